"""Draws: the generator's published answers, even spread, and an exact inverse of the cumulated probabilities."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from model.sampling import nucleus_, philox, pick, uniforms


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter: tuple, key: tuple, answer: tuple) -> None:
    words = philox(tuple(np.array([word], dtype=np.uint64) for word in counter), key)
    assert tuple(int(word[0]) for word in words) == answer


def test_uniforms_are_even_and_unrelated_along_every_axis() -> None:
    key, trajectory, step = (axis.ravel() for axis in np.meshgrid(np.arange(20), np.arange(20), np.arange(50)))
    drawn, second = uniforms(1, key, trajectory, step)
    assert abs(np.corrcoef(drawn, second)[0, 1]) < 0.03
    assert kstest(second, "uniform").pvalue > 1e-3
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert len(set(drawn)) == len(drawn)
    assert kstest(drawn, "uniform").pvalue > 1e-3
    others = [(2, key, trajectory, step), (1, key + 1, trajectory, step), (1, key, trajectory + 1, step)]
    for other in [*others, (1, key, trajectory, step + 1)]:
        assert abs(np.corrcoef(drawn, uniforms(*other)[0])[0, 1]) < 0.03
    plus, minus = (uniforms(1, np.array([sign * 5]), np.array([0]), np.array([0])) for sign in (1, -1))
    assert (plus != minus).all()


def test_pick_inverts_the_cumulated_probabilities() -> None:
    chances = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    uniform = np.array([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53])
    picked = pick(chances.expand(6, -1), uniform)
    assert picked.tolist() == [1, 1, 3, 3, 4, 4]


def test_temperature_divides_the_logits() -> None:
    logits = torch.tensor([[0.0, 2.0]]).expand(1000, -1)
    uniform = (np.arange(1000) + 0.5) / 1000
    for temperature in (0.5, 1.0, 4.0):
        share = pick(torch.softmax(logits / temperature, 1), uniform).mean()
        assert share == pytest.approx(1 / (1 + np.exp(-2 / temperature)), abs=2e-3)


@given(st.integers(0, 2**32 - 1), st.integers(2, 300), st.floats(0.01, 4.0))
def test_pick_finds_its_token_through_blocks_as_through_all_tokens(seed: int, vocab: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    weights = np.exp(spread * rng.normal(size=(8, vocab))) * (rng.random((8, vocab)) < 0.7)
    weights[:, rng.integers(vocab)] += 0.1
    chances = torch.from_numpy((weights / weights.sum(1, keepdims=True)).astype(np.float32))
    uniform = rng.random(8)
    picked = pick(chances, uniform)
    cumulated = chances.double().cumsum(1).numpy()
    cumulated /= cumulated[:, -1:]
    rows = np.arange(8)
    assert (chances.numpy()[rows, picked] > 0).all()
    # The uniform lies in the token's own part of [0, 1), up to the rounding of float32 sums.
    assert (uniform <= cumulated[rows, picked] + 1e-5).all()
    assert (uniform >= cumulated[rows, picked] - chances.numpy()[rows, picked] - 1e-5).all()


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 1.0))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(seed: int, top_p: float) -> None:
    logits = np.random.default_rng(seed).normal(size=(4, 50)).astype(np.float32) * 3
    chances = torch.softmax(torch.from_numpy(logits), 1)
    kept = nucleus_(chances.clone(), top_p)
    for before, after in zip(chances.numpy(), kept.numpy(), strict=True):
        inside = after > 0
        assert after.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(after[inside], before[inside] / before[inside].sum(), rtol=1e-4)
        assert before[inside].sum() >= top_p - 1e-5
        assert before[inside].sum() - before[inside].min() < top_p + 1e-5
        assert before[inside].min() >= before[~inside].max(initial=0)


def test_a_nucleus_keeps_ties_whole() -> None:
    kept = nucleus_(torch.tensor([[0.4, 0.2, 0.2, 0.2]]), 0.5)
    torch.testing.assert_close(kept, torch.tensor([[0.4, 0.2, 0.2, 0.2]]))
