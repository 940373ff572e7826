"""Scaling laws: fits of the loss to parameters, tokens and compute, with bootstrap intervals.

- The parametric law L(N, D) = E + A / N^α + B / D^β, by Huber loss on log L over a grid of starts (Hoffmann et al.
  2022, arXiv 2203.15556, section 3.3, with δ = 1e-3). Its optimum at compute C = 6 N D has N ∝ C^(β / (α + β)).
- IsoFLOP profiles: at each compute a parabola of L over log N; its minimum is the best N, and a line through the minima
  in log-log gives the exponents of N and D (their section 3.2). CoMET reports about 0.52 and 0.51.

Runs are resampled with replacement within each compute, so an interval tells how much of a figure is luck of runs; it
does not tell what another range of sizes would give.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from tokenizer.errors import DataError

Floats = NDArray[np.float64]
_DELTA = 1e-3
_SCALE = 1e6  # so that the optimizer does not think that it has arrived
_SAME = 0.15  # computes within so many natural logarithms are one profile


@dataclass(frozen=True)
class Run:
    """A trained model: parameters N, tokens D, its loss in nats per token."""

    parameters: float
    tokens: float
    loss: float

    @property
    def compute(self) -> float:
        """6 N D, in FLOP."""
        return 6.0 * self.parameters * self.tokens


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    floor: float
    a: float
    b: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss in nats per token."""
        return self.floor + self.a * parameters**-self.alpha + self.b * tokens**-self.beta

    def best(self, compute: float) -> tuple[float, float]:
        """Give the parameters and tokens with the lowest loss for a compute (equation 4 of arXiv 2203.15556)."""
        share = self.beta / (self.alpha + self.beta)
        scale = (self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta))
        parameters = scale * (compute / 6) ** share
        return parameters, compute / 6 / parameters


def fit_law(runs: Sequence[Run], near: Law | None = None) -> Law:
    """Fit the parametric law.

    Args:
        runs: what was trained.
        near: where to begin; without, from a grid of starts.

    Raises:
        DataError: fewer than 6 runs, or sizes or tokens that don't differ.
    """
    n, d, loss = (np.array([getattr(run, name) for run in runs]) for name in ("parameters", "tokens", "loss"))
    if len(runs) < 6 or len(set(n)) < 2 or len(set(d)) < 2:
        raise DataError("A scaling law needs 6 runs or more, of two sizes and two numbers of tokens at least.")
    # Around the means, so that the five numbers hardly depend on one another.
    around_n, around_d = math.exp(np.log(n).mean()), math.exp(np.log(d).mean())
    log_n, log_d, log_loss = np.log(n / around_n), np.log(d / around_d), np.log(loss)

    def wrong(x: Floats) -> tuple[float, Floats]:
        log_a, log_b, log_e, alpha, beta = x
        terms = np.stack([log_a - alpha * log_n, log_b - beta * log_d, np.full(len(n), log_e)])
        off = logsumexp(terms, axis=0) - log_loss
        share = softmax(terms, axis=0)
        huber = np.where(np.abs(off) <= _DELTA, off**2 / 2, _DELTA * (np.abs(off) - _DELTA / 2))
        slope = np.clip(off, -_DELTA, _DELTA) * share
        gradient = np.stack([*slope, -slope[0] * log_n, -slope[1] * log_d]).sum(axis=1)
        return float(huber.sum()) * _SCALE, gradient * _SCALE

    low = math.log(loss.min())
    starts = [
        (low + gain, low + gain, low + floor, slope, slope)
        for gain in (-2.0, -0.5) for floor in (-1.0, -0.1) for slope in (0.2, 0.6)
    ]  # fmt: skip
    if near is not None:
        a, b = near.a * around_n**-near.alpha, near.b * around_d**-near.beta
        starts = [(math.log(a), math.log(b), math.log(near.floor), near.alpha, near.beta)]
    bounds = [(-20.0, 20.0)] * 2 + [(-10.0, low)] + [(0.01, 3.0)] * 2
    fits = (minimize(wrong, x, jac=True, method="L-BFGS-B", bounds=bounds) for x in starts)
    log_a, log_b, log_e, alpha, beta = map(float, min(fits, key=lambda found: found.fun).x)
    a, b = math.exp(log_a) * around_n**alpha, math.exp(log_b) * around_d**beta
    return Law(math.exp(log_e), a, b, alpha, beta)


