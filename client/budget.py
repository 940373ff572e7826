"""A site's privacy budget: every private release is written down before it leaves, and none leaves twice.

    reserved ──charge──▶ charged ──released──▶ released
        ├──cancel──▶ (free again)
        └──free────▶ freed

1. `reserve` checks the limit, notes what is planned and draws the key from which all noise of the release follows.
   A process that is killed from here on does the same work with the same noise again.
2. `charge` notes what really ran and the sha256 of the answer, and forgets the key. Only now may the answer leave; of
   two answers to one question the first that was charged is the only one that ever does.
3. `released` notes that the answer was handed over.

`cancel` is for rounds that a run is past. `free` is a person's word that a run is abandoned: the key is forgotten, the
cost is given back, and because nothing can be drawn with that key any more, the release is refused for good.

Reserved releases count as spent, so what two processes plan at the same time can't exceed the limit together. Every
method is one transaction that is on the disk when it returns. SQLite keeps one file with a rollback journal and
synchronous=EXTRA, so that a power failure can't take a commit back (WAL would do it too, but needs shared memory);
secure_delete overwrites keys, as far as the file system lets it. PostgreSQL is told to wait for its disk.

The ledger is as good as its disk: an old copy put back in its place has forgotten what came after.
"""

import hashlib
import secrets
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from sqlalchemy import Engine, LargeBinary, delete, select
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from federation import accountant, canonical, database
from federation.accountant import Mechanism, Mechanisms
from federation.messages import SiteRefusal
from tokenizer import durable
from tokenizer.errors import ConfigError, DataError

SCHEMA = 1
"""The version of the tables; a ledger of another version is refused."""

FILE = "budget.sqlite"
"""The ledger's name in a site's state folder, where no database is given."""

_PRAGMAS = ("journal_mode=DELETE", "synchronous=EXTRA", "secure_delete=ON")

Purpose = Literal["survey", "training", "evaluation", "statistics", "restored"]


class BudgetExhausted(SiteRefusal):
    """A release would cost patients more than the site allows.

    The text may travel to the coordinator; the figures are in a note (`__notes__`), which only the site's log shows.
    """


class State(StrEnum):
    """How far a release is; `CHARGED` and `RELEASED` ones may have left, `FREED` ones never do."""

    RESERVED = "reserved"
    CHARGED = "charged"
    RELEASED = "released"
    FREED = "freed"

    @property
    def spent(self) -> bool:
        """Whether an answer may have left, and its cost stays."""
        return self in (State.CHARGED, State.RELEASED)


