"""Products over segments of tokens as one kernel each on GPUs, in Triton: their squares, and their weighted sum.

A layer's weight gradient of one patient is G^T X over the patient's tokens: gradients of outputs, and inputs.
`squares` makes a tile of that product, squares it and forgets it, so no patient's gradient is ever written to memory;
`add_` makes the same tiles again and adds them with each patient's factor. Both are as many kernels for a thousand
patients as for one. Factors meet the finished float32 tile, so what is added is what was squared, also in bfloat16.
(Cf. Bu et al., arXiv 2210.00038, who take norms from T x T products of tokens.)

Shapes: N tokens, S segments, O outputs, I inputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Sides of a tile, and the programs that keep a large GPU busy.
_TILE = 128
_PROGRAMS = 264
# Tokens that a program takes at a time: more where segments are long enough to fill them.
_LONG = 512


@dataclass(frozen=True)
class Products:
    """A weight's gradient of every segment: G^T X of its tokens, and of a table, if any, what its looked up rows get.

    Attributes:
        outer, inner: [N, O] and [N, I], of one type, bfloat16 or float32.
        ends: int64 [S + 1], where segments begin and the last ends.
        tokens: int64 [M], rows of the table that were looked up, or None.
        looked_up: gradients of what was looked up [M, I], of the same type.
        token_ends: int64 [S + 1], of `tokens`.
    """

    outer: Tensor
    inner: Tensor
    ends: Tensor
    tokens: Tensor | None = None
    looked_up: Tensor | None = None
    token_ends: Tensor | None = None

    def squares(self) -> Tensor:
        """The squared Euclidean norm of each segment's gradient, float64 [S]."""
        segments, tiles = len(self.ends) - 1, self._tiles()
        found = torch.empty(segments, tiles[0] * tiles[1], device=self.outer.device)
        _squares[(tiles[0] * tiles[1], segments)](*self._given(), found, *self._sizes(), **self._choices())
        return found.sum(1, dtype=torch.float64)

    def add_(self, total_OI: Tensor, factors_S: Tensor) -> None:
        """Add every segment's gradient times its factor, float32 [S]; 0 is nothing at all.

        Args:
            total_OI: float32, which may lack the last of the outputs.
            factors_S: of the segments.
        """
        segments, tiles = len(self.ends) - 1, self._tiles()
        splits = min(segments, triton.cdiv(_PROGRAMS, tiles[0] * tiles[1]))
        found = torch.empty(splits, self.outer.shape[1], self.inner.shape[1], device=self.outer.device)
        given = (*self._given(), factors_S, found, segments, splits, *self._sizes())
        _weighted[(tiles[0] * tiles[1], splits)](*given, **self._choices())
        total_OI += found.sum(0)[: len(total_OI)]

    def _tiles(self) -> tuple[int, int]:
        return triton.cdiv(self.outer.shape[1], _TILE), triton.cdiv(self.inner.shape[1], _TILE)

    def _given(self) -> tuple[Tensor, ...]:
        main = (self.outer, self.inner, self.ends)
        if self.tokens is None or self.looked_up is None or self.token_ends is None:
            return (*main, self.ends, self.inner, self.ends)
        return (*main, self.tokens, self.looked_up, self.token_ends)

    def _sizes(self) -> tuple[int, ...]:
        return self.outer.shape[1], self.inner.shape[1], self.outer.stride(0), self.inner.stride(0)

    def _choices(self) -> dict[str, object]:
        long = len(self.outer) >= _LONG * (len(self.ends) - 1)
        precision = "ieee" if self.outer.dtype == torch.float32 else "tf32"
        return {
            "TABLE": self.tokens is not None, "PRECISION": precision, "TILE": _TILE, "STEP": 64 if long else 32,
            "num_warps": 8,
        }  # fmt: skip


