"""What an audit found, as plain values, and whether it contradicts what is claimed.

An `Audit` is complete: the JSON beside the page is its canonical form, and page and exit code are made from nothing
else. A figure that isn't defined is None with a reason, never nan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from simulation.attacks.bound import Bound
from simulation.attacks.leakage import Leak
from simulation.attacks.membership import Separation
from simulation.attacks.memory import Rare, Repetition
from simulation.attacks.releases import Told


@dataclass(frozen=True)
class Claim:
    """What is claimed about privacy.

    Attributes:
        epsilon, delta: of a patient, add or remove.
        basis: where the figures come from, in words.
    """

    epsilon: float
    delta: float
    basis: str


@dataclass(frozen=True)
class Canaries:
    """The audit in one run.

    Attributes:
        bound: what the guesses prove.
        provable: the largest bound that these canaries could have proved, had every guess been right.
        inside, outside: scores of canaries that the coins put in and left out, ascending: how much the training
            lowered the loss of each, in nats a token.
    """

    bound: Bound
    provable: float
    inside: tuple[float, ...]
    outside: tuple[float, ...]


@dataclass(frozen=True)
class Target:
    """A model under attack by membership inference.

    Attributes:
        name: which model.
        members, others: who they are, in words.
        reference: what calibrates the scores, in words; empty if nothing does.
        attacks: what each attack found.
    """

    name: str
    members: str
    others: str
    reference: str
    attacks: tuple[Separation, ...]


@dataclass(frozen=True)
class Stage:
    """A round whose updates are under attack.

    Attributes:
        name: which round.
        steps: optimizer steps of each site in it.
        leaks: by site.
    """

    name: str
    steps: int
    leaks: tuple[Leak, ...]


@dataclass(frozen=True)
class Audit:
    """All that an audit found.

    Attributes:
        title: what was audited.
        facts: about it and about how the audit was done, by name.
        claim: the privacy that is claimed; None if none is.
        canaries: None where no training was audited.
        releases: of noise on updates; None where the noise is in the steps, or there is none.
        targets: models under membership inference.
        planted: what became of planted courses.
        rare: what came out of a finished model.
        stages: rounds whose updates were attacked.
        notes: what a reader must know besides.
        software: version of fedcomet.
        command: that made it.
    """

    title: str
    facts: Mapping[str, str]
    claim: Claim | None = None
    canaries: Canaries | None = None
    releases: Told | None = None
    targets: tuple[Target, ...] = ()
    planted: tuple[Repetition, ...] = ()
    rare: Rare | None = None
    stages: tuple[Stage, ...] = ()
    notes: tuple[str, ...] = ()
    software: str = ""
    command: str = ""
    alarm: str = field(default="", init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "alarm", _alarm(self.claim, self.bound))

    @property
    def bound(self) -> Bound | Told | None:
        """What is proved of epsilon; None if nothing was tried."""
        return self.releases if self.canaries is None else self.canaries.bound


def _alarm(claim: Claim | None, bound: Bound | Told | None) -> str:
    """Say what contradicts the claim; empty if nothing does."""
    if claim is None or bound is None or bound.epsilon <= claim.epsilon:
        return ""
    return (
        f"The privacy claim does not hold: epsilon is at least {bound.epsilon:.2f} with {bound.confidence:.1%} "
        f"confidence, and {claim.epsilon:.2f} is claimed (delta {claim.delta:g}). Do not release this model under that "
        "claim; look for steps, noise or sampling that did not run as they were accounted for."
    )
