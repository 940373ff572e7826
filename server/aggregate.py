"""The mean of the sites' updates, and the optimizers that apply it to the global weights.

Sums run in float64, chunk by chunk, always in the order in which the updates are given: the caller sorts by site name,
so the result doesn't depend on who answered first, to the last bit. Updates may be memory-mapped files; beside them
and the result no model-sized buffer is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federation.manifest import OuterOptions

Vector = NDArray[np.float32]

_CHUNK = 1 << 18


@dataclass(frozen=True, eq=False)
class GlobalState:
    """The global weights, float32 [P], and the outer optimizer's momentum, float32 [P] or none yet."""

    weights: Vector
    momentum: Vector | None = None


def outer_step(
    state: GlobalState, updates: Sequence[Vector], shares: Sequence[float], options: OuterOptions
) -> GlobalState:
    """Apply the mean update to the global weights.

    With θ the weights, Δ the weighted mean of the updates (local − global), η the outer learning rate, μ the momentum:
        fedavg: θ ← θ + η Δ
        nesterov: g = −Δ; v ← μ v + g; θ ← θ − η (g + μ v)

    Args:
        state: the global weights and momentum; not changed.
        updates: float32 [P] each, in canonical order.
        shares: a weight above 0 for each update.
        options: which optimizer, its η and μ.

    Source: nesterov is the outer optimizer of DiLoCo (arXiv 2311.08105, algorithm 1), in the form of torch.optim.SGD.
    """
    weights = np.empty_like(state.weights)
    keeps = options.name == "nesterov"
    momentum = np.empty_like(state.weights) if keeps else None
    for start in range(0, state.weights.size, _CHUNK):
        part = slice(start, min(start + _CHUNK, state.weights.size))
        gradient = -_mean(updates, shares, part)
        step = gradient
        if momentum is not None:
            old = 0.0 if state.momentum is None else state.momentum[part].astype(np.float64)
            velocity = options.momentum * old + gradient
            momentum[part] = velocity
            step = gradient + options.momentum * velocity
        weights[part] = state.weights[part] - options.lr * step
    return GlobalState(weights, momentum)


def weighted_mean(updates: Sequence[Vector], shares: Sequence[float]) -> Vector:
    """Give Σ share·update / Σ share, float32 [P], summed in float64 in the order given."""
    mean = np.empty(updates[0].size, np.float32)
    for start in range(0, mean.size, _CHUNK):
        part = slice(start, min(start + _CHUNK, mean.size))
        mean[part] = _mean(updates, shares, part)
    return mean


def _mean(updates: Sequence[Vector], shares: Sequence[float], part: slice) -> NDArray[np.float64]:
    total = np.zeros(part.stop - part.start, np.float64)
    for update, share in zip(updates, shares, strict=True):
        total += np.float64(share) * update[part]
    mean: NDArray[np.float64] = total / np.float64(sum(shares))
    return mean