@dataclass(frozen=True)
class Limit:
    """The most that all private releases of a site together may cost one of its patients."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ConfigError(f"The limit's epsilon must be above 0, got {self.epsilon}.")
        if not 0 < self.delta < 1:
            raise ConfigError(f"The limit's delta must lie between 0 and 1, got {self.delta}.")


@dataclass(frozen=True)
class Release:
    """A private release, by run, round and purpose.

    Args:
        run: The manifest's hash; for what belongs to no run, its purpose.
        round: 0 for what belongs to no round.
        purpose: What it is.
        mechanisms: What is planned (`Budget.reserve`) or really ran (`Budget.charge`).
        request: Digest of what is asked; once charged, nothing else is answered under this run, round and purpose.
    """

    run: str
    round: int
    purpose: Purpose
    mechanisms: Mechanisms
    request: str

    @property
    def name(self) -> str:
        """For messages."""
        of_round = f" of round {self.round}" if self.round else ""
        in_run = f" in run {self.run[:16]}" if self.run != self.purpose else ""
        return f"the {self.purpose}{of_round}{in_run}"


@dataclass(frozen=True)
class Charge:
    """What the ledger holds of a release.

    Attributes:
        key: 32 secret bytes that all noise must follow from; empty once charged.
        sha256: Of the answer, once charged.
        answer: The answer, if it was given to be kept.
        at: Seconds since the epoch of the last change of state.
    """

    release: Release
    state: State
    key: bytes = field(repr=False)
    sha256: str
    answer: bytes | None = field(repr=False)
    at: float


class _Base(DeclarativeBase):
    pass


class _Ledger(_Base):
    __tablename__ = "ledger"
    id: Mapped[int] = mapped_column(primary_key=True)
    schema_version: Mapped[int]
    began_at: Mapped[float]


class _Row(_Base):
    __tablename__ = "release"
    run: Mapped[str] = mapped_column(primary_key=True)
    round: Mapped[int] = mapped_column(primary_key=True)
    purpose: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    mechanisms: Mapped[bytes] = mapped_column(LargeBinary)
    request: Mapped[str]
    key: Mapped[bytes] = mapped_column(LargeBinary)
    sha256: Mapped[str]
    answer: Mapped[bytes | None] = mapped_column(LargeBinary)
    reserved_at: Mapped[float]
    changed_at: Mapped[float]


class Budget:
    """An open ledger; close it, or use it in a `with` statement."""

    def __init__(self, engine: Engine, limit: Limit | None) -> None:
        self.limit = limit
        self._engine = engine

    @classmethod
    def open(cls, place: Path | str, limit: Limit | None = None, *, begin: bool = True) -> Self:
        """Open a site's ledger.

        Args:
            place: A SQLite file, or a database's SQLAlchemy URL.
            limit: What may be spent; without one, releases are written down and none is refused.
            begin: Begin a ledger where there is none.

        Raises:
            DataError: There is no ledger and `begin` is false, it has tables of another version, its database is away,
                or it is damaged; each says what to do.
        """
        url = database.address(place)
        told = database.told(url)
        if database.is_file(url):
            path = Path(told)
            if not begin and not path.exists():
                raise DataError(
                    f"There is no privacy budget at {path}: nothing private has left, or it is kept elsewhere."
                )
            database.only_for_its_owner(path)
        # Another process may be computing what its release costs.
        engine = database.connect(url, _PRAGMAS, wait_s=600.0)
        try:
            version = _begin(engine)
        except DBAPIError as problem:
            engine.dispose()
            raise DataError(_trouble(told, problem)) from problem
        if version != SCHEMA:
            engine.dispose()
            raise DataError(f"{told} has tables of version {version}; this software knows {SCHEMA}.")
        return cls(engine, limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the database."""
        self._engine.dispose()

    def reserve(self, release: Release) -> Charge:
        """Note a planned release, before its work begins; the same one again gets the same key, or its answer.

        Raises:
            BudgetExhausted: It would exceed the limit.
            SiteRefusal: Another request was charged under this run, round and purpose, or it was freed.
        """
        with self._transaction() as session:
            row = session.get(_Row, (release.run, release.round, release.purpose))
            if row is None:
                row = _Row(run=release.run, round=release.round, purpose=release.purpose, state=State.RESERVED)
                row.request, row.sha256, row.answer, row.reserved_at = "", "", None, time.time()
                session.add(row)
            elif row.state != State.RESERVED:
                return _charge_of(_same(_not_freed(row, release), release))
            if (
                row.request != release.request
            ):  # nothing has left; whoever works on the old one can't charge it any more
                row.request, row.key = release.request, secrets.token_bytes(32)
            row.mechanisms, row.changed_at = canonical.encode(release.mechanisms), time.time()
            self._within_limit(session, release)
            return _charge_of(row)

    def charge(self, release: Release, answer: bytes | None = None, *, sha256: str = "") -> Charge:
        """Note what really ran, and the answer, before it leaves; the noise's key is forgotten.

        Args:
            release: As reserved, but for the mechanisms: the sampling rate, noise and steps that were used.
            answer: The bytes that will leave, to be kept here, or
            sha256: their digest, if they are kept elsewhere and already safe.

        Returns:
            The charge that stands: of an answer that was charged before, if it has the same digest.

        Raises:
            BudgetExhausted: What ran exceeds the limit; the answer must not leave.
            SiteRefusal: It was not reserved, or another answer was charged already; this one must not leave.
        """
        digest = sha256 or hashlib.sha256(answer or b"").hexdigest()
        with self._transaction() as session:
            row = _find(session, release)
            if row is None:
                raise SiteRefusal(f"No privacy budget was reserved for {release.name}.")
            if row.state == State.RESERVED:
                self._within_limit(session, release)
                row.state, row.sha256, row.answer, row.key = State.CHARGED, digest, answer, b""
                row.mechanisms, row.changed_at = canonical.encode(release.mechanisms), time.time()
            elif row.sha256 != digest:
                raise SiteRefusal(f"Another answer was charged already for {release.name}; this one must not leave.")
            return _charge_of(row)

    def released(self, release: Release) -> None:
        """Note that a charged answer was handed over."""
        with self._transaction() as session:
            row = _find(session, release)
            if row is None or not State(row.state).spent:
                raise SiteRefusal(f"{release.name[0].upper()}{release.name[1:]} was not charged; it must not leave.")
            if row.state == State.CHARGED:
                row.state, row.changed_at = State.RELEASED, time.time()

    def cancel(self, release: Release) -> None:
        """Give back what was reserved for a release that will not be made; what was charged stays spent."""
        same = (_Row.run == release.run, _Row.round == release.round, _Row.purpose == release.purpose)
        with self._transaction() as session:
            session.execute(delete(_Row).where(*same, _Row.state == State.RESERVED))

    def cancel_before(self, release: Release) -> None:
        """Give back what is reserved for earlier rounds of a run, which is past them: nothing of these ever left."""
        same = (_Row.run == release.run, _Row.round < release.round, _Row.purpose == release.purpose)
        with self._transaction() as session:
            session.execute(delete(_Row).where(*same, _Row.state == State.RESERVED))

    def free(self, releases: Sequence[Release]) -> list[Charge]:
        """Give up reservations of an abandoned run: their keys are forgotten, and they are refused from now on.

        All of them or, killed or refused, none.

        Raises:
            DataError: One is not reserved any more: it was charged, or given back, in the meantime.
        """
        with self._transaction() as session:
            rows = [session.get(_Row, (each.run, each.round, each.purpose)) for each in releases]
            for release, row in zip(releases, rows, strict=True):
                if row is None or row.state != State.RESERVED or row.request != release.request:
                    raise DataError(
                        f"What is reserved for {release.name} has changed in the meantime, so nothing was freed. "
                        "Look again."
                    )
                row.state, row.key, row.changed_at = State.FREED, b"", time.time()
            return [_charge_of(row) for row in rows if row is not None]

    def find(self, run: str, number: int, purpose: Purpose) -> Charge | None:
        """Give what the ledger holds of a release."""
        with self._transaction() as session:
            row = session.get(_Row, (run, number, purpose))
            return None if row is None else _charge_of(row)

    def charges(self) -> list[Charge]:
        """Give all releases in the order in which they were reserved."""
        with self._transaction() as session:
            rows = session.scalars(select(_Row).order_by(_Row.reserved_at, _Row.run, _Row.round, _Row.purpose))
            return [_charge_of(row) for row in rows]

    def spent(self, delta: float | None = None) -> float:
        """Give the epsilon of everything in the ledger, what is reserved included.

        Args:
            delta: At which delta; the limit's if there is one.
        """
        return accountant.epsilon(self.mechanisms(), self.delta(delta))

    def mechanisms(self, but: str = "") -> list[Mechanism]:
        """Give all mechanisms of all releases, but for those that were freed and those of one run."""
        counted = [each for each in self.charges() if each.state != State.FREED and each.release.run != but]
        return [each for charge in counted for each in charge.release.mechanisms.all]

    def delta(self, delta: float | None = None) -> float:
        """Give the delta at which figures are told: the one asked for, the limit's, or 1e-6."""
        return delta or (self.limit.delta if self.limit else 1e-6)

    def _within_limit(self, session: Session, release: Release) -> None:
        if self.limit is None:
            return
        other = (_Row.run != release.run) | (_Row.round != release.round) | (_Row.purpose != release.purpose)
        rows = session.scalars(select(_Row.mechanisms).where(other, _Row.state != State.FREED))
        before = [each for row in rows for each in _mechanisms(row).all]
        after = [*before, *release.mechanisms.all]
        limit = self.limit
        # The Rényi bound is quick; the sharper one is needed only where it is above the limit.
        if accountant.epsilon_rdp(after, limit.delta) <= limit.epsilon:
            return
        if (cost := accountant.epsilon(after, limit.delta)) <= limit.epsilon:
            return
        refusal = BudgetExhausted(
            f"The site's privacy budget does not allow {release.name}. Fewer steps, smaller batches or more noise "
            "would cost less; the limit is the site's own."
        )
        refusal.add_note(
            f"{release.name}: with it, epsilon would be {cost:.4f} at delta {limit.delta:g}; the limit is "
            f"{limit.epsilon:g}, and {accountant.epsilon(before, limit.delta):.4f} is spent or reserved. It is made of "
            f"{canonical.encode(release.mechanisms).decode()}."
        )
        raise refusal

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        """One at a time, among all processes: SQLite by its lock, others by the ledger's row.

        Raises:
            DataError: The database's own errors: it is away, full or damaged.
        """
        try:
            with Session(self._engine) as session, session.begin():
                session.get(_Ledger, 1, with_for_update=True)
                yield session
        except DBAPIError as problem:
            raise DataError(_trouble(database.told(self._engine.url), problem)) from problem


