"""All measures of a table of predictions, for all patients and for groups of them: as JSON, and for a terminal.

The table has a row per prediction: `subject_id`, `task`, `label` (-1 censored, 0, 1) and `risk`; with `time_days` and
`event` (0 censored, 1 outcome, 2 competing) it is also measured by time; with `count` and `count_mean`, `value` and
`value_mean` by how far numbers are off; with `grid_days` and `risk_curve` (lists) by the risk told
for a day. A row without a risk is one whose record ended too early to be asked about: it weighs the others in the AUC
over time. Every column that is asked for as a group (sex, race, age, site) splits the patients; a group's figures stand
beside their difference from the rest (`model.subgroups`).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from rich import box
from rich.markup import escape
from rich.table import Table

from model import decisions, metrics, survival
from model.metrics import Measure
from model.subgroups import Figure, Rows, Weighted, by_group
from server.results import Figure as Told
from server.results import GroupScore, Scorecard
from tokenizer.errors import DataError

_ALERTS = 0.1
_TIMES = 4


def scorecards(
    predictions: pl.DataFrame,
    groups: Sequence[str] = (),
    *,
    horizon_days: float | Mapping[str, float] | None = None,
    seed: int = 0,
    resamples: int = 500,
    least: int = 20,
) -> tuple[Scorecard, ...]:
    """Measure every task of a table.

    Args:
        predictions: see the module.
        groups: columns whose values split the patients.
        horizon_days: of the AUC over time, of all tasks or by the task's name; none leaves it out.
        seed, resamples: of the bootstrap over patients.
        least: the fewest patients of a group that is shown.

    Raises:
        DataError: a column is missing.
    """
    wanted = ("subject_id", "task", "label", "risk", *groups)
    if missing := [name for name in wanted if name not in predictions.columns]:
        raise DataError(f"the predictions have no column {missing[0]!r}; they have {', '.join(predictions.columns)}")
    tasks = predictions.partition_by("task", as_dict=True, maintain_order=True)
    options = (seed, resamples, least)
    found = []
    for (name,), table in tasks.items():
        own = horizon_days.get(str(name)) if isinstance(horizon_days, Mapping) else horizon_days
        found.append(_scorecard(str(name), table, groups, own, *options))
    return tuple(found)


def table(card: Scorecard) -> Table:
    """Give a task's figures as a table for a terminal: groups by row."""
    names = list(card.groups[0].figures)
    told = Table(title=escape(card.task), box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "patients", *names):
        told.add_column(escape(heading), justify="left" if not heading else "right")
    for group in card.groups:
        figures = (group.figures.get(name) for name in names)
        cells = ("–" if each is None or each.value is None else f"{each.value:.3f}" for each in figures)
        told.add_row(escape(group.name), str(group.patients), *cells)
    return told


def _scorecard(
    task: str,
    table_: pl.DataFrame,
    groups: Sequence[str],
    horizon_days: float | None,
    seed: int,
    resamples: int,
    least: int,
) -> Scorecard:
    columns = {name: table_[name].to_numpy() for name in table_.columns if table_[name].dtype.is_numeric()}
    columns["risk"] = columns["risk"].astype(np.float64)
    masks = {
        f"{column}: {value}": (table_[column] == value).fill_null(value=False).to_numpy()
        for column in groups
        for value in table_[column].drop_nulls().unique().sort().to_list()
    }
    subjects = columns["subject_id"]
    found = by_group(
        _figures(columns, horizon_days),
        masks,
        subjects,
        seed=seed,
        resamples=resamples,
        least=least,
        weighted=_weighted(columns),
        whole=_concordance(columns),
    )
    told = tuple(
        GroupScore(each.name, each.patients, each.rows, _told(each.figures), _told(each.difference)) for each in found
    )
    over_time = by_group(_by_day(table_, columns), {}, subjects, seed=seed, resamples=resamples)[0].figures
    known = columns["label"] >= 0
    labels, risks = columns["label"][known], columns["risk"][known]
    curves = (decisions.net_benefit(labels, risks), decisions.treat_all(labels))
    notes = () if known.all() else (f"{int((~known).sum())} predictions are censored: only figures by time use them",)
    thresholds, ours, everybody = (tuple(curve.tolist()) for curve in (decisions.THRESHOLDS, *curves))
    by_day = tuple((float(day), figure) for day, figure in _told(over_time).items())
    return Scorecard(task, told, thresholds, ours, everybody, notes, by_day)


