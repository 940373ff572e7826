"""Claims about the sums that sites tell of their evaluations: figures of a sum are those of the pooled predictions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from federation.merged import Merged, ece_at, merge
from federation.tallies import SPAN, Form, noised, tally
from model import metrics
from model.private import Secret
from tokenizer.errors import ConfigError, DataError

EXACT = Form(floor=1)


def site(rng: np.random.Generator, size: int, share: float, spread: float, digits: int) -> list[NDArray]:
    """Labels, risks and patients of a site; few digits make many ties, a great spread risks of 0 and 1."""
    labels = (rng.random(size) < share).astype(int)
    labels[:2] = 0, 1
    risk = 1 / (1 + np.exp(-(rng.normal(-1.5, spread, size) + labels)))
    return [labels, np.round(risk, digits), rng.integers(0, max(2, size // 2), size)]


def pooled(sites: list[list[NDArray]]) -> list[NDArray]:
    return [np.concatenate(column) for column in zip(*sites, strict=True)]


def summed(sites: list[list[NDArray]], form: Form) -> NDArray:
    return np.sum([tally(*each, form) for each in sites], axis=0)


def check_bounds(found: Merged, labels: NDArray, risk: NDArray, form: Form) -> None:
    clipped = 1 / (1 + np.exp(-np.clip(np.log(np.maximum(risk, 1e-9) / np.maximum(1 - risk, 1e-9)), -SPAN, SPAN)))
    slope, intercept = metrics.recalibration(labels, clipped)
    truth = {
        "auroc": roc_auc_score(labels, risk),
        "auprc": average_precision_score(labels, risk),
        "brier": brier_score_loss(labels, risk),
        "ece": ece_at(labels, risk, form, found.cuts),
        "slope": slope,
        "intercept": intercept,
    }
    assert found.predictions == len(labels)
    assert found.positives == labels.sum()
    for name, value in truth.items():
        figure = getattr(found, name)
        if figure.value is None:
            assert name in ("slope", "intercept")
            continue
        # Slope and intercept: a bound of first order, which is checked where it is small.
        if name in ("slope", "intercept") and (np.isnan(value) or figure.high - figure.low > 0.5):
            continue
        assert figure.low - 1e-9 <= value <= figure.high + 1e-9, name
        assert figure.low <= figure.value <= figure.high


@given(
    st.integers(0, 2**32),
    st.lists(st.integers(20, 200), min_size=1, max_size=4),
    st.floats(0.05, 0.9),
    st.floats(0.01, 4.0),
    st.integers(1, 12),
    st.sampled_from([1, 2, 5]),
    st.sampled_from([64, 512, 4096]),
)
@settings(max_examples=60, deadline=None)
def test_every_pooled_figure_lies_within_the_bounds_of_the_sum(
    seed: int, sizes: list[int], share: float, spread: float, digits: int, floor: int, bins: int
) -> None:
    rng, form = np.random.default_rng(seed), Form(bins=bins, floor=floor)
    sites = [site(rng, size, share, spread, digits) for size in sizes]
    told = [each for each in sites if min(len(set(each[2][each[0] == label])) for label in (0, 1)) >= floor]
    found = merge(summed(sites, form), form, len(sites))
    if not told:
        assert found.predictions == 0
        assert found.auroc.value is None
        return
    labels, risk, _ = pooled(told)
    check_bounds(found, labels, risk, form)


@pytest.mark.parametrize("spread", [0.1, 0.4, 1.0, 2.5])
def test_the_default_bins_tell_the_auroc_to_within_two_thousandths(spread: float) -> None:
    rng = np.random.default_rng(5)
    sites = [site(rng, size, share, spread, 12) for size, share in ((3000, 0.1), (1500, 0.3), (400, 0.02))]
    labels, risk, _ = pooled(sites)
    found = merge(summed(sites, EXACT), EXACT)
    assert found.auroc.low is not None
    assert found.auroc.high is not None
    assert found.auroc.value is not None
    # The bound itself is that narrow: no arrangement inside of the bins could do worse.
    assert max(found.auroc.high - found.auroc.value, found.auroc.value - found.auroc.low) < 0.002
    assert abs(found.auroc.value - roc_auc_score(labels, risk)) < 0.0005
    assert abs((found.auprc.value or 0) - average_precision_score(labels, risk)) < 0.005


def test_too_few_bins_tell_too_little() -> None:
    """The negative control: the bound grows with the bins' width, and says so."""
    rng, form = np.random.default_rng(5), Form(bins=16, floor=1)
    sites = [site(rng, 3000, 0.1, 1.0, 12)]
    found = merge(summed(sites, form), form)
    assert found.auroc.high is not None
    assert found.auroc.low is not None
    assert found.auroc.high - found.auroc.low > 0.1


