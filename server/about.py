"""What a file of predictions is of: whom was asked, what, and which model and records it depends on.

It lies in the Parquet file's own metadata, so that a file that is passed on can still say so (`fedcomet score --html`).
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from federation import canonical
from model.cohort import Counts
from model.tasks import Task
from server.results import define
from tokenizer import durable
from tokenizer.errors import DataError

_KEY = "fedcomet"


@dataclass(frozen=True)
class Asked:
    """A question and how its cohort came about; `definition` is (term, text), `notes` what could not be told apart."""

    question: str
    definition: tuple[tuple[str, str], ...]
    counts: Counts
    horizon_days: float | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class About:
    """Questions by the task's name, and (term, text) of the model, the records, and their hashes."""

    questions: Mapping[str, Asked]
    facts: tuple[tuple[str, str], ...]
    hashes: tuple[tuple[str, str], ...]


def flow_of(task: Task, counts: Counts, notes: tuple[str, ...]) -> Asked:
    """Tell of a task."""
    return Asked(task.question, define(task), counts, task.horizon_days, notes)


def write_table(path: Path, table: pl.DataFrame, about: About | None = None) -> None:
    """Write a table of predictions, with what it is of."""
    buffer = io.BytesIO()
    metadata = {} if about is None else {_KEY: canonical.encode(about).decode()}
    table.write_parquet(buffer, metadata=metadata)
    durable.write_bytes(path, buffer.getvalue())


def read_about(path: Path) -> About | None:
    """Read what a file of predictions is of; None if it doesn't say.

    Raises:
        DataError: it says so in a form that this version doesn't know.
    """
    told = pl.read_parquet_metadata(path).get(_KEY)
    return None if told is None else canonical.decode(About, told.encode(), str(path), DataError)
