"""The decoder: against a slow reference, by count, and by its isolation of patients."""

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from model import loss as loss_module
from model.attention import SegmentPlan
from model.decoder import Decoder, Dropout
from model.settings import PRESETS, DecoderConfig, preset
from tokenizer.errors import ConfigError

SMALL = DecoderConfig(vocab=50, layers=2, width=32, heads=4, kv_heads=2, ff=64, context=128)


def shaken(config: DecoderConfig, seed: int = 0) -> Decoder:
    """A decoder whose norms and biases are not at their neutral start, so that a missing one shows."""
    decoder = Decoder.create(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in decoder.parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
            else:
                weight.mul_(4.0)
    return decoder


def flat_batch(lengths: list[int], vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, sum(lengths))
    targets = np.where(rng.random(sum(lengths)) < 0.2, -1, np.roll(tokens, -1))
    return torch.from_numpy(tokens), torch.tensor(lengths), torch.from_numpy(targets)


def reference(decoder: Decoder, tokens: Tensor) -> Tensor:
    """One segment, written from the definition with an explicit mask."""
    config, n = decoder.config, len(tokens)
    half = config.head_width // 2
    angle = torch.arange(n)[:, None] / config.rope_base ** (torch.arange(half) / half)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def rms(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.eps).sqrt() * weight

    def rope(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    x = decoder.embed_tokens.weight[tokens]
    for block in decoder.layers:
        attention, seen = block.self_attn, rms(x, block.input_layernorm.weight)
        q, k, v = (
            layer(seen).view(n, -1, config.head_width)
            for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        k, v = (y.repeat_interleave(config.heads // config.kv_heads, 1) for y in (rope(k), v))
        scores = torch.einsum("nhk,mhk->hnm", rope(q), k) / config.head_width**0.5
        scores = scores.masked_fill(torch.arange(n)[:, None] < torch.arange(n), -torch.inf)
        x = x + attention.o_proj(torch.einsum("hnm,mhk->nhk", scores.softmax(-1), v).flatten(1))
        seen, mlp = rms(x, block.post_attention_layernorm.weight), block.mlp
        gate = mlp.gate_proj(seen)
        x = x + mlp.down_proj(gate * torch.sigmoid(gate) * mlp.up_proj(seen))
    return rms(x, decoder.norm.weight)


@pytest.mark.parametrize("lengths", [[100, 3, 1, 90, 17, 128, 60, 2], [64, 64, 64], [1], [5, 5, 6]])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_flat_batch_equals_its_segments_one_at_a_time(lengths: list[int], kv_heads: int) -> None:
    decoder = shaken(DecoderConfig(vocab=50, layers=2, width=32, heads=4, kv_heads=kv_heads, ff=64, context=128))
    tokens, sizes, _ = flat_batch(lengths, 50)
    expected = torch.cat([reference(decoder, part) for part in tokens.split(lengths)])
    torch.testing.assert_close(decoder(tokens, sizes), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_equal_the_reference(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loss_module._CHUNK_NUMBERS, "cpu", 64 * 50)  # several chunks
    decoder = shaken(DecoderConfig(vocab=50, layers=2, width=32, heads=4, kv_heads=2, ff=64, context=128, tied=tied))
    lengths = [100, 3, 1, 90, 17, 128, 60]
    tokens, sizes, targets = flat_batch(lengths, 50)
    loss, count = decoder.nll(decoder(tokens, sizes), targets)
    (loss * 0.5).backward()
    got = {name: weight.grad for name, weight in decoder.named_parameters()}
    decoder.zero_grad()
    logits = torch.cat([reference(decoder, part) for part in tokens.split(lengths)]) @ decoder.head_weight.T
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    (expected * 0.5).backward()
    assert count == int((targets >= 0).sum())
    torch.testing.assert_close(loss, expected)
    for name, weight in decoder.named_parameters():
        torch.testing.assert_close(got[name], weight.grad, atol=2e-3, rtol=1e-4, msg=name)


def test_losses_of_a_packed_batch_are_those_of_its_windows_alone_up_to_8192_tokens() -> None:
    """Each window's own loss and the summed gradient: packing is a matter of speed only."""
    decoder = shaken(DecoderConfig(vocab=50, layers=2, width=16, heads=2, kv_heads=1, ff=32, context=8192))
    lengths = [8192, 3, 700, 2048, 1, 650]
    tokens, sizes, targets = flat_batch(lengths, 50)
    packed = decoder(tokens, sizes)
    decoder.nll(packed, targets)[0].backward()
    together = [weight.grad.clone() for weight in decoder.parameters()]
    decoder.zero_grad()
    parts = zip(tokens.split(lengths), targets.split(lengths), packed.detach().split(lengths), strict=True)
    for length, (own_tokens, own_targets, hidden) in zip(lengths, parts, strict=True):
        alone, count = decoder.nll(decoder(own_tokens, torch.tensor([length])), own_targets)
        with torch.no_grad():
            torch.testing.assert_close(decoder.nll(hidden, own_targets), (alone.detach(), count), rtol=1e-4, atol=1e-3)
        alone.backward()
    for got, weight in zip(together, decoder.parameters(), strict=True):
        scale = weight.grad.abs().max().item()
        torch.testing.assert_close(got, weight.grad, atol=1e-4 * scale, rtol=1e-3)


def test_loss_without_gradient_is_the_same() -> None:
    decoder = shaken(SMALL)
    tokens, sizes, targets = flat_batch([20, 30], 50)
    with torch.no_grad():
        quiet, _ = decoder.nll(decoder(tokens, sizes), targets)
    assert not quiet.requires_grad
    assert torch.equal(quiet, decoder.nll(decoder(tokens, sizes), targets)[0].detach())


def test_a_patient_never_sees_another() -> None:
    decoder = shaken(SMALL)
    tokens, sizes, _ = flat_batch([40, 38, 7], 50)
    changed = tokens.clone()
    changed[40:78] = (changed[40:78] + 1) % 50
    before, after = decoder(tokens, sizes), decoder(changed, sizes)
    assert torch.equal(before[:40], after[:40])
    assert torch.equal(before[78:], after[78:])
    assert not torch.equal(before[40:78], after[40:78])


def test_a_token_never_sees_the_future() -> None:
    decoder = shaken(SMALL)
    tokens, sizes, _ = flat_batch([40], 50)
    changed = tokens.clone()
    changed[30:] = 7
    assert torch.equal(decoder(tokens, sizes)[:30], decoder(changed, sizes)[:30])


def test_blocks_waste_little_and_cover_every_token() -> None:
    lengths = torch.from_numpy(np.random.default_rng(0).integers(1, 500, 200))
    plan = SegmentPlan.of(lengths, torch.device("cpu"))
    assert plan.take is not None
    assert plan.put is not None
    padded = sum(rows * columns for rows, columns in plan.blocks)
    assert padded <= 1.25 * int(lengths.sum()) + 16 * len(lengths)
    assert torch.equal(plan.take[plan.put], torch.arange(int(lengths.sum())))
    assert len(plan.blocks) < 25


@pytest.mark.parametrize("name", list(PRESETS))
@pytest.mark.parametrize("change", [{}, {"tied": False}, {"qkv_bias": False}, {"kv_heads": 1}])
def test_parameters_are_counted_exactly(name: str, change: dict) -> None:
    config = DecoderConfig(**{**vars(PRESETS[name]), **change})
    with torch.device("meta"):
        decoder = Decoder(config)
    assert config.parameters() == sum(weight.numel() for weight in decoder.parameters())


def test_comet_sizes_are_the_published_ones() -> None:
    """62 M, 119 M and 1 B with a vocabulary of 7,105 (arXiv 2508.12104)."""
    sizes = [preset(f"comet-{size}", 7105).parameters() for size in "sml"]
    assert [round(size / 1e6, 1) for size in sizes] == [62.1, 118.7, 1088.5]


@pytest.mark.parametrize(("name", "size"), [("0.3m", 0.33), ("1m", 0.92), ("3m", 2.98), ("10m", 10.0)])
def test_small_presets_have_about_the_size_in_their_name(name: str, size: float) -> None:
    assert preset(name, 500).parameters() / 1e6 == pytest.approx(size, abs=0.01)


def test_initial_weights_follow_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = Decoder.create(SMALL, 3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = Decoder.create(SMALL, 3), Decoder.create(SMALL, 4)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
    assert not torch.equal(first.embed_tokens.weight, other.embed_tokens.weight)
    assert first.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert first.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.01, rel=0.1)


def test_dropout_needs_masks_and_follows_their_seed() -> None:
    decoder = shaken(preset("0.3m", 50, dropout=0.5))
    tokens, sizes, _ = flat_batch([20], 50)
    dropped = [decoder(tokens, sizes, Dropout(seed, 20)) for seed in (1, 1, 2)]
    assert torch.equal(dropped[0], dropped[1])
    assert not torch.equal(dropped[0], dropped[2])
    assert torch.equal(decoder(tokens, sizes), decoder(tokens, sizes))


def test_a_part_of_a_batch_loses_the_same_units_as_in_the_whole() -> None:
    decoder = shaken(preset("0.3m", 50, dropout=0.5))
    tokens, sizes, _ = flat_batch([20, 30, 5], 50)
    whole = decoder(tokens, sizes, Dropout(3, 55))
    part = decoder(tokens[20:], sizes[1:], Dropout(3, 55, first=20))
    torch.testing.assert_close(part, whole[20:])


def test_masks_drop_their_share_and_differ_between_places() -> None:
    x = torch.ones(4000, 50)
    first, second = (Dropout(7, 4000).scale(x, 0.25, place) for place in (1, 2))
    assert first.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    # 200,000 draws: four standard deviations, a false alarm in 16,000 runs.
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 200_000) ** 0.5)
    both = ((first == 0) & (second == 0)).float().mean().item()
    assert both == pytest.approx(0.0625, abs=4 * (0.0625 * 0.9375 / 200_000) ** 0.5)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_changes_no_bit(dropout: float) -> None:
    decoder = shaken(preset("0.3m", 50, dropout=dropout))
    tokens, sizes, targets = flat_batch([20, 30, 5], 50)
    grads = []
    for checkpointing in (False, True):
        decoder.zero_grad()
        loss, _ = decoder.nll(decoder(tokens, sizes, Dropout(3, 55), checkpointing), targets)
        loss.backward()
        grads.append([weight.grad.clone() for weight in decoder.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"width": 30}, "even whole number"),
        ({"kv_heads": 3}, "must divide"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"layers": 0}, "layers is 0"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(change: dict, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        DecoderConfig(**{**vars(SMALL), **change})


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'huge'; there are 0\.3m, 1m"):
        preset("huge", 500)


@pytest.mark.parametrize("lengths", [[200], [10, 10], [10, 0]])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match="don't fit"):
        shaken(SMALL)(
            torch.zeros(min(sum(lengths), 200) - (len(lengths) > 1), dtype=torch.int64), torch.tensor(lengths)
        )


def test_training_does_not_load_the_compiler() -> None:
    """It takes seconds to import, which every worker and every command would pay."""
    script = (
        "import sys, torch\n"
        "from federation.update import to_decoder, to_vector\n"
        "from model.decoder import Decoder\n"
        "from model.settings import TrainOptions, preset\n"
        "from model.train import Trainer\n"
        "shape = preset('0.3m', 50)\n"
        "decoder = to_decoder(shape, to_vector(Decoder.create(shape, 0)))\n"
        "decoder(torch.arange(9), torch.tensor([9])).sum().backward()\n"
        "for name in ('adamw', 'muon', 'sgd'):\n"
        "    Trainer(decoder, TrainOptions(name))._update(0.1)\n"
        "sys.exit(not {'torch._dynamo', 'sympy'}.isdisjoint(sys.modules))\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
