"""A lower bound on epsilon from one training run: coins decide who is in, guesses are counted.

m canary patients are each put into the training by a coin of their own. An auditor looks at the model, guesses for some
of them whether they were in, and abstains on the others. Under (epsilon, delta)-DP with respect to adding or removing
one patient, right guesses are dominated by those of randomized response: each is right with probability
e^epsilon / (1 + e^epsilon), up to a term in delta. So too many right guesses disprove a claim of epsilon.

Source: Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, arXiv 2305.08846,
Theorem 5.2 and Corollary 5.4 (guesses of 0, 1 or -1), Appendix D.

Notable choices:
- How many guesses to make is not chosen by looking at their result: a few numbers are fixed beforehand, and each is
  tested at its share of the error (Bonferroni), so the stated confidence holds for the best of them.
- A bound is a statement about one run's coins: with the stated confidence epsilon is not below it. It never says that
  epsilon is small.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from tokenizer.errors import ConfigError

# Shares of the canaries that are guessed about; fixed, so that no choice follows from the scores.
GUESSED_SHARES = (0.1, 0.25, 0.5, 1.0)
# Where a search for the largest disproved epsilon ends: no number of guesses that fits a machine gets there.
_LARGEST = 60.0


@dataclass(frozen=True)
class Bound:
    """What guesses about canaries prove.

    Attributes:
        epsilon: with the stated confidence, the training is not (epsilon', delta)-DP for any epsilon' below this.
        delta: of the claim that is tested.
        confidence: probability that the true epsilon is at least `epsilon`, whatever it is.
        canaries: m.
        included: how many the coins put in.
        guesses: of the number of guesses that proved most; of the largest if none proved anything.
        correct: how many of them were right.
    """

    epsilon: float
    delta: float
    confidence: float
    canaries: int
    included: int
    guesses: int
    correct: int


def lower_bound(
    scores: NDArray[np.float64],
    included: NDArray[np.bool_],
    *,
    delta: float,
    confidence: float = 0.95,
    shares: tuple[float, ...] = GUESSED_SHARES,
) -> Bound:
    """Bound epsilon from below.

    Args:
        scores: float64 [m], higher where the auditor believes that a canary was in; must not depend on `included`
            but through what the training released.
        included: bool [m], how the coins fell: each with probability 1/2, independently.
        delta: of the claim.
        confidence: of the bound.
        shares: of the canaries that are guessed about, half of them "in" and half of them "out"; chosen beforehand.

    Raises:
        ConfigError: lengths that differ, scores that aren't numbers, fewer than two canaries, a value out of range.
    """
    m = len(scores)
    _check(m >= 2 and len(included) == m, f"{m} scores and {len(included)} coins; give two or more of each, as many")
    _check(not np.isnan(scores).any(), "a score is not a number")
    _check(0 < confidence < 1, f"the confidence is {confidence}; it must lie between 0 and 1")
    tried = sorted({max(2, round(share * m)) for share in shares})
    level = (1.0 - confidence) / len(tried)
    found = [(guesses, _right(scores, included, guesses)) for guesses in tried]
    proved = [(largest_disproved(m, guesses, right, delta, level), guesses, right) for guesses, right in found]
    epsilon, guesses, right = max(proved)
    return Bound(epsilon, delta, confidence, m, int(included.sum()), guesses, right)


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Largest probability of so many right guesses or more under (epsilon, delta)-DP.

    Args:
        canaries: m, each in with probability 1/2.
        guesses: r, how many were guessed about.
        correct: v, right guesses.
        epsilon, delta: the claim.

    Raises:
        ConfigError: a value out of range.

    Source: Corollary 5.4: P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i, with W binomial(r, e^eps / (1 + e^eps)).

    >>> round(p_value(canaries=10, guesses=10, correct=10, epsilon=0.0, delta=0.0) * 2**10, 9)
    1.0
    """
    _check(0 <= correct <= guesses <= canaries, "there must be at least as many canaries as guesses, as right ones")
    _check(epsilon >= 0 and 0 <= delta <= 1, "epsilon must not be negative, delta must lie in [0, 1]")
    right = float(special.expit(epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, right))
    if delta == 0 or correct == 0:
        return min(1.0, tail)
    steps = np.arange(1, correct + 1)
    # P[v > W >= v - i] for i = 1 ... v.
    below = np.cumsum(stats.binom.pmf(correct - steps, guesses, right))
    return min(1.0, tail + 2 * canaries * delta * float((below / steps).max()))


def largest_disproved(canaries: int, guesses: int, correct: int, delta: float, level: float) -> float:
    """The largest epsilon whose claim is disproved at the error `level`; 0 if none is.

    >>> round(largest_disproved(1000, 100, 75, 1e-4, 0.05), 3)  # as in Appendix D
    0.673
    """

    def excess(epsilon: float) -> float:
        return p_value(canaries, guesses, correct, epsilon, delta) - level

    if excess(0.0) >= 0:
        return 0.0
    if excess(_LARGEST) < 0:
        return _LARGEST
    found = float(optimize.bisect(excess, 0.0, _LARGEST, xtol=1e-6))
    # On the side that is disproved.
    return max(0.0, found - 1e-6)


def _right(scores: NDArray[np.float64], included: NDArray[np.bool_], guesses: int) -> int:
    """Right guesses where the highest scores are called in and the lowest out."""
    order = np.argsort(scores, kind="stable")
    low = guesses // 2
    return int((~included[order[:low]]).sum() + included[order[len(order) - (guesses - low) :]].sum())


def _check(holds: bool, rule: str) -> None:
    if not holds:
        raise ConfigError(f"auditing by canaries: {rule}")
