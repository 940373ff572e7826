"""The accountant's figure is an upper bound, a tight one, and composes as the theory says."""

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from federation import canonical
from federation.accountant import (
    Approximate,
    DiscreteGaussian,
    Gaussian,
    Laplace,
    Mechanism,
    Mechanisms,
    Skellam,
    _rdp_of,
    across,
    epsilon,
    epsilon_rdp,
    of_survey,
)
from tokenizer import noise
from tokenizer.errors import ConfigError
from tokenizer.noisy_survey import SurveyPrivacy, price

DELTA = 1e-6


def delta_of_gaussian(size: float, at: float) -> float:
    """Exact, of one Gaussian release with sensitivity / deviation `size` (Balle, Wang, ICML 2018, theorem 8)."""
    return float(stats.norm.cdf(size / 2 - at / size) - math.exp(at) * stats.norm.cdf(-size / 2 - at / size))


@given(multiplier=st.floats(0.7, 50), steps=st.integers(1, 100))
@settings(max_examples=6)
def test_gaussians_without_sampling_have_the_exact_figure(multiplier: float, steps: int) -> None:
    found = epsilon([Gaussian(multiplier, steps=steps)], DELTA)
    size = math.sqrt(steps) / multiplier
    if epsilon_rdp([Gaussian(multiplier, steps=steps)], DELTA) < 50:
        assert delta_of_gaussian(size, found) <= DELTA * (1 + 1e-6)
        assert delta_of_gaussian(size, found - 0.01 * max(found, 0.1)) > DELTA


@pytest.mark.parametrize(("multiplier", "rate", "steps"), [(1.0, 0.01, 1000), (0.8, 0.004, 300), (3.0, 0.3, 60)])
def test_the_figure_lies_between_a_lower_bound_and_the_renyi_bound(multiplier: float, rate: float, steps: int) -> None:
    mechanism = Gaussian(multiplier, rate, steps)
    optimistic = pld.from_gaussian_mechanism(
        multiplier, pessimistic_estimate=False, value_discretization_interval=1e-3, sampling_prob=rate,
        use_connect_dots=False,
    )  # fmt: skip
    lowest = optimistic.self_compose(steps).get_epsilon_for_delta(DELTA)
    found = epsilon([mechanism], DELTA)
    assert 0 < lowest <= found < epsilon_rdp([mechanism], DELTA)
    assert found < 1.3 * lowest + 0.1


def test_the_prv_accountant_agrees() -> None:
    from opacus.accountants import PRVAccountant

    other = PRVAccountant()
    other.history = [(1.0, 0.01, 500)]
    assert epsilon([Gaussian(1.0, 0.01, 500)], 1e-5) == pytest.approx(other.get_epsilon(1e-5), rel=0.03)


def test_an_accountant_that_forgets_a_tenth_of_the_steps_would_be_found_out() -> None:
    assert delta_of_gaussian(math.sqrt(100) / 10, epsilon([Gaussian(10, steps=90)], DELTA)) > DELTA


def test_laplace_is_never_above_pure_composition_and_has_no_delta() -> None:
    assert epsilon([Laplace(2.0)], 1e-12) == pytest.approx(0.5, abs=1e-3)
    assert epsilon([Laplace(2.0, 40)], 1e-5) < epsilon([Approximate(0.5, steps=40)], 1e-5) <= 20


def test_the_discrete_gaussian_is_accounted_as_its_zcdp_and_above_the_exact_figure() -> None:
    """In one dimension, `dp-accounting` has the exact distribution."""
    found = epsilon([DiscreteGaussian(16.0, 1.0)], DELTA)
    exact = pld.from_discrete_gaussian_mechanism(4.0, value_discretization_interval=1e-3)
    assert exact.get_epsilon_for_delta(DELTA) <= found <= 1.15 * exact.get_epsilon_for_delta(DELTA)
    assert noise.delta_of(1 / 32, found) == pytest.approx(DELTA, rel=0.01)


def test_many_small_shares_cost_more_than_one_and_large_ones_do_not() -> None:
    one = epsilon([DiscreteGaussian(25.0 * 10, 10.0)], DELTA)
    assert epsilon([DiscreteGaussian(25.0, 10.0, shares=10, dimensions=10**6)], DELTA) == pytest.approx(one, rel=1e-6)
    assert epsilon([DiscreteGaussian(0.5, 10.0, shares=500, dimensions=10**6)], DELTA) > one


def renyi_of_shares(variance: float, shares: int, order: float) -> float:
    """Of the sum of discrete Gaussians against itself moved by one, from its exact mass function."""
    x = np.arange(-60, 61)
    one = np.exp(-(x**2) / (2 * variance))
    one /= one.sum()
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    total = np.log(total[total > 1e-200])
    p, q = total[1:], total[:-1]
    return float(np.log(np.sum(np.exp(order * p + (1 - order) * q))) / (order - 1))


