"""The lower bound on epsilon is what the theorem says: never above the truth but with the stated probability."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from simulation.attacks.bound import GUESSED_SHARES, largest_disproved, lower_bound, p_value
from tokenizer.errors import ConfigError

# Probability that a right bound fails a test.
FALSE_ALARM = 1e-6


def test_the_figures_of_the_paper() -> None:
    # Appendix D of arXiv 2305.08846.
    assert largest_disproved(1000, 100, 75, 1e-4, 0.05) == pytest.approx(0.673, abs=5e-4)


def by_hand(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """The formula with whole numbers and no library of distributions."""
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    weight = [math.comb(r, k) * right**k * (1 - right) ** (r - k) for k in range(r + 1)]
    alpha = max((sum(weight[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, sum(weight[v:]) + 2 * m * delta * alpha)


@given(st.integers(1, 25), st.data(), st.floats(0, 5), st.floats(0, 0.01))
def test_p_values_are_those_of_the_formula(m: int, data: st.DataObject, epsilon: float, delta: float) -> None:
    r = data.draw(st.integers(0, m))
    v = data.draw(st.integers(0, r))
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(by_hand(m, r, v, epsilon, delta), rel=1e-9, abs=1e-12)


def hockey_stick(one: np.ndarray, other: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(one - math.exp(epsilon) * other, 0).sum())


@settings(max_examples=40)
@given(st.integers(2, 4), st.integers(2, 5), st.floats(0.05, 2.5), st.floats(0, 0.1), st.integers(0, 2**32 - 1))
def test_no_mechanism_beats_its_own_privacy(m: int, outcomes: int, epsilon: float, slack: float, seed: int) -> None:
    """Every outcome's probability under all 2^m coins is enumerated, with any guesses, against the true delta."""
    rng = np.random.default_rng(seed)
    # Log-probabilities that move with each coin; not a product of mechanisms.
    coins = list(itertools.product([0, 1], repeat=m))
    tilt = rng.normal(size=(m, outcomes)) * epsilon
    chance = {s: np.exp(np.array(s) @ tilt + rng.normal(size=outcomes) * slack) for s in coins}
    chance = {s: x / x.sum() for s, x in chance.items()}
    delta = 0.0
    for s, place in itertools.product(coins, range(m)):
        other = tuple(1 - bit if at == place else bit for at, bit in enumerate(s))
        delta = max(delta, hockey_stick(chance[s], chance[other], epsilon))
    guesses = rng.integers(-1, 2, (outcomes, m))
    # The bound holds for the guesses of each outcome by themselves, so for a fixed number of them it holds in all.
    r = m
    guesses = np.where(guesses == 0, 1, guesses)
    tail = np.zeros(m + 2)
    for s, x in chance.items():
        right = (guesses == np.where(np.array(s) == 1, 1, -1)).sum(1)
        for v in range(m + 1):
            tail[v] += x[right >= v].sum() / len(coins)
    for v in range(m + 1):
        assert tail[v] <= p_value(m, r, v, epsilon, delta) + 1e-9


def test_a_mechanism_that_gives_all_away_with_probability_delta_is_allowed_for() -> None:
    """With probability p all coins are told, else nothing: (0, p)-DP, and the bound at epsilon 0 must not break."""
    m, p = 6, 0.01
    for v in range(m + 1):
        tail = p + (1 - p) * stats.binom.sf(v - 1, m, 0.5)
        assert tail <= p_value(m, m, v, 0.0, p)
        if v > m // 2 + 1:
            # Negative control: without its term in delta the bound would be wrong.
            assert tail > p_value(m, m, v, 0.0, 0.0)


@given(st.integers(2, 60), st.data(), st.floats(0, 1e-3))
def test_more_right_guesses_prove_more(m: int, data: st.DataObject, delta: float) -> None:
    r = data.draw(st.integers(1, m))
    bounds = [largest_disproved(m, r, v, delta, 0.05) for v in range(r + 1)]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 2.0, 4.0])
def test_randomized_response_is_bounded_below_its_epsilon_and_close_to_it(epsilon: float) -> None:
    """Each coin is told truly with probability e^eps / (1 + e^eps): exactly epsilon-DP."""
    rng = np.random.default_rng(5)
    runs, m, confidence = 150, 400, 0.95
    bounds = []
    for _ in range(runs):
        included = rng.random(m) < 0.5
        told = included ^ (rng.random(m) >= 1 / (1 + math.exp(-epsilon)))
        # Ties are broken by noise of the auditor's own.
        scores = told + 0.1 * rng.random(m)
        bounds.append(lower_bound(scores, included, delta=0.0, confidence=confidence).epsilon)
    wrong = sum(bound > epsilon for bound in bounds)
    assert stats.binomtest(wrong, runs, 1 - confidence, alternative="greater").pvalue > FALSE_ALARM
    # The bound is of use: about what 400 guesses can tell.
    assert np.median(bounds) > 0.75 * epsilon - 0.3


def test_scores_that_know_nothing_prove_nothing() -> None:
    rng = np.random.default_rng(3)
    runs = 200
    alarms = sum(
        lower_bound(rng.normal(size=100), rng.random(100) < 0.5, delta=1e-5).epsilon > 0.05 for _ in range(runs)
    )
    assert stats.binomtest(alarms, runs, 0.05, alternative="greater").pvalue > FALSE_ALARM


def test_an_auditor_who_chose_the_number_of_guesses_afterwards_would_be_wrong() -> None:
    """Negative control of the correction for several numbers of guesses."""
    rng = np.random.default_rng(3)
    runs, level, wrong = 150, 0.05, 0
    for _ in range(runs):
        included, scores = rng.random(200) < 0.5, rng.normal(size=200)
        best = max(
            lower_bound(scores, included, delta=0.0, confidence=1 - level, shares=(share,)).epsilon
            for share in np.linspace(0.05, 1, 20)
        )
        wrong += best > 0
    assert stats.binomtest(wrong, runs, level, alternative="greater").pvalue < FALSE_ALARM


def test_right_guesses_about_everybody() -> None:
    included = np.arange(200) % 2 == 0
    found = lower_bound(included.astype(float), included, delta=1e-6, confidence=0.99)
    assert (found.guesses, found.correct, found.included, found.canaries) == (200, 200, 100, 200)
    level = 0.01 / len(GUESSED_SHARES)
    assert p_value(200, 200, 200, found.epsilon, 1e-6) == pytest.approx(level, rel=1e-3)
    assert p_value(200, 200, 200, found.epsilon, 1e-6) < level


def test_what_makes_no_sense_is_refused() -> None:
    coins = np.array([True, False])
    with pytest.raises(ConfigError, match="3 scores and 2 coins"):
        lower_bound(np.zeros(3), coins, delta=0.0)
    with pytest.raises(ConfigError, match="not a number"):
        lower_bound(np.array([0.0, np.nan]), coins, delta=0.0)
    with pytest.raises(ConfigError, match="confidence"):
        lower_bound(np.zeros(2), coins, delta=0.0, confidence=1.0)
    with pytest.raises(ConfigError, match="as many"):
        lower_bound(np.zeros(1), coins[:1], delta=0.0)
    with pytest.raises(ConfigError, match="as many canaries as guesses"):
        p_value(3, 4, 2, 1.0, 0.0)
    with pytest.raises(ConfigError, match="delta"):
        p_value(4, 4, 2, 1.0, 2.0)
