"""A site's node whose local training is a random update: `python -m benchmarks.random_site HOME`.

All the rest is a hospital's: connection, forked app processes, policy, rounding, archive, list of what leaves.
`benchmarks.transport` starts it.
"""

import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client import local, site, supernode
from client.archive import Choices, RunArchive
from federation.messages import TrainReply
from model.parallel import ALONE, Team
from model.train import StepResult

TILE = 1 << 20


def noise() -> NDArray[np.float32]:
    """Draw a million values, no two draws alike; the same cheap stand-in for training on both sides."""
    return np.random.default_rng().standard_normal(TILE, np.float32) * np.float32(1e-3)


def moved(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Give weights [P] that have moved by noise, in a new vector."""
    tile, result = noise(), np.empty_like(weights)
    for number, start in enumerate(range(0, weights.size, TILE)):
        part = weights[start : start + TILE]
        np.add(part, np.roll(tile, number)[: part.size], out=result[start : start + TILE])
    return result


class RandomRound(local.LocalRound):
    """A round whose work is done when it begins."""

    def __init__(self, work: local.Work, run: RunArchive, task: local.Task, team: Team = ALONE) -> None:
        self._work, self._run, self._task, self._team = work, run, task, team
        self._results, self._seconds, self._lost = [StepResult(1.0, 100, 0.0, 0.0)], 0.0, False
        self.residual = None
        self.trainer: Any = SimpleNamespace(decoder=task.request.weights, state_dict=dict)

    def go(self, keep_end: bool = False) -> None:
        """Do nothing."""

    def drift(self, reply: TrainReply) -> None:
        """Correct nothing."""

    @property
    def choices(self) -> Choices:
        """What a site would have chosen."""
        return Choices("fp32", 512)


if __name__ == "__main__":
    supernode.APP_MODULES = (*supernode.APP_MODULES, "benchmarks.random_site")
    code = supernode.main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # as the node itself does
elif sys.argv[0].endswith("nursery.py"):
    vars(site)["LocalRound"] = RandomRound
    vars(local)["to_vector"] = moved
