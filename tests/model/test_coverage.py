"""95 % intervals over patients cover the truth as often as they say.

Patients have one to three predictions, which share most of what is known of them and a frailty that is not, so
predictions are not independent. Truths come from a quadrature over the known law, not from draws. A right interval
falls out of the accepted band once in 10,000 tests for each figure (binomial).
"""

import numpy as np
import pytest
from scipy.stats import binom, norm

from model.metrics import BINS, compare, ece, fit_logistic, interval, weighted_auroc

_ALARM = 1e-4
FIGURES = ("auroc", "auprc", "brier", "ece", "slope", "intercept")


def _expit(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _told(z: np.ndarray) -> np.ndarray:
    """A model's risk, too extreme and too low."""
    return _expit(-1.6 + 1.3 * z)


def _risk(z: np.ndarray, frailty: np.ndarray) -> np.ndarray:
    return _expit(-1.0 + z + 0.5 * frailty)


def draw(rng: np.random.Generator, patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, risks and subjects."""
    owner = np.repeat(np.arange(patients), rng.integers(1, 4, patients))
    shared, frailty = rng.normal(size=(2, patients))
    z = np.sqrt(0.8) * shared[owner] + np.sqrt(0.2) * rng.normal(size=len(owner))
    return (rng.random(len(owner)) < _risk(z, frailty[owner])).astype(float), _told(z), owner


def truths(steps: int = 20_000) -> dict[str, float]:
    """What endlessly many patients would give."""
    z = norm.ppf((np.arange(steps) + 0.5) / steps)
    points, weights = np.polynomial.hermite_e.hermegauss(40)
    p, told = _risk(z[:, None], points) @ weights / weights.sum(), _told(z)
    labels, weight = np.repeat([1.0, 0.0], steps), np.concatenate([p, 1 - p])
    above = np.cumsum(p[::-1])[::-1] - p / 2
    called = (steps - np.arange(steps)) - 0.5
    fitted = fit_logistic(np.log(told / (1 - told)), p, np.ones(steps))
    assert fitted is not None
    off = (p - told).reshape(BINS, -1).mean(axis=1)
    return {
        "auroc": weighted_auroc(labels, np.tile(told, 2), weight),
        "auprc": float((p * above / called).sum() / p.sum()),
        "brier": float((p * (1 - told) ** 2 + (1 - p) * told**2).mean()),
        "ece": float(np.abs(off).mean()),
        "slope": fitted[0],
        "intercept": fitted[1],
    }


def band(repeats: int, slack: float = 0.0) -> tuple[float, float]:
    """Counts between which a right interval's hits lie, but once in 10,000 tests; `slack` is allowed to be missing."""
    return binom.ppf(_ALARM / 2, repeats, 0.95 - slack), binom.ppf(1 - _ALARM / 2, repeats, 0.95)


def hits(repeats: int, patients: int, resamples: int) -> dict[str, int]:
    """How often each figure's interval covers."""
    truth, rng = truths(), np.random.default_rng(7)
    found = dict.fromkeys(FIGURES, 0)
    for repeat in range(repeats):
        labels, told, owner = draw(rng, patients)
        row = compare(labels, {"a": told}, seed=repeat, resamples=resamples, subjects=owner).rows[0]
        for name in FIGURES:
            measure = getattr(row, name)
            found[name] += measure.low <= truth[name] <= measure.high
    return found


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    low, high = band(120)
    for name, count in hits(120, 200, 200).items():
        # What a calibration error's interval holds too often does no harm.
        assert low <= count <= (120 if name == "ece" else high), (name, count)
    # Intervals of half the width cover 67 %: the band finds them out.
    assert binom.cdf(low - 1, 120, 2 * norm.cdf(0.98) - 1) > 0.999


def test_errors_of_a_calibrated_model_reach_down_to_none_where_percentiles_never_do() -> None:
    """Binomial over 40 draws at 95 %: a right interval is found wrong once in 10,000 tests."""
    rng, told = np.random.default_rng(3), {"right": 0, "percentiles": 0}
    for repeat in range(40):
        _, risks, _ = draw(rng, 200)
        labels = (rng.random(len(risks)) < risks).astype(float)
        told["right"] += (
            compare(labels, {"a": risks}, seed=repeat, resamples=200, calibrated=False).rows[0].ece.low == 0
        )
        resamples = rng.integers(0, len(risks), (60, len(risks)))
        drawn = np.array([ece(labels[rows], risks[rows]) for rows in resamples])
        told["percentiles"] += interval(ece(labels, risks), drawn).low <= 0.002
    assert told["right"] >= binom.ppf(_ALARM, 40, 0.95)
    assert told["percentiles"] == 0


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say_over_many_repeats() -> None:
    """A bootstrap of a few hundred patients may miss the nominal rate by one in a hundred; AUPRC's by three."""
    for name, count in hits(2000, 500, 1000).items():
        low, high = band(2000, slack=0.03 if name == "auprc" else 0.01)
        print(f"{name}: {count / 2000:.4f}")
        assert low <= count <= (2000 if name == "ece" else high), (name, count)