@given(st.integers(0, 2**32), st.integers(2, 12), st.integers(30, 300))
@settings(max_examples=40, deadline=None)
def test_no_cell_stands_for_fewer_patients_than_the_floor(seed: int, floor: int, size: int) -> None:
    labels, risk, owner = site(np.random.default_rng(seed), size, 0.3, 1.0, 3)
    form = Form(bins=256, floor=floor)
    cells = tally(labels, risk, owner, form)[: 2 * 3 * 256].reshape(2, 3, 256)
    for label, parts in enumerate(cells):
        mine = labels == label
        assert parts.sum() in (0, 3 * mine.sum())
        lows, highs = (np.flatnonzero(part) for part in parts[:2])
        assert len(lows) == len(highs)
        bins = form.bin_of(risk[mine])
        for low, high in zip(lows, highs, strict=True):
            assert len(set(owner[mine][(bins >= low) & (bins <= high)])) >= floor


def test_a_site_with_too_few_patients_of_a_label_tells_nothing() -> None:
    labels, risk, owner = np.array([0] * 50 + [1] * 9), np.linspace(0.01, 0.9, 59), np.arange(59)
    assert not tally(labels, risk, owner, Form(floor=10)).any()
    assert tally(labels, risk, owner, Form(floor=9)).any()
    assert not tally(labels, risk, np.where(labels == 1, 99, owner), Form(floor=9)).any()  # nine of one patient


def test_noise_follows_from_the_secret_and_has_the_stated_size() -> None:
    form = Form(bins=128, floor=1, noise=4.0, most_per_patient=2)
    told = np.zeros(form.size)
    first, again = (noised(told, form, Secret(b"k" * 32, "here")) for _ in range(2))
    assert (first == again).all()
    assert (noised(told, form, Secret(b"k" * 32, "there")) != first).any()
    assert (first == first.round()).all()
    # 256 draws: the variance is within 40 % of its law in all but 1 of 100,000 cases (chi-squared).
    assert 0.6 < first.var() / form.variance < 1.4


def test_one_patient_changes_a_noised_tally_by_no_more_than_was_agreed() -> None:
    rng, form = np.random.default_rng(3), Form(bins=64, floor=1, noise=1.0, most_per_patient=3)
    labels, risk, owner = site(rng, 300, 0.3, 1.0, 6)
    whole = tally(labels, risk, owner, form)
    for patient in np.unique(owner):
        rest = owner != patient
        assert np.linalg.norm(whole - tally(labels[rest], risk[rest], owner[rest], form)) <= 3


def test_intervals_with_noise_hold_the_pooled_figure() -> None:
    """16 tallies: an interval of two deviations misses about one in twenty, five or more once in 1,000 such tests."""
    form, rng = Form(bins=128, floor=1, noise=3.0), np.random.default_rng(8)
    labels = (rng.random(2000) < 0.3).astype(int)
    risk = 1 / (1 + np.exp(-(rng.normal(-1, 1, 2000) + labels)))
    told, truth = tally(labels, risk, np.arange(2000), form), roc_auc_score(labels, risk)
    missed = 0
    for number in range(16):
        found = merge(noised(told, form, Secret(b"k" * 32, str(number))), form).auroc
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= truth <= found.high
    assert missed < 5


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="every cell has noise"):
        Form(bins=4096, floor=1, noise=1.0)
    with pytest.raises(ConfigError, match="floor must be 1"):
        Form(bins=64, floor=5, noise=1.0)
    with pytest.raises(DataError, match="censored"):
        tally([0, -1], [0.1, 0.2], [1, 2], EXACT)
    with pytest.raises(DataError, match="finite numbers"):
        merge(np.zeros(3), EXACT)
