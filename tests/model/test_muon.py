"""Muon: against torch's own, against singular values, and in any order of shapes."""

import pytest
import torch
from torch import nn

from model.muon import Muon, orthogonal


def test_singular_values_come_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 8), (2, 16, 48), (1, 1, 5)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=generator)))
        assert 0.5 < float(values.min()) <= float(values.max()) < 1.3


def test_a_matrix_of_zeros_stays_zero() -> None:
    assert not orthogonal(torch.zeros(2, 4, 6)).any()


def test_steps_equal_those_of_torch_but_for_its_bfloat16() -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(16, 16), (48, 16), (16, 48), (16, 16)]
    ours, theirs = ([nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    settings = {"momentum": 0.95, "weight_decay": 0.1}
    mine = Muon(ours, 0.02, **settings)
    peer = torch.optim.Muon(theirs, 0.02, adjust_lr_fn="match_rms_adamw", **settings)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.step()
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        moved = (b - 1).norm()
        assert (a - b).norm() < 0.03 * moved


def test_a_parameter_without_gradient_stays() -> None:
    weight = nn.Parameter(torch.ones(3, 4))
    Muon([weight], 0.1, weight_decay=0.5).step()
    assert torch.equal(weight, torch.ones(3, 4))


def test_other_than_matrices_are_refused() -> None:
    with pytest.raises(ValueError, match="matrices"):
        Muon([nn.Parameter(torch.ones(3))], 0.1)
