"""How well risks rank patients by when the outcome comes, where some records end before it and others can't have it.

Competing events (2) are told apart from censoring (0): who died of something else will never have the outcome, and
counts as one who stays free of it for good (Wolbers et al., "Prognostic models with competing risks", Epidemiology 20,
2009). A censored record says only that nothing had come by then.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from model import metrics
from tokenizer.errors import DataError

Floats = NDArray[np.float64]

CENSORED, OUTCOME, COMPETING = 0, 1, 2
_ROWS = 512


def concordance(times: ArrayLike, events: ArrayLike, scores: ArrayLike) -> float:
    """Chance that of two patients the one whose outcome comes first has the higher score; nan without such pairs.

    Args:
        times: days to event or end of record, [n].
        events: 0 censored, 1 outcome, 2 competing, [n].
        scores: the higher, the sooner, [n].

    Source: Harrell et al., JAMA 247 (1982), ties in scores one half, with competing events as the module says.

    >>> concordance([1, 2, 3], [1, 1, 0], [0.9, 0.5, 0.1])
    1.0
    """
    time, event, score = _checked(times, events, scores)
    won = pairs = 0.0
    firsts = np.flatnonzero(event == OUTCOME)
    for begin in range(0, len(firsts), _ROWS):
        mine = firsts[begin : begin + _ROWS, None]
        later = (time > time[mine]) | (event == COMPETING)
        # A record that ends at the very time of an outcome went on without one until then.
        later |= (time == time[mine]) & (event == CENSORED)
        won += float((later * ((score < score[mine]) + 0.5 * (score == score[mine]))).sum())
        pairs += float(later.sum())
    return won / pairs if pairs else float("nan")


def auc_at(times: ArrayLike, events: ArrayLike, scores: ArrayLike, day: float) -> float:
    """AUROC of having the outcome by a day against staying free of it (or being past it by a competing event).

    Records that end before `day` are left out, and those that stay stand for them by the inverse of the chance of not
    being censored until then (Kaplan-Meier). nan where one side is empty.

    Source: Uno et al., JASA 102 (2007); with competing events, definition 2 of Blanche, Dartigues, Jacqmin-Gadda,
    Statistics in Medicine 32 (2013).
    """
    time, event, score = _checked(times, events, scores)
    decided = (event != CENSORED) & (time <= day)
    known = decided | (time > day)
    weight = np.zeros(len(time))
    weight[decided] = 1 / followed(time, event, time[decided], before=True)
    free = time > day
    weight[free] = 1 / followed(time, event, np.full(int(free.sum()), day))
    labels = (decided & (event == OUTCOME)).astype(np.float64)
    return metrics.weighted_auroc(labels[known], score[known], weight[known])


def followed(times: Floats, events: NDArray[np.int64], at: Floats, before: bool = False) -> Floats:
    """Chance that a record has not ended by a time (or just before it): Kaplan-Meier of censoring, float64 [K]."""
    ends, lost = np.unique(times[events == CENSORED], return_counts=True)
    ranked = np.sort(times)
    # At equal times, events come before the ends of records.
    others = np.sort(times[events != CENSORED])
    there = len(ranked) - np.searchsorted(ranked, ends, "left")
    there -= np.searchsorted(others, ends, "right") - np.searchsorted(others, ends, "left")
    chance = np.concatenate([[1.0], np.cumprod(1 - lost / np.maximum(there, 1))])
    found = chance[np.searchsorted(ends, at, "left" if before else "right")]
    # Where all the rest were lost at once, nobody stands for anybody.
    return np.maximum(found, 1e-9)


def _checked(times: ArrayLike, events: ArrayLike, scores: ArrayLike) -> tuple[Floats, NDArray[np.int64], Floats]:
    time, event, score = np.asarray(times, np.float64), np.asarray(events, np.int64), np.asarray(scores, np.float64)
    if not time.shape == event.shape == score.shape or time.ndim != 1:
        raise DataError(f"{time.shape} times, {event.shape} events and {score.shape} scores; there must be one each")
    if not np.isfinite(time).all() or not np.isfinite(score).all() or not np.isin(event, (0, 1, 2)).all():
        raise DataError("times and scores must be finite, and events 0 (censored), 1 (outcome) or 2 (competing)")
    return time, event, score
