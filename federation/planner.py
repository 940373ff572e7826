"""How much noise a wanted protection needs, and what it will probably cost in loss; no record is needed to know.

The noise is computed: `noise_for` finds the least noise multiplier at which `federation.accountant` proves the wanted
(epsilon, delta) for all steps of all rounds. The cost in loss is only estimated, by `loss`: noise makes steps worth
less (`progress`), and the lost steps would have lowered the loss (`gained`).
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from federation.accountant import DiscreteGaussian, Gaussian, Mechanism, epsilon
from tokenizer.errors import ConfigError

_CLOSE = 0.005
"""How far below the wanted epsilon the found noise may stay, relative."""
_AGREEMENT = 0.25
"""Length of the mean of clipped gradients / the clipping bound; see `progress`."""
_FINE = 2.0**30
_NOISE_FACTOR, _NOISE_POWER = 5.0, 0.25
"""How much noise takes from a step; see `progress`."""
_FAST_NATS, _FAST_STEPS, _FAST_POWER, _NATS_PER_DOUBLING = 3.3, 18.0, 0.8, 0.1
"""The curve of losses without noise; see `gained`."""


@dataclass(frozen=True)
class Wish:
    """What a federation wants of its private training, seen from one site.

    Args:
        patients: Who train at the site; the smallest site needs the most noise.
        epsilon, delta: Of the whole training, for each patient.
        rounds: Rounds of the run.
        steps_per_round: Private steps in a round, or
        passes: how often each patient is seen in the whole run, on average.
        parameters: Of the model.
    """

    patients: int
    epsilon: float
    delta: float
    rounds: int
    steps_per_round: int | None = None
    passes: float | None = None
    parameters: int = 1_000_000

    def __post_init__(self) -> None:
        if (self.steps_per_round is None) == (self.passes is None):
            raise ConfigError("Say either how many steps a round has or how many passes the run makes, not both.")
        rules = {
            "patients must be at least 2": self.patients >= 2,
            "epsilon must be above 0 and at most 50": 0 < self.epsilon <= 50,
            "delta must lie between 0 and 1 / patients, or one patient in full would be protection enough": (
                0 < self.delta < 1 / self.patients
            ),
            "rounds must be at least 1": self.rounds >= 1,
            "steps per round must be at least 1": self.steps_per_round is None or self.steps_per_round >= 1,
            "passes must be above 0": self.passes is None or self.passes > 0,
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise ConfigError(f"privacy plan: {'; '.join(wrong)}.")


@dataclass(frozen=True)
class Row:
    """A plan with one batch size.

    Attributes:
        batch: Patients in a batch, on average.
        sampling_rate: The probability of each patient to be in a batch.
        steps: Of the whole run.
        noise_multiplier: Standard deviation of the noise / clipping bound.
        epsilon_of_one_round, epsilon: After the first round, and at the end.
        noise_per_patient: Noise multiplier / batch: what decides how much is learned.
        progress: What a step is worth in steps without noise: an estimate.
        loss: Nats per token that the noise will probably cost: a rougher one.
    """

    batch: int
    sampling_rate: float
    steps: int
    noise_multiplier: float
    epsilon_of_one_round: float
    epsilon: float
    noise_per_patient: float
    progress: float
    loss: float


@dataclass(frozen=True)
class UpdateRow:
    """A plan with noise on the updates, once a round.

    Attributes:
        mechanism: "local", each site's own noise, or "distributed", noise shared out over the sites.
        honest_sites: relied on for their share; None where each site has its own.
        noise_multiplier: Standard deviation of the noise / the updates' bound.
        epsilon: At the end.
        length: Of the noise in the mean over the sites / the updates' bound.
    """

    mechanism: Literal["local", "distributed"]
    honest_sites: int | None
    noise_multiplier: float
    epsilon: float
    length: float


def plan(wish: Wish, batches: Sequence[int]) -> list[Row]:
    """Give the plan for each batch size.

    Raises:
        ConfigError: A batch is larger than the site.
    """
    return [_row(wish, batch) for batch in batches]


def plan_updates(wish: Wish, sites: int, honest_sites: int) -> tuple[UpdateRow, UpdateRow]:
    """Give the plans with noise on the updates of so many sites: their own, and shared out.

    Two updates are twice their bound apart at most. In the mean of n sites, own noise of z bounds for each of P values
    has the length z sqrt(P / n); shares of which h make z have z sqrt(P / (n h)).

    Raises:
        ConfigError: There are not so many honest sites, or fewer than 2.
    """
    if not 2 <= honest_sites <= sites:
        raise ConfigError(f"privacy plan: honest sites must be from 2 to {sites}, the number of sites.")

    def own(noise: float) -> list[Mechanism]:
        return [Gaussian(noise / 2, steps=wish.rounds)]

    def shared(noise: float) -> list[Mechanism]:
        # Steps so fine that the law doesn't depend on them; `federation.protection` has a run's own.
        variance = (noise * _FINE) ** 2 / honest_sites
        return [DiscreteGaussian(variance, 2.0 * _FINE, honest_sites, wish.parameters, wish.rounds)]

    rows = []
    for mechanism, released, honest in (("local", own, None), ("distributed", shared, honest_sites)):
        noise = noise_for(wish.epsilon, wish.delta, 1.0, wish.rounds, released)
        length = noise * math.sqrt(wish.parameters / sites / (honest or 1))
        rows.append(UpdateRow(mechanism, honest, noise, epsilon(released(noise), wish.delta), length))  # type: ignore[arg-type]
    return rows[0], rows[1]


def honest_by_default(sites: int) -> int:
    """Give how many of so many sites must be honest where all are summed and a mask's threshold is two thirds."""
    threshold = 2 * sites // 3 + 1
    return sites - min(2 * threshold - sites - 1, threshold - 2)


