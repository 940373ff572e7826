"""What risks are worth to those who act on them: net benefit, and who is found when only so many can be looked at."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model import metrics

Floats = NDArray[np.float64]

THRESHOLDS = np.arange(1, 100) / 100


def net_benefit(labels: ArrayLike, risks: ArrayLike, thresholds: ArrayLike = THRESHOLDS) -> Floats:
    """Net benefit of treating who has a risk of `threshold` or more, in true positives per patient: float64 [T].

    A false positive costs threshold / (1 - threshold) of a true one: that is what choosing the threshold says.

    Source: Vickers and Elkin, "Decision curve analysis", Medical Decision Making 26 (2006).

    >>> net_benefit([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], [0.5]).tolist()
    [0.0]
    """
    truth, risk = metrics.checked(labels, risks)
    cut = np.asarray(thresholds, np.float64)
    order = np.sort(risk), np.sort(risk[truth == 1])
    treated, right = (len(ranked) - np.searchsorted(ranked, cut, "left") for ranked in order)
    return (right - (treated - right) * cut / (1 - cut)) / max(len(truth), 1)


def treat_all(labels: ArrayLike, thresholds: ArrayLike = THRESHOLDS) -> Floats:
    """Net benefit of treating everybody: float64 [T]; of nobody it is 0."""
    truth = np.asarray(labels, np.float64)
    return net_benefit(truth, np.ones_like(truth), thresholds)


def sensitivity_at(labels: ArrayLike, risks: ArrayLike, share: float) -> float:
    """Share of positives among those with the highest risks, where a `share` of all can be looked at; nan without any.

    Of equal risks at the edge, as many are looked at as fit: the expectation over their order.

    >>> sensitivity_at([0, 0, 1, 1], [0.1, 0.6, 0.4, 0.9], 0.25)
    0.5
    """
    truth, risk = metrics.checked(labels, risks)
    if not truth.sum():
        return float("nan")
    places = share * len(truth)
    levels, level = np.unique(-risk, return_inverse=True)
    size, hits = np.bincount(level, minlength=len(levels)), np.bincount(level, truth, len(levels))
    before = np.cumsum(size) - size
    taken = np.clip((places - before) / size, 0.0, 1.0)
    return float((hits * taken).sum() / truth.sum())
