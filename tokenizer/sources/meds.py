"""MEDS written anew: whole subjects in shards of a size that fits memory, whatever the order of rows was.

A dataset whose rows lie as MEDS asks for is read where it is; this is for those that don't: subjects scattered over a
large file or over several files, or rows that have to be set aside.
"""

from collections.abc import Callable
from pathlib import Path

import polars as pl

from tokenizer.events import out_of_range, rows, without
from tokenizer.sources.intake import EVENTS, Flow, intake


def import_meds(
    path: Path,
    out: Path,
    *,
    name: str,
    quarantine: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Flow:
    """Turn a MEDS dataset into the MEDS dataset `out`.

    Args:
        path: a folder with data/**/*.parquet.
        out: the folder to make.
        name: of the dataset.
        quarantine: set bad rows aside instead of refusing the source.
        progress: called with the rows read and the rows in all.

    Raises:
        DataError: a file that can't be read, a column of a wrong type, a bad row, or no event left.
    """
    with intake(out, f"MEDS: {path}", name=name, quarantine=quarantine) as collected:
        done = 0
        for chunk in rows(path, tuple(EVENTS)[4:]):
            frame = chunk.frame.with_row_index("_row", chunk.start)
            height = frame.height
            collected.rows(chunk.shard, height)
            for column in ("subject_id", "code"):
                frame = collected.bad_rows(
                    *(frame, without(column)),
                    file=chunk.shard,
                    table=chunk.shard,
                    column=column,
                    reason=f"no {column}",
                    advice="Rows count from 0. Give the row its value",
                )
            number = pl.col("subject_id").cast(pl.Int64, strict=False)
            frame = collected.bad_rows(
                *(frame, number.is_null()),
                file=chunk.shard,
                table=chunk.shard,
                column="subject_id",
                reason="subject_id beyond 64 bits with a sign",
                advice="Rows count from 0. Give the patient a smaller number",
            ).with_columns(number)
            frame = collected.bad_rows(
                *(frame, out_of_range("time")),
                file=chunk.shard,
                table=chunk.shard,
                column="time",
                reason="time out of range",
                advice="Rows count from 0. Correct the time",
            )
            collected.kept(chunk.shard, frame.height)
            collected.add(chunk.shard, frame)
            done += height
            if progress:
                progress(done, chunk.total)
    return collected.flow
