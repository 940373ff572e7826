"""How vectors travel: as float32, as bfloat16, or as 8-bit integers in blocks that share a power of two.

A sender first rounds its vector to values that the coding can tell (`round_`, `nearest`), and works on with these; on
the wire nothing is lost any more, so both sides hash, clip, sum and keep the same numbers. What rounding took away is
the sender's to add to its next vector (error feedback: Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019,
arXiv 1901.09847).

- bfloat16: the upper half of float32, 2 bytes a value; rounded to the nearest, ties to even.
- int8: blocks of 32 values, each an integer from -127 to 127 times the block's 2^k, 33 bytes a block: the layout of
  MXINT8 (Open Compute Project, Microscaling Formats 1.0, 2023, section 5.3.4) with k in a byte of its own at the end.
  Rounded at random with the right mean, so that a sum over sites is not biased; k is the least at which the block's
  largest value fits.
"""

import hashlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from federation.parts import Bytes, Parts

Coding = Literal["float32", "bfloat16", "int8"]
Vector = NDArray[np.float32]

BLOCK = 32
_CHUNK = 1 << 18
_MOST = 127
_BIAS, _LEAST = 127, -126
"""The byte of a block is k + 127; below 2^-126 float32 has fewer digits, so k goes no lower."""


class CodingError(ValueError):
    """Bytes that are no vector in this coding, or a vector that this coding can't tell."""