def _find(session: Session, release: Release) -> _Row | None:
    row = session.get(_Row, (release.run, release.round, release.purpose))
    return None if row is None else _same(_not_freed(row, release), release)


def _not_freed(row: _Row, release: Release) -> _Row:
    if row.state == State.FREED:
        raise SiteRefusal(f"The site has given up {release.name}: its budget is free again, and it is never made.")
    return row


def _same(row: _Row, release: Release) -> _Row:
    if row.request != release.request:
        refusal = SiteRefusal(f"Another request was made before for {release.name}; only that one is answered.")
        refusal.add_note(f"{row.state}: request {row.request}; refused: request {release.request}")
        raise refusal
    return row


def _charge_of(row: _Row) -> Charge:
    release = Release(row.run, row.round, row.purpose, _mechanisms(row.mechanisms), row.request)  # type: ignore[arg-type]
    return Charge(release, State(row.state), row.key, row.sha256, row.answer, row.changed_at)


def _mechanisms(data: bytes) -> Mechanisms:
    return canonical.decode(Mechanisms, data, "a release in the privacy budget", DataError)


def _trouble(place: str, problem: DBAPIError) -> str:
    """Say what is wrong with the ledger's database, and what to do: only a damaged one is to be restored."""
    if durable.out_of_room(problem):
        return (
            f"{place}: the privacy budget can't be written, as its disk is full; nothing private leaves. Make room, "
            "and the site goes on."
        )
    lines = str(problem.orig).strip().splitlines()
    cause = lines[0].strip() if lines else type(problem.orig).__name__
    # Of SQLite's errors, SQLITE_ERROR is about what stands in the file: tables that are not as they were made.
    foreign = getattr(problem.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR
    if problem.connection_invalidated or (isinstance(problem, OperationalError | InterfaceError) and not foreign):
        return (
            f"{place}: the privacy budget's database can't be used now ({cause}); nothing private leaves. Start it, or "
            "mend the way to it, and the site goes on; don't restore a copy, which has forgotten what was spent since."
        )
    return (
        f"{place}: the privacy budget can't be read ({cause}). Private releases may have left; restore the ledger from "
        "the newest copy before this site answers again."
    )


def _begin(engine: Engine, attempts: int = 5) -> int:
    """Make the tables if there are none, and give their version."""
    for _ in range(attempts - 1):
        try:
            return _make_tables(engine)
        except DBAPIError:
            continue  # another process may be making them at the same moment
    return _make_tables(engine)


def _make_tables(engine: Engine) -> int:
    with engine.begin() as connection:
        _Base.metadata.create_all(connection)
    with Session(engine) as session, session.begin():
        ledger = session.get(_Ledger, 1)
        if ledger is None:
            ledger = _Ledger(id=1, schema_version=SCHEMA, began_at=time.time())
            session.add(ledger)
        return ledger.schema_version
