"""On a CUDA device the model does what it does on the CPU. `make test-slow` runs this where there is one."""

import numpy as np
import pytest
import torch

from model.attention import SegmentPlan
from model.clock import Clock, Waits
from model.decoder import Decoder
from model.feed import ahead
from model.rollout import Prompt, Stop, rollout
from model.settings import Machine, TrainOptions, preset
from model.train import Trainer
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


@pytest.mark.parametrize("kv_heads", [1, 3])
def test_attention_over_segments_as_they_lie_is_that_over_blocks(kv_heads: int) -> None:
    """Half precision takes another way (varlen) than float32 (blocks); both ways and their gradients agree."""
    lengths = torch.tensor([100, 60, 1, 90, 128, 7])
    rng = torch.Generator().manual_seed(0)
    shapes = [(386, 3, 32), (386, kv_heads, 32), (386, kv_heads, 32)]
    numbers = [torch.randn(shape, generator=rng) for shape in shapes]
    found = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        plan = SegmentPlan.of(lengths, torch.device(device))
        qkv = [x.bfloat16().to(device, dtype).requires_grad_() for x in numbers]
        out = plan.attend(*qkv)
        out.float().square().sum().backward()
        found.append([x.detach().float().cpu() for x in (out, *(y.grad for y in qkv if y.grad is not None))])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=0.05, rtol=0.05)


def test_checkpointing_and_passes_change_little_on_the_device() -> None:
    options = TrainOptions(warmup_steps=2, total_steps=20, precision="bf16")
    told = []
    for machine in (Machine("cuda"), Machine("cuda", checkpointing=True), Machine("cuda", micro_tokens=100)):
        trainer = Trainer(Decoder.create(CONFIG, seed=1).to("cuda"), options, machine=machine)
        told.append([trainer.step(batch(step)).loss for step in range(5)])
    np.testing.assert_allclose(told[1:], [told[0]] * 2, rtol=0.01)


def test_batches_made_ahead_are_the_same_and_lie_in_pinned_memory() -> None:
    batches = [batch(seed) for seed in range(4)]
    for one, other in zip(batches, ahead(batches, "cuda"), strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.targets.tolist() == other.targets.tolist()
        assert torch.from_numpy(other.tokens).is_pinned()


def test_memory_that_runs_out_is_found_out_and_shared_out() -> None:
    """A cap on this process's memory stands for a small device."""
    config = preset("10m", vocab=7105, context=1024)
    lengths = np.full(64, 1024)
    tokens = np.random.default_rng(0).integers(3, config.vocab, lengths.sum())
    large = Batch(tokens, np.roll(tokens, -1), lengths, np.arange(64))
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(3e9 / total)
    try:
        trainer = Trainer(Decoder.create(config, 0).to("cuda"), TrainOptions(precision="fp32"))
        assert np.isfinite(trainer.step(large).loss)
        assert 1024 <= trainer.micro_tokens < 65536
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_rollouts_on_the_device_end_as_on_the_cpu() -> None:
    clock = Clock(
        waits=Waits.of(np.arange(10), np.full((10, 1), 3_600_000_000), CONFIG.vocab),
        eot=1,
        never=np.arange(CONFIG.vocab) == 0,
        is_static=np.zeros(CONFIG.vocab, bool),
        is_age=np.zeros(CONFIG.vocab, bool),
    )
    ends = np.arange(CONFIG.vocab) == 20
    prompts = [Prompt(np.arange(3, 40)), Prompt(np.arange(5, 15))]
    stop = Stop([ends], 24 * 3_600_000_000, 64)
    found = [
        rollout(
            Decoder.create(CONFIG, seed=1).to(device), clock, prompts, trajectories=200, stop=stop, seed=3,
            batch_rows=150, precision=precision,
        )
        for device, precision in (("cpu", "fp32"), ("cuda", "fp32"), ("cuda", "bf16"))
    ]  # fmt: skip
    # Rounding may turn a draw that falls on a boundary; all others agree.
    assert (found[0].reason == found[1].reason).mean() > 0.97
    np.testing.assert_allclose(found[2].chances.mean((0, 1)), found[0].chances.mean((0, 1)), atol=0.05)
