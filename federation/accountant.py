"""What private releases cost a patient together: epsilon at a delta, as an upper bound that can be proven.

Unit: the patient, with all records that one site holds under one subject id. Neighbours: two sets of records of which
one holds one patient more. Every mechanism is stated relative to what adding or removing one patient changes.

`epsilon` composes privacy loss distributions (PLD) that dominate the mechanisms, discretized so that the result is
never too small ("Connect the Dots", Doroshenko et al., PoPETs 2022, arXiv 2207.04380, as in `dp-accounting`).
`epsilon_rdp` adds Rényi divergences (Mironov, CSF 2017, arXiv 1702.07476) and is larger as a rule; the smaller of the
two is given.
Of mechanisms for which only Rényi divergences are known (Skellam, sums of discrete Gaussians) a dominating distribution
is made from the curve delta(epsilon) that these imply.

Composition of PLDs is proven for parameters that are fixed beforehand. Where a later release's parameters were chosen
after looking at earlier ones, `epsilon_rdp` still holds (Feldman, Zrnic, NeurIPS 2021, arXiv 2008.11193): both are
reported.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from tokenizer.errors import ConfigError

if TYPE_CHECKING:
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    from tokenizer.noisy_survey import Spend

UNIT = "patient: all records that one site holds under one subject id"
NEIGHBOURS = "add or remove one patient"
NAME = "privacy loss distributions, discretized pessimistically, or Rényi divergences where these tell less"
"""How `epsilon` is found, for whoever is shown a figure."""

_HOPELESS = 50.0
"""Above this epsilon nothing is protected, and distributions become too long to compose: the Rényi bound is enough."""
_TAIL = 1e-15
_POINTS = 400
_WHOLE_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)
_ROUNDING = 1e-9
"""Relative; deltas that add up to the one asked for do so up to floating point."""


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise on sums over patients, each of whom is in a step's batch with one probability, independently.

    Args:
        noise_multiplier: Standard deviation of the noise / the most by which one patient changes the sum (L2).
        sampling_rate: The probability q of being in a batch (Poisson sampling); 1: everybody is in each.
        steps: How many sums were told.

    Source: subsampled Gaussian, Abadi et al., CCS 2016; its dominating pairs for adding and for removing: Zhu, Dong,
    Wang, AISTATS 2022, arXiv 2106.08567.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0
    steps: int = 1
    kind: Literal["gaussian"] = "gaussian"

    def __post_init__(self) -> None:
        _check(self, 0 < self.sampling_rate <= 1, "sampling_rate must be above 0 and at most 1")
        _check(self, self.noise_multiplier > 0, "noise_multiplier must be above 0")
        _check(self, self.steps >= 0, "steps must not be negative")


@dataclass(frozen=True)
class Laplace:
    """Laplace noise on one number.

    Args:
        noise_multiplier: Scale of the noise / the most by which one patient changes the number.
        steps: How many numbers were told.
    """

    noise_multiplier: float
    steps: int = 1
    kind: Literal["laplace"] = "laplace"

    def __post_init__(self) -> None:
        _check(self, self.noise_multiplier > 0, "noise_multiplier must be above 0")
        _check(self, self.steps >= 0, "steps must not be negative")


@dataclass(frozen=True)
class DiscreteGaussian:
    """Discrete Gaussian noise on integers: by one site, or shares of several sites under secure aggregation.

    Args:
        variance: Of one share.
        l2: The most by which one patient changes the integers (L2).
        shares: Honest shares that are surely in the sum; the others' count for nothing.
        dimensions: Length of the vector; matters with more than one share, whose sum is not quite a discrete Gaussian.
        steps: How many vectors were told.

    Source: one share: theorem 4 and proposition 5 of Canonne, Kamath, Steinke, NeurIPS 2020, arXiv 2004.00010
    (l2^2 / (2 variance)-zCDP). Several: theorem 1 and proposition 14 of Kairouz, Liu, Steinke, ICML 2021,
    arXiv 2102.06387.
    """

    variance: float
    l2: float
    shares: int = 1
    dimensions: int = 1
    steps: int = 1
    kind: Literal["discrete gaussian"] = "discrete gaussian"

    def __post_init__(self) -> None:
        _check(self, self.variance > 0 and self.l2 > 0, "variance and l2 must be above 0")
        _check(self, self.shares >= 1 and self.dimensions >= 1, "shares and dimensions must be at least 1")
        _check(self, self.shares == 1 or self.variance >= 0.25, "a share's variance must be at least 1/4")
        _check(self, self.steps >= 0, "steps must not be negative")


@dataclass(frozen=True)
class Skellam:
    """Skellam noise on integers, in shares of several sites under secure aggregation: shares add up to a Skellam.

    Args:
        variance: Of the sum of the honest shares that are surely in it.
        l1, l2: The most by which one patient changes the integers.
        steps: How many vectors were told.

    Source: corollary 3.6 of Agarwal, Kairouz, Liu, "The Skellam Mechanism", NeurIPS 2021, arXiv 2110.04995.
    """

    variance: float
    l1: float
    l2: float
    steps: int = 1
    kind: Literal["skellam"] = "skellam"

    def __post_init__(self) -> None:
        _check(self, self.variance > 0 and self.l1 > 0 and self.l2 > 0, "variance, l1 and l2 must be above 0")
        _check(self, self.steps >= 0, "steps must not be negative")


@dataclass(frozen=True)
class Approximate:
    """Anything that is (epsilon, delta)-DP, such as the thresholds of a survey (epsilon 0)."""

    epsilon: float
    delta: float = 0.0
    steps: int = 1
    kind: Literal["approximate"] = "approximate"

    def __post_init__(self) -> None:
        _check(self, self.epsilon >= 0, "epsilon must not be negative")
        _check(self, 0 <= self.delta < 1, "delta must be at least 0 and below 1")
        _check(self, self.steps >= 0, "steps must not be negative")


Mechanism = Gaussian | Laplace | DiscreteGaussian | Skellam | Approximate


@dataclass(frozen=True)
class Mechanisms:
    """What one release consists of, as a value that can be written down (`federation.canonical`)."""

    all: tuple[Mechanism, ...]


@dataclass(frozen=True)
class Across:
    """What a federation's releases cost a patient, for sites that each hold part of the patients.

    Attributes:
        one_site: Of a patient whom one site holds: the largest of the sites' figures (parallel composition).
        all_sites: Of a patient whom every site holds: the composition of all sites' releases.
    """

    one_site: float
    all_sites: float


def of_survey(spend: "Spend") -> Mechanisms:
    """The mechanisms of a private survey: noise on each of its parts, and the thresholds."""
    noisy: list[Mechanism] = []
    for part in spend.releases:
        if part.epsilon is None:
            noisy.append(DiscreteGaussian(float(part.scale), part.l2))
        else:
            noisy.append(Approximate(part.epsilon))
    return Mechanisms((*noisy, *(Approximate(0.0, part.delta) for part in spend.releases if part.delta)))


def epsilon(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The epsilon of all these releases together at `delta`: an upper bound; infinite where there is none.

    Raises:
        ConfigError: delta is not between 0 and 1.
    """
    return _epsilon(merged(mechanisms), _between_0_and_1(delta))