@triton.jit
def _product(
    g_ptr, x_ptr, start, stop, o, i, outputs, inputs, g_row, x_row,
    PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of G^T X over the tokens from start to stop."""
    tile = tl.zeros((TILE, TILE), tl.float32)
    for first in range(start, stop, STEP):
        t = (first + tl.arange(0, STEP)).to(tl.int64)[:, None]
        g = tl.load(g_ptr + t * g_row + o[None, :], mask=(t < stop) & (o[None, :] < outputs), other=0.0)
        x = tl.load(x_ptr + t * x_row + i[None, :], mask=(t < stop) & (i[None, :] < inputs), other=0.0)
        tile = tl.dot(tl.trans(g), x, tile, input_precision=PRECISION)
    return tile


@triton.jit
def _looked_up(
    tile, token_ptr, e_ptr, start, stop, o, i, inputs,
    PRECISION: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The tile with what the rows `o` of a table get from being looked up."""
    for first in range(start, stop, STEP):
        t = (first + tl.arange(0, STEP)).to(tl.int64)
        row = tl.load(token_ptr + t, mask=t < stop, other=-1)
        e = tl.load(
            e_ptr + t[:, None] * inputs + i[None, :], mask=(t[:, None] < stop) & (i[None, :] < inputs), other=0.0
        )
        own = (row[None, :] == o[:, None]).to(e.dtype)
        tile = tl.dot(own, e, tile, input_precision=PRECISION)
    return tile


@triton.jit
def _tile_of(
    g_ptr, x_ptr, end_ptr, token_ptr, e_ptr, token_end_ptr, segment, o, i, outputs, inputs, g_row, x_row,
    TABLE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One tile of a segment's gradient."""
    start, stop = tl.load(end_ptr + segment), tl.load(end_ptr + segment + 1)
    tile = _product(g_ptr, x_ptr, start, stop, o, i, outputs, inputs, g_row, x_row, PRECISION, TILE, STEP)
    if TABLE:
        start, stop = tl.load(token_end_ptr + segment), tl.load(token_end_ptr + segment + 1)
        tile = _looked_up(tile, token_ptr, e_ptr, start, stop, o, i, inputs, PRECISION, STEP)
    return tile


@triton.jit
def _squares(
    g_ptr, x_ptr, end_ptr, token_ptr, e_ptr, token_end_ptr, out_ptr, outputs, inputs, g_row, x_row,
    TABLE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    place, segment = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(inputs, TILE)
    o, i = place // across * TILE + tl.arange(0, TILE), place % across * TILE + tl.arange(0, TILE)
    tile = _tile_of(
        g_ptr, x_ptr, end_ptr, token_ptr, e_ptr, token_end_ptr, segment, o, i, outputs, inputs, g_row, x_row,
        TABLE, PRECISION, TILE, STEP,
    )  # fmt: skip
    tl.store(out_ptr + segment.to(tl.int64) * tl.num_programs(0) + place, tl.sum(tl.sum(tile * tile, 1), 0))


@triton.jit
def _weighted(
    g_ptr, x_ptr, end_ptr, token_ptr, e_ptr, token_end_ptr, factor_ptr, out_ptr, segments, splits,
    outputs, inputs, g_row, x_row,
    TABLE: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    place, split = tl.program_id(0), tl.program_id(1)
    across = tl.cdiv(inputs, TILE)
    o, i = place // across * TILE + tl.arange(0, TILE), place % across * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for segment in range(split, segments, splits):
        factor = tl.load(factor_ptr + segment)
        tile = _tile_of(
            g_ptr, x_ptr, end_ptr, token_ptr, e_ptr, token_end_ptr, segment, o, i, outputs, inputs, g_row, x_row,
            TABLE, PRECISION, TILE, STEP,
        )  # fmt: skip
        # A share that is not finite has factor 0, and must leave no trace.
        total += tl.where(factor != 0.0, tile * factor, 0.0)
    at = split.to(tl.int64) * outputs * inputs + o[:, None].to(tl.int64) * inputs + i[None, :]
    tl.store(out_ptr + at, total, mask=(o[:, None] < outputs) & (i[None, :] < inputs))
