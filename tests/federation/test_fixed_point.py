import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from federation.fixed_point import FixedPoint, Total
from tokenizer.errors import ConfigError, DataError


def numbers(sites: int = 10, bits: int = 20, clip: float = 1.0, max_weight: int = 1000) -> FixedPoint:
    return FixedPoint(sites, clip, max_weight, bits, (Total("weight", max_weight), Total("loss", 1e6, 2**-10)))


@pytest.mark.parametrize("bits", [20, 30, 40])
@pytest.mark.parametrize("sites", [3, 50, 1000])
def test_the_greatest_sum_fits_in_a_word_with_its_sign(sites: int, bits: int) -> None:
    fixed = numbers(sites, bits)
    ones = np.ones(3, np.float32)
    for sign in (1, -1):
        total = np.zeros(3, fixed.dtype)
        for _ in range(sites):
            words = np.empty(3, fixed.dtype)
            fixed.encode(sign * ones * 5, fixed.max_weight, words)
            total += words
        mean = np.empty(3, np.float32)
        fixed.decode(total, sites * fixed.max_weight, mean)
        np.testing.assert_allclose(mean, sign * ones, atol=fixed.mean_error(sites, sites * fixed.max_weight), rtol=1e-7)


def test_words_are_as_narrow_as_the_precision_allows() -> None:
    assert numbers(10, 20).dtype.name == "uint32"
    assert numbers(50, 25).dtype.name == "uint32"
    assert numbers(50, 26).dtype.name == "uint64"
    assert numbers(2047, 20).dtype.name == "uint32"
    assert numbers(2048, 20).dtype.name == "uint64"
    for fixed in (numbers(10, 20), numbers(50, 30)):
        assert fixed.step <= fixed.clip / 2**fixed.precision_bits


@settings(deadline=None, max_examples=60)
@given(
    hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(-3, 3, width=32)),
    st.integers(1, 1000),
    st.sampled_from([20, 40]),
    st.floats(1e-6, 1e6),
)
def test_a_value_errs_by_half_a_step_at_most_in_place_too(
    values: np.ndarray, weight: int, bits: int, clip: float
) -> None:
    values = (values * clip).astype(np.float32)
    fixed = numbers(5, bits, clip)
    want = np.clip(values.astype(np.float64), -clip, clip)
    clipped = int(np.sum(np.abs(values) > clip))
    words = values.view(fixed.dtype) if fixed.dtype.itemsize == 4 else np.empty(values.size, fixed.dtype)
    assert fixed.encode(values, weight, words) == clipped
    mean = np.empty(words.size, np.float32)
    fixed.decode(words, weight, mean)
    assert np.all(np.abs(mean - want) <= fixed.mean_error(1, weight) + np.abs(want) * 2.0**-24)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_before_it_is_told(value: float) -> None:
    update = np.zeros(200_000, np.float32)
    update[150_000] = value
    with pytest.raises(DataError, match="1 values that are not finite"):
        numbers().check(update, {"weight": 1, "loss": 0})


def test_totals_that_were_not_agreed_are_refused() -> None:
    update = np.zeros(1, np.float32)
    with pytest.raises(DataError, match="within"):
        numbers().check(update, {"weight": 1001, "loss": 0})
    with pytest.raises(DataError, match="within"):
        numbers().check(update, {"weight": 1, "loss": float("nan")})
    with pytest.raises(DataError, match="agreed are loss, weight"):
        numbers().check(update, {"weight": 1})


def test_totals_come_back_with_their_sign() -> None:
    fixed = numbers()
    words = fixed.encode_totals({"weight": 12, "loss": -1e6}) + fixed.encode_totals({"weight": 30, "loss": 0.5})
    assert fixed.decode_totals(words) == {"weight": 42.0, "loss": -999_999.5}


def test_options_that_could_overflow_are_refused() -> None:
    with pytest.raises(ConfigError, match="44 do"):
        numbers(bits=45)
    with pytest.raises(ConfigError, match="'big'"):
        FixedPoint(10, 1.0, 1, 20, (Total("big", 2.0**52, 1.0),))
    with pytest.raises(ConfigError, match="step"):
        Total("none", 0.0)
