import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as reference

from model.metrics import auprc, auroc, brier, calibration, compare, ece, recalibration, roc
from tokenizer.errors import DataError


@st.composite
def labelled_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    size = draw(st.integers(2, 60))
    labels = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(lambda row: len(set(row)) == 2))
    # Few distinct scores, as shares of a few trajectories have: many ties.
    scores = draw(st.lists(st.integers(0, 8), min_size=size, max_size=size))
    return np.array(labels, float), np.array(scores) / 8


@given(labelled_scores())
def test_figures_agree_with_scikit_learn(data: tuple[np.ndarray, np.ndarray]):
    labels, scores = data
    assert auroc(labels, scores) == pytest.approx(reference.roc_auc_score(labels, scores))
    assert auprc(labels, scores) == pytest.approx(reference.average_precision_score(labels, scores))
    assert brier(labels, scores) == pytest.approx(reference.brier_score_loss(labels, scores))


@given(labelled_scores())
def test_the_roc_curve_agrees_with_scikit_learn(data: tuple[np.ndarray, np.ndarray]):
    labels, scores = data
    curve = roc(labels, scores)
    false, true, _ = reference.roc_curve(labels, scores, drop_intermediate=False)
    assert curve.x == pytest.approx(false)
    assert curve.y == pytest.approx(true)


@given(labelled_scores())
def test_weights_of_a_resample_act_as_repeated_rows(data: tuple[np.ndarray, np.ndarray]):
    labels, scores = data
    from model.metrics import _MEASURES, Points

    counts = np.random.default_rng(len(labels)).integers(0, 4, len(labels))
    repeated = np.repeat(labels, counts), np.repeat(scores, counts)
    for name, slow in (("auroc", auroc), ("auprc", auprc), ("brier", brier)):
        fast = _MEASURES[name](Points(labels, scores), counts[None].astype(float))[0]
        assert fast == pytest.approx(slow(*repeated), nan_ok=True)


def test_ece_is_zero_for_true_risks_in_the_long_run_and_large_for_wrong_ones():
    rng = np.random.default_rng(0)
    risks = rng.random(200_000)
    labels = rng.random(200_000) < risks
    assert ece(labels, risks) < 0.005
    assert ece(labels, risks / 2) == pytest.approx(0.25, abs=0.005)


def test_calibration_bins_hold_about_equal_counts_and_keep_equal_risks_together():
    risks = np.concatenate([np.zeros(500), np.linspace(0.1, 1, 500)])
    bins = calibration(np.zeros(1000), risks)
    assert bins.count[0] == 500
    assert bins.count.sum() == 1000
    assert bins.count[1:].max() <= 101
    assert (np.diff(bins.predicted) > 0).all()
    assert (bins.low <= bins.observed).all()
    assert (bins.high > bins.observed).all()


