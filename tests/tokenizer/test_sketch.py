"""The sketch is Datadog's grid, and its bins are what a reader of quantiles expects."""

import math

import numpy as np
import pytest
from ddsketch import DDSketch
from ddsketch.mapping import LogarithmicMapping
from hypothesis import given
from hypothesis import strategies as st

from tokenizer import sketch

values = st.floats(-(2.0**100), 2.0**100, width=32)


def sketched(numbers, accuracy=0.01):
    buckets, counts = np.unique(sketch.bucket_of(np.array(numbers, np.float64), accuracy), return_counts=True)
    return dict(zip(buckets.tolist(), counts.tolist(), strict=True))


@given(st.lists(values), st.sampled_from([0.001, 0.01, 0.1]))
def test_buckets_are_those_of_ddsketch(numbers, accuracy):
    mapping = LogarithmicMapping(accuracy)
    for number, bucket in zip(numbers, sketch.bucket_of(np.array(numbers, np.float64), accuracy), strict=True):
        if number == 0:
            assert bucket == 0
            continue
        exact = mapping._log_gamma(abs(number))
        on_an_edge = abs(exact - round(exact)) < 1e-9
        expected = int(math.copysign(mapping.key(abs(number)) + sketch.SHIFT, number))
        assert bucket == expected or (on_an_edge and abs(bucket - expected) == 1)


@given(values.filter(bool), st.sampled_from([0.001, 0.01, 0.1]))
def test_a_bucket_stands_for_its_values(number, accuracy):
    (bucket,) = sketch.bucket_of(np.array([number]), accuracy).tolist()
    assert sketch.bucket_value(bucket, accuracy) == pytest.approx(number, rel=accuracy * (1 + 1e-6))


@given(st.lists(values, min_size=2, max_size=40))
def test_buckets_sort_like_values(numbers):
    buckets = sketch.bucket_of(np.array(sorted(numbers), np.float64), 0.01)
    assert (np.diff(buckets) >= 0).all()


@given(st.lists(st.floats(0.01, 1e6), min_size=30, max_size=200))
def test_the_median_agrees_with_ddsketch(numbers):
    reference = DDSketch(0.01)
    for number in numbers:
        reference.add(number)
    breaks, _ = sketch.quantile_bins(sketched(numbers), 2, 0.01)
    below = np.mean(np.array(numbers) < breaks[0]) if breaks else 0.5
    heaviest = max(sketched(numbers).values()) / len(numbers)
    assert abs(below - 0.5) <= heaviest / 2 + 1e-9
    if breaks:
        inside = sketch.quantile_bins(sketched(numbers), 2, 0.01)[1]
        assert inside[0] <= reference.get_quantile_value(0.5) * 1.03


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200), st.integers(2, 12))
def test_every_median_lies_in_its_own_bin(numbers, bins):
    breaks, medians = sketch.quantile_bins(sketched(numbers), bins, 0.01)
    assert len(breaks) <= bins - 1
    assert list(breaks) == sorted(set(breaks))
    assert np.searchsorted(breaks, medians).tolist() == list(range(len(breaks) + 1))


def test_deciles_of_a_smooth_sample_hold_a_tenth_each():
    numbers = np.random.default_rng(0).lognormal(3, 0.5, 50_000)
    breaks, _ = sketch.quantile_bins(sketched(numbers), 10, 0.01)
    shares = np.bincount(np.searchsorted(breaks, numbers), minlength=10) / len(numbers)
    assert len(breaks) == 9
    assert abs(shares - 0.1).max() < 0.02


def test_scores_never_sit_on_a_break():
    scores = np.repeat(np.arange(3.0, 16.0), 100)
    breaks, _ = sketch.quantile_bins(sketched(scores), 10, 0.01)
    assert all(abs(score - edge) > 0.3 for score in scores for edge in breaks)


def test_one_value_has_one_bin():
    breaks, medians = sketch.quantile_bins(sketched([7.0] * 50), 10, 0.01)
    assert breaks == ()
    assert medians == (pytest.approx(7.0, rel=0.01),)


def test_a_rare_second_value_keeps_a_bin():
    breaks, _ = sketch.quantile_bins(sketched([0.0] * 990 + [1.0] * 10), 10, 0.01)
    assert breaks == (pytest.approx(0.5, abs=0.01),)


def test_the_mean_is_within_the_accuracy():
    numbers = np.random.default_rng(0).uniform(1, 100, 1000)
    assert sketch.mean(sketched(numbers), 0.01) == pytest.approx(numbers.mean(), rel=0.01)
