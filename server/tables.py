"""The tables of a federation's ledger, one database whatever the number of runs.

Times are seconds since the epoch, hashes lower-case hex, losses nats. A name that says nothing is the empty string, so
that it can be part of a key; only a time that has not come and a run that there is none are NULL. What is appended
(events, refusals, budgets) has a number that grows in the order of commits: every writer waits for the one before.

A change here needs a revision in `server/migrations` and its number in `REVISION`; a test compares the two.
"""

from enum import StrEnum

from sqlalchemy import BigInteger, Double, ForeignKey, Integer, LargeBinary, MetaData
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

REVISION = "0002"
"""The revision of the tables below: the newest in `server/migrations`."""

# SQLite numbers rows by itself only in a column of exactly this type.
_Big = BigInteger().with_variant(Integer, "sqlite")


class RunState(StrEnum):
    """How far a run is; `PAUSING` and `STOPPING` are wishes that whoever leads the run turns into what follows."""

    PROPOSED = "proposed"
    READY = "ready"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    FINISHED = "finished"


class SiteStatus(StrEnum):
    """How far a member of the federation is enrolled."""

    INVITED = "invited"
    ENROLLED = "enrolled"
    REVOKED = "revoked"


class Base(DeclarativeBase):
    """All tables; constraints have names that migrations can tell."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {int: _Big, float: Double, bytes: LargeBinary}  # noqa: RUF012  (SQLAlchemy's own form)


def _run() -> Mapped[int]:
    return mapped_column(ForeignKey("run.id"), primary_key=True)


class Run(Base):
    """A run; `manifest` and its hash are empty until the codebook is known, `plan` is the federation plan's bytes."""

    __tablename__ = "run"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    manifest_hash: Mapped[str] = mapped_column(default="", index=True)
    manifest: Mapped[bytes] = mapped_column(default=b"")
    plan: Mapped[bytes] = mapped_column(default=b"")
    state: Mapped[str]
    reason: Mapped[str] = mapped_column(default="")
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    ended_at: Mapped[float | None]
    flower_run: Mapped[str] = mapped_column(default="")


class Site(Base):
    """A member of the federation and its one identity; `ed25519` and `node_key` are public keys, in hex."""

    __tablename__ = "site"
    name: Mapped[str] = mapped_column(primary_key=True)
    role: Mapped[str]
    status: Mapped[str]
    ed25519: Mapped[str] = mapped_column(default="")
    certificate: Mapped[str] = mapped_column(default="")
    serial: Mapped[str] = mapped_column(default="")
    fingerprint: Mapped[str] = mapped_column(default="", index=True)
    node_key: Mapped[str] = mapped_column(default="")
    expires_at: Mapped[float | None]
    enrolled_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_seen: Mapped[float | None]
    version: Mapped[str] = mapped_column(default="")
    online_state: Mapped[str] = mapped_column(default="")


class Witness(Base):
    """Where a site's list of what leaves was, when it last showed that it still holds what was noted here before."""

    __tablename__ = "witness"
    site: Mapped[str] = mapped_column(primary_key=True)
    entries: Mapped[int]
    sha256: Mapped[str]
    at: Mapped[float]


class Invite(Base):
    """A one-time token, of which only the sha256 is known here."""

    __tablename__ = "invite"
    token_sha256: Mapped[str] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(index=True)
    role: Mapped[str]
    created_at: Mapped[float]
    expires_at: Mapped[float]
    used_at: Mapped[float | None]


class Participant(Base):
    """A site's part in a run."""

    __tablename__ = "participant"
    run: Mapped[int] = _run()
    site: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    reason: Mapped[str]
    counts: Mapped[str]


class Round(Base):
    """How far a round is."""

    __tablename__ = "round"
    run: Mapped[int] = _run()
    round: Mapped[int] = mapped_column(primary_key=True)
    phase: Mapped[str]
    checkpoint_sha256: Mapped[str]
    changed_at: Mapped[float]


class Reply(Base):
    """What became of a site's answer in a round."""

    __tablename__ = "reply"
    run: Mapped[int] = _run()
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


class Score(Base):
    """What became of a site's evaluation of a round."""

    __tablename__ = "score"
    run: Mapped[int] = _run()
    round: Mapped[int] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True)
    split: Mapped[str] = mapped_column(primary_key=True)
    status: Mapped[str]
    reason: Mapped[str]
    nll: Mapped[float]
    tokens: Mapped[int]


class Sum(Base):
    """A masked sum of a round."""

    __tablename__ = "sum"
    run: Mapped[int] = _run()
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


class Checkpoint(Base):
    """A checkpoint that was made; `path` is told from the run's folder, where old ones are swept."""

    __tablename__ = "checkpoint"
    run: Mapped[int] = _run()
    round: Mapped[int] = mapped_column(primary_key=True)
    path: Mapped[str]
    sha256: Mapped[str]
    bytes: Mapped[int]


class Metric(Base):
    """A figure of a round, of a site or, with none, of all."""

    __tablename__ = "metric"
    run: Mapped[int] = _run()
    round: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True, default="")
    value: Mapped[float]


class Approval(Base):
    """A site's signature under a manifest, in hex."""

    __tablename__ = "approval"
    manifest_hash: Mapped[str] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(primary_key=True)
    signature: Mapped[str]
    at: Mapped[float]


class Refusal(Base):
    """An answer that was not taken, or a request that a site did not answer; append only."""

    __tablename__ = "refusal"
    id: Mapped[int] = mapped_column(primary_key=True)
    run: Mapped[int] = mapped_column(ForeignKey("run.id"), index=True)
    round: Mapped[int]
    site: Mapped[str]
    what: Mapped[str]
    reason: Mapped[str]
    at: Mapped[float]


class Budget(Base):
    """What a site told of its privacy budget; append only."""

    __tablename__ = "budget"
    id: Mapped[int] = mapped_column(primary_key=True)
    site: Mapped[str] = mapped_column(index=True)
    at: Mapped[float]
    epsilon: Mapped[float]
    delta: Mapped[float]
    limit_epsilon: Mapped[float | None]
    limit_delta: Mapped[float | None]
    run: Mapped[int | None] = mapped_column(ForeignKey("run.id"))


class Event(Base):
    """Who did what; append only. `change` names the transaction, so that a commit whose answer was lost is found."""

    __tablename__ = "event"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[float]
    who: Mapped[str]
    what: Mapped[str]
    run: Mapped[int | None] = mapped_column(ForeignKey("run.id"), index=True)
    round: Mapped[int | None]
    site: Mapped[str] = mapped_column(default="")
    text: Mapped[str] = mapped_column(default="")
    change: Mapped[str] = mapped_column(index=True)


class Lease(Base):
    """Who may lead runs, and until when; `token` grows with every holder, and writes with an older one are refused."""

    __tablename__ = "lease"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[int]
    holder: Mapped[str]
    host: Mapped[str]
    pid: Mapped[int]
    until: Mapped[float]
