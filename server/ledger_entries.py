"""What the ledger tells: values free of any session or connection. Times are seconds since the epoch."""

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from federation.pki import Role
from server.tables import Base, RunState, SiteStatus
from tokenizer.errors import FedcometError

E = TypeVar("E")

_STATES = {"state": RunState, "role": Role, "status": SiteStatus}


class LedgerRefusal(FedcometError):
    """What is asked for does not fit what the ledger holds: no such run or member, or not in this state."""


@dataclass(frozen=True)
class RunEntry:
    """A run; `manifest` and its hash are empty until the codebook is known, `reason` says why it failed."""

    name: str
    state: RunState
    reason: str
    manifest_hash: str
    manifest: bytes = field(repr=False)
    plan: bytes = field(repr=False)
    created_at: float
    started_at: float | None
    ended_at: float | None
    flower_run: str


@dataclass(frozen=True)
class Identity:
    """What a member is known by: PEM certificate, its serial and sha256 fingerprint, public keys in hex."""

    certificate: str = field(repr=False)
    serial: str
    fingerprint: str
    ed25519: str
    node_key: str
    expires_at: float


@dataclass(frozen=True)
class MemberEntry:
    """A member of the federation, with the identity that it has or had."""

    name: str
    role: Role
    status: SiteStatus
    ed25519: str
    certificate: str = field(repr=False)
    serial: str
    fingerprint: str
    node_key: str
    expires_at: float | None
    enrolled_at: float | None
    revoked_at: float | None
    last_seen: float | None
    version: str
    online_state: str


@dataclass(frozen=True)
class WitnessEntry:
    """Where a site's list of what leaves was: its number of entries, the sha256 of the last one, and when."""

    site: str
    entries: int
    sha256: str
    at: float


@dataclass(frozen=True)
class InviteEntry:
    """An invitation; the token itself is known to whom it was given."""

    token_sha256: str
    site: str
    role: Role
    created_at: float
    expires_at: float
    used_at: float | None


@dataclass(frozen=True)
class ApprovalEntry:
    """A site's signature under a manifest, in hex."""

    manifest_hash: str
    site: str
    signature: str
    at: float


@dataclass(frozen=True)
class BudgetEntry:
    """What a site tells of its privacy budget; without a limit, none is set; `run` is the run's name, if of one."""

    site: str
    epsilon: float
    delta: float
    limit_epsilon: float | None = None
    limit_delta: float | None = None
    run: str | None = None
    at: float = 0.0


@dataclass(frozen=True)
class EventEntry:
    """Who did what; numbers grow in the order in which events became durable."""

    id: int
    at: float
    who: str
    what: str
    run: str | None
    round: int | None
    site: str
    text: str


@dataclass(frozen=True)
class CheckpointEntry:
    """A checkpoint that a run has made; `path` is told from the run's folder."""

    round: int
    path: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class MetricEntry:
    """A figure of a round, of a site or, with an empty one, of all."""

    round: int
    name: str
    value: float
    site: str = ""


@dataclass(frozen=True)
class RefusalEntry:
    """An answer that was not taken, or a request that a site did not answer, and why."""

    round: int
    site: str
    what: str
    reason: str
    at: float


def entry_of(kind: type[E], row: Base, **known: Any) -> E:
    """Make a value of a row, whose columns have the names of its fields; `known` are those that it has not as such."""
    names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {name: known.get(name, getattr(row, name, None)) for name in names}
    for name in _STATES.keys() & values.keys():
        values[name] = _STATES[name](values[name])
    return kind(**values)
