"""The ledger's transactions: durable, one after the other, tried again while the database is away.

A write is a function of a session. It is run again when the connection broke before its commit; where only the answer
to the commit was lost, the event that it wrote tells that it took place, so nothing is done twice. Writers wait for one
another (SQLite by its lock, PostgreSQL by an advisory one), which makes the numbers of events grow in the order of
commits. Whoever leads runs writes with the token of its lease; after another has taken the lease over, each of its
writes is refused, in the same transaction that would have written.
"""

import logging
import secrets
import sqlite3
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeVar, cast

from sqlalchemy import Engine, Table, func, insert, select, text
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import Insert

from federation import database
from server import tables
from tokenizer.errors import FedcometError

T = TypeVar("T")

PATIENCE_S = 300.0
"""How long a ledger that can't be reached is tried again, unless told otherwise."""

_FIRST_S, _LONGEST_S = 0.1, 10.0  # between two tries
_LOCK = 0x6665_6463_6F6D_6574  # "fedcomet": the ledger's advisory lock
_WAIT = "SET LOCAL lock_timeout TO '60s'; SET LOCAL idle_in_transaction_session_timeout TO '60s'"
_FULL = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
_ONLY_READS = "25006"  # of a server that was the first one, or is not yet
_FOR_GOOD = ("authentication failed", "no password supplied", "does not exist", "no pg_hba.conf entry")

_log = logging.getLogger("fedcomet.ledger")


class LedgerUnreachable(FedcometError):
    """The ledger's database stayed away; what was committed is in it."""


class LeaseLost(FedcometError):
    """Another coordinator leads this federation now; nothing more is written from here."""


@dataclass
class Transactions:
    """How one database is read and written.

    Attributes:
        engine: of the database.
        place: how messages name it.
        patience_s: how long to try again while it can't be reached.
        token: of the lease that this process writes under; without one, writes are not of a leader.
        pause: waits some seconds between two tries, and for the lease; what it raises ends the waiting.
        away: why the database can't be reached; empty while it can.
        away_since: by `time.monotonic`.
    """

    engine: Engine
    place: str
    patience_s: float = PATIENCE_S
    token: int | None = None
    pause: Callable[[float], None] = field(default=time.sleep, repr=False)
    away: str = ""
    away_since: float = 0.0

    def close(self) -> None:
        """Let go of the database."""
        self.engine.dispose()

    def read(self, work: Callable[[Session], T]) -> T:
        """Give what a function finds in one state of the ledger.

        Raises:
            LedgerUnreachable: the database stayed away.
        """

        def attempt() -> T:
            with Session(self._reading) as session, session.begin():
                return work(session)

        return self._until_done(attempt)

    def write(self, work: Callable[[Session], T]) -> T:
        """Do what a function does in one transaction that is on the disk when this returns.

        Args:
            work: may be called more than once; what it did before is gone then.

        Raises:
            LedgerUnreachable: the database stayed away.
            LeaseLost: another coordinator has taken over.
        """
        change = secrets.token_hex(8)
        results: list[T] = []

        def attempt() -> T:
            if results and self._committed(change):
                return results[-1]
            with Session(self.engine) as session, session.begin():
                self._alone(session)
                self._fence(session)
                session.info["change"] = change
                result = work(session)
                session.flush()
                results.append(result)
            return result

        return self._until_done(attempt)

    def now(self, session: Session) -> float:
        """Give the time that all users of the database share, in seconds since the epoch."""
        if self.engine.dialect.name != "postgresql":
            return time.time()
        return float(session.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0.0)

    @cached_property
    def _reading(self) -> Engine:
        return database.reading(self.engine)

    def _alone(self, session: Session) -> None:
        if self.engine.dialect.name == "postgresql":
            session.execute(text(f"{_WAIT}; SELECT pg_advisory_xact_lock({_LOCK})"))

    def _fence(self, session: Session) -> None:
        if self.token is None:
            return
        lease = session.get(tables.Lease, 1)
        if lease is None or lease.token != self.token:
            taken = f" ({lease.host}, process {lease.pid})" if lease is not None and lease.holder else ""
            raise LeaseLost(
                f"Another coordinator{taken} has taken over the ledger {self.place}; this one writes nothing more. "
                "If it should lead again, stop the other one and start this one anew."
            )

    def _committed(self, change: str) -> bool:
        with Session(self._reading) as session, session.begin():
            return session.scalar(select(tables.Event.id).where(tables.Event.change == change).limit(1)) is not None

    def _until_done(self, attempt: Callable[[], T]) -> T:
        began, wait_s = time.monotonic(), _FIRST_S
        while True:
            try:
                result = attempt()
            except DBAPIError as problem:
                if not passing(problem):
                    raise
                if _only_reads(problem):
                    self.engine.dispose()  # another server may be the one that writes now
                away_s, cause = time.monotonic() - began, said(problem)
                if away_s >= self.patience_s:
                    raise LedgerUnreachable(
                        f"The ledger {self.place} could not be reached for {away_s:.0f} s ({cause}). What was noted is "
                        "safe. Start the database again, or free its disk; then start the same command: it goes on "
                        "from what the ledger says."
                    ) from None
                if not self.away:
                    self.away_since = time.monotonic()
                    _log.warning("The ledger %s can't be reached (%s); trying again.", self.place, cause)
                self.away = cause
                self.pause(min(wait_s, self.patience_s))
                wait_s = min(2 * wait_s, _LONGEST_S)
            else:
                if self.away:
                    self.away = ""
                    _log.warning("The ledger %s is back after %.0f s.", self.place, time.monotonic() - self.away_since)
                return result


