"""Arms against known risks: what the formulas say is what endlessly many draws of fates come to."""

import numpy as np
import pytest

from model.known_truth import against_truth
from model.metrics import auroc, recalibration, recalibrations
from tokenizer.errors import DataError


def _made(size: int = 150) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    truth = 1 / (1 + np.exp(1.5 - 1.2 * rng.normal(size=size)))
    noisy = np.round(1 / (1 + np.exp(1.0 - 0.8 * rng.normal(size=size) - np.log(truth / (1 - truth)))), 2)
    return truth, np.clip(noisy, 0.01, 0.99)  # ties, too


def test_figures_are_those_of_many_draws() -> None:
    """400 draws; each figure within 4.5 standard errors of the draws' mean (a false alarm in 70,000 runs)."""
    truth, told = _made()
    found = against_truth(truth, {"a": told}, seed=0, resamples=50)["a"]
    draws = np.random.default_rng(0).random((400, len(truth))) < truth
    ranked = [auroc(labels, told) for labels in draws]
    assert abs(np.mean(ranked) - found.auroc.value) < 4.5 * np.std(ranked) / 20 + 1e-3
    pooled, _ = recalibration(draws.ravel().astype(int), np.tile(told, 400))
    slopes = [recalibration(labels, told)[0] for labels in draws[:100]]
    assert abs(pooled - found.slope.value) < 4.5 * np.std(slopes) / 20
    assert found.mean_risk.value == pytest.approx(told.mean() / truth.mean())


def test_nothing_is_before_the_truth_and_the_order_alone_makes_the_rank() -> None:
    truth, told = _made()
    halved = 1 / (1 + np.exp(-2 * np.log(truth / (1 - truth))))
    found = against_truth(truth, {"true": truth, "extreme": halved, "noisy": told}, seed=1, resamples=200)
    assert found["true"].behind.value == found["extreme"].behind.value == 0
    assert (found["true"].slope.value, found["extreme"].slope.value) == (pytest.approx(1.0), pytest.approx(0.5))
    noisy = found["noisy"]
    assert 0 < noisy.behind.low < noisy.behind.value < noisy.behind.high
    assert noisy.slope.low < noisy.slope.value < noisy.slope.high


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(DataError, match="between 0 and 1"):
        against_truth([0.5, 1.5], {"a": [0.1, 0.2]}, seed=0)
    with pytest.raises(DataError, match="every prediction"):
        against_truth([0.5, 0.6], {"a": [0.1]}, seed=0)


def test_many_fits_at_once_are_those_made_one_by_one() -> None:
    rng = np.random.default_rng(5)
    x, labels = rng.normal(size=40), (rng.random(40) < 0.3).astype(float)
    weights = rng.multinomial(40, np.full(40, 1 / 40), size=30).astype(float)
    weights[0] = labels  # one class
    weights[1] = np.eye(40)[int(labels.argmax())] + np.eye(40)[int(labels.argmin())]  # two points are separated
    slopes, intercepts = recalibrations(x, labels, weights, near=True)
    assert np.isnan(slopes[:2]).all()
    for row in range(2, 30):
        repeated = np.repeat(np.arange(40), weights[row].astype(int))
        told = recalibration(labels[repeated], 1 / (1 + np.exp(-x[repeated])))
        assert (slopes[row], intercepts[row]) == pytest.approx(told, abs=1e-6, nan_ok=True)
