"""Whether a site may answer: every request passes here before any record is touched.

Without a policy everything that makes sense may be answered, as in a simulation. With one, its rules hold for what is
asked (`client.policy`), and a run needs the site's approval where the policy says "ask" (`client.approval`). Policy and
approval are read anew for each request: what the site changes or withdraws holds from then on, in the middle of a run
too.

Every message that leaves is written down here, with what it costs a patient; one that has differential privacy leaves
only after the budget's ledger holds its charge, for just these bytes.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from client.approval import Approvals, site_key
from client.archive import Archive, RunArchive
from client.budget import FILE, Budget, Purpose
from client.outbound import Leaving, Outbound, content_of
from client.policy import UNUSABLE, Broken, Policy, PolicyRefusal
from client.witness import refuse_restored
from federation import accountant, canonical, masking
from federation.identity import Identity, signed_by
from federation.manifest import Manifest
from federation.messages import (
    AssessReply,
    AssessRequest,
    EvaluateReply,
    EvaluateRequest,
    PrepareRequest,
    Reply,
    Request,
    SiteRefusal,
    SurveyReply,
    SurveyRequest,
    TrainReply,
    TrainRequest,
)
from tokenizer.errors import ConfigError, DataError
from tokenizer.noisy_survey import SurveyPrivacy

Answer = Reply | masking.Reply

_DAY = timedelta(hours=24)


@dataclass(frozen=True)
class Gate:
    """A site's gate.

    Attributes:
        name: the site's.
        policy_path: its policy; None if it has none.
        device: the torch device that it trains on.
        survey_privacy: gives the privacy of its survey by its settings.
        archive: what it remembers.
        clock: gives seconds since the epoch.
        ledger: SQLAlchemy URL of the privacy budget; a file in the site's state folder if empty.
    """

    name: str
    policy_path: Path | None
    device: str
    survey_privacy: Callable[[], SurveyPrivacy | None]
    archive: Archive
    clock: Callable[[], float]
    ledger: str = ""

    @property
    def policy(self) -> Policy | None:
        """The policy in force.

        Raises:
            SiteRefusal: it can't be used; why stays in the site's log.
        """
        if self.policy_path is None:
            return None
        try:
            return Policy.read(self.policy_path)
        except ConfigError as problem:
            self.archive.log("the policy", problem)
            raise SiteRefusal(f"The policy of {self.name} can't be used; its own log says why.") from None

    def admit(self, request: Request | masking.Request) -> None:
        """Let a request pass that the site may answer.

        Raises:
            PolicyRefusal: it breaks rules of the policy; all are named.
            SiteRefusal: its run has not been approved, or the site's state was restored from an older copy.
            ProtocolError: its manifest can't be read.
        """
        refuse_restored(self.name, self.archive.path)
        if (policy := self.policy) is None:
            return
        coordinator = signed_by(request)
        broken = policy.check_request(request, coordinator, datetime.fromtimestamp(self.clock()))
        match request:
            case SurveyRequest():
                broken += policy.check_survey(self.survey_privacy())
            case PrepareRequest():
                manifest = Manifest.from_bytes(request.manifest)
                self._admit_run(policy, manifest, coordinator, broken, self._too_dear(policy, manifest))
            case TrainRequest() | EvaluateRequest() | AssessRequest():
                run = self.archive.run(request.manifest_hash)
                if isinstance(request, TrainRequest):
                    broken += self._too_much(policy, request.weights.nbytes)
                self._admit_again(policy, run, coordinator, broken)
            case _:
                run = self.archive.run(request.place.manifest_hash)
                self._admit_again(policy, run, coordinator, broken)
        self.refuse(broken)

    def admit_time(self) -> None:
        """Let work go on while the site's hours last.

        Raises:
            PolicyRefusal: they are over.
        """
        if (policy := self.policy) is not None:
            self.refuse(policy.check_time(datetime.fromtimestamp(self.clock())))

    def admit_bytes(self, count: int) -> None:
        """Let so many bytes leave.

        Raises:
            PolicyRefusal: too many left within a day, or these are too many for a round.
        """
        if (policy := self.policy) is not None:
            self.refuse([*policy.check_bytes(count), *self._too_much(policy, count)])

    def admit_patients(self, count: int) -> None:
        """Let a site with records of so many patients take part."""
        if (policy := self.policy) is not None:
            self.refuse(policy.check_patients(count))

    def admit_steps(self, count: int) -> None:
        """Let a round have so many steps."""
        if (policy := self.policy) is not None:
            self.refuse(policy.check_steps(count))

    def admit_figure(self, patients: int) -> None:
        """Let a figure leave that stands for so many patients."""
        if (policy := self.policy) is not None:
            self.refuse(policy.check_figure(patients))

    @property
    def least_summed(self) -> int:
        """The fewest sites, itself among them, that the site lets itself be summed with."""
        policy = self.policy
        return 3 if policy is None else policy.secure_aggregation.min_sites

    @property
    def floor(self) -> int:
        """The fewest patients that a count may tell of; 0 without a policy."""
        policy = self.policy
        return 0 if policy is None else policy.statistics.floor

    @property
    def share_of_time(self) -> float:
        """The share of a device's time that training may take."""
        policy = self.policy
        return 1.0 if policy is None else policy.machine.share_of_time

    def refuse(self, broken: list[Broken]) -> None:
        """Refuse if any rule is broken."""
        if broken:
            raise PolicyRefusal(self.name, broken)

    def note(self, reply: Answer, asked: str, sha256: str, size: int, place: masking.Place | None = None) -> None:
        """Write a message down on the list of what leaves; when this returns, it may.

        Args:
            reply: the message.
            asked: the kind of the request.
            place: of the masked sum that was asked about.
            sha256, size: name and number of its bytes (`federation.flower.on_the_wire`).

        Raises:
            DataError: the list is damaged or can't be written, or what it costs was not charged; it must not leave.
        """
        policy = self.policy_path and self._sha256_of_policy()
        self._check_masked(reply)
        due = self._due(reply, place)
        message = Leaving(
            kind=reply.kind,
            bytes=size,
            sha256=sha256,
            answers=asked,
            run=getattr(place or reply, "manifest_hash", None),
            round=getattr(place or reply, "round", None),
            epsilon=None if due is None else self._charged(due),
            delta=None if due is None else due.delta,
            content=content_of(reply),
            policy=policy or None,
        )
        self.outbound().note(message, datetime.fromtimestamp(self.clock(), UTC))

    def released(self, reply: Answer, place: masking.Place | None = None) -> None:
        """Tell the ledger that a message is on its way, if it has differential privacy."""
        if (due := self._due(reply, place)) is not None:
            with self.budget() as budget:
                charge = budget.find(due.run, due.round, due.purpose)
                if charge is not None:
                    budget.released(charge.release)

    def budget(self) -> Budget:
        """Open the site's privacy budget, whose limit the policy sets."""
        policy = self.policy
        return Budget.open(self.ledger or self.archive.path / FILE, None if policy is None else policy.limit)

    def outbound(self) -> Outbound:
        """Give the list of what has left."""
        return Outbound(self.archive.path / "outbound", Identity.at(site_key(self.archive.path)))

    def _sha256_of_policy(self) -> str:
        try:
            policy = self.policy
        except SiteRefusal:
            return UNUSABLE
        return "" if policy is None else policy.sha256

    def _admit_run(
        self,
        policy: Policy,
        manifest: Manifest,
        coordinator: str | None,
        broken: list[Broken],
        dear: Sequence[Broken] = (),
    ) -> None:
        """Check a run.

        Args:
            broken: the rules that the request breaks by itself.
            dear: those that the run breaks together with what the budget has spent.
        """
        of_run = [*dear, *policy.check(manifest, device=self.device)]
        approvals = Approvals(self.archive.path)
        if of_run and all(each.rule != "runs.coordinators" for each in broken):  # strangers leave nothing here
            approvals.refuse(manifest, coordinator or "")
        self.refuse([*broken, *of_run])
        if policy.runs.manifests == "ask" and not approvals.approved(manifest.hash):
            approvals.wait(manifest, coordinator or "")
            raise SiteRefusal(
                f"{self.name} has not approved the manifest {manifest.hash}: a person there must look at it (fedcomet "
                f"site approve {manifest.hash[:16]}). A run that goes on asks again; one that ended is to be resumed."
            )
        approvals.drop(manifest.hash)

    def _too_dear(self, policy: Policy, manifest: Manifest) -> list[Broken]:
        """Whether the whole run fits into what the budget has left; each round is checked again when it is charged."""
        if policy.limit is None or manifest.privacy is None:
            return []
        with self.budget() as budget:
            return policy.check_total(manifest, budget.mechanisms(but=manifest.hash))

    def _admit_again(self, policy: Policy, run: RunArchive, coordinator: str | None, broken: list[Broken]) -> None:
        """Check the run of a request that comes after it was agreed on."""
        if run.agreement() is not None:
            self._admit_run(policy, run.manifest(), coordinator, broken)

    def _check_masked(self, reply: Answer) -> None:
        """See that nothing leaves in clear that must be masked, whatever went wrong before.

        Raises:
            DataError: it would.
        """
        if isinstance(reply, TrainReply | EvaluateReply | AssessReply):
            manifest = self.archive.run(reply.manifest_hash).manifest()
            if manifest.secure_aggregation is not None:
                raise DataError(f"A {reply.kind} of a run with secure aggregation must not leave without masks.")

    def _due(self, reply: Answer, place: masking.Place | None) -> "_Due | None":
        """Where the ledger must hold the charge of a message; None if it has no differential privacy."""
        match reply:
            case SurveyReply() if (privacy := self.survey_privacy()) is not None:
                return _Due("survey", 0, "survey", privacy.delta, digest_of_answer(reply))
            case TrainReply():
                manifest = self.archive.run(reply.manifest_hash).manifest()
                if manifest.privacy is not None:
                    where = manifest.hash, reply.round
                    return _Due(*where, "training", manifest.privacy.delta, digest_of_answer(reply))
            case EvaluateReply():
                return self._due_evaluation(reply)
            case AssessReply():
                return self._due_assessment(reply)
            case masking.Masked() if place is not None:
                return self._due_masked(place)
        return None

    def _due_evaluation(self, reply: EvaluateReply) -> "_Due | None":
        manifest = self.archive.run(reply.manifest_hash).manifest()
        if manifest.privacy is None:
            return None
        return _Due(manifest.hash, reply.round, "evaluation", manifest.privacy.delta, digest_of_answer(reply))

    def _due_assessment(self, reply: AssessReply) -> "_Due | None":
        manifest = self.archive.run(reply.manifest_hash).manifest()
        if manifest.tasks is None or not manifest.tasks.form.noise:
            return None
        delta = manifest.tasks.delta if manifest.privacy is None else manifest.privacy.delta
        return _Due(manifest.hash, reply.round, "statistics", delta, digest_of_answer(reply))

    def _due_masked(self, place: masking.Place) -> "_Due | None":
        """What was charged is what stands under the masks, which the site keeps."""
        run = self.archive.run(place.manifest_hash)
        if place.purpose == "evaluate tasks":
            if (told := run.assessment(place.round)) is None:
                raise DataError(
                    f"What is masked for round {place.round} ({place.purpose}) is not kept; it must not leave."
                )
            return self._due_assessment(told)
        if (privacy := run.manifest().privacy) is None:
            return None
        kept: TrainReply | EvaluateReply | None = run.reply(place.round)
        if place.purpose != "train":
            kept = run.score(place.round, place.purpose.removeprefix("evaluate "))
        if kept is None:
            raise DataError(f"What is masked for round {place.round} ({place.purpose}) is not kept; it must not leave.")
        if isinstance(kept, EvaluateReply):
            return self._due_evaluation(kept)
        digest = digest_of_answer(kept, run.noise_key(place.round))
        return _Due(place.manifest_hash, place.round, "training", privacy.delta, digest)

    def _charged(self, due: "_Due") -> float:
        """Give the epsilon that was charged for a message, at its delta."""
        with self.budget() as budget:
            charge = budget.find(due.run, due.round, due.purpose)
        if charge is None or not charge.state.spent or charge.sha256 != due.sha256:
            raise DataError(f"The privacy budget holds no charge for this {due.purpose}; it must not leave.")
        return accountant.epsilon(charge.release.mechanisms.all, due.delta)

    def _too_much(self, policy: Policy, count: int) -> list[Broken]:
        if policy.traffic.max_bytes_per_day is None:
            return []
        since = datetime.fromtimestamp(self.clock(), UTC) - _DAY
        return policy.check_day(self.outbound().bytes_since(since), count)


@dataclass(frozen=True)
class _Due:
    """A message's place in the ledger, the delta at which its cost is told, and the sha256 of what was charged."""

    run: str
    round: int
    purpose: Purpose
    delta: float
    sha256: str


def digest_of_answer(reply: SurveyReply | TrainReply | EvaluateReply | AssessReply, noise_key: bytes = b"") -> str:
    """The sha256 under which a private answer is charged: of the survey, the sum of losses, the tallies or the update.

    With the update's goes the key of the noise that is added to it later, if there is one.
    """
    match reply:
        case SurveyReply():
            data: bytes | memoryview = reply.survey
        case TrainReply():
            data = np.asarray(reply.update).astype("<f4", copy=False).data
        case AssessReply():
            data = reply.tallies.astype("<f4", copy=False).data
        case EvaluateReply():
            data = canonical.encode({"nll": reply.nll, "tokens": reply.tokens})
    digest = hashlib.sha256(data)
    digest.update(noise_key)
    return digest.hexdigest()
