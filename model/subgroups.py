"""The same figures for groups of patients, with intervals over patients, and how each group differs from the rest.

Patients are drawn with replacement, with all of their predictions; a figure of a group and that of the rest come from
the same draw, so their difference has the interval of a paired comparison. Percentile bootstrap (Efron and Tibshirani
1993, ch. 13).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.metrics import Measure, interval
from tokenizer.errors import DataError

Rows = NDArray[np.int64]
Figure = Callable[[Rows], float]
"""A figure of some rows (indices, which may repeat); nan where it isn't defined."""

ALL = "all"


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
) -> tuple[Group, ...]:
    """Measure all patients, and each group that is large enough.

    Args:
        figures: what to measure, by name.
        groups: bool [n] by the group's name.
        subjects: whose row each is, int64 [n].
        seed, resamples: of the bootstrap.
        least: the fewest patients of a group that is shown.

    Raises:
        DataError: a group of another length.
    """
    masks = {ALL: np.ones(len(subjects), bool), **groups}
    for name, mask in masks.items():
        if mask.shape != subjects.shape:
            raise DataError(f"group {name!r} tells of {mask.shape} rows; there are {subjects.shape}")
    sizes = {name: len(np.unique(subjects[mask])) for name, mask in masks.items()}
    masks = {name: mask for name, mask in masks.items() if sizes[name] >= max(least, 1) or name == ALL}
    everybody = np.arange(len(subjects))
    drawn = [_measured(figures, masks, rows) for rows in _resamples(subjects, seed, resamples)]
    whole = _measured(figures, masks, everybody)
    found = []
    for name, mask in masks.items():
        told = {figure: _told(whole, drawn, (name, figure)) for figure in figures}
        rest = {} if name == ALL else {figure: _told(whole, drawn, (name, figure, "minus")) for figure in figures}
        found.append(Group(name, sizes[name], int(mask.sum()), told, rest))
    return tuple(found)


def _measured(
    figures: Mapping[str, Figure], masks: Mapping[str, NDArray[np.bool_]], rows: Rows
) -> dict[tuple[str, ...], float]:
    found: dict[tuple[str, ...], float] = {}
    for name, mask in masks.items():
        inside = mask[rows]
        for figure, measure in figures.items():
            found[name, figure] = measure(rows[inside])
            if name != ALL:
                found[name, figure, "minus"] = found[name, figure] - measure(rows[~inside])
    return found


def _told(
    whole: Mapping[tuple[str, ...], float], drawn: list[dict[tuple[str, ...], float]], key: tuple[str, ...]
) -> Measure:
    return interval(whole[key], np.array([each[key] for each in drawn]))


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
