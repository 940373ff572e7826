"""Histograms of values on DDSketch's logarithmic grid: small, summed without loss.

A sketch is `{bucket: events}`. The grid is the one of Datadog's DDSketch (package `ddsketch`):
bucket k holds the values in (g^(k-1), g^k] with g = (1 + accuracy) / (1 - accuracy), so that a
bucket's middle is within `accuracy` (relative) of everything in it. Negative values and zero have
their own buckets. We number the three kinds by one signed integer that sorts like the values: `key
+ SHIFT` for positive, 0 for zero, `-(key + SHIFT)` for negative ones.

Unlike the package's own serialisation a sketch has no minimum, maximum or sum: those are single
patients' values.

Source: Masson, Rim, Lee, "DDSketch", PVLDB 12(12), 2019,
https://www.vldb.org/pvldb/vol12/p2195-masson.pdf
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Sketch = Mapping[int, int]

# Values are float32: their natural logarithms lie within +-104, their keys at the finest accuracy allowed (0.001)
# within +-52,000.
SHIFT = 1 << 20
_LARGEST_LOG = 104.0


def bucket_of(values: NDArray[np.float64], accuracy: float) -> NDArray[np.int64]:
    """Bucket of each value: int64 [N] for finite float64 [N]."""
    # The same operations in the same order as ddsketch.mapping.LogarithmicMapping.key.
    multiplier = 1 / _log_gamma(accuracy) * math.log(2)
    magnitude = np.abs(values)
    zero = magnitude <= _mapping(accuracy).min_possible
    safe = np.where(zero, 1.0, magnitude)
    keys = np.ceil(np.log(safe) / math.log(2) * multiplier).astype(np.int64) + SHIFT
    return np.where(zero, 0, np.where(values > 0, keys, -keys))


def is_bucket(bucket: int, accuracy: float) -> bool:
    """Whether a float32 value can fall in this bucket."""
    return bucket == 0 or abs((abs(bucket) - SHIFT) * _log_gamma(accuracy)) <= _LARGEST_LOG


def bucket_value(bucket: int, accuracy: float) -> float:
    """The value that stands for a bucket."""
    if bucket == 0:
        return 0.0
    return math.copysign(_mapping(accuracy).value(abs(bucket) - SHIFT), bucket)


def mean(sketch: Sketch, accuracy: float) -> float:
    """Mean of the sketched values, within the sketch's relative accuracy."""
    total = math.fsum(events * bucket_value(bucket, accuracy) for bucket, events in sketch.items())
    return total / sum(sketch.values())


def quantiles(sketch: Sketch, points: int, accuracy: float) -> tuple[float, ...]:
    """Values that so many equal parts of the sketched ones have in their middles, ascending."""
    buckets = sorted(sketch)
    ends = np.cumsum([sketch[bucket] for bucket in buckets])
    middles = (2 * np.arange(points) + 1) * ends[-1]  # in 2 * points parts of an event, so that nothing is rounded
    return tuple(bucket_value(buckets[place], accuracy) for place in np.searchsorted(2 * points * ends, middles))


def quantile_bins(sketch: Sketch, bins: int, accuracy: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Cut the sketched values in at most `bins` bins of nearly equal weight.

    A cut lies between two buckets that hold values, half-way through the empty space between them,
    so a value that occurs often (a score of 3, a rate of 20) never sits on an edge. For every
    quantile k/bins the nearest possible cut is taken (the lower of two equally near); equal cuts
    count once, so a code with few distinct values has fewer bins.

    Returns:
        breaks: ascending, at most bins - 1; a value's bin is 1 + the number of breaks below it.
        medians: one value a bin, the middle of the bucket that holds the bin's median; it lies
            inside its bin.
    """
    buckets = sorted(sketch)
    weights = np.array([sketch[bucket] for bucket in buckets], np.int64)
    ends = np.cumsum(weights)
    total = int(ends[-1])
    cuts: list[int] = []
    if len(buckets) > 1:
        inner = ends[:-1] * bins
        nearest = {int(np.argmin(np.abs(inner - k * total))) for k in range(1, bins)}
        cuts = sorted(nearest)
    breaks = tuple(_tidy((_edge(buckets[i], accuracy, 1) + _edge(buckets[i + 1], accuracy, -1)) / 2) for i in cuts)
    medians = []
    for first, last in zip([0, *(i + 1 for i in cuts)], [*cuts, len(buckets) - 1], strict=True):
        before = int(ends[first - 1]) if first else 0
        half = before + (int(ends[last]) - before + 1) // 2
        medians.append(_tidy(bucket_value(buckets[int(np.searchsorted(ends, half))], accuracy)))
    return breaks, tuple(medians)


def _edge(bucket: int, accuracy: float, side: int) -> float:
    """Upper (side 1) or lower (side -1) end of a bucket."""
    if bucket == 0:
        return 0.0
    key = abs(bucket) - SHIFT
    outward = (side > 0) == (bucket > 0)
    power = key if outward else key - 1
    return math.copysign(math.exp(power * _log_gamma(accuracy)), bucket)


def _log_gamma(accuracy: float) -> float:
    return math.log1p(2 * accuracy / (1 - accuracy))


def _tidy(value: float) -> float:
    """Round to nine digits, so that the last bit of a machine's `exp` never reaches a hash."""
    return float(f"{value:.9g}")


@lru_cache
def _mapping(accuracy: float) -> Any:
    # Imported late: a reader of finished codebooks (the model's side) has no need of the package.
    from ddsketch.mapping import LogarithmicMapping

    return LogarithmicMapping(accuracy)