def noise_for(
    wanted: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    released: Callable[[float], Iterable[Mechanism]] | None = None,
    beside: Sequence[Mechanism] = (),
) -> float:
    """The noise multiplier, rounded up to 4 digits, for which these steps cost at most `wanted`, and hardly less.

    Args:
        wanted, delta: the most that all steps may cost.
        sampling_rate, steps: of sums with Gaussian noise.
        released: gives what is released by a noise multiplier, if it is something else than such sums.
        beside: what is told beside them, and paid from the same `wanted`.

    The search begins at the central limit of Bu et al., "Deep Learning with Gaussian Differential Privacy", 2019,
    arXiv 1911.11607 (corollary 5.4), and every figure that it takes is the accountant's.
    """
    if beside and (alone := epsilon(beside, delta)) >= wanted:
        raise ConfigError(
            f"What is told beside the training costs epsilon {alone:.4f} at delta {delta:g} already, of {wanted:g}: "
            "give it more noise, tell it less often, or allow more."
        )
    low, high, slope = 0.0, math.inf, -1.5  # too little noise; enough; d log(cost) / d log(noise)
    released = released or (lambda noise: [Gaussian(noise, sampling_rate, steps)])
    noise, before = _rounded_up(_central_limit(wanted, delta, sampling_rate, steps)), None
    for _ in range(40):
        cost = epsilon([*released(noise), *beside], delta)
        if cost <= wanted and (cost >= (1 - _CLOSE) * wanted or noise <= low * (1 + 2e-3)):
            return noise
        low, high = (low, noise) if cost <= wanted else (noise, high)
        if before and cost > 0 and noise != before[0]:
            slope = min(-0.3, max(-5.0, math.log(cost / before[1]) / math.log(noise / before[0])))
        before = (noise, max(cost, 1e-9))
        aim = math.log((1 - _CLOSE / 2) * wanted / before[1]) / slope
        noise = _rounded_up(noise * math.exp(min(max(aim, -0.7), 0.7)))
        if not low < noise < high:
            noise = _rounded_up(2 * low if high == math.inf else (low + high) / 2)
    return high


