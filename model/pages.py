"""Attention of single tokens over keys and values that lie in pages, as kernels in Triton (Tillet et al., MAPL 2019).

Two kernels make one attention. `shared` lets all rows that continue one window meet its keys at once: a page of keys is
read once per tile of rows, not once per row (Juravsky et al., "Hydragen", arXiv 2402.05099). `own` then meets what each
row has appended since, takes the newest token in on the way, and joins the parts by their log-sum-exps, which is exact.
Softmax runs along the keys without holding the scores (Dao et al., "FlashAttention", arXiv 2205.14135).

All sizes that change from step to step are read from the device's memory, so one CUDA graph serves many steps.

Shapes: B rows, H query heads, G key/value heads, K head width, P pages of `PAGE` tokens, S parts of a window.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PAGE = 64
# Query rows of one tile: heads of rows that share a window and a key/value head.
_TILE = 32
_OWN_TILE = 16
# Programs along the tiles; each takes every so-manieth tile.
_MOST_PROGRAMS = 64


def rows_per_tile(heads: int, kv_heads: int) -> int:
    """Rows of one tile of `shared`."""
    return max(1, _TILE // (heads // kv_heads))


def shared(
    q_BHK: Tensor, pages: Tensor, table: Tensor, lengths: Tensor, tiles: tuple[Tensor, Tensor, Tensor], parts: int
) -> tuple[Tensor, Tensor]:
    """Meet the windows' keys.

    Args:
        q_BHK: queries, [B, H, K].
        pages: keys and values of one layer, [2, P, G, PAGE, K].
        table: int32 [W, pages], each window's pages in order.
        lengths: int32 [W], tokens in each window, at least 1 where rows continue it.
        tiles: int32 [T, rows] rows of each tile (-1 for none), int32 [T] its window, int32 [1] how many there are.
        parts: into how many parts a window is cut, for GPUs with more processors than tiles.

    Returns:
        Partial outputs, float32 [S, B, H, K], and log-sum-exps, float32 [S, B, H], of rows in tiles.
    """
    rows, heads, width = q_BHK.shape
    kv_heads = pages.shape[2]
    out = q_BHK.new_empty(parts, rows, heads, width, dtype=torch.float32)
    lse = q_BHK.new_empty(parts, rows, heads, dtype=torch.float32)
    members, window, count = tiles
    grid = (min(len(window), _MOST_PROGRAMS), kv_heads, parts)
    _shared[grid](
        q_BHK, pages[0], pages[1], table, lengths, members, window, count, out, lse,
        rows, table.stride(0), width**-0.5,
        HEADS=heads, GROUP=heads // kv_heads, ROWS=members.shape[1], WIDTH=width, PARTS=parts,
        TILE=max(_TILE, triton.next_power_of_2(heads // kv_heads)), BLOCK=triton.next_power_of_2(width), PAGE=PAGE,
        PRECISION=_precision(q_BHK), num_warps=4,
    )  # fmt: skip
    return out, lse


def own(
    qkv: tuple[Tensor, Tensor, Tensor], pages: Tensor, table: Tensor, lengths: Tensor, partial: tuple[Tensor, Tensor]
) -> Tensor:
    """Meet each row's own keys and the newest one, store it, and join with the windows' parts.

    Args:
        qkv: queries [B, H, K], newest keys and values [B, G, K].
        pages: keys and values of one layer, [2, P, G, PAGE, K]; the newest ones are written behind the others.
        table: int32 [B, pages], each row's pages in order.
        lengths: integers [B], own tokens that are stored already; negative for places without a row.
        partial: from `shared`.

    Returns:
        [B, H, K], undefined in places without a row.
    """
    q_BHK, k_BGK, v_BGK = (x.contiguous() for x in qkv)
    rows, heads, width = q_BHK.shape
    kv_heads = k_BGK.shape[1]
    out = torch.empty_like(q_BHK)
    group = heads // kv_heads
    _own[(rows, kv_heads)](
        q_BHK, k_BGK, v_BGK, pages[0], pages[1], table, lengths, *partial, out,
        rows, table.stride(0), width**-0.5,
        HEADS=heads, GROUP=group, WIDTH=width, PARTS=partial[0].shape[0],
        TILE=max(_OWN_TILE, triton.next_power_of_2(group)), BLOCK=triton.next_power_of_2(width), PAGE=PAGE,
        PRECISION=_precision(q_BHK), num_warps=2,
    )  # fmt: skip
    return out


def _precision(x: Tensor) -> str:
    # Triton's default for float32 is the matrix units' shorter format.
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def _meet_page(
    q, keys, values, page, group, start, length, most, total, out, scale,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One page of keys and values: the new maximum, sum and unscaled output of each query row."""
    column = tl.arange(0, PAGE)
    unit = tl.arange(0, BLOCK)
    at = (page.to(tl.int64) * GROUPS + group) * (PAGE * WIDTH)
    here = start + column < length
    both = here[:, None] & (unit[None, :] < WIDTH)
    place = at + column[:, None] * WIDTH + unit[None, :]
    k = tl.load(keys + place, mask=both, other=0.0)
    v = tl.load(values + place, mask=both, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(here[None, :], scores, float("-inf"))
    new_most = tl.maximum(most, tl.max(scores, 1))
    weight = tl.exp(scores - new_most[:, None])
    fade = tl.exp(most - new_most)
    total = total * fade + tl.sum(weight, 1)
    out = out * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision=PRECISION)
    return new_most, total, out


