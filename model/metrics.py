"""How good risks are: ranking, precision, calibration, and how sure that is.

Everything runs over weights, so that one code serves the estimate and its bootstrap: a resample of the patients is a
row of counts. All arms of a comparison see the same resamples, which makes their differences paired. Patients are
drawn, not predictions: one who is asked about five times comes in or stays out five-fold.

Sources: AUROC as the Mann-Whitney statistic with ties one half (Hanley and McNeil 1982); average precision as the
step-wise sum over thresholds, without interpolation; percentile bootstrap (Efron and Tibshirani 1993, ch. 13), but for
calibration errors (`of_gaps`); interval of a share by Wilson (1927).
"""

from collections.abc import Callable, Iterator, Mapping
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
_NAN = float("nan")


@dataclass(frozen=True)
class Measure:
    """A figure with its 95 % interval; nan with a reason in `note` where it isn't defined."""

    value: float
    low: float
    high: float
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One arm of a comparison; its AUROC and AUPRC minus the reference arm's are paired, and None for that arm."""

    arm: str
    auroc: Measure
    auprc: Measure
    brier: Measure
    ece: Measure
    difference: Measure | None
    auprc_difference: Measure | None
    slope: Measure | None = None
    intercept: Measure | None = None


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
    log_odds = _log_odds(_scores("scores", scores, len(truth)))
    return fit_logistic(log_odds, truth, np.ones_like(truth)) or (float("nan"), float("nan"))


def fit_logistic(log_odds: Floats, truth: Floats, weights: Floats) -> tuple[float, float] | None:
    """Fit slope and intercept of the logistic regression of 0 and 1 on one variable, float64 [n] each, by Newton.

    None where a class has no weight, the variable doesn't differ, or separates the classes.
    """
    slope, intercept = recalibrations(log_odds, truth, weights[None])
    return None if np.isnan(slope[0]) else (float(slope[0]), float(intercept[0]))


def recalibrations(
    log_odds: Floats, truth: Floats, weights: Floats, *, near: bool | Floats = False
) -> tuple[Floats, Floats]:
    """Fit the logistic regression of `recalibration` for many rows of weights at once.

    Args:
        log_odds: float64 [n].
        truth: float64 [n], labels or true risks, in [0, 1].
        weights: float64 [B, n], 0 or more.
        near: begin at the fit of these weights, float64 [n], or of equal ones, which resamples are near; else at 0.

    Returns:
        Slopes and intercepts, float64 [B]; nan where there is none (see `fit_logistic`).
    """
    found = np.zeros((2, len(weights)))
    if near is not False:
        start = np.ones(len(truth)) if near is True else near
        found += np.nan_to_num(np.array(recalibrations(log_odds, truth, start[None])))
    yes, total = weights @ truth, weights.sum(axis=1)
    used = weights > 0
    spread = np.where(used, log_odds, -np.inf).max(1, initial=-np.inf) - np.where(used, log_odds, np.inf).min(
        1, initial=np.inf
    )
    open_ = np.flatnonzero((yes > 0) & (yes < total) & (spread > 0))
    done = np.zeros(len(weights), bool)
    for _ in range(_NEWTON_STEPS):
        if not len(open_):
            break
        mine = weights[open_] if len(open_) < len(weights) else weights
        fitted = 1 / (1 + np.exp(-np.clip(found[0, open_, None] * log_odds + found[1, open_, None], -30, 30)))
        gap = mine * (truth - fitted)
        fitted *= 1 - fitted
        fitted *= mine
        first, middle, last = fitted @ log_odds**2, fitted @ log_odds, fitted.sum(axis=1)
        volume = first * last - middle**2
        regular = (first + last) ** 2 <= 1e12 * np.maximum(volume, 0.0)  # else as if singular
        safe = np.where(regular, volume, 1.0)
        pull, push = gap @ log_odds, gap.sum(axis=1)
        step = np.stack([last * pull - middle * push, first * push - middle * pull]) / safe
        length = np.abs(step).max(axis=0)
        found[:, open_] += np.where(regular, step * np.minimum(1.0, 5.0 / np.maximum(length, 1e-12)), 0.0)
        ended = regular & (length < 1e-10)
        done[open_[ended]] = True
        open_ = open_[regular & ~ended]
    return np.where(done, found[0], np.nan), np.where(done, found[1], np.nan)


