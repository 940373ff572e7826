"""How good risks are: ranking, precision, calibration, and how sure that is.

Everything runs over weights, so that one code serves the estimate and its bootstrap: a resample of the patients is a
row of counts. All arms of a comparison see the same resamples, which makes their differences paired. Patients are
drawn, not predictions: one who is asked about five times comes in or stays out five-fold.

Sources: AUROC as the Mann-Whitney statistic with ties one half (Hanley and McNeil 1982); average precision as the
step-wise sum over thresholds, without interpolation; percentile bootstrap (Efron and Tibshirani 1993, ch. 13);
interval of a share by Wilson (1927).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenizer.errors import DataError

Floats: TypeAlias = NDArray[np.float64]

BINS = 10
_CHUNK = 4_000_000
_ONE_CLASS = "all labels are {}: not defined"
_EMPTY = "no predictions"
# Log-odds of 0 and 1 are infinite; risks from trajectories can be either.
_LEAST_RISK = 1e-6
_NEWTON_STEPS = 100


@dataclass(frozen=True)
class Measure:
    """A figure with its 95 % interval; nan with a reason in `note` where it isn't defined."""

    value: float
    low: float
    high: float
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One arm of a comparison; `difference` is its AUROC minus the reference arm's, paired, None for that arm."""

    arm: str
    auroc: Measure
    auprc: Measure
    brier: Measure
    ece: Measure
    difference: Measure | None


@dataclass(frozen=True)
class Comparison:
    """Arms on the same predictions."""

    rows: tuple[Row, ...]
    reference: str
    patients: int
    predictions: int
    positives: int
    resamples: int


@dataclass(frozen=True)
class Curve:
    """Points of a curve, x ascending."""

    x: Floats
    y: Floats


@dataclass(frozen=True)
class Calibration:
    """Predicted against observed in bins of like size; `low` and `high` are Wilson limits of `observed` (95 %)."""

    predicted: Floats
    observed: Floats
    low: Floats
    high: Floats
    count: NDArray[np.int64]


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Chance that a positive scores above a negative, ties one half; nan if a class is missing.

    >>> auroc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
    0.75
    """
    return _plain(_auroc, labels, scores)


def auprc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Average precision; nan without positives."""
    return _plain(_auprc, labels, scores)


