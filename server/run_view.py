"""One run as people see it, from the ledger alone: how far it is, who is waited for, curves, costs, times, refusals."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from sqlalchemy import select
from sqlalchemy.orm import Session

from federation.manifest import Manifest
from server import tables
from server.central import PREFIX
from server.ledger import Ledger
from server.ledger_entries import (
    ApprovalEntry,
    BudgetEntry,
    CheckpointEntry,
    EventEntry,
    MetricEntry,
    RefusalEntry,
    RunEntry,
)
from server.overview import GOING, manifest_of
from server.run_entries import GIVEN_UP, Phase, Status, SumEntry
from server.tables import RunState
from server.unmask import Stage

PHASES: Mapping[str, str] = {
    Phase.ANNOUNCED: "calling the sites",
    Phase.TRAINING: "waiting for the first answer",
    Phase.COLLECTING: "collecting answers",
    Phase.UNMASKING: "opening the masked sum",
    Phase.AGGREGATED: "evaluating",
    Phase.EVALUATED: "closing the round",
    Phase.COMMITTED: "done",
}
"""What happens in a phase, in words."""

_WISHES: Mapping[RunState, tuple[str, ...]] = {
    RunState.PROPOSED: ("start", "stop"),
    RunState.READY: ("pause", "stop"),
    RunState.RUNNING: ("pause", "stop"),
    RunState.PAUSING: ("resume", "stop"),
    RunState.PAUSED: ("resume", "stop"),
    RunState.STOPPED: ("resume",),
    RunState.FAILED: ("resume",),
}
_LATEST = 20


@dataclass(frozen=True)
class Answer:
    """What became of a site's answer in a round; `behind_s` is how long after the round's first one it came."""

    round: int
    site: str
    status: str
    reason: str
    bytes: int
    seconds: float
    loss: float
    norm: float
    behind_s: float


@dataclass(frozen=True)
class RoundView:
    """A round; losses in nats a token, None where nobody told one; `central` are the coordinator's own figures.

    Attributes:
        masked: the masked sum of its updates, if it was begun.
        missing: the sites that the sum's last attempt goes without, each with the stage and why.
        seconds: by phase; the phase that an open round is in counts up to now, or up to the run's end.
    """

    number: int
    phase: str
    answers: tuple[Answer, ...]
    masked: SumEntry | None
    missing: Mapping[str, str]
    loss: float | None
    tuning: float | None
    central: Mapping[str, float]
    seconds: Mapping[str, float]

    @property
    def doing(self) -> str:
        """What happens in it, in words."""
        summing = self.phase in (Phase.COLLECTING, Phase.UNMASKING)
        if self.masked is not None and summing and self.masked.stage not in (Stage.DONE.value, GIVEN_UP):
            return f"summing under masks (attempt {self.masked.attempt}, {self.masked.stage})"
        return PHASES.get(self.phase, self.phase)

    @property
    def accepted(self) -> int:
        """How many answers were taken."""
        return sum(answer.status == Status.ACCEPTED for answer in self.answers)

    @property
    def bytes(self) -> int:
        """Bytes of the updates that came."""
        return sum(answer.bytes for answer in self.answers)


@dataclass(frozen=True)
class SiteView:
    """A site's part in a run.

    Attributes:
        condition: in the open round: "waited for", its answer's status, or "not in it" or "not in the sum" with the
            reason.
        behind_s: how long after the round's first answer its own came, in the median of rounds.
        last: in how many rounds its answer was the last one that was taken.
        late: how many answers came too late.
        no_update: how often it gave none that could be taken for another reason: it refused, failed, sent a bad one, or
            is missing in the masked sum.
    """

    name: str
    condition: str
    reason: str
    accepted: int
    behind_s: float | None
    last: int
    late: int
    no_update: int
    bytes: int


@dataclass(frozen=True)
class RunView:
    """A run, as the ledger has it."""

    entry: RunEntry
    manifest: Manifest | None
    rounds: tuple[RoundView, ...]
    sites: tuple[SiteView, ...]
    by_site: Mapping[str, Mapping[int, float]]
    budgets: tuple[BudgetEntry, ...]
    refusals: tuple[RefusalEntry, ...]
    checkpoints: tuple[CheckpointEntry, ...]
    approvals: tuple[ApprovalEntry, ...]
    events: tuple[EventEntry, ...]

    @property
    def wishes(self) -> tuple[str, ...]:
        """What a coordinator may wish of it now."""
        return _WISHES.get(self.entry.state, ())

    @property
    def going(self) -> bool:
        """Whether something happens in it, or is about to."""
        return self.entry.state in GOING

    @property
    def committed(self) -> int:
        """How many rounds are done."""
        return max((each.number for each in self.rounds if each.phase == Phase.COMMITTED), default=0)

    @property
    def open(self) -> RoundView | None:
        """The round that is not done yet."""
        last = self.rounds[-1] if self.rounds else None
        return last if last is not None and last.phase != Phase.COMMITTED else None

    @property
    def said(self) -> str:
        """How it goes, in a sentence."""
        of = f" of {self.manifest.rounds}" if self.manifest else ""
        state = f"{self.entry.name} is {self.entry.state}"
        if self.open is None or self.entry.state == RunState.FINISHED:
            fewer = self.manifest is not None and self.committed < self.manifest.rounds
            early = " It ended early: later rounds were no better." if fewer and self.entry.state == "finished" else ""
            return f"{state}: {self.committed}{of} rounds are done.{early}"
        count = len(self.open.answers)
        answers = f"{count} of {max(count, len(self.sites))} sites have answered"
        missing = f"; missing in the sum: {', '.join(self.open.missing)}" if self.open.missing else ""
        return f"{state}: round {self.open.number}{of}, {self.open.doing}; {answers}{missing}."

    @property
    def phases(self) -> list[tuple[str, float, float]]:
        """What happens in every phase that rounds went through, its seconds in the last round and in the median."""
        found = []
        masked = self.manifest is not None and self.manifest.secure_aggregation is not None
        for phase, words in PHASES.items():
            times = [each.seconds[phase] for each in self.rounds if phase in each.seconds]
            if times:
                whole = times[:-1] if self.open is not None and self.open.phase == phase else times
                summed = " and their masked sum" if masked and phase == Phase.COLLECTING else ""
                found.append((f"{words}{summed}", times[-1], median(whole or times)))
        return found


def look(ledger: Ledger, name: str) -> RunView:
    """Look at a run.

    Raises:
        LedgerRefusal: there is none of this name.
    """
    entry = ledger.run(name)
    manifest, metrics = manifest_of(entry), ledger.metrics(name)
    answers, scores, rows, parts = ledger.transactions.read(lambda session: _rows(session, name))
    refusals, sums = ledger.refusals(name), {each.round: each for each in ledger.journal(name).sums("train")}
    until = time.time() if entry.state in GOING else entry.ended_at
    rounds = tuple(_round(row, answers, metrics, sums.get(row.round), refusals, until) for row in rows)
    taken = [row.site for row in parts if row.status == Status.ACCEPTED]
    open_ = rounds[-1] if rounds and rounds[-1].phase != Phase.COMMITTED and entry.state in GOING else None
    newest = {each.site: each for each in ledger.budgets()}
    return RunView(
        entry=entry,
        manifest=manifest,
        rounds=rounds,
        sites=tuple(_site(row, rounds, open_) for row in sorted(parts, key=lambda row: row.site)),
        by_site=_losses(scores),
        budgets=tuple(newest[site] for site in sorted(newest) if site in taken or not parts),
        refusals=tuple(reversed(refusals)),
        checkpoints=tuple(reversed(ledger.checkpoints(name))),
        approvals=tuple(ledger.approvals(entry.manifest_hash)) if entry.manifest_hash else (),
        events=tuple(reversed(ledger.events(run=name, limit=_LATEST, newest=True))),
    )


def _rows(session: Session, name: str) -> tuple[
    list[Answer], list[tables.Score], list[tables.Round], list[tables.Participant]
]:  # fmt: skip
    """All that rounds left, in one state of the ledger."""
    run = session.scalar(select(tables.Run.id).where(tables.Run.name == name))
    replies = list(session.scalars(select(tables.Reply).where(tables.Reply.run == run).order_by(tables.Reply.site)))
    first: dict[int, float] = {}
    for row in replies:
        first[row.round] = min(first.get(row.round, math.inf), row.received_at)
    answers = [
        Answer(
            **{name: getattr(row, name) for name in Answer.__dataclass_fields__ if name != "behind_s"},
            behind_s=row.received_at - first[row.round],
        )
        for row in replies
    ]
    scores = list(session.scalars(select(tables.Score).where(tables.Score.run == run)))
    rounds = list(session.scalars(select(tables.Round).where(tables.Round.run == run).order_by(tables.Round.round)))
    parts = list(session.scalars(select(tables.Participant).where(tables.Participant.run == run)))
    session.expunge_all()
    return answers, scores, rounds, parts


def _round(
    row: tables.Round,
    answers: Sequence[Answer],
    metrics: Sequence[MetricEntry],
    masked: SumEntry | None,
    refusals: Sequence[RefusalEntry],
    until: float | None,
) -> RoundView:
    number = row.round
    own = {each.name: each.value for each in metrics if each.round == number and not each.site}
    seconds = {name.removeprefix("seconds."): value for name, value in own.items() if name.startswith("seconds.")}
    if row.phase != Phase.COMMITTED and until is not None:
        seconds[row.phase] = max(0.0, until - row.changed_at)
    return RoundView(
        number=number,
        phase=row.phase,
        answers=tuple(answer for answer in answers if answer.round == number),
        masked=masked,
        missing={} if masked is None else _missing(masked, refusals),
        loss=own.get("train.loss"),
        tuning=own.get("tuning.loss"),
        central={name.removeprefix(PREFIX): value for name, value in own.items() if name.startswith(PREFIX)},
        seconds=seconds,
    )


def _missing(masked: SumEntry, refusals: Sequence[RefusalEntry]) -> dict[str, str]:
    """The sites that a sum's last attempt goes without; whoever left after its masked update came is in the sum."""
    summed, attempt = masked.sites.split(","), f"attempt {masked.attempt}, "
    return {
        each.site: each.reason.removeprefix(attempt)
        for each in refusals
        if (each.round, each.what) == (masked.round, f"sum, {masked.purpose}")
        and each.reason.startswith(attempt)
        and each.site not in summed
    }


