"""What a machine decides for itself: precision, passes, checkpointing, compiling. The result stays the same."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

from model import machine as machine_module
from model.decoder import Decoder
from model.machine import choose_precision, measured_precision
from model.parallel import Team, shares
from model.settings import DecoderConfig, Machine, TrainOptions
from model.train import StepResult, Trainer, WindowTooLarge, compile_blocks_
from tests.model.test_train import CONFIG, OPTIONS, counting_batch, same_weights
from tokenizer.errors import ConfigError

PLAIN = Machine(precision="fp32")


def trained(machine: Machine, steps: int = 6, config: DecoderConfig = CONFIG) -> tuple[Trainer, list[StepResult]]:
    trainer = Trainer(Decoder.create(config, 0), OPTIONS, machine=machine)
    return trainer, [trainer.step(counting_batch(step)) for step in range(steps)]


def assert_about_the_same(one: Trainer, other: Trainer) -> None:
    for a, b in zip(one.decoder.parameters(), other.decoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("micro_tokens", [1, 70, 150])
def test_a_step_in_several_passes_is_the_same_step(micro_tokens: int) -> None:
    """Dropout is on: a pass drops what the whole batch would."""
    whole, expected = trained(PLAIN)
    parts, found = trained(replace(PLAIN, micro_tokens=micro_tokens))
    assert_about_the_same(whole, parts)
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-4)
    assert [(r.tokens, r.lr) for r in found] == [(r.tokens, r.lr) for r in expected]


def test_passes_cover_every_window_once_and_stay_within_the_limit() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, 50, rng.integers(1, 20))
        most, size = int(rng.integers(0, 120)), int(rng.integers(1, 5))
        runs = [run for rank in range(size) for run in shares(lengths, most, Team(rank, size))]
        assert [at for first, last in runs for at in range(first, last)] == list(range(len(lengths)))
        assert all(last == first + 1 or not most or lengths[first:last].sum() <= most for first, last in runs)


def test_the_shares_of_a_team_differ_by_less_than_two_windows() -> None:
    lengths = np.random.default_rng(1).integers(1, 100, 200)
    tokens = [sum(lengths[a:b].sum() for a, b in shares(lengths, 0, Team(rank, 4))) for rank in range(4)]
    assert max(tokens) - min(tokens) < 200


class Scarce:
    """Memory for so many tokens in one pass, and not one more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tokens: int, error: type[Exception] = torch.OutOfMemoryError):
        self.passes: list[int] = []
        self.tokens, self.error = tokens, error
        plain = Decoder.forward
        monkeypatch.setattr(Decoder, "forward", lambda decoder, *args: self.ask(args[0]) or plain(decoder, *args))

    def ask(self, tokens: torch.Tensor) -> None:
        self.passes.append(len(tokens))
        if len(tokens) > self.tokens:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_when_memory_runs_out_the_step_is_taken_again_in_smaller_passes(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    whole, expected = trained(PLAIN)
    memory = Scarce(monkeypatch, tokens=80, error=error)
    backed_off, found = trained(PLAIN)
    assert_about_the_same(whole, backed_off)
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-4)
    assert 0 < backed_off.micro_tokens <= 80
    failed = [tokens for tokens in memory.passes if tokens > 80]
    assert len(failed) <= 3, "what fits is found once and kept"


def test_a_window_that_does_not_fit_is_told_with_a_way_out_and_spares_the_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer, _ = trained(PLAIN, steps=1)
    before = [weight.clone() for weight in trainer.decoder.parameters()]
    Scarce(monkeypatch, tokens=10)
    with pytest.raises(WindowTooLarge, match=r"A window of \d+ tokens doesn't fit.*checkpointing"):
        trainer.step(counting_batch(1))
    assert all(map(torch.equal, before, trainer.decoder.parameters()))


def test_where_the_compiler_fails_the_model_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(block: torch.nn.Module, **_: object) -> None:
        block._compiled_call_impl = lambda *args: torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr(torch.nn.Module, "compile", broken)
    plain, expected = trained(PLAIN, steps=2)
    fallen_back, found = trained(replace(PLAIN, compile=True), steps=2)
    assert found == expected
    assert same_weights(plain, fallen_back)
    assert "torch.compile does not work here" in caplog.text


@pytest.mark.slow
# What torch's compiler imports uses what torch has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_compiled_blocks_train_to_the_same_weights() -> None:
    """Of several lengths, one compiled block."""
    plain, expected = trained(PLAIN)
    compiled, found = trained(replace(PLAIN, compile=True))
    assert_about_the_same(plain, compiled)
    assert [r.loss for r in found] == pytest.approx([r.loss for r in expected], rel=1e-4)


def test_other_errors_are_not_taken_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Decoder, "forward", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        trained(PLAIN, steps=1)


def test_checkpointing_trains_to_the_same_bits() -> None:
    plain, _ = trained(PLAIN)
    frugal, _ = trained(replace(PLAIN, checkpointing=True))
    assert same_weights(plain, frugal)


@pytest.mark.parametrize(("gain", "expected"), [(0.3, "fp32"), (1.1, "fp32"), (1.3, "bf16"), (8.0, "bf16")])
def test_bfloat16_is_taken_only_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gain: float, expected: str
) -> None:
    monkeypatch.setattr(machine_module, "_bf16_gain", lambda *_: gain)
    measured_precision.cache_clear()
    with caplog.at_level(logging.INFO):
        assert choose_precision("auto", Machine(), CONFIG) == expected
        assert choose_precision("auto", Machine(), CONFIG) == expected
    assert caplog.text.count(f"{gain:.2f} times the speed") == 1, "measured once"
    measured_precision.cache_clear()


def test_what_is_asked_for_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "_bf16_gain", lambda *_: pytest.fail("measured"))
    measured_precision.cache_clear()
    assert choose_precision("bf16", Machine(precision="fp32"), CONFIG) == "bf16"
    assert choose_precision("auto", Machine(precision="bf16"), CONFIG) == "bf16"
    trainer = Trainer(Decoder.create(CONFIG, 0), TrainOptions(precision="bf16"))
    assert trainer.precision == "bf16"


def test_the_probe_compares_products_of_the_shapes_that_are_asked_about() -> None:
    gain = machine_module._bf16_gain("cpu", ((64, 128), (64, 300)))
    assert 0.001 < gain < 1000


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"precision": "fp8"}, "precision is auto, fp32 or bf16"),
        ({"micro_tokens": -1}, "micro_tokens must not be negative"),
        ({"processes": 0}, "processes must be at least 1"),
        ({"shard": True}, "shard needs 2 processes"),
    ],
)
def test_options_that_make_no_sense_are_refused(change: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Machine(**change)


@pytest.mark.slow
# The compiler walks over parts of torch that warn.
@pytest.mark.filterwarnings("ignore")
def test_batches_of_other_lengths_are_not_compiled_anew() -> None:
    """Attention, which follows a batch's lengths, stays outside of what is compiled."""
    from torch._dynamo.utils import counters

    rng = np.random.default_rng(0)
    decoder = Decoder.create(CONFIG, seed=1)
    compile_blocks_(decoder, "fp32", backend="aot_eager")
    graphs = []
    for _ in range(10):
        lengths = rng.integers(2, 60, rng.integers(1, 9))
        tokens = torch.from_numpy(rng.integers(3, CONFIG.vocab, lengths.sum()))
        hidden = decoder(tokens, torch.from_numpy(lengths))
        torch.testing.assert_close(hidden, Decoder.create(CONFIG, seed=1)(tokens, torch.from_numpy(lengths)))
        hidden.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[0]