def brier(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean squared difference between risk and label."""
    return _plain(_brier, labels, scores)


def ece(labels: ArrayLike, scores: ArrayLike) -> float:
    """Expected calibration error: mean |observed - predicted| over `BINS` bins of about equal size."""
    return _plain(_ece, labels, scores)


def recalibration(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """Slope and intercept of the logistic regression of labels on the log-odds of risks.

    A slope of 1 and an intercept of 0 are perfect; a slope below 1 says that risks are too extreme. Risks are clipped
    to [1e-6, 1 - 1e-6]; nan where a class is missing, or where risks separate the classes or don't differ.

    Source: Cox, "Two further applications of a model for binary regression", Biometrika 45 (1958); Van Calster et al.,
    "Calibration: the Achilles heel of predictive analytics", BMC Medicine 17 (2019), weak calibration.

    >>> slope, intercept = recalibration([0, 0, 0, 1, 0, 1, 1, 1], [0.25] * 4 + [0.75] * 4)
    >>> round(slope, 6), round(abs(intercept), 6)
    (1.0, 0.0)
    """
    truth = _labels(labels)
    risk = np.clip(_scores("scores", scores, len(truth)), _LEAST_RISK, 1 - _LEAST_RISK)
    return fit_logistic(np.log(risk / (1 - risk)), truth, np.ones_like(truth)) or (float("nan"), float("nan"))


def fit_logistic(log_odds: Floats, truth: Floats, weights: Floats) -> tuple[float, float] | None:
    """Fit slope and intercept of the logistic regression of 0 and 1 on one variable, float64 [n] each, by Newton.

    None where a class has no weight, the variable doesn't differ, or separates the classes.
    """
    used = weights > 0
    log_odds, truth, weights = log_odds[used], truth[used], weights[used]
    if not 0 < truth.sum() < len(truth) or np.ptp(log_odds) == 0:
        return None
    design = np.stack([log_odds, np.ones_like(log_odds)], axis=1)
    found = np.zeros(2)
    for _ in range(_NEWTON_STEPS):
        fitted = 1 / (1 + np.exp(-np.clip(design @ found, -30, 30)))
        curvature = design.T @ (design * (weights * fitted * (1 - fitted))[:, None])
        if np.trace(curvature) ** 2 > 1e12 * max(np.linalg.det(curvature), 0.0):  # as if singular
            return None
        step = np.linalg.solve(curvature, design.T @ (weights * (truth - fitted)))
        found += step * min(1.0, 5.0 / max(np.abs(step).max(), 1e-12))
        if np.abs(step).max() < 1e-10:
            return float(found[0]), float(found[1])
    return None


def weighted_auroc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> float:
    """AUROC where predictions count by weights, float64 [n]; nan if a class is missing."""
    truth, values = checked(labels, scores)
    return float(_auroc(_Points(truth, values), np.asarray(weights, np.float64)[None])[0])


def mae(truth: ArrayLike, told: ArrayLike) -> float:
    """Mean absolute error of counts, times or values, in their unit; nan of nothing."""
    off = np.abs(np.asarray(truth, np.float64) - np.asarray(told, np.float64))
    return float(off.mean()) if len(off) else float("nan")


def rmsle(truth: ArrayLike, told: ArrayLike) -> float:
    """Root mean squared error of log(1 + x): for what is 0 or more and spans magnitudes; nan of nothing."""
    off = np.log1p(np.asarray(truth, np.float64)) - np.log1p(np.asarray(told, np.float64))
    return float(np.sqrt((off**2).mean())) if len(off) else float("nan")


def interval(value: float, drawn: Floats) -> Measure:
    """Give a figure its 95 % percentile interval over resamples [R], of which some may be undefined (nan)."""
    nan = float("nan")
    defined = drawn[~np.isnan(drawn)]
    if np.isnan(value):
        return Measure(nan, nan, nan, "not defined: too few patients, or only one answer")
    if not len(defined):
        return Measure(value, nan, nan, "no resample in which it is defined")
    low, high = np.percentile(defined, [2.5, 97.5])
    note = "" if len(defined) == len(drawn) else f"defined in {len(defined)} of {len(drawn)} resamples"
    return Measure(value, float(low), float(high), note)


def checked(labels: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    """Give labels and scores as float64 [n].

    Raises:
        DataError: labels other than 0 and 1, lengths that differ, scores that aren't finite.
    """
    truth = _labels(labels)
    return truth, _scores("scores", scores, len(truth))


def compare(
    labels: ArrayLike,
    arms: Mapping[str, ArrayLike],
    *,
    seed: int,
    resamples: int = 2000,
    reference: str | None = None,
    subjects: ArrayLike | None = None,
) -> Comparison:
    """Measure arms on the same predictions, with 95 % intervals over patients and paired differences.

    Args:
        labels: 0 or 1, [n].
        arms: risks [n] by the arm's name.
        seed: of the bootstrap.
        resamples: how often patients are drawn with replacement.
        reference: the arm that others are compared with; the first if None.
        subjects: whose prediction each is, [n]; every prediction its own patient if None.

    Raises:
        DataError: labels other than 0 and 1, lengths that differ, risks that aren't finite, an unknown reference.
    """
    truth = _labels(labels)
    scores = {arm: _scores(arm, values, len(truth)) for arm, values in arms.items()}
    if not scores:
        raise DataError("nothing to compare: no arm is given")
    against = next(iter(scores)) if reference is None else reference
    if against not in scores:
        raise DataError(f"the reference arm {against!r} is not among {', '.join(scores)}")
    owner = np.arange(len(truth)) if subjects is None else np.unique(np.asarray(subjects), return_inverse=True)[1]
    if len(owner) != len(truth):
        raise DataError(f"{len(truth)} labels but {len(owner)} subjects")
    owner = owner.reshape(-1)
    patients = int(owner.max(initial=-1)) + 1
    points = {arm: _Points(truth, values) for arm, values in scores.items()}
    drawn: dict[str, dict[str, Floats]] = {arm: {name: np.empty(resamples) for name in _MEASURES} for arm in scores}
    rng = np.random.default_rng(seed)
    chance = np.full(max(patients, 1), 1 / max(patients, 1))
    chunk = max(1, _CHUNK // max(len(truth), 1))
    for start in range(0, resamples, chunk):
        rows = slice(start, min(start + chunk, resamples))
        size = rows.stop - rows.start
        weights = rng.multinomial(patients, chance, size=size)[:, owner]
        for arm, point in points.items():
            for name, measure in _MEASURES.items():
                drawn[arm][name][rows] = measure(point, weights.astype(np.float64))
    table = []
    for arm, point in points.items():
        values = {name: float(measure(point, np.ones((1, len(truth))))[0]) for name, measure in _MEASURES.items()}
        measures = {name: _measure(truth, name, values[name], drawn[arm][name]) for name in _MEASURES}
        difference = None
        if arm != against:
            gap = values["auroc"] - auroc(truth, scores[against])
            difference = _measure(truth, "auroc", gap, drawn[arm]["auroc"] - drawn[against]["auroc"])
        table.append(Row(arm=arm, difference=difference, **measures))
    return Comparison(tuple(table), against, patients, len(truth), int(truth.sum()), resamples)


def by_weight(labels: ArrayLike, scores: ArrayLike) -> dict[str, Callable[[Floats], Floats]]:
    """Give `auroc`, `auprc`, `brier` and `ece` of the same rows as functions of their weights: [B, n] to [B].

    A resample is a row of counts, a group of patients one with zeros for everybody else; bins of `ece` are those of all
    rows. nan where a figure isn't defined.
    """
    truth = _labels(labels)
    point = _Points(truth, _scores("the risks", scores, len(truth)))
    return {name: partial(measure, point) for name, measure in _MEASURES.items()}


def roc(labels: ArrayLike, scores: ArrayLike) -> Curve:
    """Return the ROC curve: false against true positive rate; empty if a class is missing."""
    truth = _labels(labels)
    point = _Points(truth, _scores("scores", scores, len(truth)))
    positive, negative = point.by_score(np.ones((1, len(truth))))
    if not positive.sum() or not negative.sum():
        return Curve(np.zeros(0), np.zeros(0))
    # Highest scores first.
    true, false = (np.concatenate([[0.0], np.cumsum(side[0, ::-1])]) for side in (positive, negative))
    return Curve(false / false[-1], true / true[-1])


def calibration(labels: ArrayLike, scores: ArrayLike, bins: int = BINS) -> Calibration:
    """Return mean risk and observed share in bins of about equal size; equal risks stay in one bin."""
    truth = _labels(labels)
    values = _scores("scores", scores, len(truth))
    bin_of = _bins(values, bins)
    count = np.bincount(bin_of, minlength=bins)
    used = count > 0
    count = count[used]
    predicted = np.bincount(bin_of, values, bins)[used] / count
    observed = np.bincount(bin_of, truth, bins)[used] / count
    low, high = _wilson(observed, count)
    return Calibration(predicted, observed, low, high, count.astype(np.int64))


class _Points:
    """Labels and scores of one arm, sorted once for all resamples."""

    def __init__(self, labels: Floats, scores: Floats) -> None:
        self.labels = labels
        self.scores = scores
        self._order = np.argsort(scores, kind="stable")
        ranked = scores[self._order]
        self._starts = np.concatenate([[0], np.nonzero(np.diff(ranked))[0] + 1]) if len(scores) else np.zeros(0, int)
        self._positive = labels[self._order]
        bin_of = _bins(scores, BINS)
        self.member = (bin_of[:, None] == np.arange(BINS)).astype(np.float64)

    def by_score(self, weights: Floats) -> tuple[Floats, Floats]:
        """Sum the weights of positives and of negatives at each distinct score: [B, n] to two of [B, G]."""
        if not len(self.scores):
            return np.zeros((len(weights), 0)), np.zeros((len(weights), 0))
        ranked = weights[:, self._order]
        positive = np.add.reduceat(ranked * self._positive, self._starts, axis=1)
        return positive, np.add.reduceat(ranked, self._starts, axis=1) - positive


def _auroc(point: _Points, weights: Floats) -> Floats:
    positive, negative = point.by_score(weights)
    below = np.cumsum(negative, axis=1) - 0.5 * negative
    return _ratio((positive * below).sum(1), positive.sum(1) * negative.sum(1))


def _auprc(point: _Points, weights: Floats) -> Floats:
    positive, negative = point.by_score(weights)
    hits = np.cumsum(positive[:, ::-1], axis=1)
    called = hits + np.cumsum(negative[:, ::-1], axis=1)
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    return _ratio((precision * positive[:, ::-1]).sum(1), positive.sum(1))


def _brier(point: _Points, weights: Floats) -> Floats:
    return _ratio(weights @ (point.scores - point.labels) ** 2, weights.sum(1))


def _ece(point: _Points, weights: Floats) -> Floats:
    gap = (weights * (point.labels - point.scores)) @ point.member
    return _ratio(np.abs(gap).sum(1), weights.sum(1))


_MEASURES: dict[str, Callable[[_Points, Floats], Floats]] = {
    "auroc": _auroc,
    "auprc": _auprc,
    "brier": _brier,
    "ece": _ece,
}


def _measure(truth: Floats, name: str, value: float, drawn: Floats) -> Measure:
    nan = float("nan")
    if not len(truth):
        return Measure(nan, nan, nan, _EMPTY)
    if np.isnan(value):
        return Measure(nan, nan, nan, _ONE_CLASS.format(int(truth[0])))
    defined = drawn[~np.isnan(drawn)]
    if not len(defined):
        return Measure(value, nan, nan, "no resample in which it is defined")
    low, high = np.percentile(defined, [2.5, 97.5])
    note = "" if len(defined) == len(drawn) else f"{name} is defined in {len(defined)} of {len(drawn)} resamples"
    return Measure(value, float(low), float(high), note)


def _plain(measure: Callable[[_Points, Floats], Floats], labels: ArrayLike, scores: ArrayLike) -> float:
    truth = _labels(labels)
    return float(measure(_Points(truth, _scores("scores", scores, len(truth))), np.ones((1, len(truth))))[0])


def _labels(labels: ArrayLike) -> Floats:
    truth = np.asarray(labels, np.float64)
    if truth.ndim != 1 or not np.isin(truth, (0.0, 1.0)).all():
        raise DataError("labels must be a row of 0 and 1; leave censored predictions out before measuring")
    return truth


def _scores(arm: str, scores: ArrayLike, expected: int) -> Floats:
    values = np.asarray(scores, np.float64)
    if values.shape != (expected,):
        raise DataError(f"{arm}: {values.shape} risks for {expected} labels; every arm must answer every prediction")
    if not np.isfinite(values).all():
        raise DataError(f"{arm}: risk {int(np.nonzero(~np.isfinite(values))[0][0])} is not a finite number")
    return values


def _bins(scores: Floats, bins: int) -> NDArray[np.int64]:
    """Bin of each score, by its quantile; equal scores share a bin."""
    if not len(scores):
        return np.zeros(0, np.int64)
    ranked = np.sort(scores)
    middle = (np.searchsorted(ranked, scores, "left") + np.searchsorted(ranked, scores, "right")) / 2
    return np.minimum((middle * bins / len(scores)).astype(np.int64), bins - 1)


def _wilson(share: Floats, count: NDArray[np.int64]) -> tuple[Floats, Floats]:
    z = 1.959963984540054
    centre = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    scale = 1 + z * z / count
    # Exact at shares of 0 and 1, where rounding would put the limit past the share.
    return np.clip((centre - half) / scale, 0, share), np.clip((centre + half) / scale, share, 1)


def _ratio(top: Floats, bottom: Floats) -> Floats:
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom > 0)
