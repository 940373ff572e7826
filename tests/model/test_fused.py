"""Kernels against the plain operations; without a GPU they run in Triton's interpreter (`tests/conftest.py`)."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

pytest.importorskip("triton")

from model.attention import rotary_angles, rotate
from model.fused import swiglu, turned

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# bfloat16 has 8 significant bits; both sides round once.
CLOSE = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-2, 1e-2)}


@pytest.mark.parametrize("dtype", list(CLOSE))
@pytest.mark.parametrize("shape", [(5, 3, 16), (2, 70, 32)])
def test_turning_at_once(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=rng).to(dtype)
    angles = rotary_angles(torch.randint(0, 9000, shape[:1], generator=rng), shape[2], 10_000.0)
    got = turned(x.to(DEVICE), *(angle.to(DEVICE) for angle in angles))
    assert got.dtype == dtype
    atol, rtol = CLOSE[dtype]
    torch.testing.assert_close(got.cpu(), rotate(x, angles), atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", list(CLOSE))
def test_swiglu_and_its_gradients(dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(0)
    gate, up, weight = (4 * torch.randn(37, 50, generator=rng).to(dtype) for _ in range(3))
    ends = []
    for function, device in ((swiglu, DEVICE), (lambda g, u: F.silu(g.float()) * u.float(), "cpu")):
        inputs = [x.detach().to(device).requires_grad_() for x in (gate, up)]
        out = function(*inputs)
        (out.float() * weight.to(device).float()).sum().backward()
        ends.append([out.detach().float().cpu(), *(x.grad.float().cpu() for x in inputs if x.grad is not None)])
    atol, rtol = CLOSE[dtype]
    for got, expected in zip(*ends, strict=True):
        torch.testing.assert_close(got, expected, atol=4 * atol, rtol=rtol)
