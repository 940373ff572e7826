"""Products over segments against plain ones; without a GPU they run in Triton's interpreter (`tests/conftest.py`)."""

import pytest
import torch

pytest.importorskip("triton")

from model.segments import Products

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter can't multiply bfloat16.
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("table", [False, True])
def test_squares_and_weighted_sums_are_those_of_each_segments_product(dtype: torch.dtype, table: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    lengths, outputs, inputs = [40, 1, 0, 70, 5], 130, 40
    ends = torch.tensor([0, *lengths]).cumsum(0)
    g, x, e = (torch.randn(int(ends[-1]), size, generator=rng).to(dtype) for size in (outputs, inputs, inputs))
    tokens = torch.randint(0, outputs, (len(e),), generator=rng)
    expected = []
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        alone = g[start:stop].double().T @ x[start:stop].double()
        expected.append(alone.index_add_(0, tokens[start:stop], e[start:stop].double()) if table else alone)
    products = Products(g.to(DEVICE), x.to(DEVICE), ends.to(DEVICE))
    if table:
        products = Products(
            products.outer, products.inner, products.ends, tokens.to(DEVICE), e.to(DEVICE), ends.to(DEVICE)
        )
    squares = torch.stack([one.square().sum() for one in expected])
    torch.testing.assert_close(products.squares().cpu(), squares, rtol=1e-5, atol=1e-9)
    factors = torch.tensor([0.5, 2.0, 1.0, 0.0, -1.0])
    total = torch.ones(outputs - 2, inputs, device=DEVICE)
    products.add_(total, factors.to(DEVICE))
    wanted = 1.0 + torch.einsum("s,soi->oi", factors.double(), torch.stack(expected))[: outputs - 2]
    torch.testing.assert_close(total.cpu().double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_segment_that_is_not_finite_leaves_no_trace_with_factor_0() -> None:
    g, x = torch.ones(4, 3, device=DEVICE), torch.ones(4, 2, device=DEVICE)
    g[3] = torch.inf
    products = Products(g, x, torch.tensor([0, 3, 4], device=DEVICE))
    assert products.squares().isfinite().tolist() == [True, False]
    total = torch.zeros(3, 2, device=DEVICE)
    products.add_(total, torch.tensor([1.0, 0.0], device=DEVICE))
    assert (total == 3).all()