def _site(row: tables.Participant, rounds: Sequence[RoundView], open_: RoundView | None) -> SiteView:
    own = [answer for each in rounds for answer in each.answers if answer.site == row.site]
    taken = [answer for answer in own if answer.status == Status.ACCEPTED]
    condition, reason = "", ""
    if row.status != Status.ACCEPTED:
        condition, reason = "not in it", row.reason
    elif open_ is not None:
        now = next((answer for answer in open_.answers if answer.site == row.site), None)
        waits = open_.phase in (Phase.ANNOUNCED, Phase.TRAINING, Phase.COLLECTING)
        condition = now.status if now else "waited for" if waits else "no answer"
        reason = now.reason if now else ""
        if row.site in open_.missing:
            condition, reason = "not in the sum", open_.missing[row.site]
    return SiteView(
        name=row.site,
        condition=condition,
        reason=reason,
        accepted=len(taken),
        behind_s=median(answer.behind_s for answer in taken) if taken else None,
        last=sum(_is_last(row.site, each) for each in rounds),
        late=sum(answer.status == Status.LATE for answer in own),
        no_update=sum(answer.status not in (Status.ACCEPTED, Status.LATE) for answer in own)
        + sum(row.site in each.missing for each in rounds),
        bytes=sum(answer.bytes for answer in own),
    )


def _is_last(site: str, each: RoundView) -> bool:
    taken = [answer for answer in each.answers if answer.status == Status.ACCEPTED]
    return len(taken) > 1 and max(taken, key=lambda answer: answer.behind_s).site == site


def _losses(scores: Sequence[tables.Score]) -> dict[str, dict[int, float]]:
    """The tuning loss of every site that told one, by round."""
    found: dict[str, dict[int, float]] = {}
    for row in sorted(scores, key=lambda row: (row.site, row.round)):
        if row.split == "tuning" and row.tokens > 0 and row.status == Status.ACCEPTED:
            found.setdefault(row.site, {})[row.round] = row.nll / row.tokens
    return found
