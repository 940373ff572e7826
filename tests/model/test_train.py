"""Training: it learns, repeats itself bit for bit, resumes as if never stopped, and says when it diverges."""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from model.decoder import Decoder
from model.settings import DecoderConfig, TrainOptions
from model.train import StepResult, Trainer, TrainingDiverged, evaluate, learning_rate
from tokenizer.errors import ConfigError, DataError
from tokenizer.windows import Batch

CONFIG = DecoderConfig(vocab=40, layers=2, width=32, heads=2, kv_heads=1, ff=48, context=64, dropout=0.1)
OPTIONS = TrainOptions(lr=3e-3, warmup_steps=3, total_steps=40, seed=5)
MUON = replace(OPTIONS, optimizer="muon")


def counting_batch(step: int) -> Batch:
    """Timelines that count upwards from a random start: learnable, and another batch at every step."""
    rng = np.random.default_rng(step)
    lengths = rng.integers(5, 60, 6)
    tokens = np.concatenate([(rng.integers(40) + np.arange(length)) % 40 for length in lengths])
    targets = np.roll(tokens, -1)
    targets[np.cumsum(lengths) - 1] = -1
    return Batch(tokens, targets, lengths, np.arange(6))


def trained(
    steps: range, trainer: Trainer | None = None, options: TrainOptions = OPTIONS
) -> tuple[Trainer, list[StepResult]]:
    trainer = trainer or Trainer(Decoder.create(CONFIG, 0), options)
    return trainer, [trainer.step(counting_batch(step)) for step in steps]


def same_weights(a: Trainer, b: Trainer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.decoder.parameters(), b.decoder.parameters(), strict=True))


def test_training_lowers_the_loss_on_new_batches() -> None:
    trainer, results = trained(range(40))
    held_out = [counting_batch(1000 + step) for step in range(5)]
    before, tokens = evaluate(Decoder.create(CONFIG, 0), held_out)
    after, _ = evaluate(trainer.decoder, held_out)
    assert tokens == sum(int((batch.targets >= 0).sum()) for batch in held_out)
    assert before == pytest.approx(math.log(40), abs=0.1)
    assert after < before - 1
    assert results[0].tokens == int((counting_batch(0).targets >= 0).sum())


def test_training_reaches_the_entropy_of_its_language_and_cannot_pass_it() -> None:
    rng = np.random.default_rng(0)
    chances = rng.dirichlet(np.full(8, 0.3), 8)
    cumulated = chances.cumsum(1)

    def batch(seed: int) -> Batch:
        uniform = np.random.default_rng(seed).random((16, 64))
        tokens = np.zeros((16, 64), np.int64)
        for place in range(1, 64):
            chosen = (uniform[:, place, None] > cumulated[tokens[:, place - 1]]).sum(1)
            tokens[:, place] = np.minimum(chosen, 7)
        targets = np.concatenate([tokens[:, 1:], np.full((16, 1), -1)], 1)
        return Batch(tokens.ravel(), targets.ravel(), np.full(16, 64), np.arange(16))

    decoder = Decoder.create(DecoderConfig(8, 1, 32, 2, 2, 48, 64), 0)
    trainer = Trainer(decoder, TrainOptions(lr=1e-2, warmup_steps=5, total_steps=80))
    for step in range(80):
        trainer.step(batch(step))
    held_out = [batch(1000 + step) for step in range(10)]
    loss, tokens = evaluate(decoder, held_out)
    seen = [(b.tokens[b.targets >= 0], b.targets[b.targets >= 0]) for b in held_out]
    truth = -sum(np.log(chances[before, after]).sum() for before, after in seen) / tokens
    assert truth < loss < truth + 0.02


def test_the_same_seed_and_batches_give_the_same_bits() -> None:
    first, results = trained(range(8))
    torch.manual_seed(99)  # nobody reads the global generator
    second, again = trained(range(8))
    assert results == again
    assert same_weights(first, second)


@pytest.mark.parametrize("options", [OPTIONS, MUON])
def test_a_resumed_run_equals_one_that_was_never_stopped(options: TrainOptions) -> None:
    whole, expected = trained(range(10), options=options)
    half, begun = trained(range(5), options=options)
    state = {name: tensor.clone() for name, tensor in half.state_dict().items()}
    decoder = Decoder.create(CONFIG, 1)
    decoder.load_state_dict(half.decoder.state_dict())
    resumed = Trainer(decoder, options)
    resumed.load_state_dict(state)
    _, rest = trained(range(5, 10), resumed)
    assert begun + rest == expected
    assert same_weights(whole, resumed)


def test_without_its_moments_a_resumed_run_is_another_one() -> None:
    whole, _ = trained(range(10))
    half, _ = trained(range(5))
    forgetful, _ = trained(range(5, 10), Trainer(half.decoder, OPTIONS, start_step=5))
    assert not same_weights(whole, forgetful)