def epsilon_rdp(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """The same by Rényi divergences alone: larger, but it also holds for parameters chosen along the way."""
    return _epsilon_rdp(merged(mechanisms), _between_0_and_1(delta))


def across(sites: Sequence[Sequence[Mechanism]], delta: float) -> Across:
    """What the releases of several sites cost a patient, by how many of the sites hold the patient's records.

    A site's releases depend on its own patients only. So a patient of one site pays what that site has spent, whatever
    the others do; a patient of several sites pays for all releases of these.
    """
    alone = max((epsilon(site, delta) for site in sites), default=0.0)
    return Across(alone, epsilon([mechanism for site in sites for mechanism in site], delta))


def merged(mechanisms: Iterable[Mechanism]) -> tuple[Mechanism, ...]:
    """Equal mechanisms as one with more steps, in an order of their own: composition doesn't depend on order."""
    steps: Counter[Mechanism] = Counter()
    for mechanism in mechanisms:
        steps[replace(mechanism, steps=1)] += mechanism.steps
    return tuple(replace(one, steps=n) for one, n in sorted(steps.items(), key=lambda pair: repr(pair[0])) if n)


@lru_cache(maxsize=4096)
def _epsilon(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    by_rdp = _epsilon_rdp(mechanisms, delta)
    if not mechanisms or by_rdp > _HOPELESS:
        return by_rdp
    interval = 1e-3 if by_rdp > 1 else 1e-4
    dominating = [_dominating(replace(m, steps=1), interval).self_compose(m.steps) for m in mechanisms if _has_pld(m)]
    if bare := tuple(m for m in mechanisms if not _has_pld(m)):
        dominating.append(_of_rdp(bare, interval))
    together = dominating[0]
    for each in dominating[1:]:
        together = together.compose(each)
    return min(by_rdp, float(together.get_epsilon_for_delta(delta)))


def _has_pld(mechanism: Mechanism) -> bool:
    return isinstance(mechanism, Gaussian | Laplace | Approximate)


@lru_cache(maxsize=64)
def _dominating(mechanism: Mechanism, interval: float) -> "PrivacyLossDistribution":
    from dp_accounting.pld import common
    from dp_accounting.pld import privacy_loss_distribution as pld

    match mechanism:
        case Gaussian(multiplier, rate):
            return pld.from_gaussian_mechanism(
                multiplier, value_discretization_interval=interval, sampling_prob=rate, use_connect_dots=True
            )
        case Laplace(multiplier):
            return pld.from_laplace_mechanism(multiplier, value_discretization_interval=interval, use_connect_dots=True)
        case Approximate(epsilon_of_one, delta_of_one):
            return pld.from_privacy_parameters(
                common.DifferentialPrivacyParameters(epsilon_of_one, delta_of_one), interval
            )
    raise AssertionError(f"{mechanism} has no distribution of its own")


def _of_rdp(mechanisms: tuple[Mechanism, ...], interval: float) -> "PrivacyLossDistribution":
    """A distribution that dominates all mechanisms with these Rényi divergences, in both directions.

    The curve delta(epsilon) of the mechanisms is convex in e^epsilon and lies below what the divergences imply, so it
    lies below the lower convex hull of any points of that, joined by straight lines. Such a hull is the curve of a
    dominating pair (Zhu, Dong, Wang, proposition 8), and Connect the Dots makes just this pair.
    """
    from dp_accounting.pld import pld_pmf
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    orders = _fine_orders()[::10]
    rdp = _rdp(mechanisms, orders)
    end = max(1, math.ceil(_to_epsilon(orders, rdp, _TAIL) / interval))
    points = np.unique(np.rint(np.linspace(0, end, min(end, _POINTS) + 1)).astype(np.int64))
    above = np.array([_to_delta(orders, rdp, point * interval) for point in points])
    # Pinsker: the total variation is at most sqrt(KL / 2), and no delta is above it.
    above = np.minimum(above, math.sqrt(rdp[0] / 2))
    # Below zero by delta(-epsilon) = 1 - e^-epsilon + e^-epsilon delta(epsilon) of the other direction.
    shrink = np.exp(-points * interval)
    below = (1 - shrink + shrink * above)[:0:-1]
    at, deltas = np.concatenate([-points[:0:-1], points]), np.concatenate([below, above])
    kept = _hull(np.exp(at * interval), deltas)
    return PrivacyLossDistribution(pld_pmf.create_pmf_pessimistic_connect_dots(interval, at[kept], deltas[kept]))


def _hull(x: NDArray[np.float64], y: NDArray[np.float64]) -> list[int]:
    """Indices of the points on the lower convex hull, for x in ascending order (Andrew's monotone chain)."""
    kept: list[int] = []
    for i in range(len(x)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            kept.pop()
        kept.append(i)
    return kept


@lru_cache(maxsize=4096)
def _epsilon_rdp(mechanisms: tuple[Mechanism, ...], delta: float) -> float:
    # (epsilon, delta)-DP is epsilon-DP but for an event of probability delta (Kairouz, Oh, Viswanath, ICML 2015).
    left = delta - sum(m.delta * m.steps for m in mechanisms if isinstance(m, Approximate))
    if left < -_ROUNDING * delta:
        return math.inf
    pure = sum((m.steps * _pure(m) for m in mechanisms), 0.0)
    if left <= _ROUNDING * delta:
        return pure
    sampled = any(isinstance(m, Gaussian) and m.sampling_rate < 1 for m in mechanisms)
    orders = _coarse_orders() if sampled else _fine_orders()
    return min(pure, _to_epsilon(orders, _rdp(mechanisms, orders), left))


def _pure(mechanism: Mechanism) -> float:
    """The epsilon at delta 0, but for what `Approximate` says of delta."""
    match mechanism:
        case Approximate(pure):
            return pure
        case Laplace(scale):
            return 1 / scale
    return math.inf


@cache
def _fine_orders() -> NDArray[np.float64]:
    return 1 + np.logspace(-5, 6, 20_001)


@cache
def _coarse_orders() -> NDArray[np.float64]:
    """For the subsampled Gaussian, whose divergences take time."""
    return np.array([*(1 + x / 20 for x in range(1, 100)), *range(6, 64), *_WHOLE_ORDERS[62:]], dtype=np.float64)


def _rdp(mechanisms: tuple[Mechanism, ...], orders: NDArray[np.float64]) -> NDArray[np.float64]:
    return sum((m.steps * _rdp_of(m, orders) for m in mechanisms), np.zeros_like(orders))


def _rdp_of(mechanism: Mechanism, a: NDArray[np.float64]) -> NDArray[np.float64]:
    """The Rényi divergence of order a of one release; an upper bound."""
    match mechanism:
        case Gaussian(multiplier, 1.0):
            return a / (2 * multiplier**2)
        case Gaussian(multiplier, rate):
            return _sampled_gaussian_rdp(multiplier, rate)
        case Laplace(scale):  # Mironov 2017, proposition 6
            return np.logaddexp(
                np.log(a / (2 * a - 1)) + (a - 1) / scale, np.log((a - 1) / (2 * a - 1)) - a / scale
            ) / (a - 1)
        case Approximate(pure):  # Bun, Steinke, TCC 2016, proposition 3.3
            return np.minimum(pure, a * pure**2 / 2)
        case DiscreteGaussian():
            return _discrete_gaussian_rdp(mechanism, a)
        case Skellam(variance, l1, l2):
            # Proven for whole orders; divergences grow with the order, so the next whole one will do.
            whole = np.maximum(np.ceil(a), 2)
            more = np.minimum(((2 * whole - 1) * l2**2 + 6 * l1) / (4 * variance**2), 3 * l1 / (2 * variance))
            return whole * l2**2 / (2 * variance) + more


@lru_cache(maxsize=256)
def _sampled_gaussian_rdp(multiplier: float, rate: float) -> NDArray[np.float64]:
    """At the coarse orders.

    Whole orders have a finite sum (Mironov, Talwar, Zhang, "Rényi DP of the Sampled Gaussian Mechanism", arXiv
    1908.10530, section 3.3); between them (order - 1) x divergence is convex in the order, so a chord is above it.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    event = PoissonSampledDpEvent(rate, GaussianDpEvent(multiplier))
    at_whole = np.asarray(RdpAccountant(list(_WHOLE_ORDERS)).compose(event).rdp)
    whole, orders = np.array((1, *_WHOLE_ORDERS)), _coarse_orders()
    return np.interp(orders, whole, np.concatenate([[0.0], at_whole * (whole[1:] - 1)])) / (orders - 1)


def _discrete_gaussian_rdp(mechanism: DiscreteGaussian, a: NDArray[np.float64]) -> NDArray[np.float64]:
    variance, n, d = mechanism.variance, mechanism.shares, mechanism.dimensions
    ratio = mechanism.l2 / math.sqrt(n * variance)
    tau = 10 * sum(math.exp(-2 * math.pi**2 * variance * k / (k + 1)) for k in range(1, n))
    return np.minimum(a / 2 * ratio**2 + tau * d, a / 2 * (ratio + math.sqrt(d) * tau) ** 2)


def _to_epsilon(orders: NDArray[np.float64], rdp: NDArray[np.float64], delta: float) -> float:
    """Source: proposition 12 of Canonne, Kamath, Steinke (also Balle et al., AISTATS 2020)."""
    found = rdp + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(found.min()))


def _to_delta(orders: NDArray[np.float64], rdp: NDArray[np.float64], at: float) -> float:
    exponent = (orders - 1) * (rdp - at) - np.log(orders - 1) + orders * np.log1p(-1 / orders)
    return math.exp(min(0.0, float(exponent.min())))


def _between_0_and_1(delta: float) -> float:
    if not 0 < delta < 1:
        raise ConfigError(f"delta must lie between 0 and 1, got {delta}; 1e-6 is usual for up to 100,000 patients.")
    return delta


def _check(mechanism: Mechanism, fits: bool, otherwise: str) -> None:
    for name, value in vars(mechanism).items():
        if type(value) is int and name not in ("steps", "shares", "dimensions"):
            object.__setattr__(mechanism, name, float(value))  # 1 and 1.0 are one value, with one canonical form
    if not (fits and all(math.isfinite(value) for value in vars(mechanism).values() if isinstance(value, float))):
        raise ConfigError(f"{mechanism}: {otherwise}.")
