"""The coordinator's ledger: who took part, what every site answered in every round, and how far the run is.

One SQLite file per run. Every method is one transaction that is on the disk when the method returns, so the run can be
continued from whatever the ledger says after a crash at any instant. `fingerprint` covers everything but times and
the number of attempts: two runs with equal settings and equal answers have equal fingerprints, however often they were
interrupted.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from sqlalchemy import Engine, create_engine, delete, event, func, select
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from federation import canonical
from federation.manifest import Manifest
from tokenizer.errors import DataError

SCHEMA = 2
"""The version of the tables; a ledger of another version is refused."""


class Phase(StrEnum):
    """How far a round is; a phase is in the ledger before its effect shows."""

    ANNOUNCED = "announced"
    TRAINING = "training"
    COLLECTING = "collecting"
    UNMASKING = "unmasking"
    AGGREGATED = "aggregated"
    EVALUATED = "evaluated"
    COMMITTED = "committed"


class Status(StrEnum):
    """What became of a site's answer."""

    ACCEPTED = "accepted"
    REFUSED = "refused"
    MALFORMED = "malformed"
    FAILED = "failed"
    LATE = "late"


@dataclass(frozen=True)
class SiteEntry:
    """A site's part in the run; `counts` are the patients and tokens of its splits."""

    site: str
    status: Status
    reason: str = ""
    counts: str = ""


@dataclass(frozen=True)
class ReplyEntry:
    """What became of one site's answer in one round; `seconds` is for people and not in the fingerprint."""

    round: int
    site: str
    status: Status
    reason: str = ""
    update_sha256: str = ""
    tokens: int = 0
    steps: int = 0
    loss: float = 0.0
    norm: float = 0.0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class ScoreEntry:
    """What became of one site's evaluation of one round: the sum of nll in nats over `tokens` targets."""

    round: int
    site: str
    split: str
    status: Status
    reason: str = ""
    nll: float = 0.0
    tokens: int = 0


GIVEN_UP = "given up"
"""The stage of a sum that the coordinator will not open any more."""


@dataclass(frozen=True)
class SumEntry:
    """A masked sum of a round: updates ("train") or losses ("evaluate tuning"); nothing in it is of a single site.

    Attributes:
        round, purpose: which sum.
        attempt: the last try, counted from 1.
        stage: what sites are asked for, "done", or "given up".
        collected_sha256: of the file with the masked sum; empty before it is whole.
        sites: whose updates are in the sum, with commas between them; empty before it is open.
        dropped: who dropped out of the last attempt, at which stage, and why.
        reason: why the sum could not be opened, the last time that it could not.
        weight, clipped, error: as in `server.unmask.Opening`.
        tokens, steps, nll: summed over the sites; nll in nats.
    """

    round: int
    purpose: str
    attempt: int = 0
    stage: str = ""
    collected_sha256: str = ""
    sites: str = ""
    dropped: str = ""
    reason: str = ""
    weight: int = 0
    clipped: int = 0
    error: float = 0.0
    tokens: int = 0
    steps: int = 0
    nll: float = 0.0


@dataclass(frozen=True)
class RoundEntry:
    """A round's phase and, from aggregation on, the sha256 of its checkpoint."""

    round: int
    phase: Phase
    checkpoint_sha256: str = ""


class Work(NamedTuple):
    """What the accepted updates of all rounds up to one stand for: tokens and steps summed, and how many sites."""

    tokens: int
    steps: int
    sites: int


class _Base(DeclarativeBase):
    pass


class _Run(_Base):
    __tablename__ = "run"
    id: Mapped[int] = mapped_column(primary_key=True)
    schema_version: Mapped[int]
    manifest_hash: Mapped[str]
    manifest: Mapped[bytes]
    started_at: Mapped[float]


class _Site(_Base):
    __tablename__ = "site"
    site: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    reason: Mapped[str]
    counts: Mapped[str]


class _Round(_Base):
    __tablename__ = "round"
    round: Mapped[int] = mapped_column(primary_key=True)
    phase: Mapped[str]
    checkpoint_sha256: Mapped[str]
    changed_at: Mapped[float]


class _Reply(_Base):
    __tablename__ = "reply"
    round: Mapped[int] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    reason: Mapped[str]
    update_sha256: Mapped[str]
    tokens: Mapped[int]
    steps: Mapped[int]
    loss: Mapped[float]
    norm: Mapped[float]
    bytes: Mapped[int]
    seconds: Mapped[float]
    received_at: Mapped[float]


