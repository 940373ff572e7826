"""The planner's noise is enough, and hardly more; its estimates go the way that they should."""

import math

import pytest
from scipy import stats

from federation.accountant import Gaussian, epsilon
from federation.planner import (
    Wish,
    _central_limit,
    batches_around,
    honest_by_default,
    noise_for,
    plan,
    plan_updates,
    progress,
)
from tokenizer.errors import ConfigError


@pytest.mark.parametrize(("wanted", "delta", "rate", "steps"), [(2.0, 1e-6, 0.02, 500), (8.0, 1e-5, 0.2, 200)])
def test_the_noise_is_enough_and_hardly_more(wanted: float, delta: float, rate: float, steps: int) -> None:
    found = noise_for(wanted, delta, rate, steps)
    assert 0.99 * wanted <= epsilon([Gaussian(found, rate, steps)], delta) <= wanted
    assert epsilon([Gaussian(0.98 * found, rate, steps)], delta) > wanted


@pytest.mark.parametrize("wanted", [0.1, 1.0, 30.0])
def test_without_sampling_the_search_begins_at_the_exact_noise(wanted: float) -> None:
    size = 10 / _central_limit(wanted, 1e-6, 1.0, 100)
    delta = stats.norm.cdf(size / 2 - wanted / size) - math.exp(wanted) * stats.norm.cdf(-size / 2 - wanted / size)
    assert delta == pytest.approx(1e-6, rel=0.25)
    assert 0.99 * wanted <= epsilon([Gaussian(noise_for(wanted, 1e-6, 1.0, 100), steps=100)], 1e-6) <= wanted


def test_larger_batches_have_less_noise_per_patient_and_more_progress() -> None:
    small, large = plan(Wish(4000, 8.0, 1e-5, 10, steps_per_round=10), [100, 800])
    assert small.noise_per_patient > large.noise_per_patient
    assert small.progress < large.progress
    assert small.loss > large.loss > 0
    assert 0 < large.epsilon_of_one_round < large.epsilon <= 8.0
    assert (large.sampling_rate, large.steps) == (0.2, 100)


def test_noise_that_is_shared_out_is_shorter_by_the_root_of_the_honest_sites() -> None:
    wish = Wish(1000, 8.0, 1e-5, 20, passes=10, parameters=10_000)
    own, shared = plan_updates(wish, 10, 7)
    assert (own.mechanism, own.honest_sites, shared.mechanism, shared.honest_sites) == ("local", None, "distributed", 7)
    assert own.noise_multiplier == pytest.approx(5.38)
    assert own.length == pytest.approx(5.38 * math.sqrt(10_000 / 10))
    assert shared.length == pytest.approx(own.length * shared.noise_multiplier / own.noise_multiplier / math.sqrt(7))
    assert 1 < shared.noise_multiplier / own.noise_multiplier < 1.1
    assert 7.9 < min(own.epsilon, shared.epsilon) <= max(own.epsilon, shared.epsilon) <= 8.0
    assert [honest_by_default(sites) for sites in (3, 4, 10, 50)] == [2, 3, 7, 33]
    for honest in (1, 11):
        with pytest.raises(ConfigError, match="from 2 to 10"):
            plan_updates(wish, 10, honest)


def test_passes_are_turned_into_steps() -> None:
    (row,) = plan(Wish(1000, 4.0, 1e-5, 5, passes=10), [100])
    assert row.steps == 100


def test_progress_is_all_without_noise_and_none_with_too_much() -> None:
    assert progress(0.0, 64, 10**6) == 1
    assert progress(1.0, 64, 10**6) < 1e-6


def test_batches_are_around_the_wanted_one_and_within_the_site() -> None:
    assert batches_around(10_000, 256) == [64, 128, 256, 512, 1024]
    assert batches_around(300, 256) == [64, 128, 256, 300]
    assert batches_around(5, None) == [1, 2, 4]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"steps_per_round": None}, "either"),
        ({"passes": 1.0}, "either"),
        ({"delta": 0.01}, "1 / patients"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(wrong: dict, told: str) -> None:
    wish = {"patients": 1000, "epsilon": 1.0, "delta": 1e-5, "rounds": 1, "steps_per_round": 1}
    with pytest.raises(ConfigError, match=told):
        Wish(**{**wish, **wrong})
    with pytest.raises(ConfigError, match="does not fit"):
        plan(Wish(**wish), [1001])  # type: ignore[arg-type]
