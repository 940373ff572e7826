"""What the figures of a grid say: means over seeds with intervals, and scaling laws where a file asks for them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from scipy.stats import t

from simulation.studies.grid import Cell, Grid
from simulation.studies.scaling import Estimate, Run, estimates


@dataclass(frozen=True)
class Mean:
    """A measure over the seeds of a point: mean and 95 % limits by Student's t (none with one seed)."""

    place: tuple[str, ...]
    arm: str
    measure: str
    mean: float
    low: float | None
    high: float | None
    seeds: int

    def told(self) -> str:
        """The figure in words."""
        if self.low is None or self.high is None or self.low == self.high:  # what is the same with every seed
            return _number(self.mean)
        return f"{_number(self.mean)} ({_number(self.low)} to {_number(self.high)})"


def means(table: pl.DataFrame, cells: Sequence[Cell]) -> tuple[Mean, ...]:
    """Give the mean of every measure over the seeds, in the order of the cells.

    Args:
        table: as from `Book.table`.
        cells: of the grid.
    """
    axes = list(cells[0].place) if cells else []
    columns = [f"axis {name}" for name in axes]
    order = {tuple(point.label for point in cell.place.values()): number for number, cell in enumerate(cells)}
    found = []
    for key, rows in table.group_by([*columns, "arm", "measure"], maintain_order=True):
        *place, arm, measure = map(str, key)
        values = rows["value"].to_numpy()
        found.append(Mean(tuple(place), arm, measure, *interval(values), len(values)))
    return tuple(sorted(found, key=lambda mean: order.get(mean.place, 0)))


def interval(values: "np.ndarray") -> tuple[float, float | None, float | None]:
    """Give the mean of values [n] and its 95 % limits by Student's t.

    >>> interval(np.array([1.0, 2.0, 3.0]))[0]
    2.0
    """
    mean = float(values.mean())
    if len(values) < 2:
        return mean, None, None
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half


def laws(grid: Grid, table: pl.DataFrame, cells: Sequence[Cell]) -> dict[str, dict[str, Estimate]]:
    """Give the scaling laws by the label of the axis that the file names; empty where it asks for none."""
    if (asked := grid.scaling) is None:
        return {}
    return {
        label: dict(estimates(runs, asked.resamples)) for label, runs in runs_by(grid, table, cells).items() if runs
    }


def runs_by(grid: Grid, table: pl.DataFrame, cells: Sequence[Cell]) -> dict[str, list[Run]]:
    """Give the trained models of each label of the axis that scaling laws are fitted by."""
    if (asked := grid.scaling) is None:
        return {}
    wide: dict[tuple[str, str], dict[str, float]] = {}
    for digest, arm, measure, value in table.select("digest", "arm", "measure", "value").iter_rows():
        wide.setdefault((digest, arm), {})[measure] = value
    found: dict[str, list[Run]] = {}
    for arm in asked.arms:
        for cell in cells:
            told = wide.get((cell.digest, arm), {})
            # Of private steps on updates nobody knows the tokens.
            if {"parameters", "tokens", "loss"} <= set(told) and told["tokens"] > 0:
                label = f"{cell.place[asked.by].label}, {arm}" if asked.by else arm
                found.setdefault(label, []).append(Run(told["parameters"], told["tokens"], told["loss"]))
    return found


def _number(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:.4g}" if abs(value) >= 10 else f"{value:.3f}"