def _log_odds(risks: Floats) -> Floats:
    risk = np.clip(risks, _LEAST_RISK, 1 - _LEAST_RISK)
    return np.log(risk / (1 - risk))


def weighted_auroc(labels: ArrayLike, scores: ArrayLike, weights: ArrayLike) -> float:
    """AUROC where predictions count by weights, float64 [n]; nan if a class is missing."""
    truth, values = checked(labels, scores)
    return float(_auroc(Points(truth, values), np.asarray(weights, np.float64)[None])[0])


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
    calibrated: bool = True,
) -> Comparison:
    """Measure arms on the same predictions, with 95 % intervals over patients and paired differences.

    Args:
        labels: 0 or 1, [n].
        arms: risks [n] by the arm's name.
        seed: of the bootstrap.
        resamples: how often patients are drawn with replacement.
        reference: the arm that others are compared with; the first if None.
        subjects: whose prediction each is, [n]; every prediction its own patient if None.
        calibrated: whether slopes and intercepts are fitted, which takes most of the time.

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
    owner = owners(subjects, len(truth))
    patients = int(owner.max(initial=-1)) + 1
    points = {arm: Points(truth, values) for arm, values in scores.items()}
    once = np.ones((1, len(truth)))
    compared = {name: float(_MEASURES[name](points[against], once)[0]) for name in ("auroc", "auprc")}
    wanted = (*_MEASURES, "slope", "intercept")
    drawn: dict[str, dict[str, Floats]] = {arm: {name: np.empty(resamples) for name in wanted} for arm in scores}
    gaps = {arm: np.empty((resamples, BINS)) for arm in scores}
    for rows, weights in resampled(owner, seed, resamples):
        for arm, point in points.items():
            for name, measure in _MEASURES.items():
                drawn[arm][name][rows] = measure(point, weights)
            gaps[arm][rows] = _gaps(point, weights)
            if calibrated:
                drawn[arm]["slope"][rows], drawn[arm]["intercept"][rows] = _recalibrated(point, weights, near=True)
    table = []
    for arm, point in points.items():
        values = {name: float(measure(point, once)[0]) for name, measure in _MEASURES.items()}
        measures = {name: _measure(truth, name, value, drawn[arm][name]) for name, value in values.items()}
        if calibrated:
            fitted = zip(("slope", "intercept"), _recalibrated(point, once), strict=True)
            measures |= {name: interval(float(value[0]), drawn[arm][name]) for name, value in fitted}
        measures["ece"] = of_gaps(_gaps(point, once)[0], gaps[arm]) if len(truth) else Measure(_NAN, _NAN, _NAN, _EMPTY)
        gaps_to = [
            _measure(truth, name, values[name] - base, drawn[arm][name] - drawn[against][name])
            for name, base in compared.items()
        ]
        difference, auprc_difference = gaps_to if arm != against else (None, None)
        table.append(Row(arm=arm, difference=difference, auprc_difference=auprc_difference, **measures))
    return Comparison(tuple(table), against, patients, len(truth), int(truth.sum()), resamples)


def owners(subjects: ArrayLike | None, size: int) -> NDArray[np.int64]:
    """Number the patients of predictions from 0: int64 [n]; without subjects every prediction is its own patient.

    Raises:
        DataError: lengths differ.
    """
    owner = np.arange(size) if subjects is None else np.unique(np.asarray(subjects), return_inverse=True)[1]
    if len(owner) != size:
        raise DataError(f"{size} labels but {len(owner)} subjects")
    return owner.reshape(-1)


def resampled(owner: NDArray[np.int64], seed: int, resamples: int) -> Iterator[tuple[slice, Floats]]:
    """Draw patients with replacement: places among the resamples, and how often each prediction counts, [B, n]."""
    patients = int(owner.max(initial=-1)) + 1
    rng = np.random.default_rng(seed)
    chance = np.full(max(patients, 1), 1 / max(patients, 1))
    chunk = max(1, _CHUNK // max(len(owner), 1))
    for start in range(0, resamples, chunk):
        rows = slice(start, min(start + chunk, resamples))
        counts = rng.multinomial(patients, chance, size=rows.stop - rows.start)
        yield rows, counts[:, owner].astype(np.float64)


def of_gaps(seen: Floats, drawn: Floats) -> Measure:
    """The expected calibration error with a 95 % interval, from `gaps` [BINS] and those of resamples [R, BINS].

    Sizes of noisy gaps are too large, and those of resamples more so: percentiles leave out the truth, always for a
    calibrated model. So the interval holds every error under which the one that was seen is no surprise: gaps of the
    observed shape at that size, with the noise of the resamples, fall on either side of it more than 1 time in 40. The
    estimate itself always lies inside.

    Source: inversion of a test (Efron and Tibshirani 1993, ch. 12.3); the bias is that of Roelofs et al., "Mitigating
    bias in calibration error estimation", AISTATS 2022.
    """
    total = float(np.abs(seen).sum())
    noise = drawn[~np.isnan(drawn).any(axis=1)] - seen
    if np.isnan(total) or not len(noise):
        return Measure(total, _NAN, _NAN, "no resample in which it is defined")
    shape = seen / total if total > 0 else np.full(len(seen), 1 / len(seen))

    def crossing(share: float, low: float, high: float) -> float:
        """The error at which this share of the draws is no larger than what was seen."""
        for _ in range(30):
            middle = (low + high) / 2
            below = np.quantile(np.abs(shape * middle + noise).sum(axis=1), share) <= total
            low, high = (middle, high) if below else (low, middle)
        return (low + high) / 2

    largest = total + float(np.abs(noise).sum(axis=1).max())
    calm = np.quantile(np.abs(noise).sum(axis=1), 0.975) >= total
    return Measure(total, 0.0 if calm else crossing(0.975, 0.0, total), max(total, crossing(0.025, 0.0, largest)))


def by_weight(labels: ArrayLike, scores: ArrayLike) -> dict[str, Callable[[Floats], Floats]]:
    """Give `auroc`, `auprc` and `brier` of the same rows as functions of their weights, [B, n] to [B], and `gaps`.

    A resample is a row of counts, a group of patients one with zeros for everybody else. `gaps`, to [B, BINS], are what
    `of_gaps` makes a calibration error of; their bins are those of all rows. nan where a figure isn't defined.
    """
    truth = _labels(labels)
    point = Points(truth, _scores("the risks", scores, len(truth)))
    told = {name: partial(measure, point) for name, measure in _MEASURES.items()}
    return {**told, "gaps": partial(_gaps, point)}


def roc(labels: ArrayLike, scores: ArrayLike) -> Curve:
    """Return the ROC curve: false against true positive rate; empty if a class is missing."""
    truth = _labels(labels)
    point = Points(truth, _scores("scores", scores, len(truth)))
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


class Points:
    """Labels (or true risks) and scores of one arm, sorted once for all resamples."""

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


def _auroc(point: Points, weights: Floats) -> Floats:
    positive, negative = point.by_score(weights)
    below = np.cumsum(negative, axis=1) - 0.5 * negative
    return _ratio((positive * below).sum(1), positive.sum(1) * negative.sum(1))


def _auprc(point: Points, weights: Floats) -> Floats:
    positive, negative = point.by_score(weights)
    hits = np.cumsum(positive[:, ::-1], axis=1)
    called = hits + np.cumsum(negative[:, ::-1], axis=1)
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    return _ratio((precision * positive[:, ::-1]).sum(1), positive.sum(1))


def _brier(point: Points, weights: Floats) -> Floats:
    return _ratio(weights @ (point.scores - point.labels) ** 2, weights.sum(1))


def _gaps(point: Points, weights: Floats) -> Floats:
    gap = (weights * (point.labels - point.scores)) @ point.member
    total = weights.sum(1, keepdims=True)
    return np.divide(gap, total, out=np.full_like(gap, np.nan), where=total > 0)


def _ece(point: Points, weights: Floats) -> Floats:
    return np.abs(_gaps(point, weights)).sum(1)


def _recalibrated(point: Points, weights: Floats, *, near: bool = False) -> tuple[Floats, Floats]:
    return recalibrations(_log_odds(point.scores), point.labels, weights, near=near)


_MEASURES: dict[str, Callable[[Points, Floats], Floats]] = {
    "auroc": _auroc,
    "auprc": _auprc,
    "brier": _brier,
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


def _plain(measure: Callable[[Points, Floats], Floats], labels: ArrayLike, scores: ArrayLike) -> float:
    truth = _labels(labels)
    return float(measure(Points(truth, _scores("scores", scores, len(truth))), np.ones((1, len(truth))))[0])


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
