"""Intervals of merged figures are those of the pooled predictions, and cover as often as they say."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom

from federation.merged import FIGURES, Merged, merge
from federation.merged_intervals import BENT
from federation.tallies import Form, noised, tally
from model import metrics
from model.private import Secret

EXACT = Form(floor=1)


def _expit(x: NDArray) -> NDArray:
    return 1 / (1 + np.exp(-x))


def _draw(rng: np.random.Generator, size: int, tilt: float = 1.3) -> tuple[NDArray, NDArray]:
    """Labels, and risks of a model that is calibrated with `tilt` 1."""
    z = rng.normal(size=size)
    return (rng.random(size) < _expit(z - 1.0)).astype(int), _expit(tilt * z - (1.0 if tilt == 1 else 1.6))


def _merged(labels: NDArray, risks: NDArray, form: Form, sites: int = 3, secret: str = "") -> Merged:
    columns = (np.array_split(column, sites) for column in (labels, risks, np.arange(len(labels))))
    parts = [tally(*each, form) for each in zip(*columns, strict=True)]
    if form.noise:
        parts = [noised(part, form, Secret(b"k" * 32, f"{secret}{n}")) for n, part in enumerate(parts)]
    return merge(np.sum(parts, axis=0), form, sites)


@pytest.mark.parametrize(("form", "near"), [(EXACT, 0.1), (Form(floor=10), 0.5)])
def test_the_sum_gives_the_intervals_of_the_pooled_predictions(form: Form, near: float) -> None:
    """Ends agree within a part of the interval's width; cells over a floor add their bounds to them."""
    labels, risks = _draw(np.random.default_rng(1), 3000)
    found = _merged(labels, risks, form)
    pooled = metrics.compare(labels, {"a": risks}, seed=5, resamples=1000).rows[0]
    least = dict.fromkeys(FIGURES, 0.0) | {"slope": -np.inf, "intercept": -np.inf}
    for name in FIGURES:
        ours, theirs = getattr(found, name), getattr(pooled, name)
        width = theirs.high - theirs.low
        bounds = (ours.value - ours.low, ours.high - ours.value) if form.floor > 1 else (0.0, 0.0)
        assert ours.least == pytest.approx(max(least[name], theirs.low - bounds[0]), abs=near * width), name
        assert ours.most == pytest.approx(theirs.high + bounds[1], abs=near * width), name
        assert ours.least <= ours.low <= ours.value <= ours.high <= ours.most, name


def test_few_bins_that_hold_all_risks_are_not_put_together() -> None:
    """Risks within a tenth of a log-odd: the interval still is that of single predictions."""
    rng = np.random.default_rng(2)
    z = rng.normal(size=2000)
    labels, risks = (rng.random(2000) < _expit(z - 1)).astype(int), _expit(0.02 * z - 1)
    ours, theirs = _merged(labels, risks, EXACT).auroc, metrics.compare(labels, {"a": risks}, seed=0).rows[0].auroc
    assert ours.low is not None
    assert ours.high is not None
    # Cells so wide against the risks leave the ranking open by their bounds.
    assert ours.least == pytest.approx(theirs.low - (ours.value - ours.low), abs=0.004)
    assert ours.most == pytest.approx(theirs.high + (ours.high - ours.value), abs=0.004)


@pytest.mark.parametrize("form", [EXACT, Form(bins=64, floor=1, noise=3.0)], ids=["exact", "noised"])
def test_errors_of_a_calibrated_model_reach_down_to_none(form: Form) -> None:
    """Binomial over 16 draws at 95 %: a right interval is found wrong once in 10,000 tests."""
    rng, none = np.random.default_rng(3), 0
    for repeat in range(16):
        found = _merged(*_draw(rng, 600, tilt=1), form, secret=f"{repeat}/").ece
        assert found.value is not None
        assert found.value > 0.005  # noise alone
        none += found.least == 0
    assert none >= binom.ppf(1e-4, 16, 0.95)


def test_noised_errors_are_bounded_by_what_noise_can_be_and_no_less() -> None:
    """The pooled error lies within the bounds, although noise makes the sum's own far too large; 5 % may miss."""
    form, rng, hits = Form(bins=64, floor=1, noise=6.0), np.random.default_rng(4), 0
    labels, risks = _draw(rng, 800, tilt=1)
    for repeat in range(16):
        found = _merged(labels, risks, form, secret=f"{repeat}/")
        pooled = _merged(labels, risks, Form(bins=64, floor=1)).ece.value
        assert found.ece.low is not None
        assert found.ece.high is not None
        assert pooled is not None
        hits += found.ece.low <= pooled <= found.ece.high
    assert hits >= binom.ppf(1e-4, 16, 0.95)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", [EXACT, Form(floor=10), Form(bins=64, floor=1, noise=3.0)], ids=["exact", "floor", "noised"]
)
def test_intervals_of_the_sum_cover_the_truth_as_often_as_they_say(form: Form) -> None:
    """300 federations of 600 predictions: a right interval is found wrong once in 10,000 tests (binomial)."""
    rng = np.random.default_rng(6)
    large = _merged(*_draw(rng, 400_000), EXACT)
    hits = dict.fromkeys(FIGURES, 0)
    for repeat in range(300):
        found = _merged(*_draw(rng, 600), form, secret=f"{repeat}/")
        for name in FIGURES:
            ours, truth = getattr(found, name), getattr(large, name).value
            if form.noise and name in BENT:
                assert ours.least is None
                hits[name] += 1
                continue
            hits[name] += ours.value is not None and ours.least <= truth <= ours.most
    print({name: count / 300 for name, count in hits.items()})
    for name, count in hits.items():
        assert count >= binom.ppf(1e-4, 300, 0.94), (name, count)
