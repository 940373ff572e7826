"""The coordinator's side of the rounds, as a pure object: it takes answers and gives decisions.

It knows neither Flower nor sockets nor clocks; what it keeps goes through a `Journal` and a `Store`. Every accepted
update is stored and noted before the next answer is looked at, so a crash loses none: the engine that is built on the
same ledger afterwards continues in the middle of the round. One bad answer is noted with its reason and the round goes
on; only when fewer than `min_sites` answers are good does the run stop.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from federation import masking, protection
from federation.coding import Told, coded
from federation.manifest import Manifest
from federation.messages import (
    PRINTABLE,
    AssessRequest,
    DeliveryError,
    EvaluateReply,
    EvaluateRequest,
    Kept,
    Payload,
    ProtocolError,
    Refusal,
    Reply,
    TrainReply,
    TrainRequest,
    Weighted,
    printable,
    to_wire,
)
from federation.vectors import norm
from server.aggregate import Combined, GlobalState, TooFewUpdates, Update, combine, outer_step
from server.assessment import Assessment
from server.central import PREFIX, CentralPlan
from server.journal import GIVEN_UP, Checkpoint, Journal, Phase, ReplyEntry, ScoreEntry, Status, SumEntry, Work
from server.reasons import gathered
from server.sums import MaskedSum, SumStore
from server.unmask import Opening
from tokenizer.errors import FedcometError
from tokenizer.wording import several

TUNING = "tuning"
"""The split whose loss is followed from round to round."""


_KEPT_BY_SITES = 2  # rounds of which a site can give its answer again: see `client.archive`
_MOST = 2**40  # of steps or tokens: far above what can be, far below what a ledger can't hold


class RoundFailed(FedcometError):
    """A round in which too few sites gave a usable update; the run can be continued when they do."""


class SumWaits(RoundFailed):
    """A signed sum that too few of its sites are left to open; no other set can take its place."""

    exit_code = 4


@dataclass(frozen=True)
class Event:
    """Something that a person who watches may want to see; `site` and `text` are empty where they make no sense."""

    kind: str
    round: int = 0
    site: str = ""
    text: str = ""
    values: Mapping[str, float] = field(default_factory=dict)


Listener = Callable[[Event], None]
Answer = Reply | masking.Reply | ProtocolError
"""What came back for a request: a reply, or why it could not be read."""


class Store(SumStore, Protocol):
    """Where the engine keeps vectors; each method returns when the bytes are on the disk."""

    def keep_update(self, number: int, site: str, update: Payload) -> tuple[str, int]:
        """Keep a site's update of a round as it travelled, and give the sha256 and the number of its bytes."""

    def update(self, number: int, site: str, sha256: str) -> Update:
        """Give back a kept update [P]; it may be a view of the file."""

    def keep_assessment(self, number: int, data: bytes) -> None:
        """Keep what the sites' answers to the run's questions say together."""

    def save(self, number: int, state: GlobalState, work: Work) -> Checkpoint:
        """Keep the state after a round, with the work behind it."""

    def load(self, number: int, sha256: str) -> GlobalState:
        """Give back the state after a round; round 0 is the beginning, of which `sha256` says nothing."""

    def check(self, committed: int, again: int) -> None:
        """See that a ledger with this last committed round is of the same time as what is kept.

        Sites could answer `again` rounds after it once more.
        """

    def sweep(self, keep: Collection[int], open_round: int) -> None:
        """Drop the checkpoints of all earlier rounds but `keep`, and the updates of all rounds but `open_round`."""


@dataclass
class _OpenRound:
    """How far the open round is, and what became of each site's answer."""

    phase: Phase | None
    replies: dict[str, ReplyEntry]


