"""Attention in two parts with their log-sum-exps: the fast kernel against the definition."""

import pytest
import torch

from model.lanes import attention_with_lse, plain_attention_with_lse


@pytest.mark.parametrize("shape", [(3, 2, 2, 5, 8), (3, 2, 40, 70, 8), (2, 1, 1, 600, 32), (2, 3, 7, 1, 16)])
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_equals_the_definition(shape: tuple[int, ...], masked: bool) -> None:
    rows, heads, queries, keys, width = shape
    torch.manual_seed(0)
    q, k, v = (torch.randn(rows, heads, n, width) for n in (queries, keys, keys))
    bias = torch.zeros(rows, 1, 1, keys)
    bias[1, ..., : keys - 1] = -1e30  # a whole block of hidden keys before the first visible one
    got = attention_with_lse(q, k, v, bias if masked else None)
    expected = plain_attention_with_lse(q, k, v, bias if masked else None)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
