"""A lower bound on epsilon of noise on updates ("local"), from the mechanism run many times.

Any two updates of a site may be the outcome of neighbouring records, as far as the claim of that mechanism goes. So the
auditor takes the two that are furthest apart after clipping: far beyond the clip along one canary direction, or along
its opposite. A coin chooses, the site's own code clips and noises it as in every round of a run, with a fresh key each
time, and the auditor sees the noised updates. Their mean along the direction tells the coin as well as anything can
(Neyman, Pearson 1933, as the noise should be Gaussian): above a threshold it is called "+".

Under (epsilon, delta)-DP of all rounds together, for both ways round (Kairouz, Oh, Viswanath 2015, arXiv 1311.0776):
    1 - delta - missed <= e^epsilon x false alarms.
Both rates are bounded from above exactly (Clopper, Pearson 1934). Thresholds are fixed beforehand, and every one of
them, either way round, is tested at its share of the error, so the stated confidence holds for the best.
"""

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from model.private import KEY_BYTES, PrivateOptions, Secret, noised_update

# The noise is drawn for each parameter by itself, so a short update tells what a long one does.
PARAMETERS = 256
# Fixed, in clips: what the mean would be is +1 or -1.
THRESHOLDS = (-2.0, -1.0, 0.0, 1.0, 2.0)
_FEWEST, _MOST = 500, 40_000
_BEYOND = 10.0  # clips: a clip that does not clip shows as another distance


@dataclass(frozen=True)
class Told:
    """What the repetitions prove.

    Attributes:
        epsilon: with the stated confidence, the rounds are not (epsilon', delta)-DP for any epsilon' below this.
        delta: of the claim.
        confidence: of the bound.
        rounds: noised updates of each repetition.
        plus, minus: repetitions by how the coin fell.
        threshold: in clips, where the most was proved; the first if nothing was.
        above_plus, above_minus: repetitions of each kind above it.
        provable: the largest bound that so many repetitions could have proved.
    """

    epsilon: float
    delta: float
    confidence: float
    rounds: int
    plus: int
    minus: int
    threshold: float
    above_plus: int
    above_minus: int
    provable: float


def repetitions_for(epsilon: float | None) -> int:
    """How often the mechanism is run, so that a claim of epsilon could be contradicted, within reason."""
    wanted = _MOST if epsilon is None or epsilon > math.log(_MOST) else math.ceil(30 * math.exp(epsilon))
    return min(max(wanted, _FEWEST), _MOST)


def attack(
    options: PrivateOptions,
    rounds: int,
    repetitions: int,
    *,
    delta: float,
    confidence: float,
    seed: int,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> Told:
    """Run the mechanism and bound its epsilon from below.

    Args:
        options: clip and noise multiplier of an update.
        rounds: noised updates that are seen together.
        repetitions: how often; half of them with each of the two updates, on average.
        delta: of the claim.
        confidence: of the bound.
        seed: of direction and coins; keys are the operating system's.
        watch: told of repetitions done, and of all.
    """
    rng = np.random.default_rng([seed, 1])
    direction = rng.normal(size=PARAMETERS)
    direction /= np.linalg.norm(direction)
    coins = rng.random(repetitions) < 0.5
    far = (_BEYOND * options.clip * direction).astype(np.float32)
    scores = np.empty(repetitions)
    for place, coin in enumerate(coins):
        update, key = far if coin else -far, secrets.token_bytes(KEY_BYTES)
        told = (noised_update(update, options, Secret(key, f"audit/{number}/update")) for number in range(rounds))
        scores[place] = sum(float(each @ direction) for each in told) / (rounds * options.clip)
        if place % 100 == 99 or place == repetitions - 1:
            watch(place + 1, repetitions)
    return judge(scores, coins, rounds, delta=delta, confidence=confidence)


def judge(
    scores: NDArray[np.float64], coins: NDArray[np.bool_], rounds: int, *, delta: float, confidence: float
) -> Told:
    """Bound epsilon from below by scores, float64 [m], and coins, bool [m], of independent repetitions."""
    plus, minus = int(coins.sum()), int((~coins).sum())
    level = (1.0 - confidence) / (2 * len(THRESHOLDS))
    found = []
    for threshold in THRESHOLDS:
        above = int((scores[coins] > threshold).sum()), int((scores[~coins] > threshold).sum())
        both = (
            _disproved(plus - above[0], plus, above[1], minus, delta, level),
            _disproved(above[1], minus, plus - above[0], plus, delta, level),
        )
        found.append((max(both), threshold, above))
    epsilon, threshold, above = max(found, key=lambda each: each[0])
    best = max(_disproved(0, plus, 0, minus, delta, level), _disproved(0, minus, 0, plus, delta, level))
    return Told(epsilon, delta, confidence, rounds, plus, minus, threshold, *above, best)


def _disproved(missed: int, of: int, false_alarms: int, others: int, delta: float, level: float) -> float:
    """The epsilon that two error rates disprove, each bounded exactly; both bounds fail with probability `level`."""
    room = 1.0 - delta - _highest(missed, of, level / 2)
    return max(0.0, math.log(room / _highest(false_alarms, others, level / 2))) if room > 0 else 0.0


def _highest(count: int, of: int, level: float) -> float:
    """A rate's exact upper bound, which fails with probability `level` at most."""
    return 1.0 if count >= of else float(stats.beta.ppf(1.0 - level, count + 1, of - count))