class Packed:
    """A vector [P] as it travels, read a part at a time; nothing is unpacked before it is asked for.

    `packed[start:stop]` is float32, of int8 from a multiple of 32 on; `numpy.asarray(packed)` is all of it.

    Attributes:
        data: its bytes.
        coding: how they are laid out.
        size: the number of values P.
    """

    def __init__(self, data: Parts, coding: Coding) -> None:
        """Take a vector's bytes.

        Raises:
            CodingError: no vector has so many.
        """
        width = {"float32": 4, "bfloat16": 2}.get(coding)
        size = data.size // width if width else data.size - -(-data.size // (BLOCK + 1))
        if length(size, coding) != data.size:
            raise CodingError(f"{data.size} bytes are no whole vector in {coding}.")
        self.data, self.coding, self.size = data, coding, size

    @property
    def shape(self) -> tuple[int]:
        """That of the vector."""
        return (self.size,)

    @property
    def nbytes(self) -> int:
        """How many bytes the values take in float32."""
        return 4 * self.size

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return unpack(self.data, self.coding).astype(dtype or np.float32, copy=False)

    def __getitem__(self, part: slice) -> Vector:
        start, stop, _ = part.indices(self.size)
        if self.coding == "float32":
            return self.data[4 * start : 4 * stop].view("<f4").astype(np.float32, copy=False)
        if self.coding == "bfloat16":
            bits = self.data[2 * start : 2 * stop].view("<u2").astype(np.uint32)
            bits <<= np.uint32(16)
            return bits.view(np.float32)
        if start % BLOCK:
            raise ValueError("A part must begin at a whole block.")
        blocks = slice(self.size + start // BLOCK, self.size + -(-stop // BLOCK))
        scales = np.ldexp(np.float32(1), self.data[blocks].astype(np.int32) - _BIAS)
        values = self.data[start:stop].view(np.int8).astype(np.float32)
        values *= np.repeat(scales, BLOCK)[: values.size]
        return values


Told = Vector | Packed
"""A vector [P] as it was made, or as it travels."""


def length(size: int, coding: Coding) -> int:
    """Tell how many bytes a vector of `size` values takes."""
    return size + -(-size // BLOCK) if coding == "int8" else size * (2 if coding == "bfloat16" else 4)


def pack(vector: Vector, coding: Coding) -> Bytes:
    """Lay out a vector [P] whose values the coding can tell; float32 is not copied.

    Raises:
        CodingError: a value would change on the way: round the vector first.
    """
    vector = np.ascontiguousarray(vector, np.float32)
    if coding == "float32":
        return vector.astype("<f4", copy=False).view(np.uint8)
    out = np.empty(length(vector.size, coding), np.uint8)
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        if coding == "bfloat16":
            if (part.view(np.uint32) & np.uint32(0xFFFF)).any():
                raise CodingError("The vector holds values that bfloat16 can't tell.")
            out[2 * start : 2 * (start + part.size)] = _upper(part)
            continue
        steps, powers = _steps(part)
        whole = np.rint(steps)
        if not np.array_equal(whole, steps):
            raise CodingError("The vector holds values that int8 can't tell.")
        out[start : start + part.size] = whole.ravel()[: part.size].astype(np.int8).view(np.uint8)
        where = vector.size + start // BLOCK
        out[where : where + powers.size] = powers + _BIAS
    return out


def unpack(data: Parts, coding: Coding) -> Vector:
    """Give the vector [P] that travelled; of float32, a view.

    Raises:
        CodingError: no vector has so many bytes.
    """
    packed = Packed(data, coding)
    if coding == "float32":
        return packed[: packed.size]
    vector = np.empty(packed.size, np.float32)
    for start in range(0, vector.size, _CHUNK):
        part = slice(start, min(start + _CHUNK, vector.size))
        vector[part] = packed[part]
    return vector


def nearest(vector: Vector, coding: Literal["float32", "bfloat16"]) -> Vector:
    """Give the nearest vector [P] that the coding can tell; of float32, itself."""
    if coding == "float32":
        return vector
    # By hand, as torch spreads so little work over threads that spin at the cost of all others on the machine.
    rounded = np.empty_like(vector)
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        bits, out = part.view(np.uint32), rounded[start : start + _CHUNK].view(np.uint32)
        np.right_shift(bits, np.uint32(16), out=out)
        out &= np.uint32(1)
        out += np.uint32(0x7FFF)  # carries into the upper half above a tie, and at one if that makes it even
        out += bits
        out &= np.uint32(0xFFFF0000)
        strange = np.isnan(part)
        if strange.any():
            out[strange] = np.uint32(0x7FC00000)
    return rounded


def coded(vector: Vector, coding: Literal["float32", "bfloat16"]) -> Told:
    """Give the nearest vector [P] that the coding can tell, as it travels; of float32, itself."""
    if coding == "float32":
        return vector
    out = np.empty(length(vector.size, coding), np.uint8)
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        out[2 * start : 2 * (start + part.size)] = _upper(nearest(part, coding))
    return Packed(out, coding)


def round_(
    vector: Vector,
    coding: Coding,
    seed: str,
    residual: Packed | None = None,
    keep: Callable[[Bytes], object] = lambda part: None,
) -> Packed:
    """Round a vector [P] of finite values to what the coding can tell.

    Args:
        vector: its memory is what the result lies in, for new memory costs more than all that is done here.
        coding: int8 rounds at random; the others to the nearest.
        seed: names the randomness; equal seeds round equally. It protects nothing.
        residual: what the last rounding took away; added before.
        keep: is given the new residual part by part, in bfloat16: next to the update that it comes from it is small,
            so that half its digits do. Of float32 there is none.

    Returns:
        The rounded vector.
    """
    if coding == "float32":
        return Packed(pack(vector, coding), coding)
    out, scales = vector.view(np.uint8), np.empty(-(-vector.size // BLOCK), np.uint8)
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16])
    random = np.random.Generator(np.random.Philox(key=key))
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK].copy()
        if residual is not None:
            part += residual[start : start + _CHUNK]
        if coding == "bfloat16":
            told = nearest(part, coding)
            out[2 * start : 2 * (start + part.size)] = _upper(told)
        else:
            steps, powers = _steps(part)
            steps += random.random(steps.shape, np.float32)
            whole = np.minimum(np.floor(steps), _MOST)
            told = (whole * np.ldexp(np.float32(1), powers)[:, None]).ravel()[: part.size]
            out[start : start + part.size] = whole.ravel()[: part.size].astype(np.int8).view(np.uint8)
            scales[start // BLOCK : start // BLOCK + powers.size] = powers + _BIAS
        part -= told
        keep(_upper(nearest(part, "bfloat16")))
    if coding == "int8":
        out[vector.size : vector.size + scales.size] = scales
    return Packed(out[: length(vector.size, coding)], coding)


def _upper(part: Vector) -> Bytes:
    """The upper half of each value, as bfloat16 travels."""
    return (part.view(np.uint32) >> np.uint32(16)).astype("<u2").view(np.uint8)


def _steps(part: Vector) -> tuple[Vector, NDArray[np.int32]]:
    """Give values in steps of their block, float32 [B, 32], and the blocks' powers of two, int32 [B]."""
    blocks = np.zeros((-(-part.size // BLOCK), BLOCK), np.float32)
    blocks.ravel()[: part.size] = part
    largest = np.abs(blocks).max(axis=1)
    # largest / 127 = m · 2^e with 0.5 <= m < 1, computed in float64, where the quotient of two such numbers is exact
    # enough to tell whether it is a power of two.
    fraction, power = np.frexp(largest.astype(np.float64) / _MOST)
    powers = np.maximum(np.where(fraction > 0.5, power, power - 1), _LEAST).astype(np.int32)
    powers[largest == 0] = _LEAST
    return np.ldexp(blocks, -powers[:, None]), powers
