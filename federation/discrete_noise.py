"""Discrete Gaussian noise by the million: a site's share of the noise of a sum, drawn exactly from a secret keystream.

The law is that of Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy" (NeurIPS 2020, arXiv
2004.00010): an integer x has a probability proportional to exp(-x^2 / (2 variance)). Theirs draws one number at a time
(`tokenizer.noise`); this draws many at once by rejection from steps. With t a power of two, the places jt + l,
0 <= l < t, are a step of the height exp(-(jt)^2 / (2 variance)). A step is drawn by its height, l and a sign by fair
bits; the place stays with probability exp(-l (2jt + l) / (2 variance)), and -0 never. With t between 1/16 and 1/8 of
the deviation, 95 of 100 stay or more.

Exact means: a comparison of a uniform number with a probability is made in 64-bit words or float64 only where their
error can't change its outcome. Where it could, about once in 2^46 draws, the number gets 64 bits more, and the
probability 50 digits. What is left: uniform numbers have 128 bits, and nothing beyond 13.4 deviations is drawn, which
together changes the probability of no event of a draw by more than 2^-118, and of 10^9 draws by 2^-88.
"""

from bisect import bisect_right
from decimal import Context, Decimal
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from federation.messages import Words
from tokenizer.errors import ConfigError

if TYPE_CHECKING:
    from model.private import Secret

_DIGITS = Context(prec=50)
_ALL = 1 << 128
_TAIL = Decimal(2) ** -129  # relative to the height at zero
# Absolute: the exponent is at most 1.7 with five roundings of 2^-53 each, exp has one more, a uniform number 2^-53.
_SLACK = 2.0**-48
_AT_ONCE = 1 << 14  # what they are drawn from fits into a core's cache
_MOST_DEVIATION = 2.0**48  # places of 13.4 deviations are whole numbers of float64


class DiscreteGaussianNoise:
    """A stream of discrete Gaussian integers; the same variance, secret and sizes of draws give the same again.

    Args:
        variance: of the integers, above 0; the deviation is at most 2^48.
        secret: whose next numbers are taken.

    Raises:
        ConfigError: the variance is out of range.
    """

    def __init__(self, variance: float, secret: "Secret") -> None:
        if not 0 < variance <= _MOST_DEVIATION**2:
            raise ConfigError(f"Discrete Gaussian noise needs a variance above 0 and of 2^96 at most, not {variance}.")
        self._variance, self._secret = variance, secret
        self._bits = max(0, int(np.floor(np.log2(variance) / 2)) - 3)
        self._thresholds = self._cumulated()
        self._words = np.array([threshold >> 64 for threshold in self._thresholds], np.uint64)

    def add_to_(self, words: Words) -> None:
        """Add the next numbers to words, uint32 or uint64, modulo their size."""
        words += self.draw(words.size).view(np.uint64).astype(words.dtype)

    def draw(self, count: int) -> NDArray[np.int64]:
        """Draw the next numbers, int64 [count]."""
        drawn, done = np.empty(count, np.int64), 0
        while done < count:
            wanted = min(count - done, _AT_ONCE)
            fresh = self._propose(wanted + wanted // 16 + 8)[:wanted]
            drawn[done : done + fresh.size] = fresh
            done += fresh.size
        return drawn

    def _propose(self, count: int) -> NDArray[np.int64]:
        step = self._step(self._secret.words(count)).astype(np.float64)
        fair, uniform = self._secret.words(count), self._secret.words(count)
        low = (fair & np.uint64((1 << self._bits) - 1)).astype(np.float64)
        begin = step * 2.0**self._bits
        stays = self._stays(begin, low, uniform)
        negative = fair >> np.uint64(63) == 1
        place = begin + low
        stays &= (place > 0) | ~negative
        return np.where(negative, -place, place)[stays].astype(np.int64)

    def _step(self, uniform: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Give the step that each of the uniform words falls into."""
        found = np.searchsorted(self._words, uniform, side="right")
        # A word that equals a threshold's first 64 bits lies on either side of it.
        for at in np.flatnonzero(self._words[found - 1] == uniform):
            found[at] = bisect_right(self._thresholds, self._longer(uniform[at]))
        return found

    def _stays(
        self, begin: NDArray[np.float64], low: NDArray[np.float64], uniform: NDArray[np.uint64]
    ) -> NDArray[np.bool_]:
        chance = np.exp(low * (2.0 * begin + low) / (-2.0 * self._variance))
        above = (uniform >> np.uint64(11)).astype(np.float64) * 2.0**-53 - chance
        stays = above < 0
        for at in np.flatnonzero(np.abs(above) <= _SLACK):
            square = int(low[at]) * (2 * int(begin[at]) + int(low[at]))
            stays[at] = self._longer(uniform[at]) < _DIGITS.multiply(self._height(square), Decimal(_ALL))
        return stays

    def _longer(self, word: np.uint64) -> int:
        """Give a uniform number of 128 bits that begins with a word."""
        return (int(word) << 64) | int(self._secret.words(1)[0])

    def _height(self, square: int) -> Decimal:
        """Give exp(-square / (2 variance)) to 49 digits at least."""
        exponent = _DIGITS.divide(Decimal(-square), _DIGITS.multiply(Decimal(2), Decimal(self._variance)))
        return _DIGITS.exp(exponent)

    def _cumulated(self) -> list[int]:
        """Give 2^128 times the probability of all steps up to each one, but for the last."""
        heights: list[Decimal] = []
        while not heights or heights[-1] > _TAIL:
            heights.append(self._height((len(heights) << self._bits) ** 2))
        *sums, total = accumulate(heights, _DIGITS.add)
        return [min(int(_DIGITS.multiply(_DIGITS.divide(each, total), Decimal(_ALL))), _ALL - 1) for each in sums]
