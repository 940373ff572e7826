"""Noise has the distribution that the privacy proof needs.

Each statistical test alarms falsely once in a million runs; a control beside it shows that it can alarm at all.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from tokenizer import noise

FALSE_ALARM = 1e-6
DRAWS = 20_000


def laplace_mass(scale, reach):
    x = np.arange(-reach, reach + 1)
    rate = 1 / float(scale)
    return x, np.tanh(rate / 2) * np.exp(-np.abs(x) * rate)


def gaussian_mass(variance, reach):
    x = np.arange(-reach, reach + 1)
    weight = np.exp(-(x**2) / (2 * float(variance)))
    return x, weight / weight.sum()


def p_value(draws, values, mass):
    """Of a chi-square test on cells of at least 20 expected draws, tails joined."""
    inner = mass * DRAWS >= 20
    low, high = values[inner][0], values[inner][-1]
    expected = mass[inner].copy()
    rest = (1 - expected.sum()) / 2
    clipped = np.clip(draws, low - 1, high + 1)
    seen = np.array([np.sum(clipped == v) for v in range(low - 1, high + 2)])
    expected = np.concatenate([[rest], expected, [rest]])
    if rest * DRAWS < 20:
        seen, expected = seen[1:-1], expected[1:-1] / expected[1:-1].sum()
    return stats.chisquare(seen, expected / expected.sum() * seen.sum()).pvalue


CASES = [
    ("laplace", Fraction(3), laplace_mass),
    ("laplace", Fraction(7, 2), laplace_mass),
    ("laplace", Fraction(1, 3), laplace_mass),
    ("gaussian", Fraction(9), gaussian_mass),
    ("gaussian", Fraction(50, 3), gaussian_mass),
    ("gaussian", Fraction(1, 4), gaussian_mass),
]


@pytest.mark.parametrize(("kind", "scale", "mass"), CASES)
def test_draws_have_the_exact_distribution(kind, scale, mass):
    draw = getattr(noise.Noise(), kind)
    draws = np.array([draw(scale) for _ in range(DRAWS)])
    assert p_value(draws, *mass(scale, 200)) > FALSE_ALARM


@pytest.mark.parametrize(("kind", "scale", "mass"), CASES[:1] + CASES[3:4])
def test_a_sampler_a_tenth_too_narrow_would_be_found_out(kind, scale, mass):
    draw = getattr(noise.Noise(), kind)
    narrow = scale * (Fraction(9, 10) if kind == "laplace" else Fraction(81, 100))
    draws = np.array([draw(narrow) for _ in range(DRAWS)])
    assert p_value(draws, *mass(scale, 200)) < FALSE_ALARM


def test_uniform_draws_are_uniform():
    source = noise.Noise()
    draws = np.bincount([source.below(6) for _ in range(DRAWS)], minlength=6)
    assert stats.chisquare(draws).pvalue > FALSE_ALARM
    assert {source.below(1) for _ in range(10)} == {0}


def test_tails_are_never_understated():
    for scale in (Fraction(1, 2), Fraction(3), Fraction(80)):
        x, mass = laplace_mass(scale, 5000)
        for at_least in (1, 2, 10, 300):
            assert noise.laplace_tail(at_least, scale) == pytest.approx(mass[x >= at_least].sum(), rel=1e-9, abs=1e-300)
    for variance in (Fraction(1, 4), Fraction(9), Fraction(1700)):
        x, mass = gaussian_mass(variance, 5000)
        for at_least in (1, 2, 10, 100):
            assert noise.gaussian_tail(at_least, variance) >= mass[x >= at_least].sum() * (1 - 1e-12)


def test_delta_is_above_that_of_the_gaussian_and_not_far_above():
    # The continuous Gaussian with the same rho (Balle, Wang, "Improving the Gaussian mechanism", ICML 2018, theorem 8).
    for rho, epsilon in ((0.02, 1.0), (0.3, 4.0), (0.001, 0.2)):
        size = math.sqrt(2 * rho)
        true = stats.norm.cdf(size / 2 - epsilon / size) - math.exp(epsilon) * stats.norm.cdf(
            -size / 2 - epsilon / size
        )
        assert true <= noise.delta_of(rho, epsilon) <= 10 * true


def test_rho_is_the_largest_that_delta_allows():
    for epsilon, delta in ((1.0, 1e-6), (0.1, 1e-9), (8.0, 1e-3)):
        rho = noise.rho_of(epsilon, delta)
        assert noise.delta_of(rho, epsilon) <= delta < noise.delta_of(rho * 1.001, epsilon)


def test_scales_are_rounded_towards_more_noise():
    for size in (0.01, 1.0, 3.14159, 1e6 + 0.001):
        assert size <= noise.rounded_up(size) <= size + 1 / 64


def test_a_key_gives_the_same_draws_again_and_they_have_the_distribution():
    first, again, other = (noise.Noise(key) for key in (b"k" * 32, b"k" * 32, b"o" * 32))
    draws = [first.gaussian(Fraction(9)) for _ in range(DRAWS)]
    assert [again.gaussian(Fraction(9)) for _ in range(100)] == draws[:100]
    assert [other.gaussian(Fraction(9)) for _ in range(100)] != draws[:100]
    assert p_value(np.array(draws), *gaussian_mass(Fraction(9), 200)) > FALSE_ALARM