@pytest.mark.parametrize(
    ("options", "key"),
    [(OPTIONS, "exp_avg.norm.weight"), (MUON, "momentum_buffer.layers.0.mlp.up_proj.weight")],
)
def test_a_state_of_another_decoder_is_refused(options: TrainOptions, key: str) -> None:
    trainer, _ = trained(range(1), options=options)
    state = trainer.state_dict()
    state[key] = torch.zeros(3)
    with pytest.raises(DataError, match=key):
        trainer.load_state_dict(state)


@pytest.mark.parametrize("tied", [True, False])
def test_muon_moves_the_matrices_of_the_blocks_only(tied: bool) -> None:
    decoder = Decoder.create(replace(CONFIG, tied=tied), 0)
    trainer = Trainer(decoder, MUON)
    trainer.step(counting_batch(0))
    state = trainer.state_dict()
    for name, weight in decoder.named_parameters():
        in_block = weight.dim() == 2 and name.startswith("layers.")
        assert (f"momentum_buffer.{name}" in state) == in_block
        assert (f"exp_avg.{name}" in state) != in_block


def test_the_rate_is_a_function_of_the_global_step() -> None:
    late = Trainer(Decoder.create(CONFIG, 0), OPTIONS, start_step=20)
    assert late.step(counting_batch(0)).lr == learning_rate(OPTIONS, 20)
    assert late.global_step == 21
    rates = [learning_rate(OPTIONS, step) for step in range(50)]
    assert rates[0] == pytest.approx(1e-3)
    assert max(rates) == pytest.approx(rates[2]) == pytest.approx(OPTIONS.lr)
    assert rates[40:] == pytest.approx([OPTIONS.lr * OPTIONS.min_lr_ratio] * 10)


def test_the_norm_that_is_told_is_the_one_before_clipping() -> None:
    def one_step(clip: float) -> tuple[float, float]:
        trainer = Trainer(Decoder.create(CONFIG, 0), TrainOptions(clip=clip, weight_decay=0.0))
        result = trainer.step(counting_batch(0))
        grads = [weight.grad for weight in trainer.decoder.parameters()]
        return result.grad_norm, torch.nn.utils.get_total_norm(grads).item()

    told, kept = one_step(1e-3)
    assert kept == pytest.approx(1e-3, rel=1e-3)
    assert one_step(0.0) == pytest.approx((told, told))
    assert told > 0.1


def test_decay_shrinks_matrices_but_no_norm_bias_or_embedding() -> None:
    def weights(decay: float) -> dict[str, torch.Tensor]:
        decoder = Decoder.create(CONFIG, 0)
        Trainer(decoder, TrainOptions(weight_decay=decay)).step(counting_batch(0))
        return dict(decoder.named_parameters())

    with_decay, without = weights(0.9), weights(0.0)
    shrunk = {name for name in without if not torch.equal(with_decay[name], without[name])}
    assert shrunk == {name for name in without if "proj.weight" in name}


def test_divergence_is_told_with_step_and_rate_and_spares_the_weights() -> None:
    trainer, _ = trained(range(2))
    with torch.no_grad():
        trainer.decoder.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    before = {name: weight.clone() for name, weight in trainer.decoder.named_parameters()}
    with pytest.raises(TrainingDiverged, match=r"step 2: loss is nan at learning rate 0\.003"):
        trainer.step(counting_batch(2))
    assert all(torch.equal(before[name], weight) for name, weight in trainer.decoder.named_parameters())


def test_a_batch_without_targets_changes_nothing_but_the_step() -> None:
    trainer, _ = trained(range(1))
    before = trainer.decoder.embed_tokens.weight.clone()
    result = trainer.step(Batch(np.zeros(3, np.int64), np.full(3, -1), np.array([3]), np.array([0])))
    assert (result.tokens, trainer.global_step) == (0, 2)
    assert torch.equal(before, trainer.decoder.embed_tokens.weight)
    assert math.isnan(evaluate(trainer.decoder, [])[0])


def test_bfloat16_trains_and_stays_near_float32() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer(Decoder.create(CONFIG, 0), TrainOptions(precision=precision, warmup_steps=3))
        losses[precision] = [trainer.step(counting_batch(step)).loss for step in range(5)]
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], abs=0.02)


@dataclass(frozen=True)
class Wrong:
    change: dict
    told: str


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong({"lr": 0.0}, "lr must be positive"),
        Wrong({"warmup_steps": 10, "total_steps": 10}, "total_steps must exceed"),
        Wrong({"precision": "fp8"}, "precision is auto, fp32 or bf16"),
        Wrong({"betas": (0.9, 1.0)}, "betas must lie"),
    ],
)
def test_options_out_of_range_are_refused(wrong: Wrong) -> None:
    with pytest.raises(ConfigError, match=wrong.told):
        TrainOptions(**wrong.change)