class Rounds:
    """The rounds of one run, from the first that is not committed."""

    def __init__(
        self,
        manifest: Manifest,
        size: int,
        journal: Journal,
        store: Store,
        listen: Listener,
        central: CentralPlan | None = None,
    ) -> None:
        """Take up the run where its ledger says it is.

        Args:
            manifest: the agreement; the ledger must have begun with it.
            size: the length P of the flat vector.
            journal: the ledger.
            store: where vectors are kept.
            listen: told of every decision after it is durable.
            central: how the coordinator's own questions choose the best round, and end the run.

        Raises:
            DataError: ledger and store are not of one time, or a file is damaged.
        """
        self.manifest, self._central = manifest, central
        self._size, self._journal, self._store, self._listen = size, journal, store, listen
        self.number = journal.committed() + 1
        self._open: _OpenRound | None = None
        store.check(journal.committed(), self._again())
        self._state = self._load(self.number - 1)
        self._digest = ""
        self._sweep()

    @property
    def finished(self) -> bool:
        """Tell whether all rounds are committed, or as many as it takes: see `CentralPlan.patience`."""
        return self.number > self.manifest.rounds or self.early

    @property
    def early(self) -> bool:
        """Tell whether the run is over before its last round, as its model grows no better."""
        if self._central is None or self.number > self.manifest.rounds:
            return False
        return self._central.over(self._tested(self.number - 1))

    @property
    def masked(self) -> bool:
        """Tell whether sites' updates and losses are only ever seen as sums."""
        return self.manifest.secure_aggregation is not None

    @property
    def phase(self) -> Phase | None:
        """The open round's phase, or none before it is announced."""
        return self._round.phase

    @property
    def collecting(self) -> bool:
        """Tell whether the open round still takes updates."""
        return self.phase in (None, Phase.ANNOUNCED, Phase.TRAINING, Phase.COLLECTING)

    def open(self) -> None:
        """Announce the open round, or take it up again: answers that were accepted before a crash stay."""
        if self.collecting:
            if self._round.phase is not None or self._round.replies:
                self._journal.reopen(self.number)
                self._open = None
            if self.phase is None:
                self._enter(Phase.ANNOUNCED)
            self._tell("round.announced")
        elif self.phase is not Phase.UNMASKING:
            self._state = self._load(self.number)

    def drawn(self, sites: Mapping[str, int]) -> dict[str, int]:
        """Give those of the sites that are asked in the open round: all, or a draw that names and round decide."""
        most = self.manifest.sites_per_round

        def lot(site: str) -> bytes:
            return hashlib.sha256(f"{self.manifest.hash}/{self.number}/{site}".encode()).digest()

        return {site: sites[site] for site in sorted(sites, key=lot)[:most]}

    def missing(self, sites: Iterable[str]) -> list[str]:
        """Give the sites, by name, whose answer of the open round is not decided yet."""
        return sorted(set(sites) - self._round.replies.keys())

    def request(self, deadline_s: float) -> TrainRequest:
        """Give the open round's request, and note that it goes out."""
        coding = self.manifest.transport.weights
        request = TrainRequest(self.manifest.hash, self.number, self._told_weights(), deadline_s, coding)
        self._digest = request.digest
        if self.phase is Phase.ANNOUNCED:
            self._enter(Phase.TRAINING)
        return request

    def receive(self, site: str, answer: Answer) -> Status:
        """Decide on a site's answer of the open round, and keep it when it is good; the first answer counts.

        An answer of an earlier round, which was late then, is passed over.
        """
        if isinstance(answer, TrainReply | Kept) and answer.round < self.number:
            return Status.LATE
        if (decided := self._round.replies.get(site)) is not None:
            return decided.status
        length = norm(answer.update) if isinstance(answer, TrainReply) else 0.0
        reason = printable(self._objection(site, answer, length))
        if reason or not isinstance(answer, TrainReply | Kept):
            status = _bad(answer)
            self._note(ReplyEntry(self.number, site, status, reason))
            self._tell(f"update.{status}", site, reason)
            return status
        self._accept(site, answer, length)
        return Status.ACCEPTED

    def late(self, site: str) -> None:
        """Note that a site's answer did not come in time."""
        self._note(ReplyEntry(self.number, site, Status.LATE, "no answer before the deadline"))
        self._tell("update.late", site, "no answer before the deadline")

    def ready(self) -> list[str]:
        """Give the sites, by name, that have kept an update of the open round, to be summed under masks.

        Raises:
            RoundFailed: they are too few.
        """
        return [entry.site for entry in self._accepted()]

    def sum_of(self, request: Weighted) -> MaskedSum:
        """Give the masked sum of what sites have kept for a request of the open round."""
        purpose: masking.Purpose = "train"
        if isinstance(request, EvaluateRequest):
            purpose = "evaluate tuning" if request.split == TUNING else "evaluate held_out"
        elif isinstance(request, AssessRequest):
            purpose = "evaluate tasks"

        def dropped(site: str, reason: str) -> None:
            self._tell("sum.dropped", site, reason)

        where = self.number, purpose
        return MaskedSum(self.manifest, where, request.digest, self._journal, self._store, dropped)

    def unmask(self) -> None:
        """Note that sites are asked to sign and open the sum of the round: no more updates are taken."""
        if self.phase is Phase.COLLECTING:
            self._enter(Phase.UNMASKING)

    def aggregate(self, opening: Opening | None = None) -> None:
        """Apply the accepted updates, or their opened sum, to the global weights, and keep the result.

        Raises:
            RoundFailed: fewer than `min_sites` updates were accepted.
        """
        if self.phase in (Phase.AGGREGATED, Phase.EVALUATED):
            return
        if opening is not None:
            state = outer_step(self._state, Combined([opening.mean], [1.0], [1.0]), self.manifest.outer)
            entry = self._journal.sum(self.number, "train") or SumEntry(self.number, "train")
            self._keep(state, {"sites": len(opening.sites), **self._told(entry.tokens, entry.nll)})
            return
        accepted = self._accepted()
        with ThreadPoolExecutor() as threads:  # all of their bytes are hashed
            updates = list(threads.map(self._stored, accepted))
        by_tokens = self.manifest.outer.weights == "tokens"
        weights = [float(entry.tokens) if by_tokens else 1.0 for entry in accepted]
        try:
            combined = combine(updates, weights, self.manifest.outer)
        except TooFewUpdates as problem:
            raise self.fail(str(problem)) from None
        for reply, share in zip(accepted, combined.shares, strict=True):
            if share == 0:
                reason = f"left out by {self.manifest.outer.rule}: it lies far from the others"
                self._note(replace(reply, reason=reason))
                self._tell("update.outlier", reply.site, reason)
        state = outer_step(self._state, combined, self.manifest.outer)
        self._keep(state, {"sites": len(accepted), **self._summary(accepted)})

    def _stored(self, entry: ReplyEntry) -> Update:
        return self._store.update(self.number, entry.site, entry.update_sha256)

    def _accepted(self) -> list[ReplyEntry]:
        """The good answers of the open round, if they are enough."""
        replies = [reply for _, reply in sorted(self._round.replies.items())]
        accepted = [entry for entry in replies if entry.status is Status.ACCEPTED]
        masked = self.manifest.secure_aggregation
        least = max(1, self.manifest.min_sites, 0 if masked is None else masked.min_sites)
        if len(accepted) < least:
            raise RoundFailed(self._failure(len(accepted), least, replies))
        return accepted

    def _keep(self, state: GlobalState, told: Mapping[str, float]) -> None:
        """Keep the weights that a round came to."""
        if not math.isfinite(norm(state.weights)):
            raise RoundFailed(f"Round {self.number} would make the global weights infinite; set max_norm in a new run.")
        work = self._journal.work(self.number)
        if self.manifest.privacy is not None:
            work = work._replace(tokens=0)  # the ledger holds expected patients in their place
        self._state = state  # first, so that the old one need not lie in memory beside what is written
        checkpoint = self._store.save(self.number, state, work)
        self._enter(Phase.AGGREGATED, checkpoint, {f"train.{k}": v for k, v in told.items()})
        self._tell("round.aggregated", values=told)

    def evaluation(self, split: str, deadline_s: float) -> EvaluateRequest | None:
        """Give the request that evaluates the round's new weights; none when that was done before a crash.

        None in private runs, either, unless their manifest asks for it: then a "loss" is a noised sum over patients.
        """
        told = self.manifest.privacy is None or protection.evaluated(self.manifest, self.number)
        if self.phase is not Phase.AGGREGATED or not told:
            return None
        coding = self.manifest.transport.weights
        return EvaluateRequest(self.manifest.hash, self.number, split, self._told_weights(), deadline_s, coding)

    def score(self, request: EvaluateRequest | None, answers: Mapping[str, Answer | None]) -> None:
        """Note the sites' evaluations: an answer each, or none from a site that was late."""
        if self.phase is Phase.EVALUATED:
            return
        entries = []
        if request is not None:
            digest = request.digest
            entries = [self._score(site, request, digest, answers[site]) for site in sorted(answers)]
        tokens, nll = sum(entry.tokens for entry in entries), sum(entry.nll for entry in entries)
        self._note_scores(entries, _figures(tokens, nll))
        if entries:
            self._tell("round.evaluated", values={self._counted: tokens, "loss": nll / tokens if tokens else math.nan})

    def score_sum(self, entry: SumEntry) -> None:
        """Note that the round is evaluated, by a masked sum; one that could not be opened tells no loss."""
        if self.phase is Phase.EVALUATED:
            return
        self._note_scores([], _figures(entry.tokens, entry.nll))
        loss = entry.nll / entry.tokens if entry.tokens else math.nan
        self._tell("round.evaluated", text=entry.reason, values={self._counted: entry.tokens, "loss": loss})

    @property
    def to_test(self) -> bool:
        """Tell whether the coordinator's own questions are to be asked after the open round: once, whoever crashes."""
        due = self._central is not None and self._central.due(self.number, self.manifest.rounds)
        return due and self.phase is Phase.EVALUATED and self.number not in self._tested(self.number)

    def tested(self, figures: Mapping[str, float]) -> None:
        """Note what the coordinator's own questions say of the open round's model."""
        self._journal.note_central(self.number, figures)
        self._tell("round.tested", values=figures)

    def _tested(self, last: int) -> dict[int, float]:
        """The metric that chooses the best round, by round up to `last`."""
        if self._central is None:
            return {}
        values = self._journal.figures(f"{PREFIX}{self._central.metric}")
        return {number: value for number, value in values.items() if number <= last}

    def assessment(self, deadline_s: float) -> AssessRequest | None:
        """Give the request that puts the run's questions to the sites, of an evaluated round; None if there is none.

        After the last round it is the best one's weights that are asked about: those that the run is known by.
        """
        tasks = self.manifest.tasks
        if tasks is None or self.phase is not Phase.EVALUATED or not tasks.due(self.number, self.manifest.rounds):
            return None
        weights, best = self._told_weights(), self._best(self.number)
        if self.number == self.manifest.rounds and best != self.number:
            weights = coded(self._load(best).weights, self.manifest.transport.weights)
        return AssessRequest(self.manifest.hash, self.number, weights, deadline_s, self.manifest.transport.weights)

    def assessed(self, found: Assessment) -> None:
        """Note what the sites' answers to the run's questions say together."""
        self._store.keep_assessment(self.number, found.to_bytes())
        figures = found.figures()
        self._journal.note_assessment(self.number, {s: printable(r) for s, r in found.left_out.items()}, figures)
        self._tell("round.assessed", text=found.reason, values=figures)

    @property
    def given_up(self) -> bool:
        """Tell whether the coordinator has given up the open round's sum."""
        entry = self._journal.sum(self.number, "train") if self.masked else None
        return entry is not None and entry.stage == GIVEN_UP

    def pass_over(self) -> None:
        """End a round whose sum was given up, with the weights that it began with."""
        if self.phase is Phase.UNMASKING:
            self._keep(self._state, {"sites": 0})
        if self.phase is Phase.AGGREGATED:
            self._note_scores([], {})

    def fail(self, reason: str) -> RoundFailed:
        """Tell that the open round can't be summed, and give the error that says so."""
        entry = self._journal.sum(self.number, "train")
        if entry is not None and entry.collected_sha256:
            self._tell("sum.waits", text=reason)
            return SumWaits(
                f"Round {self.number} waits for sites that have signed its sum, as no other sum can take its place: "
                f"{reason} Once they can answer, start the same run again: it continues with this round. If they never "
                "come back, give the round up: fedcomet coordinator give-up."
            )
        self._tell("sum.failed", text=reason)
        return RoundFailed(
            f"Round {self.number} could not be summed: {reason} Once the sites can answer, start the same run again: "
            "it continues with this round."
        )

    def commit(self) -> None:
        """Close the open round; what is not needed any more is dropped after that."""
        self._enter(Phase.COMMITTED)
        self._tell("round.committed")
        self.number, self._open = self.number + 1, None
        self._sweep()

    def best(self) -> int:
        """Give the best committed round: by the coordinator's own questions, else by tuning loss, else the last."""
        return self._best(self.number - 1)

    def _best(self, last: int) -> int:
        if self._central is not None and (best := self._central.best(self._tested(last))) is not None:
            return best
        losses = {number: loss for number, loss in self._journal.losses(TUNING).items() if number <= last}
        return min(losses, key=lambda number: (losses[number], number), default=last)

    @property
    def _round(self) -> "_OpenRound":
        """The open round as the ledger has it, which is asked once: nobody but this process writes it."""
        if self._open is None:
            entry = self._journal.round(self.number)
            replies = {reply.site: reply for reply in self._journal.replies(self.number)}
            self._open = _OpenRound(None if entry is None else entry.phase, replies)
        return self._open

    def _enter(
        self, phase: Phase, checkpoint: Checkpoint | None = None, figures: Mapping[str, float] | None = None
    ) -> None:
        self._journal.enter(self.number, phase, checkpoint, figures)
        self._round.phase = phase

    def _note(self, entry: ReplyEntry) -> None:
        first = Phase.COLLECTING if self.phase is Phase.TRAINING and entry.status is not Status.LATE else None
        self._journal.note_reply(entry, first)
        self._round.phase = first or self.phase
        self._round.replies[entry.site] = entry

    def _note_scores(self, entries: list[ScoreEntry], figures: Mapping[str, float]) -> None:
        self._journal.note_scores(entries, self.number, figures)
        self._round.phase = Phase.EVALUATED

    def _told_weights(self) -> Told:
        """The global weights as they travel."""
        return coded(self._state.weights, self.manifest.transport.weights)

    def _load(self, number: int) -> GlobalState:
        entry = self._journal.round(number)
        return self._store.load(number, entry.checkpoint_sha256 if entry else "")

    def _accept(self, site: str, reply: TrainReply | Kept, length: float) -> None:
        if isinstance(reply, Kept):
            self._note(ReplyEntry(self.number, site, Status.ACCEPTED))
            self._tell("update.accepted", site)
            return
        sha256, size = self._store.keep_update(self.number, site, to_wire(reply).payloads["update"])
        entry = ReplyEntry(
            self.number,
            site,
            Status.ACCEPTED,
            update_sha256=sha256,
            tokens=reply.tokens,
            steps=reply.steps,
            loss=reply.loss,
            norm=length,
            bytes=size,
            seconds=reply.seconds,
        )
        self._note(entry)
        values = {**self._summary([entry]), "norm": entry.norm, "seconds": reply.seconds}
        self._tell("update.accepted", site, values=values)

    def _summary(self, entries: list[ReplyEntry]) -> dict[str, float]:
        """What updates were made of: tokens and their mean loss, or the patients that private steps drew on average."""
        return self._told(sum(entry.tokens for entry in entries), sum(entry.loss * entry.tokens for entry in entries))

    def _told(self, weight: int, nll: float) -> dict[str, float]:
        return (
            {self._counted: weight} if self.manifest.privacy is not None else {"tokens": weight, "loss": nll / weight}
        )

    @property
    def _counted(self) -> str:
        """What sites' answers are weighed by."""
        return "tokens" if self.manifest.privacy is None else "patients"

    def _objection(self, site: str, answer: Answer, length: float) -> str:
        """Say why an answer can't be used; empty when it can."""
        if isinstance(answer, ProtocolError):
            return str(answer)
        if answer.site != site:
            return f"the answer names site {answer.site}, but came from {site}"
        if isinstance(answer, Refusal):
            return answer.reason
        wanted = Kept if self.masked else TrainReply
        if not isinstance(answer, wanted):
            return f"a {answer.kind} came in the place of a {wanted.kind}"
        if isinstance(answer, Kept):
            return self._wrong_belonging(answer)
        return self._wrong_belonging(answer) or self._wrong_work(answer) or self._wrong_update(answer, length)

    def _wrong_belonging(self, reply: TrainReply | Kept) -> str:
        if reply.manifest_hash != self.manifest.hash:
            return f"it belongs to run {reply.manifest_hash:.80}, this is {self.manifest.hash}"
        if reply.round != self.number:
            return f"it belongs to round {reply.round}, this is round {self.number}"
        if reply.request_digest != self._digest:
            return "it answers other weights than those that were sent"
        return ""

    def _wrong_work(self, reply: TrainReply) -> str:
        local = self.manifest.local
        if (privacy := self.manifest.privacy) is not None:
            agreed = protection.releases_of_round(privacy, local)
            fits = reply.steps == agreed and 1 <= reply.tokens <= _MOST
            return "" if fits else f"{reply.steps} steps on {reply.tokens} patients are not the agreed private work"
        if not 1 <= reply.steps <= _MOST or (local.steps is not None and reply.steps != local.steps):
            return f"{reply.steps} steps are not the agreed local work"
        if not 1 <= reply.tokens <= reply.steps * local.batch_tokens:
            return f"{reply.tokens} tokens can't come from {reply.steps} steps of {local.batch_tokens}"
        return ""

    def _wrong_update(self, reply: TrainReply, length: float) -> str:
        update, agreed = reply.update, self.manifest.transport.update
        if reply.coding != agreed:
            return f"the update travels as {reply.coding}, agreed is {agreed}"
        if update.shape != (self._size,):
            return f"the update has shape {update.shape}, the model has {self._size} parameters"
        if not math.isfinite(length):
            wrong = int(update.size - np.count_nonzero(np.isfinite(update)))
            return f"the update holds {wrong} values that are not finite"
        limit = self.manifest.max_norm
        if limit is not None and length > limit:
            return f"the update's norm {length:.6g} is above the agreed {limit:.6g}"
        return ""

    def _score(self, site: str, request: EvaluateRequest, digest: str, answer: Answer | None) -> ScoreEntry:
        head = (self.number, site, request.split)
        if answer is None:
            return ScoreEntry(*head, Status.LATE, "no answer before the deadline")
        if isinstance(answer, (ProtocolError, Refusal)):
            return ScoreEntry(*head, _bad(answer), printable(str(getattr(answer, "reason", answer))))
        fits = isinstance(answer, EvaluateReply) and (answer.site, answer.request_digest) == (site, digest)
        # Noise can make a sum of losses negative.
        least = 0.0 if self.manifest.privacy is None else -math.inf
        sound = fits and isinstance(answer, EvaluateReply) and 0 <= answer.tokens <= _MOST and answer.nll >= least
        if not sound or not isinstance(answer, EvaluateReply):
            return ScoreEntry(*head, Status.MALFORMED, "it does not answer this evaluation")
        return ScoreEntry(*head, Status.ACCEPTED, "", answer.nll, answer.tokens)

    def _failure(self, accepted: int, least: int, replies: list[ReplyEntry]) -> str:
        begin = (
            f"Round {self.number} has {several(accepted, 'usable update', 'usable updates')}, at least {least} "
            f"{'is' if least == 1 else 'are'} needed ("
        )
        end = "). Once the sites can answer, start the same run again: it continues with this round."
        reasons = {e.site: f"{e.status}, {e.reason}" for e in replies if e.status is not Status.ACCEPTED}
        told = gathered(reasons, PRINTABLE - len(begin) - len(end)) or "no site answered"
        return f"{begin}{told}{end}"

    def _again(self) -> int:
        """How many rounds after the last committed one could be done again by sites that have done them already.

        Of a sum under masks none, once sites have signed it: what the ledger then lacks of it is lost.
        """
        if self.masked:
            return int(self.phase in (Phase.UNMASKING, Phase.AGGREGATED, Phase.EVALUATED))
        return _KEPT_BY_SITES

    def _sweep(self) -> None:
        last = self.number - 1
        self._store.sweep({last, last - 1, self.best()}, self.number)

    def _tell(self, kind: str, site: str = "", text: str = "", values: Mapping[str, float] | None = None) -> None:
        self._listen(Event(kind, self.number, site, text, values or {}))


def _figures(tokens: int, nll: float) -> dict[str, float]:
    """What the ledger keeps of an evaluation, if any site told one."""
    return {f"{TUNING}.tokens": tokens, f"{TUNING}.loss": nll / tokens} if tokens > 0 else {}


def _bad(answer: Answer) -> Status:
    if isinstance(answer, DeliveryError):
        return Status.FAILED
    return Status.REFUSED if isinstance(answer, Refusal) else Status.MALFORMED
