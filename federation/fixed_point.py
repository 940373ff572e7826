"""Numbers as integers that are summed modulo 2³² or 2⁶⁴: what stands under the masks.

A site's update x, clipped to ±clip and scaled by its share of the greatest weight, w/W, is told in steps of clip/L:
    q = rint(clip(x, ±clip) · (w/W) · L/clip), −L ≤ q ≤ L.
L is the greatest level at which n such sums fit in the signed range of a word, so a sum never wraps. Where every site
adds noise of the deviation s to every integer, the range also holds 12 deviations of the whole noise, 12 sqrt(n) s: a
sum of discrete Gaussians is beyond them with a probability of 2 exp(-72) at most (its tails are a
Gaussian's at most: Canonne, Kamath, Steinke, NeurIPS 2020, arXiv 2004.00010), below 1e-21 for any of a billion values.
The mean over the sites S is Σ q · (clip/L) · W / Σ w, and it errs by at most
    0.51 · |S| · (clip/L) · W / Σ w,
the hundredth being float64's own error, besides the rounding of the result to float32.

Rounding is to the nearest. Stochastic rounding would have no bias, but at 20 bits and more below the clip the bias of
the nearest is smaller than an update's own float32 error; it halves the worst case, needs no randomness, and the same
update gives the same integers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from federation.messages import Vector, Words
from tokenizer.errors import ConfigError, DataError

CHUNK = 1 << 16
"""Values worked on at a time: small enough for a core's own cache."""

_NOISE_ROOM = 12.0  # deviations
_MOST_LEVELS = 2**44  # four float64 roundings of such a number stay below 0.01
_ERROR = 0.51


@dataclass(frozen=True)
class Total:
    """A number that each site adds to the sum beside its update: its name, greatest absolute value, and resolution."""

    name: str
    most: float
    step: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "most", float(self.most))
        object.__setattr__(self, "step", float(self.step))
        if not (self.name and 0 < self.step <= self.most < math.inf):
            raise ConfigError(f"The total {self.name!r} needs a name and 0 < step <= most.")


@dataclass(frozen=True)
class FixedPoint:
    """How updates and totals become integers, so that the sum over `sites` sites can't overflow.

    Attributes:
        sites: most summands.
        clip: values beyond ±clip are told as ±clip.
        max_weight: the greatest weight W of a site.
        precision_bits: the step is at most clip / 2^precision_bits; words are 32 bits where that is enough.
        totals: what is summed beside the update, in this order.
        noise: standard deviation of the noise that each site adds to every value of its update; 0 is none.
    """

    sites: int
    clip: float
    max_weight: float
    precision_bits: int
    totals: tuple[Total, ...]
    noise: float = 0.0

    def __post_init__(self) -> None:
        if self._levels(64) < 2**self.precision_bits:
            noisy = f" with noise of {self.noise / self.clip:g} clips" if self.noise else ""
            raise ConfigError(
                f"{self.precision_bits} bits for {self.sites} sites{noisy} don't fit in 64; at most 44 do."
            )
        for total in self.totals:
            if self.sites * (total.most / total.step + 1) >= 2**53:
                raise ConfigError(
                    f"The total {total.name!r} over {self.sites} sites doesn't fit: raise its step or lower its most."
                )

    @property
    def dtype(self) -> np.dtype:
        """The words of the sum: little-endian uint32 where that is precise enough, else uint64."""
        return np.dtype("<u4" if self._levels(32) >= 2**self.precision_bits else "<u8")

    @property
    def levels(self) -> int:
        """The greatest integer L of one site."""
        return self._levels(8 * self.dtype.itemsize)

    @property
    def step(self) -> float:
        """The resolution of a value of full weight."""
        return self.clip / self.levels

    @property
    def noise_variance(self) -> float:
        """The variance of a site's noise, in steps."""
        return (self.noise / self.step) ** 2

    def mean_error(self, sites: int, weight: float) -> float:
        """Give the greatest error of a mean of `sites` updates of the summed weight, before rounding to float32."""
        return _ERROR * sites * self.step * self.max_weight / weight

    def check(self, update: Vector, totals: Mapping[str, float]) -> None:
        """Refuse what can't be told, before anything is changed.

        Raises:
            DataError: naming the total or the number of values that don't fit.
        """
        names = [total.name for total in self.totals]
        if set(names) != set(totals):
            raise DataError(f"The totals are {', '.join(sorted(totals))}; agreed are {', '.join(sorted(names))}.")
        for total in self.totals:
            if not abs(totals[total.name]) <= total.most:
                raise DataError(f"The total {total.name!r} is not within ±{total.most:g}, as was agreed.")
        wrong = sum(
            int(np.count_nonzero(~np.isfinite(update[start : start + CHUNK]))) for start in range(0, update.size, CHUNK)
        )
        if wrong:
            raise DataError(f"The update holds {wrong} values that are not finite; it can't be summed.")

    def encode(self, values: Vector, weight: float, out: Words) -> int:
        """Write at most `CHUNK` finite float32 values as words; `out` may share their memory.

        Returns:
            How many values were beyond the clip.
        """
        limit = self.levels * (weight / self.max_weight)
        clipped = int(np.count_nonzero(np.abs(values) > self.clip))
        work = np.multiply(values, limit / self.clip, dtype=np.float64)
        np.rint(np.clip(work, -limit, limit, out=work), out=work)
        out[:] = work.astype(np.int64).view(np.uint64)  # modulo the word: a negative number is told from its top
        return clipped

    def decode(self, words: Words, weight: float, out: Vector) -> None:
        """Write at most `CHUNK` words of the sum as their mean by the summed weight; `out` may share their memory."""
        signed = words.view(f"<i{words.dtype.itemsize}")
        out[:] = signed * (self.step * self.max_weight / weight)

    def encode_totals(self, totals: Mapping[str, float]) -> NDArray[np.uint64]:
        """Give the totals as uint64 [K], in the agreed order."""
        steps = [round(totals[total.name] / total.step) % 2**64 for total in self.totals]
        return np.array(steps, np.uint64)

    def decode_totals(self, words: NDArray[np.uint64]) -> dict[str, float]:
        """Read the sums of the totals, each within half a step per site."""
        pairs = zip(self.totals, words.view(np.int64).tolist(), strict=True)
        return {total.name: value * total.step for total, value in pairs}

    def _levels(self, bits: int) -> int:
        if not self.noise:
            return min((2 ** (bits - 1) - 1) // self.sites, _MOST_LEVELS)
        room = self.sites + _NOISE_ROOM * math.sqrt(self.sites) * self.noise / self.clip
        return min(int((2 ** (bits - 1) - 1) / room), _MOST_LEVELS)
