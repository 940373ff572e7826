"""Arms against known risks: how good they are when no single draw of the patients' fates counts.

The labels of made-up patients are one draw from their true risks. Over endlessly many draws the AUROC has an
expectation (numerator and denominator of the Mann-Whitney statistic each by their own), recalibration a limit, and both
need no draw at all: a patient counts as positive by the true risk, and as negative by its complement.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from model.metrics import Floats, Measure, Points, interval, owners, recalibrations, resampled
from tokenizer.errors import DataError

_LEAST_RISK = 1e-6


@dataclass(frozen=True)
class AgainstTruth:
    """One arm: its AUROC, how far that is behind the best possible, slope, and mean risk over the true mean."""

    auroc: Measure
    behind: Measure
    slope: Measure
    mean_risk: Measure


def against_truth(
    true_risks: ArrayLike,
    arms: Mapping[str, ArrayLike],
    *,
    seed: int,
    resamples: int = 2000,
    subjects: ArrayLike | None = None,
) -> dict[str, AgainstTruth]:
    """Hold arms against the true risks of the same predictions, with 95 % intervals over patients.

    Args:
        true_risks: the chance of the outcome given all that is known at each prediction, [n].
        arms: risks [n] by the arm's name.
        seed, resamples: of the bootstrap; `behind` is paired.
        subjects: whose prediction each is, [n]; every prediction its own patient if None.

    Raises:
        DataError: true risks outside of [0, 1], lengths that differ.
    """
    truth = np.asarray(true_risks, np.float64)
    scores = {arm: np.asarray(risks, np.float64) for arm, risks in arms.items()}
    if not ((truth >= 0) & (truth <= 1)).all() or any(risks.shape != truth.shape for risks in scores.values()):
        raise DataError("true risks must lie between 0 and 1, and every arm must answer every prediction")
    owner, best = owners(subjects, len(truth)), Points(truth, truth)
    points = {arm: Points(truth, risks) for arm, risks in scores.items()}
    drawn = {arm: np.empty((4, resamples)) for arm in scores}
    for rows, weights in resampled(owner, seed, resamples):
        most = expected_auroc(best, weights)
        for arm, point in points.items():
            drawn[arm][:, rows] = _figures(point, most, weights, near=True)
    once = np.ones((1, len(truth)))
    found = {}
    for arm, point in points.items():
        values = _figures(point, expected_auroc(best, once), once)[:, 0]
        found[arm] = AgainstTruth(*(interval(float(value), row) for value, row in zip(values, drawn[arm], strict=True)))
    return found


def expected_auroc(point: Points, weights: Floats) -> Floats:
    """AUROC of scores over endlessly many draws of labels from the risks in `point.labels`: float64 [B].

    Args:
        point: true risks and scores.
        weights: float64 [B, n], how often each prediction counts.
    """
    positive, negative = point.by_score(weights)
    below = np.cumsum(negative, axis=1) - 0.5 * negative
    # Nobody is compared with oneself.
    own = weights @ (point.labels * (1 - point.labels))
    pairs = positive.sum(axis=1) * negative.sum(axis=1) - own
    wins = (positive * below).sum(axis=1) - 0.5 * own
    return np.divide(wins, pairs, out=np.full_like(wins, np.nan), where=pairs > 0)


def _figures(point: Points, most: Floats, weights: Floats, *, near: bool = False) -> Floats:
    reached = expected_auroc(point, weights)
    risk = np.clip(point.scores, _LEAST_RISK, 1 - _LEAST_RISK)
    slope, _ = recalibrations(np.log(risk / (1 - risk)), point.labels, weights, near=near)
    means = weights @ point.scores, weights @ point.labels
    ratio = np.divide(*means, out=np.full_like(means[0], np.nan), where=means[1] > 0)
    return np.stack([reached, most - reached, slope, ratio])
