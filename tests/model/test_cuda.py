"""On a CUDA device the model does what it does on the CPU. `make test-slow` runs this where there is one."""

import numpy as np
import pytest
import torch

from model.clock import Clock
from model.decoder import Decoder, preset
from model.rollout import Prompt, Stop, rollout
from model.train import Trainer, TrainOptions
from tokenizer.windows import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

CONFIG = preset("0.3m", vocab=50, context=128)


def batch(seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    lengths = np.array([100, 60, 90, 6])
    tokens = rng.integers(3, CONFIG.vocab, lengths.sum())
    targets = np.roll(tokens, -1)
    targets[np.cumsum(lengths) - 1] = -1
    return Batch(tokens, targets, lengths, np.arange(len(lengths)))


def losses(device: str, precision: str) -> list[float]:
    options = TrainOptions(warmup_steps=2, total_steps=20, precision=precision)  # type: ignore[arg-type]
    trainer = Trainer(Decoder.create(CONFIG, seed=1).to(device), options)
    return [trainer.step(batch(step)).loss for step in range(10)]


def test_training_on_the_device_follows_the_cpu_in_float32() -> None:
    np.testing.assert_allclose(losses("cuda", "fp32"), losses("cpu", "fp32"), rtol=1e-3)


def test_training_in_bfloat16_stays_near_float32() -> None:
    np.testing.assert_allclose(losses("cuda", "bf16"), losses("cpu", "fp32"), rtol=0.03)


def test_rollouts_on_the_device_end_as_on_the_cpu() -> None:
    clock = Clock(
        advance_us=np.where(np.arange(CONFIG.vocab) < 10, 3_600_000_000, 0),
        eot=1,
        never=np.arange(CONFIG.vocab) == 0,
        is_static=np.zeros(CONFIG.vocab, bool),
        is_age=np.zeros(CONFIG.vocab, bool),
    )
    ends = np.arange(CONFIG.vocab) == 20
    prompts = [Prompt(np.arange(3, 40)), Prompt(np.arange(5, 15))]
    stop = Stop([ends], 24 * 3_600_000_000, 64)
    found = [
        rollout(Decoder.create(CONFIG, seed=1).to(device), clock, prompts, trajectories=200, stop=stop, seed=3)
        for device in ("cpu", "cuda")
    ]
    # Rounding may turn a draw that falls on a boundary; all others agree.
    assert (found[0].reason == found[1].reason).mean() > 0.97
