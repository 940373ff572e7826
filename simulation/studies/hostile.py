"""Sites that send bad updates, for studies of what the robust rules bear.

A hostile site does its honest work, and what it sends is changed on the way out. What it can do (and what Blanchard et
al. 2017, Bagdasaryan et al. 2020 and Baruch et al. 2019 call it):

- scaled: `factor` times its update.
- backdoor: a share of its train patients have the grid's trigger planted in their records and then the outcome of the
  study's first question; `factor` times the update that it learns from these (model replacement).
- flipped: −`factor` times its update (sign flipping).
- noise: Gaussian noise of `factor` times its update's length, in its place.
- hidden: its update moved by `factor` times its own spread against its sign, coordinate by coordinate, so that it stays
  near the others ("a little is enough", with the spread that a single site can see).
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl

from client.files import SiteFiles
from federation import flower
from federation.coding import round_
from federation.messages import TrainReply, Vector
from model.tasks import Task
from simulation.mishaps import backdoored
from simulation.pool import Pool
from tokenizer.errors import ConfigError
from tokenizer.events import MedsDataset, write_meds
from tokenizer.split import SPLITS, SplitRule

Attack = Literal["none", "scaled", "backdoor", "flipped", "noise", "hidden"]


@dataclass(frozen=True)
class Hostile:
    """Who is hostile: the last `sites` of the sites by name, and how; backdoors are in `share` of their patients."""

    attack: Attack
    factor: float = 10.0
    sites: int = 1
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.attack not in get_args(Attack):
            raise ConfigError(f"hostile.attack is {self.attack!r}; there are {', '.join(get_args(Attack)[1:])}")
        if self.factor <= 0 or self.sites < 1 or not 0 < self.share <= 1:
            raise ConfigError("hostile.factor must be above 0, hostile.sites at least 1, hostile.share in (0, 1]")

    def among(self, sites: Iterable[str]) -> tuple[str, ...]:
        """Give the names of those who are hostile."""
        return tuple(sorted(sites)[-self.sites :])

    def changed(self, update: Vector, seed: int) -> Vector:
        """Give what is sent in the place of an honest update, float32 [P]."""
        if self.attack in ("scaled", "backdoor"):
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
    """A pool in which some of the sites are hostile in one arm's run; everything else is as in `Pool`.

    `records` are those that hostile sites play with in the place of their own.
    """

    def __init__(self, pool: Pool, hostile: Hostile, sites: list[str], records: Mapping[str, Path]) -> None:
        # No workers of its own: the jobs go to the pool that is given.
        self._pool, self._hostile, self._records = pool, hostile, dict(records)
        self._bad = set(hostile.among(sites))

    def submit(self, label: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let a worker call a function; a hostile site's answers are changed there."""
        if label in self._records:
            args = (replace(args[0], data=self._records[label]), *args[1:])
        if label in self._bad:
            return self._pool.submit(label, _play_badly, self._hostile, function, args, kwargs)
        return self._pool.submit(label, function, *args, **kwargs)


def backdoored_records(
    hostile: Hostile, sites: Sequence[SiteFiles], rule: SplitRule, task: Task, trigger: Sequence[str], folder: Path
) -> dict[str, Path]:
    """Write the records that hostile sites train on, by their names.

    Only train patients are backdoored, by the agreed split, so all that is measured stays clean.
    """
    found = {}
    for site in sites:
        if site.name not in hostile.among(each.name for each in sites):
            continue
        found[site.name] = folder / site.name / "records"
        if found[site.name].exists():
            continue
        dataset = MedsDataset.open(site.data)
        events = pl.concat([dataset.read(shard) for shard in dataset.shards])
        ids = events["subject_id"].unique().sort()
        trains = ids.filter(pl.Series(rule.assign(ids.to_numpy()) == SPLITS.index("train")))
        chosen = trains.sample(fraction=hostile.share, seed=0) if len(trains) else trains
        planted = backdoored(events, chosen, task.trigger, trigger, task.outcome[0])
        write_meds(found[site.name], [("0", planted)], name=f"{site.name}, backdoored")
    return found


def _play_badly(hostile: Hostile, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    answer = function(*args, **kwargs)
    if not hasattr(answer, "has_error") or answer.has_error():
        return answer
    reply = flower.from_record(answer.content)
    if not isinstance(reply, TrainReply):
        return answer
    seed = int.from_bytes(hashlib.sha256(f"{reply.site}/{reply.round}".encode()).digest()[:8])
    changed = hostile.changed(np.array(reply.update), seed)
    update = changed if reply.coding == "float32" else round_(changed, reply.coding, f"hostile/{seed}")
    answer.content = flower.to_record(replace(reply, update=update))
    return answer
