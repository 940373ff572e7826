"""One update of many, and the optimizers that apply it to the global weights.

Sums run in float64, chunk by chunk, always in the order in which the updates are given: the caller sorts by site name,
so the result doesn't depend on who answered first, to the last bit. Updates may be memory-mapped or packed files;
beside them and the result no model-sized buffer is made.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federation.coding import Packed
from federation.manifest import OuterOptions
from federation.vectors import norm
from tokenizer.errors import FedcometError

Vector = NDArray[np.float32]
Update = Vector | Packed

_CHUNK = 1 << 18


class TooFewUpdates(FedcometError):
    """So few updates that the rule can't bear as many hostile ones among them as was agreed."""


@dataclass(frozen=True, eq=False)
class GlobalState:
    """The global weights, float32 [P], and the outer optimizer's first and second moment, float32 [P] or none yet."""

    weights: Vector
    momentum: Vector | None = None
    second: Vector | None = None


@dataclass(frozen=True, eq=False)
class Combined:
    """One update made of several: `combined[start:stop]` is float64.

    Attributes:
        updates: float32 [P] each, in canonical order.
        shares: a factor for each update, which sum to 1; 0 leaves it out. Of "median" and "trimmed_mean" only factors
            of length are used.
        scales: a factor of length for each update, 1 or less.
        rule, byzantine: as in `OuterOptions`.
    """

    updates: Sequence[Update]
    shares: Sequence[float]
    scales: Sequence[float]
    rule: str = "mean"
    byzantine: int = 0

    def __getitem__(self, part: slice) -> NDArray[np.float64]:
        if self.rule in ("mean", "krum"):
            total = np.zeros(part.stop - part.start, np.float64)
            for update, share, scale in zip(self.updates, self.shares, self.scales, strict=True):
                if share:
                    total += np.float64(share * scale) * update[part]
            return total
        rows = np.stack(
            [np.float64(scale) * update[part] for update, scale in zip(self.updates, self.scales, strict=True)]
        )
        if self.rule == "median":
            middle: NDArray[np.float64] = np.median(rows, axis=0)
            return middle
        rows.sort(axis=0)
        trimmed: NDArray[np.float64] = rows[self.byzantine : len(rows) - self.byzantine].mean(axis=0)
        return trimmed


def combine(updates: Sequence[Update], weights: Sequence[float], options: OuterOptions) -> Combined:
    """Make one update of several, by the agreed rule.

    - mean: Σ w·Δ / Σ w, no weight more than `max_share` of all.
    - median, trimmed_mean: coordinate by coordinate (Yin et al., ICML 2018, arXiv 1803.01498); of n values the
      `byzantine` smallest and largest are left out, which needs n > 2 · `byzantine`.
    - krum: the mean of the n − `byzantine` updates that are nearest to their neighbours (Multi-Krum; Blanchard et al.,
      NeurIPS 2017, arXiv 1703.02757): an update's score is the sum of its squared distances to its n − `byzantine` − 2
      nearest; it needs n > 2 · `byzantine` + 2.
    An update that is longer than `clip_norm` is cut to it before (Sun et al. 2019, arXiv 1911.07963).

    Args:
        updates: float32 [P] each, in canonical order.
        weights: above 0, one for each update.
        options: the rule.

    Raises:
        TooFewUpdates: see above.
    """
    n, f = len(updates), options.byzantine
    least = {"trimmed_mean": 2 * f + 1, "krum": 2 * f + 3}.get(options.rule, 1)
    if n < least:
        raise TooFewUpdates(f"{options.rule} with byzantine = {f} needs at least {least} updates, there are {n}.")
    scales = [1.0] * n
    if options.clip_norm is not None:
        scales = [min(1.0, options.clip_norm / length) if length else 1.0 for length in map(norm, updates)]
    if options.rule == "krum":
        taken = _krum(_products(updates) * np.outer(scales, scales), f)
        weights = [weight if chosen else 0.0 for weight, chosen in zip(weights, taken, strict=True)]
    return Combined(updates, _capped(weights, options.max_share), scales, options.rule, f)


