"""What was predicted and what happened, row by row: the one table that metrics, reports and files are made from.

Columns of a prediction table, all [P] unless said otherwise: `subject_id` int64; `prediction_time` int64, microseconds
since the epoch; `task`, `task_hash`; answers `label` int8 (1, 0, -1 unknown), `time_days` float64 and `event` int8 (0
censored, 1 outcome, 2 competing), `repeat` bool, and by the kind of task `count`, `value` float64 (nan: unknown) or
`codes` int8 [P, C] (-1: unknown); estimates `risk`, `se`, `resolved` float64, `trajectories` int64, with a horizon
`risk_curve` and `competing_curve` float64 [P, G] at the times `grid_days` [P, G], `count_mean`, `count_median`,
`count_low`, `count_high` (or `time_...`, `value_...`) float64, and `codes_risk` float64 [P, C] for the outcome prefixes
`codes_names` [P, C].
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model.cohort import Cohort
from model.estimate import Estimates
from model.tasks import Task

_MEASURED = ("count", "time", "value")


def prediction_table(task: Task, cohort: Cohort, found: Estimates) -> dict[str, NDArray]:
    """Put the answers and the estimates of a cohort side by side.

    Args:
        task: the question.
        cohort: P predictions.
        found: what was estimated about them, in the same order.

    Returns:
        The columns by name.
    """
    size = len(cohort)
    table: dict[str, NDArray] = {
        "subject_id": cohort.subject_ids,
        "prediction_time": cohort.prediction_us,
        "task": np.full(size, task.name),
        "task_hash": np.full(size, task.hash),
        "label": cohort.labels,
        **cohort.told,
        "risk": found.risk,
        "se": found.se,
        "resolved": found.resolved,
        "trajectories": found.trajectories,
    }
    if len(found.grid_days):
        table["grid_days"] = _repeated(found.grid_days, size)
        table["risk_curve"], table["competing_curve"] = found.curve, found.competing
    if task.kind in _MEASURED:
        measures = {"mean": found.mean, "median": found.median, "low": found.low, "high": found.high}
        table |= {f"{task.kind}_{name}": column for name, column in measures.items()}
    if task.kind == "set":
        table["codes_names"] = _repeated(np.array(task.outcome), size)
        table["codes_risk"] = found.codes
    return table


def _repeated(row: NDArray, size: int) -> NDArray:
    return np.tile(row, (size, 1))


def joined(parts: Sequence[Estimates]) -> Estimates:
    """Put the estimates of parts of a cohort together, in the order given."""
    first = parts[0]
    reasons = {name: sum(part.reasons[name] for part in parts) for name in first.reasons}
    stacked = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in (
            "risk",
            "resolved",
            "trajectories",
            "se",
            "curve",
            "competing",
            "mean",
            "median",
            "low",
            "high",
            "codes",
        )
    }
    return Estimates(
        **stacked,
        reasons=reasons,
        tokens_sampled=sum(part.tokens_sampled for part in parts),
        grid_days=first.grid_days,
    )