def _two_arms(rng: np.random.Generator, patients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    labels = rng.random(patients) < 0.3
    good = labels + rng.normal(size=patients)
    return labels, good, good + 1.5 * rng.normal(size=patients)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    labels, good, _ = _two_arms(rng, 400_000)
    truth = auroc(labels, good)
    covered = 0
    for repeat in range(200):
        labels, good, _ = _two_arms(rng, 150)
        measure = compare(labels, {"a": good}, seed=repeat, resamples=300).rows[0].auroc
        covered += measure.low <= truth <= measure.high
    assert 0.89 <= covered / 200 <= 0.99


def test_patients_are_drawn_whole():
    rng = np.random.default_rng(1)
    labels, good, _ = _two_arms(rng, 200)
    one_each = compare(labels, {"a": good}, seed=0, resamples=500).rows[0].auroc
    ten_each = (
        compare(
            np.repeat(labels, 10),
            {"a": np.repeat(good, 10)},
            seed=0,
            resamples=500,
            subjects=np.repeat(np.arange(200), 10),
        )
        .rows[0]
        .auroc
    )
    assert ten_each.low == pytest.approx(one_each.low)
    assert ten_each.high == pytest.approx(one_each.high)
    # Taken for different patients, copies would feign certainty.
    naive = compare(np.repeat(labels, 10), {"a": np.repeat(good, 10)}, seed=0, resamples=500).rows[0].auroc
    assert naive.high - naive.low < 0.5 * (one_each.high - one_each.low)


def test_differences_are_paired():
    rng = np.random.default_rng(2)
    labels, good, _ = _two_arms(rng, 300)
    nearly = good + 0.05 * rng.normal(size=300)
    rows = compare(labels, {"a": good, "b": nearly}, seed=0, resamples=500).rows
    assert rows[0].difference is rows[0].auprc_difference is None
    for gap, one, other in (
        (rows[1].difference, rows[0].auroc, rows[1].auroc),
        (rows[1].auprc_difference, rows[0].auprc, rows[1].auprc),
    ):
        assert gap is not None
        assert gap.value == pytest.approx(other.value - one.value)
        assert gap.low <= gap.value <= gap.high
        # Unpaired, the interval would be as wide as either arm's.
        assert gap.high - gap.low < 0.3 * (one.high - one.low)


def test_the_reference_arm_and_the_counts_are_told():
    rng = np.random.default_rng(3)
    labels, good, worse = _two_arms(rng, 300)
    subjects = np.arange(300) // 2
    table = compare(labels, {"a": good, "b": worse}, seed=0, resamples=100, reference="b", subjects=subjects)
    assert (table.reference, table.patients, table.predictions, table.resamples) == ("b", 150, 300, 100)
    assert table.positives == labels.sum()
    assert table.rows[0].difference is not None
    assert table.rows[0].difference.value > 0
    assert table == compare(labels, {"a": good, "b": worse}, seed=0, resamples=100, reference="b", subjects=subjects)


def test_one_class_gives_no_ranking_but_a_reason():
    row = compare(np.zeros(20), {"a": np.linspace(0, 1, 20)}, seed=0, resamples=100).rows[0]
    assert np.isnan(row.auroc.value)
    assert row.auroc.note == "all labels are 0: not defined"
    assert row.brier.value == pytest.approx(np.mean(np.linspace(0, 1, 20) ** 2))
    assert len(roc(np.zeros(20), np.linspace(0, 1, 20)).x) == 0


def test_resamples_without_a_positive_are_left_out_and_counted():
    labels = np.zeros(30)
    labels[0] = 1
    measure = compare(labels, {"a": np.linspace(1, 0, 30)}, seed=0, resamples=400).rows[0].auroc
    assert measure.value == 1.0
    assert "resamples" in measure.note


def test_nothing_to_measure_is_said():
    row = compare([], {"a": []}, seed=0, resamples=100).rows[0]
    assert row.auroc.note == row.brier.note == "no predictions"


@pytest.mark.parametrize(
    ("labels", "arms", "message"),
    [
        ([0, 1, -1], {"a": [0.1, 0.2, 0.3]}, "labels must be a row of 0 and 1"),
        ([0, 1], {"a": [0.1]}, "a: .* risks for 2 labels"),
        ([0, 1], {"a": [0.1, np.nan]}, "a: risk 1 is not a finite number"),
        ([0, 1], {}, "no arm"),
    ],
)
def test_wrong_input_is_named(labels: list[int], arms: dict[str, list[float]], message: str):
    with pytest.raises(DataError, match=message):
        compare(labels, arms, seed=0, resamples=100)


def test_an_unknown_reference_is_named():
    with pytest.raises(DataError, match="reference arm 'z' is not among a"):
        compare([0, 1], {"a": [0.1, 0.2]}, seed=0, resamples=100, reference="z")


def test_the_recalibration_slope_tells_how_far_log_odds_are_stretched():
    """Against the truth that made the labels; each estimate lies within 4 standard errors (about 0.012)."""
    rng = np.random.default_rng(0)
    odds = rng.normal(-1, 1.5, 40_000)
    labels = (rng.random(len(odds)) < 1 / (1 + np.exp(-odds))).astype(int)
    for stretch, shift in ((1.0, 0.0), (2.0, 0.0), (0.5, 1.0)):
        slope, intercept = recalibration(labels, 1 / (1 + np.exp(-(stretch * odds + shift))))
        assert slope == pytest.approx(1 / stretch, abs=0.05 / stretch)
        assert intercept == pytest.approx(-shift / stretch, abs=0.1)


def test_no_recalibration_where_there_is_none():
    for labels, scores in (([1, 1], [0.2, 0.4]), ([0, 1], [0.3, 0.3]), ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9])):
        assert np.isnan(recalibration(labels, scores)).all()
    slope, _ = recalibration([0, 1, 0, 1, 1, 0], [0.0, 1.0, 0.3, 0.4, 0.0, 1.0])
    assert np.isfinite(slope)
