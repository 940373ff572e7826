"""One hospital's part of a federation, as an object that takes requests and gives replies; Flower is not known here.

A site answers a question once: the same request gets the same bytes back without new work, another request for a round
that was answered is refused. All that is random follows from the run's seed, the site's name and the round, and the
optimizer's state is kept beside the answer, so a site that was killed in the middle of a round does exactly the same
work again. What leaves are surveys over the floor, counts, updates and sums; never a record.
"""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from client import torchrun
from client.archive import Agreement, Archive, RunArchive
from client.budget import Release, State
from client.gate import Gate
from client.local import LocalRound, Task, Work, agreement_of, choices_of, open_work
from federation import accountant, canonical
from federation.manifest import Manifest, software_version
from federation.messages import (
    EvaluateReply,
    EvaluateRequest,
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
    is_site_name,
)
from federation.update import Layout
from model.machine import Machine
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import MedsDataset, Records
from tokenizer.noisy_survey import SurveyPrivacy, noisy_survey, price
from tokenizer.prepare import Prepared, records_of
from tokenizer.settings import AS_THEY_ARE, agreed
from tokenizer.shards import AS_IT_FITS, Crew
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey


@dataclass(frozen=True)
class SiteFiles:
    """A site's name, its records (a MEDS dataset's folder) and the folder for what it must not forget.

    Attributes:
        name: up to 64 letters, digits, '.', '_' and '-'.
        data, state: the folders.
        settings: what is done to the records before they are surveyed or encoded: a TOML file, "standard", or "none".
        machine: how it computes.
        snapshot_minutes: how much of a round's work may be lost when it is stopped in the middle; 0 loses nothing.
        policy: the site's rules (a TOML file, see `client.policy`); without them it answers whoever reaches it.
        budget: SQLAlchemy URL of the privacy budget's database; a file in `state` if empty.
    """

    name: str
    data: Path
    state: Path
    settings: str = AS_THEY_ARE
    machine: Machine = field(default_factory=Machine)
    snapshot_minutes: float = 10.0
    policy: Path | None = None
    budget: str = ""

    def __post_init__(self) -> None:
        if not is_site_name(self.name):
            raise ConfigError(
                f"{self.name!r} can't be the name of a site: use up to 64 letters, digits, '.', '_' and '-'."
            )

    def node_config(self) -> dict[str, bool | float | int | str]:
        """What a Flower node is told to be this site; `client.app` reads it back."""
        folders = {"name": self.name, "data": str(self.data), "state": str(self.state)}
        policy = {} if self.policy is None else {"policy": str(self.policy)}
        budget = {"budget": self.budget} if self.budget else {}
        rest = {"settings": self.settings, "snapshot_minutes": self.snapshot_minutes, **vars(self.machine)}
        return {**folders, **policy, **budget, **rest}

    def records(self, codebook: Codebook | None = None) -> MedsDataset | Prepared:
        """Open the records as they are to be read, and by this codebook.

        Raises:
            ConfigError: The codebook was made of records to which something else was done.
        """
        return records_of(MedsDataset.open(self.data), agreed(self.settings, codebook).preparation)


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

    def answer(self, request: Request) -> Reply:
        """Answer any request that the site's policy allows.

        Raises:
            SiteRefusal: the site does not want to, or can't.
            ProtocolError: the request makes no sense.
            FedcometError: whatever else stands in the way; its text may speak of records and must stay here.
        """
        self.gate.admit(request)
        match request:
            case SurveyRequest():
                return self.survey(request)
            case PrepareRequest():
                return self.prepare(request)
            case TrainRequest():
                return self.train(request)
            case EvaluateRequest():
                return self.evaluate(request)

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
        counts = {split: self._told(store, split) for split in SPLITS}
        fallbacks = sum(sum(codes.values()) for codes in store.manifest["fallbacks"].values())
        return PrepareReply(self.files.name, manifest.hash, counts, fallbacks)

    def train(self, request: TrainRequest) -> TrainReply:
        """Do a round's local work from the global weights and give the difference."""
        run = self.archive.run(request.manifest_hash)
        agreement_of(run, self.files.name)
        with run.working():
            if (known := self._answered(run, request)) is not None:
                return known
            self._in_time(request.deadline_s)
            work = open_work(self.archive, run, self.files.name)
            work.check_request(request.round, request.weights)
            machine = self.files.machine

            def in_time() -> None:
                self._in_time(request.deadline_s)
                self.gate.admit_time()

            task = Task(request, machine, 60 * self.files.snapshot_minutes, in_time)
            task = replace(task, share_of_time=self.gate.share_of_time, pause=self._pause)
            if machine.processes > 1:
                torchrun.advance(self.files, run, work, task)
                # The snapshot that is left holds the whole round, so nothing more is computed here.
                task = replace(task, machine=Machine())
            local = LocalRound(work, run, task)
            local.go()
            reply = local.reply(self.files.name)
            run.keep(reply, local.trainer.state_dict() if work.keeps_optimizer else None)
            if local.choices != run.choices():
                run.choose(local.choices)
        return reply

    def evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        """Sum the loss of the weights over a split that doesn't train."""
        self._in_time(request.deadline_s)
        if request.split not in SPLITS[1:]:
            raise ProtocolError(
                f"There is no split {request.split!r} to evaluate on; there are {', '.join(SPLITS[1:])}."
            )
        run = self.archive.run(request.manifest_hash)
        work = open_work(self.archive, run, self.files.name)
        work.check_request(request.round, request.weights)
        self.gate.admit_figure(work.patients(request.split))
        machine = self.files.machine
        mean, tokens = work.evaluate(
            request.split, request.weights, machine.device, choices_of(run, work, machine).precision
        )
        nll = mean * tokens if tokens else 0.0
        return EvaluateReply(
            self.files.name, request.manifest_hash, request.round, request.split, request.digest, nll, tokens
        )

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

    def _survey_privacy(self) -> SurveyPrivacy | None:
        return agreed(self.files.settings).survey_privacy

    def _in_time(self, deadline_s: float) -> None:
        if self._clock() > deadline_s:
            raise SiteRefusal("The deadline of the request has passed.")

    def _answered(self, run: RunArchive, request: TrainRequest) -> TrainReply | None:
        answered = run.answered()
        if request.round in answered:
            if answered[request.round] != request.digest:
                raise SiteRefusal(f"Round {request.round} was answered already, for another request.")
            if (reply := run.reply(request.round)) is None:
                raise SiteRefusal(f"Round {request.round} was answered already; its answer is no longer kept.")
            return reply
        if request.round < (last := max(answered, default=0)):
            raise SiteRefusal(f"Round {request.round} is over: round {last} was answered already.")
        return None

    def _told(self, store: TokenStore, split: str) -> SplitCounts:
        """How much a split holds; one with fewer patients than the policy's floor is told as empty."""
        counts = SplitCounts(**store.manifest["splits"][split])
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
    if manifest.privacy is not None or manifest.secure_aggregation is not None:
        # Training without what was promised would be worse than not training.
        raise SiteRefusal(f"fedcomet {software_version()} has neither private training nor secure aggregation yet.")
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
