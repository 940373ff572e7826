"""What the journal of a run takes and gives: rounds, answers, evaluations and masked sums as plain values."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


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


@dataclass(frozen=True)
class SumEntry:
    """A masked sum of a round: updates ("train") or losses ("evaluate tuning"); nothing in it is of a single site.

    Attributes:
        round, purpose: which sum.
        attempt: the last try, counted from 1.
        stage: what sites are asked for, or "done".
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


@dataclass(frozen=True)
class Checkpoint:
    """A file with the weights after a round; `path` is told from the run's folder."""

    path: str
    sha256: str
    bytes: int


class Work(NamedTuple):
    """What the accepted updates of all rounds up to one stand for: tokens and steps summed, and how many sites."""

    tokens: int
    steps: int
    sites: int