def _by_day(table_: pl.DataFrame, columns: Mapping[str, NDArray]) -> dict[str, Figure]:
    """The AUC over time of the risks that were told for a few days of the curve, by day.

    Days by which a record was followed that nobody was asked about are left out: only its time is known.
    """
    if not {"grid_days", "risk_curve", "time_days", "event"} <= set(table_.columns):
        return {}
    asked = np.isfinite(columns["risk"])
    told = table_.filter(pl.Series(asked))
    if not told.height or told["grid_days"].null_count():
        return {}
    days, curve = np.array(told["grid_days"][0]), np.full((len(asked), len(told["grid_days"][0])), np.nan)
    curve[asked] = np.array(told["risk_curve"].to_list())
    time, event = _followed(columns), columns["event"]
    chosen = sorted({round(len(days) * part / _TIMES) - 1 for part in range(1, _TIMES + 1)} - {-1})
    return {
        f"{days[place]:g}": _auc_at(time, event, curve[:, place], float(days[place]))
        for place in chosen
        if asked[time > days[place]].all()
    }


def _followed(columns: Mapping[str, NDArray]) -> NDArray[np.float64]:
    """Days until a record ended; those without an outcome to the horizon, where looking stops, went on beyond it."""
    time = columns["time_days"].astype(np.float64)
    free = (columns["label"] == 0) & (columns["event"] == survival.CENSORED)
    return np.where(free, np.nextafter(time, np.inf), time)


def _auc_at(time: NDArray, event: NDArray, risk: NDArray, day: float) -> Figure:
    # Records that end before the day have no weight, so that their risk is of no account.
    score = np.nan_to_num(risk)
    return lambda rows: survival.auc_at(time[rows], event[rows], score[rows], day)


def _weighted(columns: Mapping[str, NDArray]) -> dict[str, Weighted]:
    known = columns["label"] >= 0
    # Those without an answer have no place in a calibration error's bins either.
    figures = metrics.by_weight(columns["label"][known], columns["risk"][known])

    def of_known(measure: Weighted) -> Weighted:
        return lambda weights: measure(weights[:, known])

    names = {"auroc": "AUROC", "auprc": "AUPRC", "brier": "Brier", "gaps": "ECE"}
    return {told: of_known(figures[name]) for name, told in names.items()}


def _concordance(columns: Mapping[str, NDArray]) -> dict[str, Figure]:
    """The C-index, of all patients only: it looks at pairs, and their number is the square of that of rows."""
    if not {"time_days", "event"} <= set(columns):
        return {}
    asked = np.isfinite(columns["risk"])

    def of_asked(rows: NDArray[np.int64]) -> float:
        rows = rows[asked[rows]]
        return survival.concordance(columns["time_days"][rows], columns["event"][rows], columns["risk"][rows])

    return {"C-index": of_asked}


def _figures(columns: Mapping[str, NDArray], horizon_days: float | None) -> dict[str, Figure]:
    label, risk = columns["label"], columns["risk"]

    def of_known(measure: Figure) -> Figure:
        return lambda rows: measure(rows[label[rows] >= 0])

    def nan_if_none(measure: Figure) -> Figure:
        return lambda rows: measure(rows) if len(rows) else float("nan")

    line: dict[int, tuple[Rows, tuple[float, float]]] = {}

    def recalibrated(rows: Rows) -> tuple[float, float]:
        # Slope and intercept are one fit, and are asked for one after the other.
        if 0 not in line or line[0][0] is not rows:
            known = rows[label[rows] >= 0]
            nothing = float("nan"), float("nan")
            line[0] = rows, metrics.recalibration(label[known], risk[known]) if len(known) else nothing
        return line[0][1]

    found: dict[str, Figure] = {
        f"sensitivity at {_ALERTS:.0%}": lambda rows: decisions.sensitivity_at(label[rows], risk[rows], _ALERTS),
    }
    found = {
        "slope": lambda rows: recalibrated(rows)[0],
        "intercept": lambda rows: recalibrated(rows)[1],
        **{name: of_known(nan_if_none(measure)) for name, measure in found.items()},
    }
    if {"time_days", "event"} <= set(columns):
        time, event = _followed(columns), columns["event"]
        asked = np.isfinite(risk)
        if horizon_days is not None and asked[time > horizon_days].all():
            found[f"AUC at {horizon_days:g} d"] = _auc_at(time, event, risk, horizon_days)
    for name in ("count", "value"):
        if {name, f"{name}_mean"} <= set(columns):
            truth, told = columns[name], columns[f"{name}_mean"]
            found |= _of_numbers(name, truth, told)
    return found


def _of_numbers(name: str, truth: NDArray, told: NDArray) -> dict[str, Figure]:
    def both(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return rows[np.isfinite(truth[rows]) & np.isfinite(told[rows])]

    found: dict[str, Figure] = {f"MAE of {name}": lambda rows: metrics.mae(truth[both(rows)], told[both(rows)])}
    if name == "count":
        found["RMSLE of count"] = lambda rows: metrics.rmsle(truth[both(rows)], told[both(rows)])
    return found


def _told(figures: Mapping[str, Measure]) -> dict[str, Told]:
    return {
        name: Told(_defined(each.value), _defined(each.low), _defined(each.high), each.note)
        for name, each in figures.items()
    }


def _defined(number: float) -> float | None:
    return None if np.isnan(number) else float(number)