def outer_step(state: GlobalState, update: Combined, options: OuterOptions) -> GlobalState:
    """Apply the combined update to the global weights.

    With θ the weights, Δ the update (local − global), η the outer learning rate, μ the momentum, and of the last two
    β₁ = μ, β₂ = `second`, τ = `floor`:
        fedavg: θ ← θ + η Δ
        nesterov: g = −Δ; v ← μ v + g; θ ← θ − η (g + μ v)
        adam: m ← β₁ m + (1 − β₁) Δ; v ← β₂ v + (1 − β₂) Δ²; θ ← θ + η m / (√v + τ)
        yogi: the same with v ← v − (1 − β₂) Δ² sign(v − Δ²)
    v begins with τ², m with 0.

    Args:
        state: the global weights and moments; not changed.
        update: what the sites' updates came to.
        options: which optimizer, its η and μ.

    Source: nesterov is the outer optimizer of DiLoCo (arXiv 2311.08105, algorithm 1), in the form of torch.optim.SGD;
    adam and yogi are FedAdam and FedYogi (Reddi et al., ICLR 2021, arXiv 2003.00295, algorithm 2).
    """
    weights = np.empty_like(state.weights)
    keeps, adapts = options.name != "fedavg", options.name in ("adam", "yogi")
    momentum = np.empty_like(state.weights) if keeps else None
    second = np.empty_like(state.weights) if adapts else None
    for start in range(0, state.weights.size, _CHUNK):
        part = slice(start, min(start + _CHUNK, state.weights.size))
        change = update[part]
        step = change
        if momentum is not None:
            old = 0.0 if state.momentum is None else state.momentum[part].astype(np.float64)
            if second is None:
                velocity = options.momentum * old - change
                momentum[part] = velocity
                step = change - options.momentum * velocity
            else:
                mean = options.momentum * old + (1 - options.momentum) * change
                before = options.floor**2 if state.second is None else state.second[part].astype(np.float64)
                square = _second(before, change, options)
                momentum[part], second[part] = mean, square
                step = mean / (np.sqrt(square) + options.floor)
        weights[part] = state.weights[part] + options.lr * step
    return GlobalState(weights, momentum, second)


def _second(
    before: NDArray[np.float64] | float, change: NDArray[np.float64], options: OuterOptions
) -> NDArray[np.float64]:
    """Give the second moment of FedAdam or FedYogi after an update."""
    square = change**2
    if options.name == "yogi":
        yogi: NDArray[np.float64] = before - (1 - options.second) * square * np.sign(before - square)
        return yogi
    return options.second * before + (1 - options.second) * square


def _capped(weights: Sequence[float], most: float) -> list[float]:
    """Give shares that sum to 1: as the weights, but none above `most`; what is cut off goes to the others."""
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    counted = sum(share > 0 for share in shares)
    if counted * most <= 1:
        return [1 / counted if share else 0.0 for share in shares]
    over: set[int] = set()
    while found := {i for i, share in enumerate(shares) if share > most * (1 + 1e-12)}:
        over |= found
        rest = math.fsum(weight for i, weight in enumerate(weights) if i not in over)
        free = 1 - len(over) * most
        shares = [most if i in over else weight / rest * free for i, weight in enumerate(weights)]
    return shares


def _products(updates: Sequence[Update]) -> NDArray[np.float64]:
    """Give all inner products, float64 [n, n]."""
    products = np.zeros((len(updates), len(updates)))
    for start in range(0, updates[0].size, _CHUNK):
        part = slice(start, min(start + _CHUNK, updates[0].size))
        rows = np.stack([update[part].astype(np.float64) for update in updates])
        products += rows @ rows.T
    return products


def _krum(products: NDArray[np.float64], byzantine: int) -> list[bool]:
    """Tell which updates Multi-Krum takes; of equal scores the first."""
    n = len(products)
    lengths = np.diagonal(products)
    distances = np.maximum(lengths[:, None] + lengths[None, :] - 2 * products, 0.0)
    np.fill_diagonal(distances, np.inf)
    scores = np.sort(distances, axis=1)[:, : n - byzantine - 2].sum(axis=1)
    taken = set(np.argsort(scores, kind="stable")[: n - byzantine].tolist())
    return [i in taken for i in range(n)]
