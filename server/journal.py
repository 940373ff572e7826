"""One run in the ledger: who takes part, what every site answered in every round, and how far the run is.

The run is one of a federation's ledger (`server.ledger`), or the only one in a file of its own, as in a simulation.
Every method is one transaction that is on the disk when the method returns, so the run can be continued from whatever
the ledger says after a crash at any instant. What a method changes, it also writes down as an event. `fingerprint`
covers everything but times and the number of attempts: two runs with equal settings and equal answers have equal
fingerprints, however often they were interrupted.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import Row, Select, bindparam, delete, func, insert, select
from sqlalchemy.orm import Session

from federation.manifest import Manifest
from server import tables
from server.fingerprint import fingerprint_of
from server.run_entries import (
    GIVEN_UP,
    Checkpoint,
    Phase,
    ReplyEntry,
    RoundEntry,
    ScoreEntry,
    SiteEntry,
    Status,
    SumEntry,
    Work,
)
from server.schema import open_ledger
from server.tables import RunState
from server.transactions import Transactions, note, put, table_of
from tokenizer.errors import DataError

__all__ = [
    "GIVEN_UP",
    "Checkpoint",
    "Journal",
    "Phase",
    "ReplyEntry",
    "RoundEntry",
    "ScoreEntry",
    "SiteEntry",
    "Status",
    "SumEntry",
    "Work",
]

T = TypeVar("T")

_NOT_FOR_LEADING = (RunState.PAUSING, RunState.PAUSED, RunState.STOPPING, RunState.STOPPED, RunState.FINISHED)
_ENDED = (RunState.PAUSED, RunState.STOPPED, RunState.FAILED, RunState.FINISHED)


# Made once: making a statement takes as long as its execution.
_STATE = select(tables.Run.state).where(tables.Run.id == bindparam("run"))
_COMMITTED = select(func.max(tables.Round.round)).where(
    tables.Round.run == bindparam("run"), tables.Round.phase == Phase.COMMITTED
)
_FORGET_BAD = delete(table_of(tables.Reply)).where(
    tables.Reply.run == bindparam("run"),
    tables.Reply.round == bindparam("round"),
    tables.Reply.status != Status.ACCEPTED,
)
_WORK = select(
    func.sum(tables.Reply.tokens), func.sum(tables.Reply.steps), func.count(tables.Reply.site.distinct())
).where(
    tables.Reply.run == bindparam("run"),
    tables.Reply.round <= bindparam("until"),
    tables.Reply.status == Status.ACCEPTED,
)
_REFUSE = insert(table_of(tables.Refusal))


class Journal:
    """A run in an open ledger. One that opened the ledger itself closes it; use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        """Open the ledger of one run at `path`, or begin one.

        Raises:
            DataError: the file is not a ledger, or newer than this software.
        """
        self._ledger, self._name = open_ledger(path), ""
        self._known: int | None = None

    @classmethod
    def of(cls, ledger: Transactions, name: str) -> Self:
        """Give the journal of the run with this name in an open ledger; whoever opened that closes it."""
        journal = cls.__new__(cls)
        journal._ledger, journal._name, journal._known = ledger, name, None
        return journal

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the database, if it is this run's own."""
        if not self._name:
            self._ledger.close()

    def start(self, name: str, plan: bytes = b"") -> None:
        """Note that somebody leads the run now, also for the first time; that it should pause or stop, or has, stays.

        Args:
            name: of the run, where the ledger has none yet.
            plan: the federation plan's bytes.
        """

        def work(session: Session) -> None:
            run = self._find(session)
            if run is None:
                run = self._add(session, name, plan)
            if run.state in _NOT_FOR_LEADING:
                return
            run.state, run.reason, run.ended_at = RunState.RUNNING, "", None
            run.started_at = run.started_at or time.time()
            note(session, "coordinator", "run.started", run.id)

        self._ledger.write(work)

    def begin(self, manifest: Manifest) -> None:
        """Note the manifest when the run begins; on a ledger that has one, check that it is the same.

        Raises:
            DataError: the ledger belongs to another run.
        """

        def work(session: Session) -> None:
            run = self._find(session)
            if run is None:
                run = self._add(session, manifest.name, b"")
                run.state, run.started_at = RunState.RUNNING, time.time()
            if run.manifest_hash == manifest.hash:
                return
            if run.manifest_hash:
                raise DataError(
                    f"{self._ledger.place} is the ledger of run {run.manifest_hash}, not of {manifest.hash}; "
                    "take another run directory."
                )
            run.manifest_hash, run.manifest = manifest.hash, manifest.to_bytes()
            note(session, "coordinator", "run.begun", run.id, told=manifest.hash)

        self._ledger.write(work)

    def state(self) -> RunState | None:
        """Give how far the run is, or what somebody wishes of it; none before it was started."""
        return self._read(
            lambda session, run: RunState(session.connection().execute(_STATE, {"run": run}).scalar_one()), None
        )

    def end(self, state: RunState, reason: str = "") -> None:
        """Note that nobody leads the run any more: it is paused, stopped, failed (and why) or finished."""

        def work(session: Session) -> None:
            run = self._get(session)
            if state not in _ENDED:
                raise AssertionError(f"{state} is not an end")
            if (run.state, run.reason) == (state, reason):
                return
            run.state, run.reason, run.ended_at = state, reason, time.time()
            note(session, "coordinator", f"run.{state}", run.id, told=reason)

        self._ledger.write(work)

    def manifest(self) -> Manifest | None:
        """Give the run's manifest, if the run has begun."""

        def work(session: Session) -> Manifest | None:
            run = self._find(session)
            return None if run is None or not run.manifest else Manifest.from_bytes(run.manifest)

        return self._ledger.read(work)

    def note_site(self, entry: SiteEntry) -> None:
        """Note whether a site takes part; a later note replaces an earlier one."""

        def work(session: Session) -> None:
            run = self._run(session)
            put(session, tables.Participant, {"run": run, **vars(entry)})
            note(session, "coordinator", f"site.{entry.status}", run, site=entry.site, told=entry.reason)
            if entry.status is not Status.ACCEPTED:
                _refuse(session, run, 0, entry.site, "prepare", f"{entry.status}: {entry.reason}")

        self._ledger.write(work)

    def note_refusal(self, site: str, what: str, reason: str) -> None:
        """Note that something of a site was not taken before the rounds began."""

        def work(session: Session) -> None:
            run = self._run(session)
            _refuse(session, run, 0, site, what, reason)
            note(session, "coordinator", f"{what}.refused", run, site=site, told=reason)

        self._ledger.write(work)

    def sites(self) -> list[SiteEntry]:
        """Give all sites by name."""
        rows = self._rows(tables.Participant)
        entries = [SiteEntry(r.site, Status(r.status), r.reason, r.counts) for r in rows]
        return sorted(entries, key=lambda entry: entry.site)

    def committed(self) -> int:
        """Give the number of the last committed round; 0 when there is none."""
        return self._read(lambda session, run: session.connection().execute(_COMMITTED, {"run": run}).scalar() or 0, 0)

    def round(self, number: int) -> RoundEntry | None:
        """Give a round's entry, if it was announced."""

        def work(session: Session, run: int) -> RoundEntry | None:
            row = _round(session, run, number)
            return None if row is None else RoundEntry(row.round, Phase(row.phase), row.checkpoint_sha256)

        return self._read(work, None)

    def enter(
        self,
        number: int,
        phase: Phase,
        checkpoint: Checkpoint | None = None,
        figures: Mapping[str, float] | None = None,
    ) -> None:
        """Note that a round has reached a phase.

        Args:
            number: of the round.
            phase: that it has reached.
            checkpoint: that it came to.
            figures: of the round, by their names.
        """

        def work(session: Session) -> None:
            run = self._run(session)
            self._enter(session, run, number, phase, checkpoint.sha256 if checkpoint else None)
            if checkpoint is not None:
                put(session, tables.Checkpoint, {"run": run, "round": number, **vars(checkpoint)})
            _measure(session, run, number, figures or {})

        self._ledger.write(work)

    def reopen(self, number: int) -> None:
        """Take up a round again after a crash: accepted answers stay, the others may be asked for again."""

        def work(session: Session) -> None:
            run = self._run(session)
            session.connection().execute(_FORGET_BAD, {"run": run, "round": number})
            if _round(session, run, number) is not None:
                note(session, "coordinator", "round.reopened", run, number)

        self._ledger.write(work)

    def note_reply(self, entry: ReplyEntry, phase: Phase | None = None) -> None:
        """Note what became of a site's answer, and the phase that the round reaches with it."""

        def work(session: Session) -> None:
            run, where = self._run(session), (entry.round, entry.site)
            if phase is not None:
                self._enter(session, run, entry.round, phase, None)
            put(session, tables.Reply, {"run": run, **vars(entry), "received_at": time.time()})
            what = "outlier" if entry.status is Status.ACCEPTED and entry.reason else entry.status
            note(session, "coordinator", f"update.{what}", run, *where, told=entry.reason)
            if entry.status is not Status.ACCEPTED:
                _refuse(session, run, *where, "train", f"{entry.status}: {entry.reason}")

        self._ledger.write(work)

    def replies(self, number: int) -> list[ReplyEntry]:
        """Give a round's answers by site name."""
        entries = [_reply_entry(row) for row in self._rows(tables.Reply, round=number)]
        return sorted(entries, key=lambda entry: entry.site)

    def note_sum(self, entry: SumEntry, missing: Mapping[str, str] | None = None) -> None:
        """Note how far a masked sum is, and why each site is missing that the closed stage waited for."""

        def work(session: Session) -> None:
            run = self._run(session)
            put(session, tables.Sum, {"run": run, **vars(entry)})
            told = [f"{entry.purpose}, attempt {entry.attempt}: {entry.stage}", entry.reason or entry.dropped]
            note(session, "coordinator", "sum.advanced", run, entry.round, told="; ".join(filter(None, told)))
            for site, why in (missing or {}).items():
                _refuse(session, run, entry.round, site, f"sum, {entry.purpose}", f"attempt {entry.attempt}, {why}")

        self._ledger.write(work)

    def sum(self, number: int, purpose: str) -> SumEntry | None:
        """Give a masked sum's entry, if it was begun."""
        return next((entry for entry in self.sums(purpose) if entry.round == number), None)

    def sums(self, purpose: str) -> list[SumEntry]:
        """Give the masked sums for a purpose, by round."""
        rows = self._rows(tables.Sum, purpose=purpose)
        entries = [SumEntry(**{name: getattr(row, name) for name in SumEntry.__dataclass_fields__}) for row in rows]
        return sorted(entries, key=lambda entry: entry.round)

    def work(self, until: int) -> Work:
        """Sum the work behind the updates of the rounds up to and with `until`, accepted or in masked sums."""
        sums_until = [entry for entry in self.sums("train") if entry.round <= until and entry.sites]
        if sums_until:
            names = {site for entry in sums_until for site in entry.sites.split(",")}
            tokens, steps = (sum(getattr(entry, name) for entry in sums_until) for name in ("tokens", "steps"))
            return Work(tokens, steps, len(names))

        def work(session: Session, run: int) -> Work:
            tokens, steps, sites = session.connection().execute(_WORK, {"run": run, "until": until}).one()
            return Work(int(tokens or 0), int(steps or 0), sites)

        return self._read(work, Work(0, 0, 0))

    def note_scores(
        self, entries: Sequence[ScoreEntry], number: int, figures: Mapping[str, float] | None = None
    ) -> None:
        """Note a round's evaluations, its figures and that it is evaluated, in one step."""

        def work(session: Session) -> None:
            run = self._run(session)
            put(session, tables.Score, *({"run": run, **vars(entry)} for entry in entries))
            for entry in entries:
                if entry.status is not Status.ACCEPTED:
                    told = f"{entry.status}: {entry.reason}"
                    _refuse(session, run, number, entry.site, f"evaluate {entry.split}", told)
            self._enter(session, run, number, Phase.EVALUATED, None)
            _measure(session, run, number, figures or {})

        self._ledger.write(work)

    def note_assessment(self, number: int, left_out: Mapping[str, str], figures: Mapping[str, float]) -> None:
        """Note what the sites' answers to the run's questions say together, and why some sites are not in it."""

        def work(session: Session) -> None:
            run = self._run(session)
            for site, reason in left_out.items():
                _refuse(session, run, number, site, "evaluate tasks", reason)
            _measure(session, run, number, figures)
            note(session, "coordinator", "round.assessed", run, number)

        self._ledger.write(work)

    def note_central(self, number: int, figures: Mapping[str, float]) -> None:
        """Note what the coordinator's own questions say of a round's model."""

        def work(session: Session) -> None:
            run = self._run(session)
            _measure(session, run, number, figures)
            note(session, "coordinator", "round.tested", run, number)

        self._ledger.write(work)

    def figures(self, name: str) -> dict[int, float]:
        """Give a figure of the whole federation by round."""
        rows = self._rows(tables.Metric, name=name, site="")
        return {row.round: row.value for row in rows}

    def scores(self) -> list[ScoreEntry]:
        """Give all evaluations, by round, split and site."""
        entries = [
            ScoreEntry(r.round, r.site, r.split, Status(r.status), r.reason, r.nll, r.tokens)
            for r in self._rows(tables.Score)
        ]
        return sorted(entries, key=lambda entry: (entry.round, entry.split, entry.site))

    def losses(self, split: str) -> dict[int, float]:
        """Give the sites' common mean nll in nats per target on a split, by round: the figure `<split>.loss`."""
        return self.figures(f"{split}.loss")

    def fingerprint(self) -> str:
        """Give the sha256 of everything that the ledger holds of the run but wall-clock times."""
        return self._ledger.read(lambda session: fingerprint_of(session, self._find(session)))

    def _add(self, session: Session, name: str, plan: bytes) -> tables.Run:
        run = tables.Run(name=self._name or name, plan=plan, state=RunState.READY, created_at=time.time())
        session.add(run)
        session.flush()
        note(session, "coordinator", "run.proposed", run.id)
        return run

    def _enter(self, session: Session, run: int, number: int, phase: Phase, checkpoint_sha256: str | None) -> None:
        row, now = _round(session, run, number), time.time()
        if row is not None and row.phase != phase:
            # How long the round was in the phase before; a coordinator's absence counts.
            _measure(session, run, number, {f"seconds.{row.phase}": now - row.changed_at})
        if checkpoint_sha256 is None:
            checkpoint_sha256 = "" if row is None else row.checkpoint_sha256
        new = {"phase": phase, "checkpoint_sha256": checkpoint_sha256, "changed_at": now}
        put(session, tables.Round, {"run": run, "round": number, **new})
        note(session, "coordinator", f"round.{phase}", run, number)

    def _find(self, session: Session) -> tables.Run | None:
        """The run's row: that with the name, or the only one."""
        rows = session.scalars(select(tables.Run).where(tables.Run.name == self._name) if self._name
                               else select(tables.Run).order_by(tables.Run.id).limit(2)).all()  # fmt: skip
        if len(rows) > 1:
            raise DataError(f"{self._ledger.place} is the ledger of many runs; name the one.")
        return rows[0] if rows else None

    def _known_run(self, session: Session) -> int | None:
        """The run's number, which stays what it is once it was found."""
        if self._known is None and (run := self._find(session)) is not None:
            self._known = run.id
        return self._known

    def _run(self, session: Session) -> int:
        run = self._known_run(session)
        return self._get(session).id if run is None else run

    def _get(self, session: Session) -> tables.Run:
        run = self._find(session)
        if run is None:
            raise DataError(f"{self._ledger.place} has no run {self._name or 'yet'}; begin it first.")
        return run

    def _read(self, work: Callable[[Session, int], T], empty: T) -> T:
        def found(session: Session) -> T:
            run = self._known_run(session)
            return empty if run is None else work(session, run)

        return self._ledger.read(found)

    def _rows(self, kind: type[tables.Base], **where: Any) -> Sequence[Row[Any]]:
        """The run's rows of a table with these values; whoever sorts names does so by code point."""
        return self._read(lambda session, run: _rows_of(session, kind, run=run, **where), [])


def _rows_of(session: Session, kind: type[tables.Base], **where: Any) -> Sequence[Row[Any]]:
    return session.connection().execute(_chosen(kind, frozenset(where)), where).all()


@cache
def _chosen(kind: type[tables.Base], names: frozenset[str]) -> Select[Any]:
    table = table_of(kind)
    return select(table).where(*(table.c[name] == bindparam(name) for name in sorted(names)))


def _round(session: Session, run: int, number: int) -> Row[Any] | None:
    return next(iter(_rows_of(session, tables.Round, run=run, round=number)), None)


def _refuse(session: Session, run: int, number: int, site: str, what: str, reason: str) -> None:
    row = {"run": run, "round": number, "site": site, "what": what, "reason": reason}
    session.connection().execute(_REFUSE, {**row, "at": time.time()})


def _measure(session: Session, run: int, number: int, figures: Mapping[str, float]) -> None:
    where = {"run": run, "round": number, "site": ""}
    put(session, tables.Metric, *({**where, "name": name, "value": float(value)} for name, value in figures.items()))


def _reply_entry(row: Row[Any]) -> ReplyEntry:
    values = {each.name: getattr(row, each.name) for each in fields(ReplyEntry)}
    return ReplyEntry(**{**values, "status": Status(row.status)})
