"""Noise by the million has the law that the accountant counts with, follows from its key, and decides no draw by float.

Each statistical test alarms falsely once in a million runs; a control beside it shows that it can alarm at all.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from federation import discrete_noise
from federation.discrete_noise import DiscreteGaussianNoise
from model.private import Secret
from tokenizer import noise
from tokenizer.errors import ConfigError

FALSE_ALARM = 1e-6
DRAWS = 300_000


def stream(variance: float, key: bytes = bytes(32)) -> DiscreteGaussianNoise:
    return DiscreteGaussianNoise(variance, Secret(key, "noise"))


def p_value(drawn: NDArray[np.int64], variance: float, cell: int = 1) -> float:
    """Of a chi-square test of the drawn numbers in cells of neighbouring integers against the exact law."""
    reach = math.ceil(14 * math.sqrt(variance)) // cell * cell + cell
    values = np.arange(-reach, reach)
    mass = np.exp(-(values.astype(float) ** 2) / (2 * variance))
    want = (mass / mass.sum()).reshape(-1, cell).sum(1) * len(drawn)
    seen = np.bincount((drawn + reach) // cell, minlength=len(want)).astype(float)
    kept = np.flatnonzero(want >= 20)
    first, last = kept[0], kept[-1]
    want = np.array([want[:first].sum(), *want[first : last + 1], want[last + 1 :].sum()]) + 1e-9
    seen = np.array([seen[:first].sum(), *seen[first : last + 1], seen[last + 1 :].sum()])
    return float(stats.chisquare(seen, want / want.sum() * seen.sum()).pvalue)


@pytest.mark.parametrize(("variance", "cell"), [(0.25, 1), (1.0, 1), (9.3, 1), (300.0, 1), (700.5, 1), (1e5, 8)])
def test_draws_have_the_exact_law(variance: float, cell: int) -> None:
    assert p_value(stream(variance).draw(DRAWS), variance, cell) > FALSE_ALARM


@pytest.mark.parametrize(("variance", "cell"), [(0.25, 1), (9.3, 1), (1e5, 8)])
def test_another_law_is_found_out(variance: float, cell: int) -> None:
    """The negative control: noise that is a twentieth too wide, and a rounded Gaussian where that is another law."""
    assert p_value(stream(1.05 * variance).draw(DRAWS), variance, cell) < FALSE_ALARM
    if variance < 1:
        rounded = np.rint(np.random.default_rng(1).normal(0, math.sqrt(variance), DRAWS)).astype(np.int64)
        assert p_value(rounded, variance, cell) < FALSE_ALARM


def test_one_by_one_and_by_the_million_are_the_same_law() -> None:
    one = noise.Noise(bytes(32))
    slow = np.array([one.gaussian(Fraction(9)) for _ in range(20_000)])
    fast = stream(9.0).draw(20_000)
    table = [[np.sum(drawn == value) for value in range(-8, 9)] for drawn in (slow, fast)]
    assert stats.chi2_contingency(np.array(table) + 1).pvalue > FALSE_ALARM


@pytest.mark.parametrize("deviation", [2.0**24 / 9, 2.0**40, 2.0**48])
def test_wide_noise_is_normal_to_its_last_bits(deviation: float) -> None:
    drawn = stream(deviation**2).draw(DRAWS)
    assert stats.kstest(drawn / deviation, "norm").pvalue > FALSE_ALARM
    assert stats.chisquare(np.bincount(drawn & 255, minlength=256)).pvalue > FALSE_ALARM
    # Neighbours are independent: the correlation of so many pairs is normal with deviation 1 / sqrt(draws).
    correlation = float(np.corrcoef(drawn[:-1], drawn[1:])[0, 1])
    assert abs(correlation) * math.sqrt(DRAWS) < stats.norm.isf(FALSE_ALARM / 2)


@pytest.mark.parametrize("variance", [0.25, 30.0, 1e5, 1e14])
def test_a_close_decision_is_made_by_more_bits_and_comes_out_the_same(
    variance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = stream(variance)
    rng = np.random.default_rng(2)
    words = rng.integers(0, 2**64, 2000, np.uint64)
    begin = rng.integers(0, len(drawing._thresholds), 2000) * 2.0**drawing._bits
    low = np.floor(rng.random(2000) * 2.0**drawing._bits)
    quick = drawing._stays(begin, low, words)
    monkeypatch.setattr(discrete_noise, "_SLACK", 2.0)
    assert np.array_equal(drawing._stays(begin, low, words), quick)


class Known(Secret):
    """A stream whose words are all the same."""

    def __init__(self, word: int) -> None:
        self._word = word

    def words(self, count: int) -> NDArray[np.uint64]:
        return np.full(count, self._word, np.uint64)


@pytest.mark.parametrize("variance", [0.25, 1e14])
def test_a_word_on_the_edge_of_two_steps_is_decided_by_its_next_bits(variance: float) -> None:
    drawing = stream(variance)
    inner = [n for n, edge in enumerate(drawing._thresholds) if edge % 2**64 and edge >> 64 < 2**64 - 1]
    edges = np.array([drawing._thresholds[n] >> 64 for n in inner], np.uint64)
    drawing._secret = Known(0)
    assert drawing._step(edges).tolist() == inner
    drawing._secret = Known(2**64 - 1)
    assert drawing._step(edges).tolist() == [n + 1 for n in inner]
    assert drawing._step(np.zeros(1, np.uint64)).tolist() == [0]


def test_steps_have_the_chances_that_their_heights_give() -> None:
    drawing = stream(700.0)
    edges = np.array([0, *(edge / 2**128 for edge in drawing._thresholds), 1])
    heights = np.exp(-((np.arange(len(edges) - 1) * 2.0**drawing._bits) ** 2) / 1400)
    np.testing.assert_allclose(np.diff(edges), heights / heights.sum(), rtol=1e-9, atol=1e-15)
    assert (len(heights) - 1) * 2.0**drawing._bits > 13 * math.sqrt(700)


def test_the_same_key_gives_the_same_noise_and_another_one_other_noise() -> None:
    one, same, other = (stream(1e12, key) for key in (bytes(32), bytes(32), bytes([1] * 32)))
    drawn = one.draw(1000)
    assert np.array_equal(drawn, same.draw(1000))
    assert not np.any(drawn == other.draw(1000))
    assert not np.array_equal(drawn, one.draw(1000))


@pytest.mark.parametrize("kind", ["<u4", "<u8"])
def test_noise_is_added_modulo_the_word(kind: str) -> None:
    words = np.arange(1000, dtype=kind)
    stream(1e6).add_to_(words)
    drawn = stream(1e6).draw(1000).tolist()
    assert words.tolist() == [(at + noise) % 2 ** (8 * words.itemsize) for at, noise in enumerate(drawn)]
    assert min(drawn) < -1000, "some sums are negative"


@pytest.mark.parametrize("variance", [0.0, -1.0, 2.0**97, math.nan])
def test_a_variance_that_cannot_be_drawn_is_refused(variance: float) -> None:
    with pytest.raises(ConfigError, match="variance above 0"):
        stream(variance)
