"""What goes wrong in a simulated federation, decided by a seed: sites that drop out, are late, or are away.

For every round and site the fate is a function of (seed, site, round) alone, so that a scenario is the same whoever
works on it, in whatever order, and after a crash. It concerns requests to train; a site that misses one answers the
next. Lateness is in virtual seconds: nobody waits for them (`simulation.engine`).
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tokenizer.errors import ConfigError


@dataclass(frozen=True)
class Fate:
    """What becomes of one request to train.

    Attributes:
        answers: whether an answer ever comes; if not, the site did not work.
        late_s: virtual seconds that the answer takes on top. Past the round's deadline it is lost, though the site has
            done its work.
    """

    answers: bool = True
    late_s: float = 0.0


@dataclass(frozen=True)
class Scenario:
    """What may go wrong.

    Attributes:
        seed: of everything that is drawn.
        dropout: chance that a site drops out of a round.
        straggler: chance that one who doesn't is late.
        straggler_s: mean lateness of those, in seconds; exponential.
        absent: rounds in which a site is away, by its name.
    """

    seed: int = 0
    dropout: float = 0.0
    straggler: float = 0.0
    straggler_s: float = 600.0
    absent: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("dropout", "straggler"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"scenario.{name} must be a chance from 0 to 1, not {getattr(self, name)}.")
        if not self.straggler_s > 0:
            raise ConfigError(f"scenario.straggler_s must be more than 0 seconds, not {self.straggler_s}.")

    def fate(self, site: str, number: int) -> Fate:
        """Decide what becomes of the request to train of a site in a round.

        >>> Scenario(absent={"north": (2,)}).fate("north", 2)
        Fate(answers=False, late_s=0.0)
        """
        if number in self.absent.get(site, ()):
            return Fate(answers=False)
        if not self.dropout and not self.straggler:
            return Fate()
        key = hashlib.sha256(f"{self.seed}/{number}/{site}".encode()).digest()
        drops, lags, slowness = np.random.default_rng(int.from_bytes(key[:16], "little")).random(3)
        if drops < self.dropout:
            return Fate(answers=False)
        if lags < self.straggler:
            return Fate(late_s=float(-self.straggler_s * np.log1p(-slowness)))
        return Fate()
