"""A site's node whose local training is a random update: `python -m benchmarks.random_site HOME`.

All the rest is a hospital's: connection, forked app processes, policy, rounding, archive, list of what leaves.
`benchmarks.transport` starts it.
"""

import os
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client import local, supernode
from federation.coding import Told
from model.train import StepResult
from tokenizer.windows import Batch

TILE = 1 << 20


def noise() -> NDArray[np.float32]:
    """Draw a million values, no two draws alike; the same cheap stand-in for training on both sides."""
    return np.random.default_rng().standard_normal(TILE, np.float32) * np.float32(1e-3)


def moved(weights: Told) -> NDArray[np.float32]:
    """Give weights [P] that have moved by noise, in a new vector."""
    tile, result = noise(), np.empty(weights.size, np.float32)
    for number, start in enumerate(range(0, weights.size, TILE)):
        part = weights[start : start + TILE]
        np.add(part, np.roll(tile, number)[: part.size], out=result[start : start + TILE])
    return result


class RandomTrainer:
    """Whose one step is taken before it is asked for."""

    precision, micro_tokens = "fp32", 512

    def __init__(self, weights: Told) -> None:
        self.decoder = weights

    def step(self, batch: Batch) -> StepResult:
        """Do nothing."""
        return StepResult(1.0, 100, 0.0, 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Keep nothing from round to round."""
        return {}


def trainer(work: local.Work, number: int, weights: Told, *how: Any, **more: Any) -> RandomTrainer:
    """Stand in for `client.local.Work.trainer`."""
    return RandomTrainer(weights)


if __name__ == "__main__":
    supernode.APP_MODULES = (*supernode.APP_MODULES, "benchmarks.random_site")
    code = supernode.main(sys.argv[1])
    sys.stdout.flush()
    os._exit(code)  # as the node itself does
elif sys.argv[0].endswith("nursery.py"):
    setattr(local.Work, "trainer", trainer)  # noqa: B010
    vars(local)["to_vector"] = moved