@pytest.mark.parametrize("order", [2.0, 8.0])
@pytest.mark.parametrize(("variance", "shares"), [(0.3, 3), (1.0, 5)])
def test_the_bound_for_shares_holds_on_the_exact_distribution(variance: float, shares: int, order: float) -> None:
    bound = float(_rdp_of(DiscreteGaussian(variance, 1.0, shares), np.array([order]))[0])
    assert renyi_of_shares(variance, shares, order) <= bound


@pytest.mark.parametrize("order", [2.0, 5.0, 20.0])
@pytest.mark.parametrize("variance", [1.0, 9.0, 100.0])
def test_the_bound_for_skellam_holds_on_the_exact_distribution(variance: float, order: float) -> None:
    x = np.arange(-60, 61)
    log_p = stats.skellam.logpmf(x, variance / 2, variance / 2)
    fine = np.isfinite(log_p[1:]) & np.isfinite(log_p[:-1]) & (log_p[1:] > -200) & (log_p[:-1] > -200)
    p, q = log_p[1:][fine], log_p[:-1][fine]
    exact = np.log(np.sum(np.exp(order * p + (1 - order) * q))) / (order - 1)
    assert exact <= float(_rdp_of(Skellam(variance, 1.0, 1.0), np.array([order]))[0])


TRAINING = Gaussian(1.0, 0.05, 400)


def survey(mechanism: str) -> tuple[Mechanism, ...]:
    return of_survey(price(SurveyPrivacy(mechanism, 1.0, 1e-6))).all  # type: ignore[arg-type]


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_a_survey_costs_what_its_settings_say(mechanism: str) -> None:
    assert epsilon(survey(mechanism), 1e-6) <= 1.0
    assert epsilon(survey(mechanism), 1e-6) > 0.5


@pytest.mark.parametrize("mechanism", ["gaussian", "laplace"])
def test_survey_and_training_cost_less_than_their_sum_and_more_than_each(mechanism: str) -> None:
    together = epsilon([TRAINING, *survey(mechanism)], 2e-6)
    alone = epsilon([TRAINING], 2e-6)
    assert alone < together < alone + 0.8
    assert together < epsilon_rdp([TRAINING, *survey(mechanism)], 2e-6)


def test_a_distribution_made_of_renyi_divergences_dominates_the_exact_one() -> None:
    """A Gaussian's divergences are known exactly, so its own distribution must lie below."""
    for multiplier in (2.0, 10.0):
        bare = DiscreteGaussian(multiplier**2, 1.0)
        for delta in (1e-3, 1e-6, 1e-9):
            exact, found = epsilon([TRAINING, Gaussian(multiplier)], delta), epsilon([TRAINING, bare], delta)
            assert exact <= found + 1e-3
            assert found < 1.15 * exact


def test_order_and_grouping_do_not_matter() -> None:
    parts = [Gaussian(1.0, 0.05, 100), Laplace(5.0), Gaussian(1.0, 0.05, 300)]
    assert epsilon(parts, DELTA) == epsilon([Gaussian(1.0, 0.05, 400), Laplace(5.0)], DELTA)
    assert epsilon(parts, DELTA) == epsilon(parts[::-1], DELTA)


def test_nothing_costs_nothing_and_too_much_has_no_figure() -> None:
    assert epsilon([], DELTA) == 0
    assert epsilon([Gaussian(1.0, steps=0)], DELTA) == 0
    assert epsilon([Approximate(0.0, 1e-5)], DELTA) == math.inf
    assert epsilon([Gaussian(0.01, steps=1000)], DELTA) > 1e6


def test_patients_of_one_site_pay_the_largest_and_those_of_all_sites_the_sum_of_releases() -> None:
    sites = [[Gaussian(1.0, 0.05, 100)], [Gaussian(2.0, 0.05, 100)], []]
    found = across(sites, DELTA)
    assert found.one_site == epsilon(sites[0], DELTA)
    assert found.all_sites == epsilon([*sites[0], *sites[1]], DELTA) > found.one_site
    assert across([], DELTA).one_site == 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Gaussian(0.0),
        lambda: Gaussian(1.0, 1.5),
        lambda: Gaussian(1.0, steps=-1),
        lambda: Laplace(-1.0),
        lambda: DiscreteGaussian(0.1, 1.0, shares=3),
        lambda: Skellam(1.0, 0.0, 1.0),
        lambda: Approximate(-1.0),
        lambda: epsilon([], 0.0),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="must"):
        wrong()  # type: ignore[operator]


def test_mechanisms_can_be_written_down_and_read() -> None:
    every = Mechanisms(
        (Gaussian(1.0, 0.1, 3), Laplace(2.0), DiscreteGaussian(9, 3), Skellam(9, 3, 2), Approximate(0, 0.1))
    )
    assert canonical.decode(Mechanisms, canonical.encode(every), "it", ConfigError) == every