@triton.jit
def _shared(
    q_ptr, keys, values, table, lengths, members, windows, count, out_ptr, lse_ptr,
    rows, stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    part = tl.program_id(2)
    slot = tl.arange(0, TILE)
    unit = tl.arange(0, BLOCK)
    for tile in range(tl.program_id(0), tl.load(count), tl.num_programs(0)):
        window = tl.load(windows + tile)
        length = tl.load(lengths + window)
        row = tl.load(members + tile * ROWS + slot // GROUP, mask=slot < ROWS * GROUP, other=-1)
        head = group * GROUP + slot % GROUP
        place = (row.to(tl.int64) * HEADS + head) * WIDTH
        both = (row >= 0)[:, None] & (unit[None, :] < WIDTH)
        q = tl.load(q_ptr + place[:, None] + unit[None, :], mask=both, other=0.0)
        pages = tl.cdiv(length, PAGE)
        share = tl.cdiv(pages, PARTS)
        most = tl.full([TILE], -1e30, tl.float32)
        total = tl.zeros([TILE], tl.float32)
        out = tl.zeros([TILE, BLOCK], tl.float32)
        for n in range(part * share, tl.minimum(part * share + share, pages)):
            page = tl.load(table + window * stride + n)
            most, total, out = _meet_page(
                q, keys, values, page, group, n * PAGE, length, most, total, out, scale,
                HEADS // GROUP, WIDTH, BLOCK, PAGE, PRECISION,
            )  # fmt: skip
        # A part beyond the window's end has met nothing: its weight is zero.
        safe = tl.where(total > 0, total, 1.0)
        at = (part * rows).to(tl.int64) * HEADS
        tl.store(out_ptr + at * WIDTH + place[:, None] + unit[None, :], out / safe[:, None], mask=both)
        tl.store(lse_ptr + at + row.to(tl.int64) * HEADS + head, most + tl.log(safe), mask=row >= 0)


@triton.jit
def _own(
    q_ptr, k_ptr, v_ptr, keys, values, table, lengths, part_ptr, lse_ptr, out_ptr,
    rows, stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, PAGE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    length = tl.load(lengths + row)
    if length < 0:
        return
    slot = tl.arange(0, TILE)
    unit = tl.arange(0, BLOCK)
    head = group * GROUP + slot
    place = (row * HEADS + head)[:, None] * WIDTH + unit[None, :]
    both = (slot < GROUP)[:, None] & (unit[None, :] < WIDTH)
    q = tl.load(q_ptr + place, mask=both, other=0.0)
    inside = unit < WIDTH
    newest = (row * (HEADS // GROUP) + group) * WIDTH + unit
    k = tl.load(k_ptr + newest, mask=inside, other=0.0)
    v = tl.load(v_ptr + newest, mask=inside, other=0.0)
    page = tl.load(table + row * stride + length // PAGE)
    at = ((page.to(tl.int64) * (HEADS // GROUP) + group) * PAGE + length % PAGE) * WIDTH + unit
    tl.store(keys + at, k.to(keys.dtype.element_ty), mask=inside)
    tl.store(values + at, v.to(values.dtype.element_ty), mask=inside)
    most = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
    total = tl.full([TILE], 1.0, tl.float32)
    out = tl.zeros([TILE, BLOCK], tl.float32) + v.to(tl.float32)[None, :]
    for part in tl.static_range(PARTS):
        shift = (part * rows).to(tl.int64) * HEADS
        lse = tl.load(lse_ptr + shift + row * HEADS + head, mask=slot < GROUP, other=-1e30)
        met = tl.load(part_ptr + shift * WIDTH + place, mask=both, other=0.0)
        new_most = tl.maximum(most, lse)
        fade = tl.exp(most - new_most)
        weight = tl.exp(lse - new_most)
        total = total * fade + weight
        out = out * fade[:, None] + met * weight[:, None]
        most = new_most
    for n in range(tl.cdiv(length, PAGE)):
        page = tl.load(table + row * stride + n)
        most, total, out = _meet_page(
            q, keys, values, page, group, n * PAGE, length, most, total, out, scale,
            HEADS // GROUP, WIDTH, BLOCK, PAGE, PRECISION,
        )  # fmt: skip
    tl.store(out_ptr + place, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=both)
