"""The attacks compute where the model lies, and find the same there."""

import numpy as np
import pytest
import torch

from model.private import PrivateOptions
from simulation.attacks import leakage, memory
from simulation.attacks.membership import repeated
from simulation.attacks.training import losses, train
from tests.simulation.attacks import small
from tests.simulation.attacks.test_leakage import site

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_training_and_attacks_run_on_a_device() -> None:
    words, members, others = small.words(), small.patients(21, 25), small.patients(22, 25)
    recipe = small.recipe(20, batch_tokens=256, device="cuda")
    model = train(recipe, members, words, small.KEY)
    assert model.embed_tokens.weight.is_cuda
    there = losses(model, words, others)
    part = leakage.attack(recipe.initial(), words, [site(recipe, "s", members, others)], most=10)[0]
    assert part.plain.codes.value is not None or part.absent == 0
    rare = memory.rare(model, words, members, others, length=4, most=5, tries=2, seed=0)
    assert rare.members.courses == 5
    assert np.isfinite(repeated(model, words, others, cuts=2, trajectories=1)).all()
    np.testing.assert_allclose(losses(model.cpu(), words, others), there, rtol=1e-3)


def test_private_steps_run_on_a_device() -> None:
    recipe = small.recipe(5, device="cuda", private=PrivateOptions(1.0, 1.0, 0.5))
    model = train(recipe, small.patients(21, 25), small.words(), small.KEY)
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
