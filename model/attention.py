"""Causal attention over patients that lie end to end in one flat batch.

Segments (one window of one patient each) differ in length. They are sorted into groups of similar length once per
batch; every layer then gathers its queries, keys and values into `[B, L]` blocks, runs PyTorch's fused causal attention
on each block, and gathers the results back. A patient can't see another one, because a block row holds one segment and
padding stands behind it, where the causal mask hides it. The gradients of both moves are gathers too, so nothing is
added up in an order that could change from run to run.

On CUDA devices, half-precision queries go through PyTorch's attention for segments of any length
(`torch.nn.attention.varlen`, FlashAttention) as they lie: no blocks, no padding, no moves.

Shapes: N flat tokens, M padded tokens, S segments, B rows and L columns of one block, H query heads, G key/value heads,
K head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# A block closes when its next segment would leave more than this share of its row empty (and more than a few tokens).
_MAX_WASTE = 0.2
_ALWAYS_SHARE = 16


@dataclass(frozen=True)
class SegmentPlan:
    """Where each flat token goes in the blocks, and back.

    Attributes:
        positions: int64 [N], place of each token in its own segment (what RoPE rotates by).
        blocks: rows and columns of every block, in the order of the padded axis M.
        take: int64 [M], flat index of every padded place, or None when the flat batch already is one block.
        put: int64 [N], padded place of every flat token.
        ends: int32 [S + 1], where segments begin and the last ends; on CUDA devices only.
    """

    positions: Tensor
    blocks: tuple[tuple[int, int], ...]
    take: Tensor | None
    put: Tensor | None
    ends: Tensor | None = None

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> "SegmentPlan":
        """Plan the blocks for `lengths` (int64 [S], all positive) on `device`."""
        length_S = lengths.cpu().numpy().astype(np.int64)
        start_S = np.cumsum(length_S) - length_S
        positions = np.arange(length_S.sum()) - np.repeat(start_S, length_S)
        order = np.argsort(-length_S, kind="stable")
        blocks: list[tuple[int, int]] = []
        take: list[np.ndarray] = []
        put = np.empty(len(positions), dtype=np.int64)
        first = padded = 0
        while first < len(order):
            columns = int(length_S[order[first]])
            fits = columns - length_S[order[first:]] <= max(_ALWAYS_SHARE, _MAX_WASTE * columns)
            members = order[first : first + int(fits.sum())]
            within = np.arange(columns)
            real = within < length_S[members, None]
            flat_BL = np.where(real, start_S[members, None] + within, start_S[members, None])
            put[flat_BL[real]] = padded + np.flatnonzero(real)
            take.append(flat_BL.ravel())
            blocks.append((len(members), columns))
            padded += flat_BL.size
            first += len(members)
        places, ends = torch.from_numpy(positions).to(device), None
        if device.type == "cuda":
            ends = torch.from_numpy(np.append(start_S, len(positions)).astype(np.int32)).to(device)
        if len(blocks) == 1 and padded == len(positions):
            return cls(places, tuple(blocks), None, None, ends)
        take_M = torch.from_numpy(np.concatenate(take)).to(device)
        return cls(places, tuple(blocks), take_M, torch.from_numpy(put).to(device), ends)

    def attend(self, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        """Causal attention inside every segment: `[N, H, K]`."""
        if self.ends is not None and q_NHK.dtype in (torch.bfloat16, torch.float16):
            longest = max(columns for _, columns in self.blocks)
            return _attend_flat(q_NHK, k_NGK, v_NGK.to(q_NHK.dtype), self.ends, longest)
        if self.take is None or self.put is None:
            return _attend_block(q_NHK, k_NGK, v_NGK, *self.blocks[0])
        sizes = [rows * columns for rows, columns in self.blocks]
        padded = [_pad(x, self.take, self.put).split(sizes) for x in (q_NHK, k_NGK, v_NGK)]
        out_MHK = torch.cat(
            [
                _attend_block(q, k, v, rows, columns)
                for q, k, v, (rows, columns) in zip(*padded, self.blocks, strict=True)
            ]
        )
        return _unpad(out_MHK, self.put)


def _attend_flat(q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, ends: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Groups of queries are asked for only where there are some: older releases of PyTorch don't know the word.
    attend = varlen_attn if q_NHK.shape[1] == k_NGK.shape[1] else partial(varlen_attn, enable_gqa=True)
    # The window (-1, 0) is all of the past and nothing of the future.
    out = attend(q_NHK, k_NGK, v_NGK, ends, ends, longest, longest, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out


def _attend_block(q_MHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, rows: int, columns: int) -> Tensor:
    q, k, v = (x.unflatten(0, (rows, columns)).transpose(1, 2) for x in (q_MHK, k_MGK, v_MGK))
    grouped = q.shape[1] != k.shape[1]
    out_BHLK = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out_BHLK.transpose(1, 2).flatten(0, 1)


class _Pad(torch.autograd.Function):
    """`x[take]`; padded places get no gradient, because no real token attends to them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, put: Tensor) -> Tensor:
        ctx.save_for_backward(put)
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (put,) = ctx.saved_tensors
        return grads[0].index_select(0, put), None, None


class _Unpad(torch.autograd.Function):
    """`x[put]`; each real place is read once, so its gradient is a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, put: Tensor) -> Tensor:
        ctx.save_for_backward(put)
        ctx.places = x.shape[0]
        return x.index_select(0, put)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (put,) = ctx.saved_tensors
        padded = grads[0].new_zeros(ctx.places, *grads[0].shape[1:])
        return padded.index_copy_(0, put, grads[0]), None


class _Rotate(torch.autograd.Function):
    """Turn the pairs (x_i, x_{i+K/2}) by their angles; the gradient turns back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


_pad: Callable[[Tensor, Tensor, Tensor], Tensor] = _Pad.apply
_unpad: Callable[[Tensor, Tensor], Tensor] = _Unpad.apply
_rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = _Rotate.apply


def _turn(x_NHK: Tensor, cos_N1k: Tensor, sin_N1k: Tensor) -> Tensor:
    half = x_NHK.shape[-1] // 2
    low, high = x_NHK[..., :half], x_NHK[..., half:]
    if torch.compiler.is_compiling():
        # One kernel either way; the compiler can't write into halves.
        turned = [low * cos_N1k - high * sin_N1k, high * cos_N1k + low * sin_N1k]
        return torch.cat(turned, -1).to(x_NHK.dtype)
    if has_kernels(x_NHK):
        from model.fused import turned as turned_at_once

        return turned_at_once(x_NHK, cos_N1k, sin_N1k)
    # In float32 whatever comes in, and without a copy of a half on the way.
    out = torch.empty_like(x_NHK, dtype=cos_N1k.dtype)
    torch.mul(low, cos_N1k, out=out[..., :half]).addcmul_(high, sin_N1k, value=-1)
    torch.mul(high, cos_N1k, out=out[..., half:]).addcmul_(low, sin_N1k)
    return out.to(x_NHK.dtype)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def has_kernels(x: Tensor) -> bool:
    """Whether kernels in Triton run where `x` is."""
    return x.is_cuda and _has_triton()


def rotate(x_NHK: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary position embedding (Su et al. 2021, arXiv 2104.09864, rotate-half layout of Qwen2)."""
    return _rotate(x_NHK, *angles)


def rotary_angles(positions: Tensor, head_width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine, float32 [N, 1, K/2], of every position and frequency; one pair serves all layers."""
    power = torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width
    angle = positions.float()[:, None, None] * (1.0 / base**power)
    return angle.cos(), angle.sin()
