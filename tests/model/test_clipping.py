"""Per-patient gradients are those of a loop over patients, and one patient moves their sum by the clip at most."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model.clipping import clipped_sum
from model.decoder import Decoder
from model.settings import PRESETS, DecoderConfig
from tokenizer.errors import ConfigError
from tokenizer.windows import Batch

BASE = DecoderConfig(vocab=23, layers=2, width=16, heads=4, kv_heads=2, ff=24, context=32)
SHAPES = {
    "tied": BASE,
    "untied": replace(BASE, tied=False),
    "no biases": replace(BASE, qkv_bias=False, kv_heads=4),
    **{
        name: replace(shape, vocab=31, layers=2, width=8 * shape.heads, ff=8 * shape.ff // (shape.width // shape.heads))
        for name, shape in PRESETS.items()
    },
}


def batch_of(lengths: list[int], vocab: int, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, sum(lengths))
    targets = np.where(rng.random(len(tokens)) < 0.8, np.roll(tokens, -1), -1)
    targets[np.cumsum(lengths) - 1] = -1
    return Batch(tokens, targets, np.array(lengths), np.arange(len(lengths)))


def decoder_of(config: DecoderConfig, seed: int = 0) -> Decoder:
    decoder = Decoder.create(config, seed)
    with torch.no_grad():
        for weight in decoder.parameters():
            # Larger than at the start, so that no part of the gradient is tiny.
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed + weight.numel()))
            weight.add_(noise, alpha=0.2)
    return decoder


def one_by_one(decoder: Decoder, batch: Batch) -> list[list[torch.Tensor]]:
    """Every patient's gradient by a plain backward pass of its own."""
    found, ends = [], np.cumsum(batch.lengths)
    for start, end in zip(ends - batch.lengths, ends, strict=True):
        tokens, targets = (torch.from_numpy(x[start:end]) for x in (batch.tokens, batch.targets))
        decoder.zero_grad(set_to_none=False)
        nll, count = decoder.nll(decoder(tokens, torch.tensor([end - start])), targets)
        (nll / max(count, 1)).backward()
        found.append([torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in decoder.parameters()])
    decoder.zero_grad()
    return found


def norm_of(gradients: list[torch.Tensor]) -> float:
    return float(torch.cat([g.double().flatten() for g in gradients]).norm())


