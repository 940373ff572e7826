"""What vectors lose before they travel, and that they lose nothing while they do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from federation.coding import BLOCK, Coding, CodingError, Packed, coded, length, nearest, pack, round_, unpack
from federation.parts import Joined

vectors = arrays(np.float32, st.integers(1, 100), elements=st.floats(-(2.0**100), 2.0**100, width=32))
codings = st.sampled_from(["float32", "bfloat16", "int8"])


def rounded(
    vector: np.ndarray, coding: Coding, seed: str, residual: Packed | None = None
) -> tuple[np.ndarray, Packed | None]:
    """Give what a vector is rounded to, and what that took away."""
    kept: list[np.ndarray] = []
    told = round_(vector.copy(), coding, seed, residual, kept.append)
    return np.array(told), Packed(Joined(kept), "bfloat16") if kept else None


@given(vectors, codings)
def test_a_rounded_vector_travels_without_loss(vector: np.ndarray, coding: Coding) -> None:
    packed = round_(vector.copy(), coding, "seed")
    told = np.array(packed)
    data = pack(told, coding)
    assert packed.data.size == data.size == length(vector.size, coding)
    assert packed.size == vector.size
    for each in (packed, Packed(data, coding)):
        assert np.array_equal(np.concatenate([each[i : i + BLOCK] for i in range(0, vector.size, BLOCK)]), told)
    assert np.array_equal(unpack(data, coding), told)


@pytest.mark.parametrize("coding", ["bfloat16", "int8"])
def test_a_vector_of_many_parts_is_rounded_in_its_own_memory_as_each_part_alone(coding: Coding) -> None:
    vector = np.random.default_rng(0).normal(size=(1 << 19) + 77).astype(np.float32)
    residual = coded(vector[::-1].copy(), "bfloat16")
    assert isinstance(residual, Packed)
    told, kept = rounded(vector, coding, "seed", residual)
    wanted = vector + np.asarray(residual)
    assert kept is not None
    assert np.allclose(told + np.asarray(kept), wanted, atol=2.0**-12, rtol=0)
    if coding == "bfloat16":
        assert np.array_equal(told, nearest(wanted, "bfloat16"))


@given(vectors, codings)
def test_what_is_taken_away_is_small_and_given_back(vector: np.ndarray, coding: Coding) -> None:
    told, kept = rounded(vector, coding, "seed")
    if kept is None:
        assert np.array_equal(told, vector)
        return
    residual = np.asarray(kept)
    blocks = np.zeros(-(-vector.size // BLOCK) * BLOCK, np.float32)
    blocks[: vector.size] = np.abs(vector)
    largest = np.repeat(blocks.reshape(-1, BLOCK).max(axis=1), BLOCK)[: vector.size].astype(np.float64)
    # bfloat16: half of the last of 8 digits. int8: a step of the block, which is below twice the largest / 127. What is
    # kept of that has 8 digits itself.
    bound = (1 + 2**-8) * (np.abs(vector.astype(np.float64)) / 256 if coding == "bfloat16" else 2 * largest / 127)
    assert (np.abs(residual) <= bound + 1e-37).all()
    again, _ = rounded(np.zeros_like(vector), coding, "later", kept)
    assert (np.abs(again - residual) <= np.abs(residual).max() * 2 / 127 + 1e-37).all()


def test_rounding_at_random_has_the_right_mean() -> None:
    """False alarms: below 1e-6 (each mean of 4,000 draws within 6 standard errors, 64 values)."""
    vector = np.linspace(-1, 1, 64, dtype=np.float32)
    told = np.stack([rounded(vector, "int8", str(number))[0] for number in range(4000)])
    step = 2.0**-6  # of both blocks, whose largest value is 1
    assert (np.abs(told.mean(axis=0) - vector) <= 6 * step / 2 / np.sqrt(len(told))).all()


def test_equal_seeds_round_equally_and_others_differently() -> None:
    vector = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    one, same, other = (rounded(vector, "int8", seed)[0] for seed in ("a", "a", "b"))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_sums_over_rounds_lose_the_last_rounding_and_little_else() -> None:
    updates = np.random.default_rng(0).normal(size=(50, 333)).astype(np.float32)
    total, residual = np.zeros(333, np.float64), None
    for number, update in enumerate(updates):
        told, residual = rounded(update, "int8", str(number), residual)
        total += told
    assert residual is not None
    # What is given back is itself rounded to 8 digits, every time; at most a step of a block, 2 / 127 of its largest.
    lost = len(updates) * 2**-9 * np.abs(updates).max() * 2 / 127
    assert np.allclose(total + np.asarray(residual), updates.astype(np.float64).sum(axis=0), atol=lost, rtol=0)


def test_bfloat16_is_the_nearest_with_ties_to_even() -> None:
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert nearest(values, "bfloat16").tolist() == [1, 1, 1 + 2**-6, 1 + 2**-7]


@pytest.mark.parametrize("coding", ["bfloat16", "int8"])
def test_a_vector_that_would_change_on_the_way_is_refused(coding: Coding) -> None:
    with pytest.raises(CodingError, match=f"{coding} can't tell"):
        pack(np.array([1.0, 1 + 2**-20], np.float32), coding)


@pytest.mark.parametrize(("coding", "size"), [("float32", 3), ("bfloat16", 3), ("int8", 1), ("int8", 34)])
def test_bytes_that_are_no_vector_are_refused(coding: Coding, size: int) -> None:
    with pytest.raises(CodingError, match="no whole vector"):
        unpack(np.zeros(size, np.uint8), coding)