@dataclass(frozen=True)
class Profile:
    """One compute: its runs, the best number of parameters and the loss there; None where no minimum is inside."""

    compute: float
    runs: tuple[Run, ...]
    parameters: float | None
    loss: float | None


def profiles(runs: Sequence[Run]) -> tuple[Profile, ...]:
    """Fit a parabola of the loss over log N to the runs of each compute that has three sizes or more."""
    found: list[Profile] = []
    for group in by_compute(runs):
        log_n, loss = np.log([run.parameters for run in group]), np.array([run.loss for run in group])
        compute = float(np.exp(np.mean(np.log([run.compute for run in group]))))
        if len(set(log_n)) < 3:
            continue
        curve, slope, _ = np.polyfit(log_n, loss, 2)
        at = -slope / (2 * curve) if curve > 0 else math.inf
        if log_n.min() <= at <= log_n.max():
            lowest = float(np.polyval(np.polyfit(log_n, loss, 2), at))
            found.append(Profile(compute, tuple(group), float(math.exp(at)), lowest))
        else:
            found.append(Profile(compute, tuple(group), None, None))
    return tuple(found)


def by_compute(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs of about the same compute."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.compute):
        if groups and math.log(run.compute / groups[-1][0].compute) < _SAME:
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def exponents(found: Sequence[Profile]) -> tuple[float, float] | None:
    """Give the exponents of the best N and D in compute; None with fewer than two minima."""
    inside = [(profile.compute, profile.parameters) for profile in found if profile.parameters is not None]
    if len(inside) < 2:
        return None
    x, y = np.log([c for c, _ in inside]), np.log([n for _, n in inside])
    slope = float(np.polyfit(x, y, 1)[0])
    return slope, 1 - slope


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval, and in how many resamples it could be made."""

    value: float | None
    low: float | None
    high: float | None
    made: int


def estimates(runs: Sequence[Run], resamples: int, seed: int = 0) -> Mapping[str, Estimate]:
    """Give every figure of the fits with its interval.

    Returns:
        `E`, `alpha`, `beta`, `exponent of N` and `exponent of D` of the law; `IsoFLOP exponent of N`, `... of D`; and
        `loss exponent`: of the lowest loss above E in compute.
    """
    rng = np.random.default_rng(seed)
    try:
        law = fit_law(runs)
    except DataError:
        law = None
    whole = _figures(runs, law)
    groups = by_compute(runs)
    drawn: dict[str, list[float]] = {name: [] for name in whole}
    for _ in range(resamples):
        again = [group[i] for group in groups for i in rng.integers(0, len(group), len(group))]
        for name, value in _figures(again, law and _again(again, law)).items():
            if value is not None:
                drawn[name].append(value)
    return {name: _estimate(value, drawn[name]) for name, value in whole.items()}


def _estimate(value: float | None, drawn: Sequence[float]) -> Estimate:
    if len(drawn) < 20:
        return Estimate(value, None, None, len(drawn))
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high), len(drawn))


def _again(runs: Sequence[Run], near: Law) -> Law | None:
    try:
        return fit_law(runs, near)
    except DataError:
        return None


def _figures(runs: Sequence[Run], law: Law | None) -> dict[str, float | None]:
    names = ("E", "alpha", "beta", "exponent of N", "exponent of D", "loss exponent")
    told: dict[str, float | None] = dict.fromkeys(names)
    if law is not None:
        share = law.beta / (law.alpha + law.beta)
        slope = law.alpha * law.beta / (law.alpha + law.beta)
        told = dict(zip(names, (law.floor, law.alpha, law.beta, share, 1 - share, slope), strict=True))
    found = exponents(profiles(runs))
    told["IsoFLOP exponent of N"], told["IsoFLOP exponent of D"] = found or (None, None)
    return told
