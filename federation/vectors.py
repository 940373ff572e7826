"""Arithmetic on flat vectors, float32 [P] or packed as they travelled, in chunks: none is copied whole.

Whose numbers they are is a matter of `federation.update`; PyTorch is not needed here.
"""

import math

import numpy as np
from numpy.typing import NDArray

from federation.coding import Told

_CHUNK = 1 << 18


def norm(vector: Told) -> float:
    """Give the L2 norm of a vector [P], summed in float64 by chunks; not finite when a value is not."""
    total = 0.0
    with np.errstate(invalid="ignore"):
        for start in range(0, vector.size, _CHUNK):
            part = vector[start : start + _CHUNK].astype(np.float64)
            total += float(np.square(part, out=part).sum())  # a BLAS would spin on all processors for so little
    return math.sqrt(total)


def is_finite(vector: Told) -> bool:
    """Tell whether all values of a vector are finite."""
    # A minimum is not finite where a value is not a number; a flag for each value would cost more than the question.
    parts = (vector[start : start + _CHUNK] for start in range(0, vector.size, _CHUNK))
    return all(bool(np.isfinite([part.min(), part.max()]).all()) for part in parts)


def subtract_(vector: NDArray[np.float32], other: Told) -> None:
    """Take another vector [P] away."""
    for start in range(0, vector.size, _CHUNK):
        vector[start : start + _CHUNK] -= other[start : start + _CHUNK]


def cut_(vector: NDArray[np.float32], limit: float) -> None:
    """Shorten a vector [P] to the L2 norm `limit`, up to its rounding to float32; all zeros if a value isn't finite."""
    length = norm(vector)
    if not math.isfinite(length):
        vector[:] = 0.0
    elif length > limit:
        for start in range(0, vector.size, _CHUNK):
            part = vector[start : start + _CHUNK]
            part[:] = part * np.float64(limit / length)
