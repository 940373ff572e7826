"""A federation's ledger: its runs, members, approvals and budgets, and who did what; one database for it all.

SQLite in the coordinator's home, or PostgreSQL by URL. Every method is one transaction that is on the disk when it
returns, and writes down as an event what it changed. How the rounds of one run go is in its journal
(`Ledger.journal`), which is a view of the same database; who may lead runs says the lease (`Ledger.lead`).

A run's state is what the ledger says. `pausing` and `stopping` are wishes: whoever leads the run sees them, between
rounds or between answers, and turns them into `paused` and `stopped`.

    proposed ─start─▶ ready ─(led)─▶ running ─▶ finished | failed
                        ▲               │ pause, stop
                        └────resume──── paused, stopped, failed
"""

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from server import lease, tables
from server.journal import Journal
from server.ledger_entries import (
    ApprovalEntry,
    BudgetEntry,
    CheckpointEntry,
    EventEntry,
    LedgerRefusal,
    MetricEntry,
    RefusalEntry,
    RunEntry,
    entry_of,
)
from server.members import Members
from server.schema import open_ledger
from server.tables import RunState
from server.transactions import PATIENCE_S, Transactions, note

E = TypeVar("E")

_STOPS = (RunState.PROPOSED, RunState.READY, RunState.PAUSED, RunState.FAILED)
_RESUMES = (RunState.PAUSED, RunState.STOPPED, RunState.FAILED)
_LED = (RunState.RUNNING, RunState.PAUSING)