def progress(noise_per_patient: float, batch: int, parameters: int) -> float:
    """What a noisy step is worth, in steps of equally large batches without noise: an estimate, from 0 to 1.

    It is (1 + 5 nu)^(-1/4), where nu is the variance that privacy adds over that which is there without it, signal and
    sampling: parameters x (noise multiplier x bound / batch)^2 against |mean gradient|^2 (1 + its sampling noise), all
    patients' gradients being clipped. That the noise-to-batch ratio rules is McKenna et al., "Scaling Laws for
    Differentially Private Language Models", 2025, arXiv 2501.18914. If all directions had the same signal and the step
    were the best one along the noisy gradient, it would be 1 / (1 + nu) (McCandlish et al., "An Empirical Model of
    Large-Batch Training", 2018, arXiv 1812.06162, section 2.2), and the square root of that with Adam, which divides by
    the noise. But gradients have most of their length in few directions, which are learnt through noise in which all
    others drown, and moments average over some steps. Power and factor are fitted to four measured settings of private
    training (docs/privacy.md), for AdamW with the default moments.
    """
    sampling = (1 / _AGREEMENT**2 - 1) / batch
    privacy = parameters * (noise_per_patient / _AGREEMENT) ** 2
    return (1 + _NOISE_FACTOR * privacy / (1 + sampling)) ** -_NOISE_POWER


def gained(steps: float) -> float:
    """Nats per token by which so many steps without noise lower the loss, up to a constant: an estimate.

    The curve of a small model on the made-up hospital: a fast part, 3.3 x (1 - exp(-(steps / 18)^0.8)), in which codes
    and their order are learnt, and 0.1 for each doubling after it, as between 2 and 8 passes over the ICU stays in
    docs/results.md.
    """
    fast = _FAST_NATS * (1 - math.exp(-((steps / _FAST_STEPS) ** _FAST_POWER)))
    return fast + _NATS_PER_DOUBLING * math.log2(1 + steps / _FAST_STEPS)


def loss(noise_per_patient: float, batch: int, steps: int, parameters: int) -> float:
    """Nats per token that noise costs after so many steps: what the steps that it takes away would have gained."""
    return gained(steps) - gained(steps * progress(noise_per_patient, batch, parameters))


def batches_around(patients: int, batch: int | None) -> list[int]:
    """Batch sizes to compare: a quarter of the wanted one to four times, within the site."""
    middle = batch or max(1, patients // 16)
    return sorted({min(max(1, middle * factor // 4), patients) for factor in (1, 2, 4, 8, 16)})


def _row(wish: Wish, batch: int) -> Row:
    if not 1 <= batch <= wish.patients:
        raise ConfigError(f"A batch of {batch} patients does not fit a site with {wish.patients}.")
    rate = batch / wish.patients
    per_round = wish.steps_per_round or max(1, math.ceil((wish.passes or 0.0) / rate / wish.rounds))
    noise = noise_for(wish.epsilon, wish.delta, rate, per_round * wish.rounds)
    gain = progress(noise / batch, batch, wish.parameters)
    return Row(
        batch=batch,
        sampling_rate=rate,
        steps=per_round * wish.rounds,
        noise_multiplier=noise,
        epsilon_of_one_round=epsilon([Gaussian(noise, rate, per_round)], wish.delta),
        epsilon=epsilon([Gaussian(noise, rate, per_round * wish.rounds)], wish.delta),
        noise_per_patient=noise / batch,
        progress=gain,
        loss=loss(noise / batch, batch, per_round * wish.rounds, wish.parameters),
    )


def _central_limit(wanted: float, delta: float, rate: float, steps: int) -> float:
    low, high = 1e-4, 1e4
    while high - low > 1e-3:
        size = math.sqrt(low * high) if low > 0.1 else (low + high) / 2
        low, high = (low, size) if _delta_of(size, wanted) > delta else (size, high)
    # size = rate * sqrt(steps * (e^(1 / noise^2) - 1)); without sampling it is sqrt(steps) / noise.
    if rate == 1:
        return math.sqrt(steps) / low
    return 1 / math.sqrt(math.log1p((low / rate) ** 2 / steps))


def _delta_of(size: float, at: float) -> float:
    """Of a Gaussian with sensitivity / deviation `size`: Balle, Wang, ICML 2018, theorem 8, without overflow."""
    from scipy.special import erfc, erfcx  # part of what dp-accounting needs, and slow to import

    near, far = (at / size - size / 2) / math.sqrt(2), (at / size + size / 2) / math.sqrt(2)
    # e^at erfc(far) = e^(-near^2) erfcx(far), as far^2 - near^2 = at.
    return float(0.5 * (erfc(near) - math.exp(-(near**2)) * erfcx(far)))


def _rounded_up(noise: float) -> float:
    step = 10.0 ** (math.floor(math.log10(noise)) - 3)
    return round(math.ceil(noise / step * (1 - 1e-12)) * step, 12)
