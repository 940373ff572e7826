"""The same figures for groups of patients, with intervals over patients, and how each group differs from the rest.

Patients are drawn with replacement, with all of their predictions; a figure of a group and that of the rest come from
the same draw, so their difference has the interval of a paired comparison. Percentile bootstrap (Efron and Tibshirani
1993, ch. 13).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.metrics import Measure, interval, of_gaps
from tokenizer.errors import DataError

Rows = NDArray[np.int64]
Figure = Callable[[Rows], float]
"""A figure of some rows (indices, which may repeat); nan where it isn't defined."""

Weighted = Callable[[NDArray[np.float64]], NDArray[np.float64]]
"""Figures of all rows by their weights, float64 [B, n] to [B], as `model.metrics.by_weight` gives: much faster.

Gaps of a calibration curve, [B, n] to [B, BINS], become its error.
"""

ALL = "all"
_WEIGHTS = 4_000_000


@dataclass(frozen=True)
class Group:
    """A group's figures; `difference` is its figure minus that of everybody else, empty for all patients together."""

    name: str
    patients: int
    rows: int
    figures: Mapping[str, Measure]
    difference: Mapping[str, Measure]


def by_group(
    figures: Mapping[str, Figure],
    groups: Mapping[str, NDArray[np.bool_]],
    subjects: NDArray[np.int64],
    *,
    seed: int,
    resamples: int = 500,
    least: int = 1,
    weighted: Mapping[str, Weighted] | None = None,
    whole: Mapping[str, Figure] | None = None,
) -> tuple[Group, ...]:
    """Measure all patients, and each group that is large enough.

    Args:
        figures: what to measure, by name.
        groups: bool [n] by the group's name.
        subjects: whose row each is, int64 [n].
        seed, resamples: of the bootstrap.
        least: the fewest patients of a group that is shown.
        weighted: more figures, by name; they come first.
        whole: figures of all patients only, which take too long for groups; they come last.

    Raises:
        DataError: a group of another length.
    """
    masks = {ALL: np.ones(len(subjects), bool), **groups}
    for name, mask in masks.items():
        if mask.shape != subjects.shape:
            raise DataError(f"group {name!r} tells of {mask.shape} rows; there are {subjects.shape}")
    sizes = {name: len(np.unique(subjects[mask])) for name, mask in masks.items()}
    masks = {name: mask for name, mask in masks.items() if sizes[name] >= max(least, 1) or name == ALL}
    everybody, draws = np.arange(len(subjects)), _resamples(subjects, seed, resamples)
    told = _weighed(weighted or {}, masks, [everybody, *draws])
    for part, chosen in ((whole or {}, {ALL: masks[ALL]}), (figures, masks)):
        if part:
            each = [_measured(part, chosen, rows) for rows in (everybody, *draws)]
            told |= {key: np.array([row[key] for row in each]) for key in each[0]}
    found = []
    for name, mask in masks.items():
        own = [*(weighted or {}), *figures, *(whole or {} if name == ALL else {})]
        figures_of = {figure: _told(told[name, figure]) for figure in own}
        rest = {} if name == ALL else {figure: _apart(told, name, figure) for figure in own}
        found.append(Group(name, sizes[name], int(mask.sum()), figures_of, rest))
    return tuple(found)


def _weighed(
    figures: Mapping[str, Weighted], masks: Mapping[str, NDArray[np.bool_]], draws: list[Rows]
) -> dict[tuple[str, ...], NDArray[np.float64]]:
    """The figures of every draw, by group; a few draws at a time, so that their weights fit in memory."""
    size = len(masks[ALL])
    keys = [(name, figure) for name in masks for figure in figures]
    found: dict[tuple[str, ...], list[NDArray[np.float64]]] = {}
    step = max(1, _WEIGHTS // max(size, 1))
    for begin in range(0, len(draws), step):
        part = draws[begin : begin + step]
        weights = np.array([np.bincount(rows, minlength=size) for rows in part], np.float64).reshape(len(part), size)
        for name, figure in keys:
            mine = figures[figure](weights * masks[name])
            found.setdefault((name, figure), []).append(mine)
            if name != ALL:
                rest = figures[figure](weights * ~masks[name])
                minus = mine - rest if mine.ndim == 1 else (np.abs(mine) - np.abs(rest)).sum(axis=1)
                found.setdefault((name, figure, "minus"), []).append(minus)
    return {key: np.concatenate(parts) for key, parts in found.items()}


def _measured(
    figures: Mapping[str, Figure], masks: Mapping[str, NDArray[np.bool_]], rows: Rows
) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {}
    for name, mask in masks.items():
        mine, rest = rows[mask[rows]], rows[~mask[rows]]
        for figure, measure in figures.items():
            found[name, figure] = measure(mine)
        if name != ALL:
            for figure, measure in figures.items():
                found[name, figure, "minus"] = found[name, figure] - measure(rest)
    return found


def _told(values: NDArray[np.float64]) -> Measure:
    """The figure of all rows, which comes first, with the interval of the draws."""
    return interval(float(values[0]), values[1:]) if values.ndim == 1 else of_gaps(values[0], values[1:])


def _apart(told: Mapping[tuple[str, ...], NDArray[np.float64]], name: str, figure: str) -> Measure:
    """How a group's figure differs from that of everybody else."""
    values = told[name, figure, "minus"]
    if told[name, figure].ndim == 1:
        return _told(values)
    # The noise of gaps makes errors too large, the more the smaller the group: no interval of resamples holds that.
    nan = float("nan")
    return Measure(float(values[0]), nan, nan, "without interval: it depends on the size of the group")


def _resamples(subjects: NDArray[np.int64], seed: int, resamples: int) -> list[Rows]:
    """Rows of patients who were drawn with replacement."""
    owner = np.unique(subjects, return_inverse=True)[1].reshape(-1)
    order, size = np.argsort(owner, kind="stable"), np.bincount(owner)
    start = np.cumsum(size) - size
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        who = rng.integers(0, len(size), len(size)) if len(size) else np.zeros(0, np.int64)
        length = size[who]
        within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
        found.append(order[np.repeat(start[who], length) + within])
    return found