@pytest.fixture
def threads() -> Iterator[None]:
    """Whatever a test sets is gone afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_threads_change_rounding_at_most_and_the_same_threads_nothing() -> None:
    decoder = decoder_of(BASE)
    batch = batch_of([5, 1, 17, 30, 2, 9, 9, 12, 3, 8, 21], decoder.config.vocab)
    found = {}
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        found[threads], again = clipped_sum(decoder, batch, 1.0), clipped_sum(decoder, batch, 1.0)
        assert torch.get_num_threads() == threads
        np.testing.assert_array_equal(found[threads].norms, again.norms)
        for one, other in zip(found[threads].gradients, again.gradients, strict=True):
            assert torch.equal(one, other)
        np.testing.assert_allclose(found[threads].norms, found[1].norms, rtol=1e-5)
        for one, other in zip(found[threads].gradients, found[1].gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("threads")
def test_an_error_in_a_thread_arrives_and_leaves_the_decoder_as_it_was() -> None:
    torch.set_num_threads(2)
    decoder = decoder_of(BASE)
    batch = batch_of([5, 9, 17, 30], decoder.config.vocab)
    batch.tokens[-1] = decoder.config.vocab
    with pytest.raises(IndexError):
        clipped_sum(decoder, batch, 1.0)
    assert torch.get_num_threads() == 2
    assert all(weight.requires_grad for weight in decoder.parameters())
    assert not decoder.embed_tokens._forward_hooks


@pytest.mark.parametrize("together", [1, 3, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_norms_and_sum_are_those_of_a_loop(name: str, together: int) -> None:
    decoder = decoder_of(SHAPES[name])
    batch = batch_of([5, 1, 17, 30, 2, 9], decoder.config.vocab)
    alone = one_by_one(decoder, batch)
    expected = np.array([norm_of(gradients) for gradients in alone])
    clip = float(np.median(expected))
    row = 4 * decoder.config.parameters()
    found = clipped_sum(decoder, batch, clip, budget_bytes=together * row)
    np.testing.assert_allclose(found.norms, expected, rtol=2e-5, atol=1e-7)
    for place, gradient in enumerate(found.gradients):
        shares = [min(1.0, clip / max(n, 1e-12)) * g[place] for n, g in zip(expected, alone, strict=True)]
        torch.testing.assert_close(gradient, torch.stack(shares).sum(0), rtol=1e-4, atol=1e-5)
    assert all(weight.requires_grad and weight.grad is None for weight in decoder.parameters())


@pytest.mark.parametrize("name", ["tied", "untied", "no biases"])
def test_products_give_what_rows_give(name: str) -> None:
    """Kernels that make products twice, for the norm and the sum; without a GPU they are interpreted."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = decoder_of(SHAPES[name])
    batch = batch_of([5, 1, 17, 9], decoder.config.vocab)
    rows = clipped_sum(decoder, batch, 0.5)
    products = clipped_sum(decoder.to(device), batch, 0.5, factored=True)
    np.testing.assert_allclose(products.norms, rows.norms, rtol=2e-5)
    np.testing.assert_allclose(products.losses, rows.losses, rtol=2e-5)
    for one, other in zip(products.gradients, rows.gradients, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_products_leave_out_a_patient_whose_gradient_is_not_finite() -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = decoder_of(replace(BASE, tied=False))
    batch = batch_of([9, 5], BASE.vocab - 1)
    alone = clipped_sum(decoder, batch.windows(0, 1), 1.0)
    batch.tokens[10] = BASE.vocab - 1  # which only the second patient has
    with torch.no_grad():
        decoder.embed_tokens.weight[BASE.vocab - 1] = torch.inf
    found = clipped_sum(decoder.to(device), batch, 1.0, factored=True)
    assert np.isfinite(found.norms).tolist() == [True, False]
    for one, other in zip(found.gradients, alone.gradients, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


@settings(max_examples=25)
@given(
    st.lists(st.integers(1, 32), min_size=1, max_size=7), st.floats(1e-3, 10.0), st.integers(0, 2**16), st.booleans()
)
def test_one_patient_moves_the_sum_by_the_clip_at_most(lengths: list[int], clip: float, seed: int, tied: bool) -> None:
    decoder = decoder_of(replace(BASE, tied=tied), seed)
    batch = batch_of(lengths, BASE.vocab, seed)
    whole = clipped_sum(decoder, batch, clip)
    gone = len(lengths) - 1
    if gone:
        kept = int(sum(lengths[:gone]))
        rest = Batch(batch.tokens[:kept], batch.targets[:kept], batch.lengths[:gone], batch.patients[:gone])
        change = [a - b for a, b in zip(whole.gradients, clipped_sum(decoder, rest, clip).gradients, strict=True)]
        rounding = 1e-5 * sum(min(clip, norm) for norm in whole.norms)
    else:
        change, rounding = whole.gradients, 0.0
    assert norm_of(change) <= clip + rounding


def test_losses_are_means_over_targets() -> None:
    decoder = decoder_of(BASE)
    batch = batch_of([12, 4], BASE.vocab)
    found = clipped_sum(decoder, batch, 1.0)
    for place, (start, end) in enumerate([(0, 12), (12, 16)]):
        targets = torch.from_numpy(batch.targets[start:end])
        nll, count = decoder.nll(
            decoder(torch.from_numpy(batch.tokens[start:end]), torch.tensor([end - start])), targets
        )
        assert found.losses[place] == pytest.approx(nll.item() / count, rel=1e-5)


def test_bfloat16_is_clipped_by_the_norms_of_what_is_summed() -> None:
    decoder = decoder_of(BASE)
    batch = batch_of([20], BASE.vocab)
    found = clipped_sum(decoder, batch, 0.5, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    exact = clipped_sum(decoder, batch, 0.5)
    assert found.norms[0] == pytest.approx(exact.norms[0], rel=0.05)
    assert norm_of(found.gradients) == pytest.approx(0.5, rel=1e-4)
    assert norm_of(found.gradients) <= 0.5


@pytest.mark.parametrize("together", [1, 100])
def test_a_patient_whose_gradient_is_not_finite_has_no_share_and_takes_none_from_others(together: int) -> None:
    decoder = decoder_of(replace(BASE, tied=False))
    batch = batch_of([9, 5, 12], BASE.vocab - 1)
    row = 4 * decoder.config.parameters() * together
    without = Batch(
        np.delete(batch.tokens, range(9, 14)), np.delete(batch.targets, range(9, 14)), batch.lengths[[0, 2]],
        batch.patients[[0, 2]],
    )  # fmt: skip
    expected = clipped_sum(decoder, without, 1.0, budget_bytes=row)
    batch.tokens[10] = BASE.vocab - 1  # which only the second patient has
    with torch.no_grad():
        decoder.embed_tokens.weight[BASE.vocab - 1] = torch.inf
    found = clipped_sum(decoder, batch, 1.0, budget_bytes=row)
    assert np.isfinite(found.norms).tolist() == [True, False, True]
    for one, other in zip(found.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        decoder.norm.weight.fill_(torch.nan)
    nobody = clipped_sum(decoder, batch, 1.0, budget_bytes=row)
    assert all((gradient == 0).all() for gradient in nobody.gradients)


def test_what_has_no_exact_rule_is_refused() -> None:
    batch = batch_of([4, 4], BASE.vocab)
    decoder = Decoder.create(BASE, 0)
    decoder.register_parameter("scale", nn.Parameter(torch.ones(3)))
    with pytest.raises(ConfigError, match="no exact rule for scale"):
        clipped_sum(decoder, batch, 1.0)
    decoder = Decoder.create(BASE, 0)
    decoder.layers[1] = decoder.layers[0]
    with pytest.raises(ConfigError, match="took part twice"):
        clipped_sum(decoder, batch, 1.0)
    with pytest.raises(ConfigError, match="several windows"):
        clipped_sum(Decoder.create(BASE, 0), replace(batch, patients=np.array([7, 7])), 1.0)
    with pytest.raises(ConfigError, match="dropout"):
        clipped_sum(Decoder.create(replace(BASE, dropout=0.1), 0), batch, 1.0)
