"""MEDS label files: predictions and answers that something else made, such as ACES.

The schema (MEDS 0.4, label.parquet): `subject_id` int64, `prediction_time` timestamp, and one of `boolean_value`,
`integer_value`, `float_value`, `categorical_value`. A category must read as a number or as true or false.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenizer.errors import DataError

_VALUES = ("boolean_value", "integer_value", "float_value", "categorical_value")
_WORDS = {"true": "1", "yes": "1", "false": "0", "no": "0"}


@dataclass(frozen=True)
class Labels:
    """The rows of a label file.

    Attributes:
        subject_ids: int64 [N].
        prediction_us: int64 [N], microseconds since the epoch.
        answers: float64 [N], 1 and 0 for booleans; nan where the file has none.
    """

    subject_ids: NDArray[np.int64]
    prediction_us: NDArray[np.int64]
    answers: NDArray[np.float64]


def read_labels(path: Path) -> Labels:
    """Read a label file, or all Parquet files of a folder.

    Raises:
        DataError: no such file, other columns, or a row without patient or time.
    """
    import polars as pl

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    try:
        table = pl.concat([pl.read_parquet(file) for file in files], how="diagonal_relaxed")
    except (OSError, ValueError, pl.exceptions.PolarsError) as problem:
        raise DataError(f"{path}: no readable label file ({problem}); give a Parquet file of MEDS labels") from None
    if missing := [name for name in ("subject_id", "prediction_time") if name not in table.columns]:
        raise DataError(f"{path}: {missing[0]} is missing; a MEDS label file has subject_id and prediction_time")
    if table["subject_id"].null_count() or table["prediction_time"].null_count():
        raise DataError(f"{path}: a row has no subject_id or no prediction_time; mend or drop it")
    found = [name for name in _VALUES if name in table.columns and table[name].null_count() < table.height]
    if len(found) > 1:
        raise DataError(f"{path}: {' and '.join(found)} both hold answers; keep one")
    answers = np.full(table.height, np.nan)
    if found:
        column = table[found[0]]
        if found[0] == "categorical_value":
            column = column.cast(pl.String).str.to_lowercase().replace(_WORDS)
        try:
            answers = column.cast(pl.Float64).fill_null(float("nan")).to_numpy()
        except pl.exceptions.PolarsError:
            raise DataError(f"{path}: categorical_value holds words that are no numbers; map them to numbers") from None
    try:
        times = table["prediction_time"].cast(pl.Datetime("us")).to_physical().to_numpy()
    except pl.exceptions.PolarsError:
        raise DataError(f"{path}: prediction_time is no timestamp; write it as one") from None
    return Labels(table["subject_id"].cast(pl.Int64).to_numpy(), times.astype(np.int64), answers.astype(np.float64))
