"""A study's ledger: one SQLite file with a row for each cell and each of its figures, and a Parquet copy of all of it.

The ledger is what counts; `results.parquet` is made from it after each cell, for whoever reads it with other tools.
"""

import io
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from sqlalchemy import Column, Float, ForeignKey, Integer, MetaData, String, Table, Text, delete, insert, select, update

from federation.database import address, connect, reading
from simulation.studies.cell import Figure
from simulation.studies.grid import Cell
from tokenizer import durable

OPEN, RUNNING, DONE, FAILED = "open", "running", "done", "failed"

_metadata = MetaData()
_cells = Table(
    "cells",
    _metadata,
    Column("digest", String(16), primary_key=True),
    Column("seed", Integer, nullable=False),
    Column("place", Text, nullable=False),
    Column("settings", Text, nullable=False),
    Column("state", String(8), nullable=False),
    Column("reason", Text, nullable=False, default=""),
    Column("attempts", Integer, nullable=False, default=0),
    Column("seconds", Float, nullable=False, default=0.0),
    Column("ended", Float),
)
_figures = Table(
    "figures",
    _metadata,
    Column("digest", String(16), ForeignKey("cells.digest"), primary_key=True),
    Column("arm", String(120), primary_key=True),
    Column("measure", String(120), primary_key=True),
    Column("value", Float, nullable=False),
)


@dataclass(frozen=True)
class Entry:
    """What the ledger says of a cell; `seconds` are those of the attempt that ended it."""

    digest: str
    state: str
    reason: str
    attempts: int
    seconds: float


class Book:
    """The ledger in a study's folder; use it in a `with` statement. Safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._copying = threading.Lock()
        self._engine = connect(
            address(folder / "study.sqlite"), ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON")
        )
        _metadata.create_all(self._engine)

    @classmethod
    @contextmanager
    def at(cls, folder: Path) -> "Iterator[Book]":
        """Open the ledger of a folder, and close it at the end."""
        book = cls(folder)
        try:
            yield book
        finally:
            book._engine.dispose()

    def expect(self, cells: Sequence[Cell]) -> None:
        """Note the cells that are wanted; those that are known stay as they are, and what was running is open again."""
        with self._engine.begin() as connection:
            known = set(connection.scalars(select(_cells.c.digest)))
            fresh = [_row(cell) for cell in cells if cell.digest not in known]
            if fresh:
                connection.execute(insert(_cells), fresh)
            for cell in cells:  # labels may have changed
                connection.execute(
                    update(_cells).where(_cells.c.digest == cell.digest).values(place=_row(cell)["place"])
                )
            connection.execute(update(_cells).where(_cells.c.state == RUNNING).values(state=OPEN))

    def entries(self) -> dict[str, Entry]:
        """Give what is known of every cell by its digest."""
        columns = [_cells.c[name] for name in ("digest", "state", "reason", "attempts", "seconds")]
        with reading(self._engine).begin() as connection:
            return {row.digest: Entry(*row) for row in connection.execute(select(*columns))}

    def begin(self, digest: str) -> None:
        """Note that a cell is being run."""
        change = {"state": RUNNING, "reason": "", "attempts": _cells.c.attempts + 1}
        with self._engine.begin() as connection:
            connection.execute(update(_cells).where(_cells.c.digest == digest).values(**change))

    def end(self, digest: str, figures: Sequence[Figure], seconds: float) -> None:
        """Note a cell's figures."""
        rows = [{"digest": digest, **vars(figure)} for figure in figures]
        with self._engine.begin() as connection:
            connection.execute(delete(_figures).where(_figures.c.digest == digest))
            if rows:
                connection.execute(insert(_figures), rows)
            self._close(connection, digest, DONE, "", seconds)
        self._copy()

    def fail(self, digest: str, reason: str, seconds: float) -> None:
        """Note why a cell could not be run."""
        with self._engine.begin() as connection:
            self._close(connection, digest, FAILED, reason, seconds)

    def table(self, cells: Sequence[Cell]) -> pl.DataFrame:
        """Give the figures of these cells: digest, seed, arm, measure, value, and a column of labels for each axis."""
        wanted = {cell.digest: cell for cell in cells}
        with reading(self._engine).begin() as connection:
            rows = [row for row in connection.execute(select(_figures)) if row.digest in wanted]
        axes = list(cells[0].place) if cells else []
        fixed = {
            "digest": [row.digest for row in rows],
            "seed": [wanted[row.digest].seed for row in rows],
            "arm": [row.arm for row in rows],
            "measure": [row.measure for row in rows],
            "value": [row.value for row in rows],
        }
        labels = {f"axis {name}": [wanted[row.digest].place[name].label for row in rows] for name in axes}
        schema: dict[str, Any] = dict.fromkeys(("digest", "arm", "measure"), pl.String)
        schema |= {"seed": pl.Int64, "value": pl.Float64} | dict.fromkeys(labels, pl.String)
        return pl.DataFrame({**fixed, **labels}, schema_overrides=schema)

    @staticmethod
    def _close(connection: Any, digest: str, state: str, reason: str, seconds: float) -> None:
        change = {"state": state, "reason": reason, "seconds": seconds, "ended": time.time()}
        connection.execute(update(_cells).where(_cells.c.digest == digest).values(**change))

    def _copy(self) -> None:
        """Write all cells and figures to the Parquet file."""
        with self._copying:
            joined = select(_cells, _figures.c.arm, _figures.c.measure, _figures.c.value).join(_figures)
            with reading(self._engine).begin() as connection:
                rows = [dict(row._mapping) for row in connection.execute(joined)]
            buffer = io.BytesIO()
            pl.DataFrame(rows, infer_schema_length=None).write_parquet(buffer)
            durable.write_bytes(self._folder / "results.parquet", buffer.getvalue())


def _row(cell: Cell) -> dict[str, Any]:
    place = {name: point.label for name, point in cell.place.items()}
    settings = cell.study.model_dump(mode="json")
    hostile = vars(cell.hostile) if cell.hostile else None
    return {
        "digest": cell.digest,
        "seed": cell.seed,
        "place": json.dumps(place),
        "settings": json.dumps({**settings, "hostile": hostile}, sort_keys=True),
        "state": OPEN,
    }
