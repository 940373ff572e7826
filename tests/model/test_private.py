"""Secret draws have the distribution that is claimed, and noise is added on a grid."""

import numpy as np
import pytest
import torch
from scipy import stats

from model.clipping import clipped_sum
from model.decoder import Decoder
from model.private import PrivateOptions, PrivateTrainer, Secret, clip_before_rounding, noised
from model.settings import DecoderConfig, TrainOptions
from tokenizer.errors import ConfigError
from tokenizer.windows import Batch

KEY = bytes(range(32))
# Probability that a right sampler fails a test.
FALSE_ALARM = 1e-6


def test_draws_follow_from_key_and_purpose() -> None:
    assert (Secret(KEY, "a").words(9) == Secret(KEY, "a").words(9)).all()
    one = Secret(KEY, "a")
    assert (np.concatenate([one.words(3), one.words(6)]) == Secret(KEY, "a").words(9)).all()
    assert not (Secret(KEY, "a").words(9) == Secret(KEY, "b").words(9)).any()
    assert not (Secret(KEY, "a").words(9) == Secret(KEY[::-1], "a").words(9)).any()
    assert KEY.hex() not in repr(Secret(KEY, "a"))
    with pytest.raises(ConfigError, match="32 bytes"):
        Secret(b"short", "a")


def test_gaussian_draws_are_gaussian() -> None:
    drawn = Secret(KEY, "gaussian").gaussian(400_001).numpy()
    assert len(drawn) == 400_001
    assert stats.kstest(drawn, "norm").pvalue > FALSE_ALARM
    # Tails, and independence of neighbours and of the halves that share a radius.
    beyond = int((np.abs(drawn) > 3).sum())
    assert stats.binomtest(beyond, len(drawn), 2 * stats.norm.sf(3)).pvalue > FALSE_ALARM
    for lag in (1, 200_001):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 5 / np.sqrt(len(drawn) - lag)


@pytest.mark.parametrize("rate", [0.01, 0.3, 1.0])
def test_every_patient_is_drawn_with_the_rate(rate: float) -> None:
    steps = [Secret(KEY, f"step {step}").chosen(50, rate) for step in range(2000)]
    counts = np.bincount(np.concatenate(steps), minlength=50)
    assert all(stats.binomtest(int(count), 2000, rate).pvalue > FALSE_ALARM / 50 for count in counts)
    sizes = np.array([len(chosen) for chosen in steps])
    # The spread is that of independent draws, as accountants take it, and not that of batches of one size.
    assert sizes.var() == pytest.approx(50 * rate * (1 - rate), rel=0.2)


def test_noise_has_the_deviation_and_the_result_lies_on_a_grid() -> None:
    options = PrivateOptions(clip=0.5, noise_multiplier=1.5, sampling_rate=0.1)
    gradients = [torch.full((300, 400), 2.0), torch.zeros(1000)]
    found = noised(gradients, options, Secret(KEY, "noise"))
    assert [part.shape for part in found] == [part.shape for part in gradients]
    flat = torch.cat([(a - b).flatten() for a, b in zip(found, gradients, strict=True)]).numpy()
    assert stats.kstest(flat / (0.5 * 1.5), "norm").pvalue > FALSE_ALARM
    steps = torch.cat([part.flatten() for part in found]).numpy() / (0.5 * 2.0**-16 / 121_000**0.5)
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-3)


def test_rounding_keeps_a_share_below_the_clip() -> None:
    options = PrivateOptions(clip=1.0, noise_multiplier=1e-9, sampling_rate=1.0)
    generator = torch.Generator().manual_seed(0)
    share = torch.randn(5000, generator=generator)
    share *= clip_before_rounding(1.0) / share.norm()
    found = noised([share], options, Secret(KEY, "rounding"))[0]
    assert found.norm() <= 1.0


@pytest.mark.parametrize(
    "wrong", [{"clip": 0.0}, {"noise_multiplier": -1.0}, {"sampling_rate": 1.5}, {"noise_multiplier": float("nan")}]
)
def test_options_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        PrivateOptions(**{"clip": 1.0, "noise_multiplier": 1.0, "sampling_rate": 0.1} | wrong)


CONFIG = DecoderConfig(vocab=12, layers=1, width=16, heads=2, kv_heads=1, ff=24, context=16)
OPTIONS = TrainOptions(lr=2e-2, warmup_steps=0, total_steps=200, clip=0.0)


def trainer_of(noise_multiplier: float, rate: float = 1.0, config: DecoderConfig = CONFIG) -> PrivateTrainer:
    private = PrivateOptions(clip=1.0, noise_multiplier=noise_multiplier, sampling_rate=rate)
    secret = lambda step, use: Secret(KEY, f"{step} {use}")  # noqa: E731
    return PrivateTrainer(Decoder.create(config, 0), OPTIONS, private, 8, secret)


def counting(patients: int = 8) -> Batch:
    """Every patient counts upwards."""
    tokens = np.concatenate([(patient + np.arange(10)) % 12 for patient in range(patients)])
    targets = np.where(np.arange(len(tokens)) % 10 == 9, -1, np.roll(tokens, -1))
    return Batch(tokens, targets, np.full(patients, 10), np.arange(patients))


def test_a_step_follows_the_noised_mean_over_the_expected_number() -> None:
    trainer = trainer_of(1.0, rate=0.5)
    decoder = Decoder.create(CONFIG, 0)
    total = clipped_sum(decoder, counting(), clip_before_rounding(1.0)).gradients
    noisy = noised(total, PrivateOptions(1.0, 1.0, 0.5), Secret(KEY, "0 noise"))
    trainer.step(counting())
    for weight, expected in zip(trainer.decoder.parameters(), noisy, strict=True):
        torch.testing.assert_close(weight.grad, (expected / 4).float())


def test_it_learns_with_little_noise_and_not_with_much() -> None:
    quiet, loud = trainer_of(0.05), trainer_of(100.0)
    losses = [[trainer.step(counting()).loss for _ in range(60)][-1] for trainer in (quiet, loud)]
    assert losses[0] < 0.5
    assert losses[1] > 1.5


def test_nobody_drawn_is_a_step_of_noise() -> None:
    trainer = trainer_of(1.0)
    before = [weight.clone() for weight in trainer.decoder.parameters()]
    empty = np.empty(0, np.int64)
    result = trainer.step(Batch(empty, empty, empty, empty))
    assert (result.loss, result.tokens, trainer.global_step) == (0.0, 0, 1)
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.decoder.parameters(), strict=True))


def test_an_interrupted_run_draws_and_ends_the_same() -> None:
    whole, first = trainer_of(1.0), trainer_of(1.0)
    for _ in range(4):
        whole.step(counting())
    for _ in range(2):
        first.step(counting())
    second = trainer_of(1.0)
    second.decoder.load_state_dict(first.decoder.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.step(counting())
    assert all(torch.equal(a, b) for a, b in zip(whole.decoder.parameters(), second.decoder.parameters(), strict=True))


def test_clipping_of_the_whole_gradient_is_refused() -> None:
    private = PrivateOptions(1.0, 1.0, 0.5)
    with pytest.raises(ConfigError, match="clip to 0"):
        PrivateTrainer(Decoder.create(CONFIG, 0), TrainOptions(), private, 8, lambda *_: Secret(KEY, ""))
