"""Sites that send bad updates, for studies of what the robust rules bear.

A hostile site does its honest work, and what it sends is changed on the way out. What it can do (and what Blanchard et
al. 2017, Bagdasaryan et al. 2020 and Baruch et al. 2019 call it):

- scaled: `factor` times its update (model replacement; with a poisoned record it is a backdoor that survives the mean).
- flipped: −`factor` times its update (sign flipping).
- noise: Gaussian noise of `factor` times its update's length, in its place.
- hidden: its update moved by `factor` times its own spread against its sign, coordinate by coordinate, so that it stays
  near the others ("a little is enough", with the spread that a single site can see).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from federation import flower
from federation.coding import round_
from federation.messages import TrainReply, Vector
from simulation.pool import Pool
from tokenizer.errors import ConfigError

Attack = Literal["none", "scaled", "flipped", "noise", "hidden"]


@dataclass(frozen=True)
class Hostile:
    """Who is hostile: the last `sites` of the sites by name, and how."""

    attack: Attack
    factor: float = 10.0
    sites: int = 1

    def __post_init__(self) -> None:
        if self.attack not in ("none", "scaled", "flipped", "noise", "hidden"):
            raise ConfigError(f"hostile.attack is {self.attack!r}; there are scaled, flipped, noise and hidden")
        if self.factor <= 0 or self.sites < 1:
            raise ConfigError("hostile.factor must be above 0, and hostile.sites at least 1")

    def changed(self, update: Vector, seed: int) -> Vector:
        """Give what is sent in the place of an honest update, float32 [P]."""
        if self.attack == "scaled":
            return np.float32(self.factor) * update
        if self.attack == "flipped":
            return np.float32(-self.factor) * update
        if self.attack == "noise":
            noise = np.random.default_rng(seed).standard_normal(update.size)
            length = float(np.linalg.norm(update)) * self.factor
            made: Vector = (noise * (length / np.linalg.norm(noise))).astype(np.float32)
            return made
        moved: Vector = (update - self.factor * float(update.std()) * np.sign(update)).astype(np.float32)
        return moved


class HostilePool(Pool):
    """A pool in which some of the sites are hostile in one arm's run; everything else is as in `Pool`."""

    def __init__(self, pool: Pool, hostile: Hostile, sites: list[str]) -> None:
        # No workers of its own: the jobs go to the pool that is given.
        self._pool, self._hostile = pool, hostile
        self._bad = set(sorted(sites)[-hostile.sites :])

    def submit(self, label: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let a worker call a function; a hostile site's answers are changed there."""
        if label in self._bad:
            return self._pool.submit(label, _play_badly, self._hostile, function, args, kwargs)
        return self._pool.submit(label, function, *args, **kwargs)


def _play_badly(hostile: Hostile, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    answer = function(*args, **kwargs)
    if not hasattr(answer, "has_error") or answer.has_error():
        return answer
    reply = flower.from_record(answer.content)
    if not isinstance(reply, TrainReply):
        return answer
    seed = int.from_bytes(hashlib.sha256(f"{reply.site}/{reply.round}".encode()).digest()[:8])
    update = hostile.changed(np.array(reply.update), seed)
    if reply.coding != "float32":
        round_(update, reply.coding, f"hostile/{seed}", None)
    answer.content = flower.to_record(replace(reply, update=update))
    return answer
