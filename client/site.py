"""One hospital's part of a federation, as an object that takes requests and gives replies; Flower is not known here.

A site answers a question once: the same request gets the same bytes back without new work, another request for a round
that was answered is refused. All that is random follows from the run's seed, the site's name and the round, and the
optimizer's state is kept beside the answer, so a site that was killed in the middle of a round does exactly the same
work again. What leaves are surveys over the floor, counts, updates and sums; never a record.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

from client import assessment, evaluation, torchrun
from client.approval import site_key
from client.archive import Agreement, Archive, RunArchive
from client.budget import Budget, Release, State
from client.files import SiteFiles
from client.gate import Gate, digest_of_answer
from client.local import LocalRound, Task, Work, agreement_of, choices_of, open_work
from client.summing import Summing
from federation import accountant, canonical, masking, protection, summed
from federation.identity import Identity
from federation.manifest import Manifest, Privacy, software_version
from federation.messages import (
    AssessReply,
    AssessRequest,
    EvaluateReply,
    EvaluateRequest,
    Kept,
    Lacking,
    PrepareReply,
    PrepareRequest,
    ProtocolError,
    Reply,
    Request,
    SiteRefusal,
    SplitCounts,
    SurveyReply,
    SurveyRequest,
    TrainReply,
    TrainRequest,
    Weighted,
)
from federation.update import Layout
from model.settings import Machine
from model.train import TrainingDiverged
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.errors import DataError
from tokenizer.events import Records
from tokenizer.noisy_survey import SurveyPrivacy, noisy_survey, price
from tokenizer.settings import agreed
from tokenizer.shards import AS_IT_FITS, Crew
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey


class Site:
    """A hospital's site; everything it must remember is in `files.state`."""

    def __init__(
        self,
        files: SiteFiles,
        clock: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Set up a site.

        Args:
            files: its name and folders.
            clock: gives seconds since the epoch; requests past their deadline are refused.
            pause: called with a number of seconds when the device is to rest.
        """
        self.files = files
        self.archive = Archive(files.state)
        self.gate = Gate(
            files.name, files.policy, files.machine.device, self._survey_privacy, self.archive, clock, files.budget
        )
        self._clock, self._pause = clock, pause

    def answer(self, request: Request | masking.Request) -> Reply | masking.Reply:
        """Answer any request that the site's policy allows.

        In a run with secure aggregation, what a round came to stays here, and leaves under masks only.

        Raises:
            SiteRefusal: the site does not want to, or can't.
            ProtocolError: the request makes no sense.
            FedcometError: whatever else stands in the way; its text may speak of records and must stay here.
        """
        self.gate.admit(request)
        if isinstance(request, Weighted):
            whole = self._whole(request)
            if whole is None:
                return Lacking(self.files.name, request.manifest_hash, request.digest)
            request = whole
        match request:
            case SurveyRequest():
                return self.survey(request)
            case PrepareRequest():
                return self.prepare(request)
            case TrainRequest() | EvaluateRequest() | AssessRequest():
                return self._worked(request)
            case _:
                return self.sum(request)

    def _worked(self, request: Weighted) -> Reply:
        if self._masked(request):
            return self._kept(request)
        if isinstance(request, TrainRequest):
            return self.train(request)
        return self.evaluate(request) if isinstance(request, EvaluateRequest) else self.assess(request)

    def survey(self, request: SurveyRequest) -> SurveyReply:
        """Tell what may be told about the codes of the patients that train."""
        self._in_time(request.deadline_s)
        dataset = self.files.records()
        if dataset.subjects == 0:
            raise SiteRefusal(f"{self.files.name} has no patients.")
        self.gate.admit_patients(dataset.subjects)
        privacy = self._survey_privacy()
        if privacy is None:
            told = survey_bytes(dataset, request.split, request.tokenizer)
        else:
            told = self._private_survey(dataset, request, privacy)
        return SurveyReply(self.files.name, told)

    def prepare(self, request: PrepareRequest) -> PrepareReply:
        """Check manifest and codebook, and encode the records with them; a store that fits is used again."""
        self._in_time(request.deadline_s)
        manifest, codebook = Manifest.from_bytes(request.manifest), _read_codebook(request.codebook)
        _check_agreement(manifest, codebook)
        self._check_roster(manifest)
        dataset = self.files.records(codebook)
        self.gate.admit_patients(dataset.subjects)
        run = self.archive.run(manifest.hash)
        with self.archive.building():
            name = _store_name(dataset.fingerprint(), codebook, manifest.split)
            agreement = Agreement(dataset.fingerprint(), name)
            if run.agreement() not in (None, agreement):
                raise SiteRefusal(
                    f"The records of {self.files.name} have changed since this run began; begin a new run."
                )
            store = self._store(dataset, codebook, manifest.split, name)
            work = Work(self.files.name, manifest, codebook, store)
            work.check()
            self.gate.admit_steps(work.most_steps)
            if run.agreement() is None:
                run.agree(manifest, codebook, agreement)
        if manifest.secure_aggregation is not None:
            return PrepareReply(self.files.name, manifest.hash, {}, 0)
        private = manifest.privacy is not None
        counts = {split: self._told(store, split, private) for split in SPLITS}
        fallbacks = 0 if private else sum(sum(codes.values()) for codes in store.manifest["fallbacks"].values())
        return PrepareReply(self.files.name, manifest.hash, counts, fallbacks)

    def train(self, request: TrainRequest) -> TrainReply:
        """Do a round's local work from the global weights and give the difference."""
        run = self.archive.run(request.manifest_hash)
        agreement_of(run, self.files.name)
        with run.working():
            known = self._answered(run, request)
            if known is None:
                self._in_time(request.deadline_s)
            if (privacy := run.manifest().privacy) is not None:
                return self._train_privately(run, request, privacy, known)
            return known or self._work(run, request, self.files.machine)

    def sum(self, request: masking.Request) -> masking.Reply:
        """Take a step of a masked sum of what was kept."""
        self._in_time(request.deadline_s)
        run = self.archive.run(request.place.manifest_hash)
        agreement_of(run, self.files.name)
        with run.working():
            return Summing(self.files.name, run, self._identity, self.gate.least_summed).answer(request)

    def _whole(self, request: Weighted) -> Weighted | None:
        """Give a request with its weights, if need be from what the site keeps; None if it doesn't have them."""
        run = self.archive.run(request.manifest_hash)
        agreement_of(run, self.files.name)
        manifest = run.manifest()
        if request.coding != manifest.transport.weights:
            raise ProtocolError(f"The weights travel as {request.coding}; {manifest.transport.weights} was agreed on.")
        if request.known:
            weights = run.weights(request.known, request.coding)
            return None if weights is None else replace(request, weights=weights)
        again = request.round < manifest.rounds or (isinstance(request, EvaluateRequest) and manifest.tasks is not None)
        if isinstance(request, EvaluateRequest | AssessRequest) and again:
            run.keep_weights(request)
        return request

    def _kept(self, request: Weighted) -> Kept:
        """Do the work that is asked for, keep what it came to, and tell only that."""
        run, name = self.archive.run(request.manifest_hash), self.files.name
        if isinstance(request, TrainRequest):
            reply = self.train(request)
            if wrong := summed.objection(run.manifest(), reply):
                raise SiteRefusal(f"{name} keeps its update of round {request.round} out of the sum: {wrong}.")
        elif isinstance(request, AssessRequest):
            self.assess(request)
        else:
            score = self.evaluate(request)
            if run.manifest().privacy is None:  # else it is kept, and charged, already
                with run.working():
                    run.keep_score(score)
        return Kept(name, request.manifest_hash, request.round, request.digest)

    def _masked(self, request: Weighted) -> bool:
        run = self.archive.run(request.manifest_hash)
        agreement_of(run, self.files.name)
        return run.manifest().secure_aggregation is not None

    @property
    def _identity(self) -> Identity:
        return Identity.at(site_key(self.files.state))

    def _train_privately(
        self, run: RunArchive, request: TrainRequest, privacy: Privacy, known: TrainReply | None
    ) -> TrainReply:
        """Answer a round of a private run: reserve its cost, train with the ledger's key, keep the answer, charge it.

        Each is durable before the next. Killed anywhere, the same request gets the same noise again or the same answer.
        """
        manifest = run.manifest()
        costs = protection.of_releases(manifest, protection.releases_of_round(privacy, manifest.local))
        release = Release(request.manifest_hash, request.round, "training", costs, request.digest)
        with self.gate.budget() as budget:
            charge = budget.reserve(release)
            if known is None:
                self._forget_uncharged(run, budget)
        if known is None:
            if charge.state != State.RESERVED:
                raise SiteRefusal(f"{release.name} was answered already; its answer is no longer kept.")
            # One process trains, as only it may know the key.
            alone = replace(self.files.machine, processes=1, shard=False)
            try:
                known = self._work(run, request, alone, charge.key)
            except TrainingDiverged as problem:
                self.archive.log("private training", problem)
                raise SiteRefusal("Private training did not end well; the site's own log says why.") from None
        ran = replace(release, mechanisms=protection.of_releases(manifest, known.steps))
        with self.gate.budget() as budget:
            budget.charge(ran, sha256=digest_of_answer(known, run.noise_key(request.round)))
            budget.cancel_before(ran)
        return known

    @staticmethod
    def _forget_uncharged(run: RunArchive, budget: Budget) -> None:
        """Drop answers that were kept and never charged: a later round must not go on from what they did."""
        for number in sorted(run.answered()):
            charge = budget.find(run.manifest().hash, number, "training")
            if charge is None or not charge.state.spent:
                run.forget(number)

    def _work(self, run: RunArchive, request: TrainRequest, machine: Machine, key: bytes = b"") -> TrainReply:
        """Do a round's work, and keep what it came to."""
        work = open_work(self.archive, run, self.files.name)
        work.check_request(request.round, request.weights)

        def in_time() -> None:
            self._in_time(request.deadline_s)
            self.gate.admit_time()

        task = Task(request, machine, 60 * self.files.snapshot_minutes, in_time, key=key)
        task = replace(task, share_of_time=self.gate.share_of_time, pause=self._pause)
        if machine.processes > 1:
            torchrun.advance(self.files, run, work, task)
            # The snapshot that is left holds the whole round, so nothing more is computed here.
            task = replace(task, machine=Machine())
        local = LocalRound(work, run, task)
        local.go()
        reply = local.reply(self.files.name)
        # The ledger forgets the key with the charge; noise that is added under masks needs it until then.
        noise_key = key if summed.shares_noise(run.manifest()) else b""
        run.keep(
            reply,
            local.trainer.state_dict() if work.keeps_optimizer else None,
            noise_key,
            local.drift(reply),
            local.head(),
        )
        if local.choices != run.choices():
            run.choose(local.choices)
        return reply

    def evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        """Sum the loss of the weights over a split that doesn't train; in a private run only with noise."""
        self._in_time(request.deadline_s)
        if request.split not in SPLITS[1:]:
            raise ProtocolError(
                f"There is no split {request.split!r} to evaluate on; there are {', '.join(SPLITS[1:])}."
            )
        run = self.archive.run(request.manifest_hash)
        work = open_work(self.archive, run, self.files.name)
        private = run.manifest().privacy is not None
        if private:
            evaluation.check_request(work, request)
        work.check_request(request.round, request.weights)
        self.gate.admit_figure(work.patients(request.split))
        device = self.files.machine.device
        weights = work.weights_at_home(run, request.round + 1, request.weights)
        asked = (request.split, weights, device, choices_of(run, work, self.files.machine).precision)
        if private:
            with run.working():
                return evaluation.evaluate(
                    self.files.name, run, request, self.gate, work, lambda: work.patient_losses(*asked)
                )
        mean, tokens = work.evaluate(*asked)
        nll = mean * tokens if tokens else 0.0
        about = (self.files.name, request.manifest_hash, request.round, request.split, request.digest)
        return EvaluateReply(*about, nll, tokens)

    def assess(self, request: AssessRequest) -> AssessReply:
        """Answer the run's questions about the site's own patients, and tell how well; the answer is kept."""
        self._in_time(request.deadline_s)
        run = self.archive.run(request.manifest_hash)
        work = open_work(self.archive, run, self.files.name)

        def watch(done: int, total: int) -> None:
            self._in_time(request.deadline_s)
            self.gate.admit_time()

        with run.working():
            return assessment.assess(self.files.name, run, request, self.gate, work, self.files.machine.device, watch)

    def _private_survey(self, records: Records, request: SurveyRequest, privacy: SurveyPrivacy) -> bytes:
        """Charge the survey and draw its noise once for good: the same request gets the same bytes, no other any."""
        asked = {"split": request.split, "tokenizer": request.tokenizer}
        costs = accountant.of_survey(price(privacy, request.tokenizer.min_patients))
        digest = hashlib.sha256(canonical.encode(asked)).hexdigest()
        release = Release("survey", 0, "survey", costs, digest)
        with self.archive.surveying(), self.gate.budget() as budget:
            kept = budget.find(release.run, release.round, release.purpose)
            if kept and kept.state != State.RESERVED and kept.release.request != digest:
                raise SiteRefusal(
                    f"{self.files.name} has given the one private survey that its settings allow; another, with other "
                    "options, would cost its patients more. Use the options of the first."
                )
            charge = budget.reserve(release)
            if charge.answer is None:
                told, _ = noisy_survey(records, request.split, request.tokenizer, privacy, key=charge.key)
                charge = budget.charge(release, told.to_bytes())
        return charge.answer or b""

    def _check_roster(self, manifest: Manifest) -> None:
        """Refuse a run with secure aggregation that does not know this site by its key."""
        if (chosen := manifest.secure_aggregation) is None:
            return
        listed, own = chosen.roster.get(self.files.name), self._identity.public
        if listed != own:
            told = "does not list" if listed is None else "has another key for"
            raise SiteRefusal(f"The run's roster {told} {self.files.name}; the key here is {own}.")

    def _survey_privacy(self) -> SurveyPrivacy | None:
        return agreed(self.files.settings).survey_privacy

    def _in_time(self, deadline_s: float) -> None:
        if self._clock() > deadline_s:
            raise SiteRefusal("The deadline of the request has passed.")

    def _answered(self, run: RunArchive, request: TrainRequest) -> TrainReply | None:
        asked = run.asked(request.round)
        if asked is not None:
            if asked != request.digest:
                raise SiteRefusal(f"Round {request.round} was answered already, for another request.")
            if (reply := run.reply(request.round)) is None:
                raise SiteRefusal(f"Round {request.round} was answered already; its answer is no longer kept.")
            return reply
        if request.round < (last := max(run.answered(), default=0)):
            raise SiteRefusal(f"Round {request.round} is over: round {last} was answered already.")
        return None

    def _told(self, store: TokenStore, split: str, private: bool) -> SplitCounts:
        """How much a split holds, only its patients if private; below the policy's floor of patients it is empty."""
        counts = SplitCounts(**store.manifest["splits"][split])
        if private:
            counts = SplitCounts(counts.patients, 0, 0)
        return counts if counts.patients >= self.gate.floor else SplitCounts(0, 0, 0)

    def _store(self, dataset: Records, codebook: Codebook, rule: SplitRule, name: str) -> TokenStore:
        path = self.archive.store_path(name)
        if path.exists():
            try:
                return TokenStore.open(path, codebook.hash)
            except DataError as damage:
                self.archive.log("a damaged store is built again", damage)
        return build_store(dataset, codebook, rule, path)


def survey_bytes(
    records: Records,
    rule: SplitRule,
    options: TokenizerOptions,
    progress: Callable[[int, int], None] | None = None,
    crew: Crew = AS_IT_FITS,
) -> bytes:
    """What a site answers to a survey request; `client.check` shows the same before anything leaves."""
    return survey(records, rule, options, progress, crew).to_bytes()


def _read_codebook(data: bytes) -> Codebook:
    try:
        return Codebook.from_bytes(data)
    except DataError as cause:
        raise ProtocolError(f"The codebook that was sent can't be read: {cause}") from None


def _check_agreement(manifest: Manifest, codebook: Codebook) -> None:
    """Refuse a manifest that doesn't fit the codebook beside it, or this software."""
    protection.check(manifest)
    if manifest.software != software_version():
        raise SiteRefusal(f"The run is for fedcomet {manifest.software}, here is {software_version()}.")
    if codebook.hash != manifest.codebook_hash:
        raise ProtocolError(f"The codebook has hash {codebook.hash}, the manifest names {manifest.codebook_hash}.")
    if codebook.options != manifest.tokenizer or len(codebook) != manifest.model.vocab:
        raise ProtocolError("The codebook's options or size are not those of the manifest.")
    layout = Layout.of_config(manifest.model)
    if layout.hash != manifest.layout_hash:
        raise ProtocolError(f"The layout here has hash {layout.hash}, the manifest names {manifest.layout_hash}.")


def _store_name(fingerprint: str, codebook: Codebook, rule: SplitRule) -> str:
    parts = {"records": fingerprint, "codebook": codebook.hash, "split": rule}
    return hashlib.sha256(canonical.encode(parts)).hexdigest()[:32]
