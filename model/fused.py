"""The decoder's element-wise steps as one kernel each on GPUs, in Triton: bound by memory, so each byte moves once.

Results are those of the plain operations up to rounding: both compute in float32 and round once.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def turned(x_NHK: Tensor, cos_N1k: Tensor, sin_N1k: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i+K/2}) by their angles: like `x_NHK`, which may be of any float type."""
    x_NHK = x_NHK.contiguous()
    tokens, heads, width = x_NHK.shape
    out = torch.empty_like(x_NHK)
    pairs = heads * width // 2
    grid = (tokens, triton.cdiv(pairs, _BLOCK))
    _turn[grid](x_NHK, cos_N1k, sin_N1k, out, pairs, HALF=width // 2, BLOCK=_BLOCK)
    return out


class _SwiGlu(torch.autograd.Function):
    """`silu(gate) * up` (Shazeer 2020, arXiv 2002.05202); keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Both [N, F], of one type, as the result."""
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        _swiglu[(triton.cdiv(gate.numel(), _BLOCK),)](gate, up, out, gate.numel(), BLOCK=_BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
        grid = (triton.cdiv(gate.numel(), _BLOCK),)
        _swiglu_back[grid](gate, up, grads[0].contiguous(), to_gate, to_up, gate.numel(), BLOCK=_BLOCK)
        return to_gate, to_up


swiglu: Callable[[Tensor, Tensor], Tensor] = _SwiGlu.apply


@triton.jit
def _turn(x_ptr, cos_ptr, sin_ptr, out_ptr, pairs, HALF: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    place = token * pairs * 2 + pair // HALF * (2 * HALF) + pair % HALF
    angle = token * HALF + pair % HALF
    low = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + angle, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=inside, other=0.0)
    tl.store(out_ptr + place, (low * cos - high * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + place + HALF, (high * cos + low * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_back(gate_ptr, up_ptr, grad_ptr, to_gate_ptr, to_up_ptr, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    gate = tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    to_gate = grad * up * share * (1.0 + gate * (1.0 - share))
    tl.store(to_gate_ptr + place, to_gate.to(to_gate_ptr.dtype.element_ty), mask=inside)
    tl.store(to_up_ptr + place, (grad * gate * share).to(to_up_ptr.dtype.element_ty), mask=inside)