class _Score(_Base):
    __tablename__ = "score"
    round: Mapped[int] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True)
    split: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    reason: Mapped[str]
    nll: Mapped[float]
    tokens: Mapped[int]


class _Sum(_Base):
    __tablename__ = "sum"
    round: Mapped[int] = mapped_column(primary_key=True)
    purpose: Mapped[str] = mapped_column(primary_key=True)
    attempt: Mapped[int]
    stage: Mapped[str]
    collected_sha256: Mapped[str]
    sites: Mapped[str]
    dropped: Mapped[str]
    reason: Mapped[str]
    weight: Mapped[int]
    clipped: Mapped[int]
    error: Mapped[float]
    tokens: Mapped[int]
    steps: Mapped[int]
    nll: Mapped[float]


# Times, and what follows from fresh keys or from how often something was interrupted.
_NOT_IN_FINGERPRINT = {"started_at", "changed_at", "received_at", "seconds", "attempt", "collected_sha256"}


class Journal:
    """An open ledger; close it, or use it in a `with` statement."""

    def __init__(self, path: Path) -> None:
        """Open the ledger at `path`, or begin one.

        Raises:
            DataError: the file is not a ledger, or one of another version of the tables.
        """
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._engine = _connect(path)
        try:
            _Base.metadata.create_all(self._engine)
            with Session(self._engine) as session:
                run = session.get(_Run, 1)
        except DatabaseError as cause:
            self._engine.dispose()
            raise DataError(f"{path} is not a ledger of fedcomet ({cause.orig}).") from None
        if run is not None and run.schema_version != SCHEMA:
            self._engine.dispose()
            raise DataError(f"{path} has tables of version {run.schema_version}; this software knows {SCHEMA}.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._engine.dispose()

    def begin(self, manifest: Manifest) -> None:
        """Note the manifest when the run begins; on a ledger that has one, check that it is the same.

        Raises:
            DataError: the ledger belongs to another run.
        """
        with self._transaction() as session:
            run = session.get(_Run, 1)
            if run is None:
                session.add(
                    _Run(
                        id=1,
                        schema_version=SCHEMA,
                        manifest_hash=manifest.hash,
                        manifest=manifest.to_bytes(),
                        started_at=time.time(),
                    )
                )
            elif run.manifest_hash != manifest.hash:
                raise DataError(
                    f"{self.path} is the ledger of run {run.manifest_hash}, not of {manifest.hash}; "
                    "take another run directory."
                )

    def manifest(self) -> Manifest | None:
        """Give the run's manifest, if the run has begun."""
        with Session(self._engine) as session:
            run = session.get(_Run, 1)
            return None if run is None else Manifest.from_bytes(run.manifest)

    def note_site(self, entry: SiteEntry) -> None:
        """Note whether a site takes part; a later note replaces an earlier one."""
        with self._transaction() as session:
            session.merge(_Site(**asdict(entry)))

    def sites(self) -> list[SiteEntry]:
        """Give all sites by name."""
        with Session(self._engine) as session:
            rows = session.scalars(select(_Site).order_by(_Site.site))
            return [SiteEntry(r.site, Status(r.status), r.reason, r.counts) for r in rows]

    def committed(self) -> int:
        """Give the number of the last committed round; 0 when there is none."""
        with Session(self._engine) as session:
            last = session.scalar(select(func.max(_Round.round)).where(_Round.phase == Phase.COMMITTED))
            return last or 0

    def round(self, number: int) -> RoundEntry | None:
        """Give a round's entry, if it was announced."""
        with Session(self._engine) as session:
            row = session.get(_Round, number)
            return None if row is None else RoundEntry(row.round, Phase(row.phase), row.checkpoint_sha256)

    def enter(self, number: int, phase: Phase, checkpoint_sha256: str | None = None) -> None:
        """Note that a round has reached a phase."""
        with self._transaction() as session:
            row = session.get(_Round, number)
            if row is None:
                row = _Round(round=number, phase="", checkpoint_sha256="", changed_at=0.0)
                session.add(row)
            row.phase, row.changed_at = phase, time.time()
            if checkpoint_sha256 is not None:
                row.checkpoint_sha256 = checkpoint_sha256

    def reopen(self, number: int) -> None:
        """Take up a round again after a crash: accepted answers stay, the others may be asked for again."""
        with self._transaction() as session:
            rows = delete(_Reply).where(_Reply.round == number, _Reply.status != Status.ACCEPTED)
            session.execute(rows)

    def note_reply(self, entry: ReplyEntry) -> None:
        """Note what became of a site's answer."""
        with self._transaction() as session:
            session.merge(_Reply(**asdict(entry), received_at=time.time()))

    def replies(self, number: int) -> list[ReplyEntry]:
        """Give a round's answers by site name."""
        with Session(self._engine) as session:
            rows = session.scalars(select(_Reply).where(_Reply.round == number).order_by(_Reply.site))
            return [_reply_entry(row) for row in rows]

    def note_sum(self, entry: SumEntry) -> None:
        """Note how far a masked sum is."""
        with self._transaction() as session:
            session.merge(_Sum(**asdict(entry)))

    def sum(self, number: int, purpose: str) -> SumEntry | None:
        """Give a masked sum's entry, if it was begun."""
        return next((entry for entry in self.sums(purpose) if entry.round == number), None)

    def sums(self, purpose: str) -> list[SumEntry]:
        """Give the masked sums for a purpose, by round."""
        with Session(self._engine) as session:
            rows = session.scalars(select(_Sum).where(_Sum.purpose == purpose).order_by(_Sum.round))
            return [SumEntry(**{name: getattr(row, name) for name in SumEntry.__dataclass_fields__}) for row in rows]

    def work(self, until: int) -> Work:
        """Sum the work behind the updates of the rounds up to and with `until`, accepted or in masked sums."""
        sums_until = [entry for entry in self.sums("train") if entry.round <= until and entry.sites]
        if sums_until:
            names = {site for entry in sums_until for site in entry.sites.split(",")}
            tokens, steps = (sum(getattr(entry, name) for entry in sums_until) for name in ("tokens", "steps"))
            return Work(tokens, steps, len(names))
        sums = select(func.sum(_Reply.tokens), func.sum(_Reply.steps), func.count(_Reply.site.distinct()))
        with Session(self._engine) as session:
            rows = session.execute(sums.where(_Reply.round <= until, _Reply.status == Status.ACCEPTED))
            tokens, steps, sites = rows.one()
        return Work(tokens or 0, steps or 0, sites)

    def note_scores(self, entries: Sequence[ScoreEntry], number: int) -> None:
        """Note a round's evaluations and that it is evaluated, in one step."""
        with self._transaction() as session:
            for entry in entries:
                session.merge(_Score(**asdict(entry)))
            row = session.get_one(_Round, number)
            row.phase, row.changed_at = Phase.EVALUATED, time.time()

    def scores(self) -> list[ScoreEntry]:
        """Give all evaluations, by round, split and site."""
        with Session(self._engine) as session:
            rows = session.scalars(select(_Score).order_by(_Score.round, _Score.split, _Score.site))
            return [ScoreEntry(r.round, r.site, r.split, Status(r.status), r.reason, r.nll, r.tokens) for r in rows]

    def losses(self, split: str) -> dict[int, float]:
        """Give the sites' common mean nll in nats per target on a split, by round."""
        sums: dict[int, tuple[float, int]] = {}
        for entry in self.scores():
            if entry.split == split and entry.tokens > 0:
                nll, tokens = sums.get(entry.round, (0.0, 0))
                sums[entry.round] = (nll + entry.nll, tokens + entry.tokens)
        for masked in self.sums(f"evaluate {split}"):
            if masked.tokens > 0:
                sums[masked.round] = masked.nll, masked.tokens
        return {number: nll / tokens for number, (nll, tokens) in sums.items()}

    def fingerprint(self) -> str:
        """Give the sha256 of everything in the ledger but wall-clock times."""
        digest = hashlib.sha256()
        with Session(self._engine) as session:
            for table in _Base.metadata.sorted_tables:
                digest.update(table.name.encode())
                for row in session.execute(select(table).order_by(*table.primary_key)).mappings():
                    digest.update(canonical.encode(_content(row)))
        return digest.hexdigest()

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with Session(self._engine) as session, session.begin():
            yield session


def _connect(path: Path) -> Engine:
    engine = create_engine(f"sqlite:///{path}")

    @event.listens_for(engine, "connect")
    def _durable(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    return engine


def _reply_entry(row: _Reply) -> ReplyEntry:
    values = {name: getattr(row, name) for name in ReplyEntry.__dataclass_fields__}
    return ReplyEntry(**{**values, "status": Status(row.status)})


def _content(row: Mapping[Any, Any]) -> dict[str, Any]:
    kept = {str(key): value for key, value in row.items() if key not in _NOT_IN_FINGERPRINT}
    return {key: value.hex() if isinstance(value, bytes) else value for key, value in kept.items()}