class Ledger:
    """An open ledger; close it, or use it in a `with` statement.

    Attributes:
        members: who belongs to the federation.
        transactions: the database below.
    """

    def __init__(self, transactions: Transactions) -> None:
        self.transactions = transactions
        self.members = Members(transactions)

    @classmethod
    def open(
        cls,
        place: Path | str,
        *,
        backups: Path | None = None,
        begin: bool = True,
        patience_s: float = PATIENCE_S,
        pause: Callable[[float], None] = time.sleep,
    ) -> Self:
        """Open a ledger; see `server.schema.open_ledger` for arguments and errors."""
        return cls(open_ledger(place, backups=backups, begin=begin, patience_s=patience_s, pause=pause))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the database."""
        self.transactions.close()

    # --- who leads ---

    def lead(
        self,
        *,
        wait: bool = False,
        ttl_s: float = lease.TTL_S,
        tell: Callable[[str], None] = lambda text: None,
        lost: threading.Event | None = None,
    ) -> AbstractContextManager[int]:
        """Hold the lease in a `with` statement; see `server.lease.lead` for arguments and errors."""
        return lease.lead(self.transactions, wait=wait, ttl_s=ttl_s, tell=tell, lost=lost)

    def join(self, token: int) -> None:
        """Write under the lease of the process that this one works for; raises LeaseLost where it is out of date."""
        lease.join(self.transactions, token)

    def holder(self) -> lease.Holder | None:
        """Give who leads now, if anybody does."""
        return lease.holder(self.transactions)

    # --- runs ---

    def journal(self, run: str) -> Journal:
        """Give the rounds of a run; they end with this ledger."""
        return Journal.of(self.transactions, run)

    def propose(self, run: str, plan: bytes = b"", who: str = "coordinator") -> RunEntry:
        """Add a run.

        Raises:
            LedgerRefusal: there is one of this name with another plan.
        """

        def work(session: Session) -> RunEntry:
            row = _find_run(session, run)
            if row is None:
                state, now = RunState.PROPOSED, self.transactions.now(session)
                row = tables.Run(name=run, plan=plan, state=state, created_at=now, flower_run="")
                session.add(row)
                session.flush()
                note(session, who, "run.proposed", row.id)
            elif row.plan != plan:
                raise LedgerRefusal(f"There is a run {run} with another plan; take another name.")
            return entry_of(RunEntry, row)

        return self.transactions.write(work)

    def note_manifest(self, run: str, manifest_hash: str, manifest: bytes, who: str = "coordinator") -> None:
        """Note the manifest that a run will have, for sites to see and sign before it begins.

        Raises:
            LedgerRefusal: no such run, or it has another manifest.
        """

        def work(session: Session) -> None:
            row = _get_run(session, run)
            if row.manifest_hash == manifest_hash:
                return
            if row.manifest_hash:
                raise LedgerRefusal(f"Run {run} has the manifest {row.manifest_hash}; another needs another run.")
            row.manifest_hash, row.manifest = manifest_hash, manifest
            note(session, who, "run.begun", row.id, told=manifest_hash)

        self.transactions.write(work)

    def note_flower_run(self, run: str, flower_run: str) -> None:
        """Note Flower's number of the process that leads a run."""

        def work(session: Session) -> None:
            row = _get_run(session, run)
            row.flower_run = flower_run
            note(session, "coordinator", "run.flower", row.id, told=flower_run)

        self.transactions.write(work)

    def start(self, run: str, who: str = "coordinator") -> RunEntry:
        """Let a run begin, or go on: it is ready for whoever leads it; one that was only to be paused runs on.

        Raises:
            LedgerRefusal: no such run; it is finished, or it is about to stop.
        """

        def work(session: Session, row: tables.Run) -> None:
            if row.state in (RunState.READY, RunState.RUNNING):
                return
            if row.state not in (RunState.PROPOSED, RunState.PAUSING, *_RESUMES):
                raise LedgerRefusal(f"Run {run} is {row.state}; it can't be started.")
            resumed = row.state != RunState.PROPOSED
            row.state = RunState.RUNNING if row.state == RunState.PAUSING else RunState.READY
            row.reason, row.ended_at = "", None
            note(session, who, "run.resumed" if resumed else "run.readied", row.id)

        return self._change(run, work)

    def pause(self, run: str, who: str = "coordinator") -> RunEntry:
        """Wish that a run pauses after its open round.

        Raises:
            LedgerRefusal: no such run, or it is not running.
        """

        def work(session: Session, row: tables.Run) -> None:
            if row.state in (RunState.PAUSING, RunState.PAUSED):
                return
            if row.state not in (RunState.READY, RunState.RUNNING):
                raise LedgerRefusal(f"Run {run} is {row.state}; only a run that is running can pause.")
            row.state = RunState.PAUSING if row.state == RunState.RUNNING else RunState.PAUSED
            note(session, who, f"run.{row.state}", row.id)

        return self._change(run, work)

    def stop(self, run: str, who: str = "coordinator") -> RunEntry:
        """Wish that a run stops after the next answer; one that nobody leads is stopped at once.

        Raises:
            LedgerRefusal: no such run, or it is finished.
        """

        def work(session: Session, row: tables.Run) -> None:
            if row.state in (RunState.STOPPING, RunState.STOPPED):
                return
            if row.state == RunState.FINISHED:
                raise LedgerRefusal(f"Run {run} is finished; there is nothing to stop.")
            row.state = RunState.STOPPING if row.state in _LED else RunState.STOPPED
            if row.state == RunState.STOPPED:
                row.ended_at = self.transactions.now(session)
            note(session, who, f"run.{row.state}", row.id)

        return self._change(run, work)

    def abandon(self, run: str, reason: str) -> RunEntry:
        """Note that the process that led a run ended by itself: a wish comes true, any other run has failed."""

        def work(session: Session, row: tables.Run) -> None:
            wishes = {RunState.PAUSING: RunState.PAUSED, RunState.STOPPING: RunState.STOPPED}
            if row.state not in (RunState.RUNNING, RunState.READY, *wishes):
                return
            row.state = wishes.get(RunState(row.state), RunState.FAILED)
            row.reason, row.ended_at = reason, self.transactions.now(session)
            note(session, "coordinator", f"run.{row.state}", row.id, told=reason)

        return self._change(run, work)

    def run(self, run: str) -> RunEntry:
        """Give a run.

        Raises:
            LedgerRefusal: there is none of this name.
        """
        return self.transactions.read(lambda session: entry_of(RunEntry, _get_run(session, run)))

    def runs(self) -> list[RunEntry]:
        """Give all runs, in the order in which they were proposed."""
        rows = select(tables.Run).order_by(tables.Run.id)
        return self.transactions.read(lambda session: [entry_of(RunEntry, row) for row in session.scalars(rows)])

    def checkpoints(self, run: str) -> list[CheckpointEntry]:
        """Give the checkpoints that a run has made, by round; the files of old ones are swept."""
        return self._of_run(run, tables.Checkpoint, CheckpointEntry, tables.Checkpoint.round)

    def metrics(self, run: str) -> list[MetricEntry]:
        """Give the figures of a run's rounds, by round and name."""
        found = self._of_run(run, tables.Metric, MetricEntry, tables.Metric.round)
        return sorted(found, key=lambda entry: (entry.round, entry.name, entry.site))

    def note_metric(self, run: str, entry: MetricEntry) -> None:
        """Note a figure of a round; a later one of the same name replaces it."""

        def work(session: Session) -> None:
            row = _get_run(session, run)
            where = {"round": entry.round, "name": entry.name, "site": entry.site}
            session.merge(tables.Metric(run=row.id, **where, value=entry.value))

        self.transactions.write(work)

    def refusals(self, run: str) -> list[RefusalEntry]:
        """Give what was refused in a run, in the order in which it was."""
        return self._of_run(run, tables.Refusal, RefusalEntry, tables.Refusal.id)

    def note_refusal(self, run: str, entry: RefusalEntry) -> None:
        """Note that something was refused; `entry.at` is the time that counts."""

        def work(session: Session) -> None:
            row = _get_run(session, run)
            told = {"round": entry.round, "site": entry.site, "what": entry.what, "reason": entry.reason}
            session.add(tables.Refusal(run=row.id, at=entry.at, **told))
            note(session, entry.site, f"refused.{entry.what}", row.id, entry.round, entry.site, entry.reason)

        self.transactions.write(work)

    # --- approvals, budgets ---

    def approve(self, manifest_hash: str, site: str, signature: str) -> None:
        """Note a site's signature under a manifest, in hex; a later one replaces it."""

        def work(session: Session) -> None:
            run = session.scalar(select(tables.Run.id).where(tables.Run.manifest_hash == manifest_hash).limit(1))
            at = self.transactions.now(session)
            session.merge(tables.Approval(manifest_hash=manifest_hash, site=site, signature=signature, at=at))
            note(session, site, "manifest.approved", run, site=site, told=manifest_hash)

        self.transactions.write(work)

    def approvals(self, manifest_hash: str) -> list[ApprovalEntry]:
        """Give the signatures under a manifest by site."""
        found = self._entries(
            ApprovalEntry, select(tables.Approval).where(tables.Approval.manifest_hash == manifest_hash)
        )
        return sorted(found, key=lambda entry: entry.site)

    def report_budget(self, entry: BudgetEntry) -> None:
        """Note what a site tells of its privacy budget; its time is the ledger's own, whatever the entry says."""

        def work(session: Session) -> None:
            run = None if entry.run is None else _get_run(session, entry.run).id
            values = {field.name: getattr(entry, field.name) for field in fields(entry)}
            values.update(run=run, at=self.transactions.now(session))
            session.add(tables.Budget(**values))
            told = f"epsilon {entry.epsilon:.4g} at delta {entry.delta:g}"
            note(session, entry.site, "budget.reported", run, site=entry.site, told=told)

        self.transactions.write(work)

    def budgets(self, site: str | None = None) -> list[BudgetEntry]:
        """Give all that was told of budgets, of one site or of all, in the order in which it came."""
        rows = select(tables.Budget, tables.Run.name).outerjoin(tables.Run, tables.Budget.run == tables.Run.id)
        rows = rows.order_by(tables.Budget.id)
        if site is not None:
            rows = rows.where(tables.Budget.site == site)
        return self.transactions.read(
            lambda session: [entry_of(BudgetEntry, row, run=run) for row, run in session.execute(rows)]
        )

    # --- events ---

    def note(
        self, who: str, what: str, *, run: str | None = None, number: int | None = None, site: str = "", told: str = ""
    ) -> int:
        """Write down who did what, where no other method does; gives the event's number.

        Raises:
            LedgerRefusal: there is no such run.
        """

        def work(session: Session) -> int:
            row = None if run is None else _get_run(session, run).id
            return note(session, who, what, row, number, site, told)

        return self.transactions.write(work)

    def events(
        self,
        after: int = 0,
        *,
        run: str | None = None,
        site: str | None = None,
        what: str = "",
        before: int | None = None,
        limit: int | None = None,
        newest: bool = False,
    ) -> list[EventEntry]:
        """Give events in the order in which they became durable.

        Args:
            after: only those with a greater number: who asks again with the last number misses none.
            run, site: only those of this run, this site.
            what: only those whose kind begins so, such as "run.".
            before: only those with a smaller number.
            limit: at most so many.
            newest: of more than `limit`, the last instead of the first.
        """
        event = tables.Event
        rows = select(event, tables.Run.name).outerjoin(tables.Run, event.run == tables.Run.id).where(event.id > after)
        if run is not None:
            rows = rows.where(tables.Run.name == run)
        if site is not None:
            rows = rows.where(event.site == site)
        if what:
            rows = rows.where(event.what.startswith(what, autoescape=True))
        if before is not None:
            rows = rows.where(event.id < before)
        rows = rows.order_by(event.id.desc() if newest else event.id).limit(limit)
        found = self.transactions.read(
            lambda session: [entry_of(EventEntry, row, run=name) for row, name in session.execute(rows)]
        )
        return found[::-1] if newest else found

    def _change(self, run: str, work: Callable[[Session, tables.Run], None]) -> RunEntry:
        def changed(session: Session) -> RunEntry:
            row = _get_run(session, run)
            work(session, row)
            return entry_of(RunEntry, row)

        return self.transactions.write(changed)

    def _of_run(self, run: str, table: Any, kind: type[E], order: Any) -> list[E]:
        def work(session: Session) -> list[E]:
            rows = select(table).where(table.run == _get_run(session, run).id).order_by(order)
            return [entry_of(kind, row, run=run) for row in session.scalars(rows)]

        return self.transactions.read(work)

    def _entries(self, kind: type[E], rows: Any) -> list[E]:
        return self.transactions.read(lambda session: [entry_of(kind, row) for row in session.scalars(rows)])


def _find_run(session: Session, run: str) -> tables.Run | None:
    return session.scalar(select(tables.Run).where(tables.Run.name == run))


def _get_run(session: Session, run: str) -> tables.Run:
    row = _find_run(session, run)
    if row is None:
        raise LedgerRefusal(f"The ledger has no run {run}; fedcomet coordinator runs lists them.")
    return row