def passing(problem: DBAPIError) -> bool:
    """Tell whether a database's error may be over when the same is tried again."""
    code = getattr(problem.orig, "sqlite_errorcode", None)
    if code is not None:
        return code & 0xFF in _FULL
    if problem.connection_invalidated or _only_reads(problem):
        return True
    # PostgreSQL's operational errors: gone, starting, shutting down, out of room or connections, a lock not given.
    return _operational(problem) and not _for_good(problem)


def _only_reads(problem: DBAPIError) -> bool:
    return getattr(problem.orig, "sqlstate", None) == _ONLY_READS


def said(problem: DBAPIError) -> str:
    """Give a database's error in one line."""
    lines = str(problem.orig).strip().splitlines()
    return lines[0].strip() if lines else type(problem.orig).__name__


def note(
    session: Session,
    who: str,
    what: str,
    run: int | None = None,
    number: int | None = None,
    site: str = "",
    told: str = "",
) -> int:
    """Write down who did what, in the transaction that does it; gives the event's number."""
    where = {"run": run, "round": number, "site": site}
    event = {"at": time.time(), "who": who, "what": what, **where, "text": told, "change": session.info["change"]}
    session.flush()
    key = session.connection().execute(_EVENT, event).inserted_primary_key
    return int(key[0])  # type: ignore[index]  # one row has one key


_EVENT = insert(cast(Table, tables.Event.__table__))


def put(session: Session, kind: type[tables.Base], *rows: Mapping[str, Any]) -> None:
    """Write rows of all columns, each in the place of one with its key, if there is one.

    No objects are made of them: of what a run writes down, most are such rows.
    """
    if rows:
        connection = session.connection()
        connection.execute(_replacing(kind, connection.dialect.name), [dict(row) for row in rows])


@cache
def _replacing(kind: type[tables.Base], dialect: str) -> Insert:
    table = table_of(kind)
    rows = (postgresql if dialect == "postgresql" else sqlite).insert(table)
    key = list(table.primary_key)
    new = {column.name: rows.excluded[column.name] for column in table.columns if column not in set(key)}
    return rows.on_conflict_do_update(index_elements=key, set_=new)


def table_of(kind: type[tables.Base]) -> Table:
    """Give the table below a class of rows."""
    return cast(Table, kind.__table__)


def _operational(problem: DBAPIError) -> bool:
    return any(kind.__name__ in ("OperationalError", "InterfaceError") for kind in type(problem.orig).__mro__)


def _for_good(problem: DBAPIError) -> bool:
    return any(sign in str(problem.orig) for sign in _FOR_GOOD)
