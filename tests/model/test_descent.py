"""AdamW and SGD against torch's own, to the bit."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from model.descent import SGD, AdamW, Optimizer

Groups = list[dict[str, Any]]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda groups: AdamW(groups, 0.02, (0.9, 0.95)),
         lambda groups: torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.95), fused=True)),
        (lambda groups: SGD(groups, 0.02), lambda groups: torch.optim.SGD(groups, lr=0.02)),
    ],
)  # fmt: skip
def test_steps_equal_those_of_torch(
    ours: Callable[[Groups], Optimizer], theirs: Callable[[Groups], torch.optim.Optimizer]
) -> None:
    generator = torch.Generator().manual_seed(1)
    mine, peers = ([nn.Parameter(torch.ones(shape)) for shape in ((16, 33), (7,), (5, 5))] for _ in range(2))
    one, other = (
        make([{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}])
        for make, weights in ((ours, mine), (theirs, peers))
    )
    for step in range(4):
        for group in (*one.param_groups, *other.param_groups):
            group["lr"] = 0.02 / (step + 1)
        for a, b in zip(mine[: 2 + step % 2], peers, strict=False):  # the last one has no gradient at first
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        one.step()
        other.step()
    for a, b in zip(mine, peers, strict=True):
        assert torch.equal(a, b)
        assert one.state.get(a, {}).keys() == {
            key for key, value in other.state.get(b, {}).items() if value is not None
        }
        assert all(torch.equal(value, other.state[b][key]) for key, value in one.state.get(a, {}).items())
