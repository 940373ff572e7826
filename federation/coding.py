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
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Coding = Literal["float32", "bfloat16", "int8"]
Bytes = NDArray[np.uint8]
Vector = NDArray[np.float32]

BLOCK = 32
_CHUNK = 1 << 18
_MOST = 127
_BIAS, _LEAST = 127, -126
"""The byte of a block is k + 127; below 2^-126 float32 has fewer digits, so k goes no lower."""


class CodingError(ValueError):
    """Bytes that are no vector in this coding, or a vector that this coding can't tell."""


class Parts(Protocol):
    """Bytes that are there a part at a time: an array, or a file."""

    @property
    def size(self) -> int:
        """How many there are."""

    def __getitem__(self, part: slice, /) -> Bytes:
        """Give some of them."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A vector as it travels, read a part at a time: `packed[start:stop]` is float32, from a multiple of 32 on."""

    data: Parts
    coding: Coding

    @property
    def size(self) -> int:
        """The number of values P.

        Raises:
            CodingError: no vector has so many bytes.
        """
        width = {"float32": 4, "bfloat16": 2}.get(self.coding)
        size = self.data.size // width if width else self.data.size - -(-self.data.size // (BLOCK + 1))
        if length(size, self.coding) != self.data.size:
            raise CodingError(f"{self.data.size} bytes are no whole vector in {self.coding}.")
        return size

    def __getitem__(self, part: slice) -> Vector:
        start, stop, _ = part.indices(self.size)
        if self.coding == "float32":
            return self.data[4 * start : 4 * stop].view("<f4").astype(np.float32, copy=False)
        if self.coding == "bfloat16":
            values = np.zeros(stop - start, "<f4")
            values.view("<u2")[1::2] = self.data[2 * start : 2 * stop].view("<u2")
            return values.astype(np.float32, copy=False)
        if start % BLOCK:
            raise ValueError("A part must begin at a whole block.")
        blocks = slice(self.size + start // BLOCK, self.size + -(-stop // BLOCK))
        scales = np.ldexp(np.float32(1), self.data[blocks].astype(np.int32) - _BIAS)
        values = self.data[start:stop].view(np.int8).astype(np.float32)
        values *= np.repeat(scales, BLOCK)[: values.size]
        return values


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
            halves = _halves(part)
            if halves[0::2].any():
                raise CodingError("The vector holds values that bfloat16 can't tell.")
            out[2 * start : 2 * (start + part.size)].view("<u2")[:] = halves[1::2]
            continue
        steps, powers = _steps(part)
        whole = np.rint(steps)
        if not np.array_equal(whole, steps):
            raise CodingError("The vector holds values that int8 can't tell.")
        out[start : start + part.size] = whole.ravel()[: part.size].astype(np.int8).view(np.uint8)
        where = vector.size + start // BLOCK
        out[where : where + powers.size] = powers + _BIAS
    return out


def unpack(data: Bytes, coding: Coding) -> Vector:
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


def round_(vector: Vector, coding: Coding, seed: str, residual: Bytes | None = None) -> Bytes | None:
    """Round a vector [P] of finite values in place to what the coding can tell, and give what that took away.

    Args:
        vector: changed.
        coding: int8 rounds at random; the others to the nearest.
        seed: names the randomness; equal seeds round equally. It protects nothing.
        residual: what the last rounding took away; added before.

    Returns:
        The new residual in bfloat16, as `pack` lays it out: next to the update that it comes from it is small, so that
        half its digits do. None for float32.
    """
    if coding == "float32":
        return None
    before = None if residual is None else Packed(residual, "bfloat16")
    kept = np.empty(2 * vector.size, np.uint8)
    key = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16])
    random = np.random.Generator(np.random.Philox(key=key))
    for start in range(0, vector.size, _CHUNK):
        part = vector[start : start + _CHUNK]
        if before is not None:
            part += before[start : start + _CHUNK]
        if coding == "bfloat16":
            told = nearest(part, coding)
        else:
            steps, powers = _steps(part)
            steps += random.random(steps.shape, np.float32)
            told = (np.minimum(np.floor(steps), _MOST) * np.ldexp(np.float32(1), powers)[:, None]).ravel()[: part.size]
        part -= told
        kept[2 * start : 2 * (start + part.size)].view("<u2")[:] = _halves(nearest(part, "bfloat16"))[1::2]
        part[:] = told
    return kept


def _halves(part: Vector) -> NDArray[np.uint16]:
    """The lower and the upper half of each value, one after the other."""
    halves: NDArray[np.uint16] = part.astype("<f4", copy=False).view("<u2")
    return halves


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
