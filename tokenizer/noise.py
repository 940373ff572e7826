"""Integer noise for differential privacy, drawn exactly and from a cryptographic generator.

Only integers and fractions are used: floating-point samplers leak through the pattern of their last bits (Mironov, CCS
2012). Both samplers are algorithms 1 to 3 of Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential
Privacy", NeurIPS 2020, https://arxiv.org/abs/2004.00010.
"""

import hashlib
import math
import secrets
from fractions import Fraction

import numpy as np

_SCALE_STEPS = 64
_POOL_BYTES = 256


class Noise:
    """Draws from the system's generator, or from a secret key: the same draws again, for whoever was interrupted."""

    def __init__(self, key: bytes | None = None) -> None:
        """Begin.

        Args:
            key: At least 32 secret random bytes, used for nothing else; SHAKE-256 makes the bits from them.
        """
        self._key = key
        self._pools = 0
        self._bits = 0
        self._left = 0

    def below(self, end: int) -> int:
        """Draw one of 0 to end - 1, all alike."""
        width = (end - 1).bit_length()
        while True:
            if self._left < width:
                self._bits |= int.from_bytes(self._pool()) << self._left
                self._left += 8 * _POOL_BYTES
            number = self._bits & ((1 << width) - 1)
            self._bits >>= width
            self._left -= width
            if number < end:
                return number

    def _pool(self) -> bytes:
        """Many bytes at a time, as asking for them is slow."""
        if self._key is None:
            return secrets.token_bytes(_POOL_BYTES)
        self._pools += 1
        return hashlib.shake_256(self._key + self._pools.to_bytes(8)).digest(_POOL_BYTES)

    def laplace(self, scale: Fraction) -> int:
        """Draw x with probability proportional to exp(-|x| / scale)."""
        t, s = scale.numerator, scale.denominator
        while True:
            low = self.below(t)
            if not self._true_by_exp(low, t):
                continue
            high = 0
            while self._true_by_exp(1, 1):
                high += 1
            size = (low + t * high) // s
            negative = self.below(2)
            # Zero has one sign only.
            if not (negative and size == 0):
                return -size if negative else size

    def gaussian(self, variance: Fraction) -> int:
        """Draw x with probability proportional to exp(-x^2 / (2 variance))."""
        top, bottom = variance.numerator, variance.denominator
        t = math.isqrt(top // bottom) + 1
        while True:
            x = self.laplace(Fraction(t))
            # (|x| - variance / t)^2 / (2 variance) in integers.
            if self._true_by_exp((abs(x) * t * bottom - top) ** 2, 2 * top * bottom * t * t):
                return x

    def _true_by_exp(self, top: int, bottom: int) -> bool:
        """True with probability exp(-top / bottom), of 0 or more."""
        while top > bottom:
            if not self._true_by_exp(1, 1):
                return False
            top -= bottom
        k = 1
        while self.below(bottom * k) < top:
            k += 1
        return k % 2 == 1


def laplace_tail(at_least: int, scale: Fraction) -> float:
    """P(laplace(scale) >= at_least), for at_least of 1 or more; exact up to floating point."""
    rate = float(1 / scale)
    return math.exp(-rate * at_least) / (1 + math.exp(-rate))


def gaussian_tail(at_least: int, variance: Fraction) -> float:
    """An upper bound of P(gaussian(variance) >= at_least), for at_least of 1 or more.

    Source: proposition 25 of Canonne et al.: P(X >= m) <= P(N(0, variance) >= m - 1).
    """
    return 0.5 * math.erfc((at_least - 1) / math.sqrt(2 * float(variance)))


def delta_of(rho: float, epsilon: float) -> float:
    """An upper bound of the delta at which rho-zCDP implies (epsilon, delta)-DP.

    Any alpha > 1 gives a bound, the best of a fine grid is taken.

    Source: proposition 12 and corollary 13 of Canonne et al.
    """
    alpha = 1 + np.logspace(-5, 6, 20_001)
    exponent = (alpha - 1) * (alpha * rho - epsilon) - np.log(alpha - 1) + alpha * np.log1p(-1 / alpha)
    return float(min(1.0, math.exp(min(float(exponent.min()), 0.0))))


def rho_of(epsilon: float, delta: float) -> float:
    """The largest rho (to nine digits) whose zCDP implies (epsilon, delta)-DP by `delta_of`."""
    low, high = 0.0, epsilon + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, epsilon) <= delta else (low, middle)
    return low


def rounded_up(size: float) -> Fraction:
    """The next fraction that is simple enough to draw with quickly."""
    return Fraction(math.ceil(size * _SCALE_STEPS), _SCALE_STEPS)
