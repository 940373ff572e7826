"""A site's own tables become events, as a mapping file says.

Each table is read in pieces of some 16 MiB of text, so that memory doesn't grow with it. What the language can say is
in docs/sources/tables.md; `tokenizer.sources.mapping` reads it, `tokenizer.sources.telling` turns rows into events.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import polars as pl

from tokenizer.errors import DataError
from tokenizer.sources.columns import Columns
from tokenizer.sources.delimited import read_rows
from tokenizer.sources.folders import exists, find
from tokenizer.sources.intake import Flow, Intake, intake
from tokenizer.sources.mapping import Layout, Lookup, Mapping, Table, read_mapping
from tokenizer.sources.telling import Telling

Progress = Callable[[str, int], None]


def import_tables(
    folder: Path,
    out: Path,
    mapping: Path,
    *,
    name: str,
    quarantine: bool = False,
    progress: Progress | None = None,
) -> Flow:
    """Turn tables into the MEDS dataset `out`.

    Args:
        folder: with the files that the mapping names, or a tar or zip archive of it.
        out: the folder to make; one that stands there is replaced.
        mapping: the TOML file that says what the columns mean; see docs/sources/tables.md.
        name: of the dataset.
        quarantine: set bad rows aside in `out/quarantine.csv` instead of refusing the source.
        progress: called with a table and how many of its rows are read.

    Returns:
        What became of the rows.

    Raises:
        ConfigError: the mapping is wrong.
        DataError: a file is missing or damaged, or a row is bad and may not be set aside.
    """
    plan = read_mapping(mapping)
    with intake(out, f"tables in {folder}, mapped by {mapping.name}", name=name, quarantine=quarantine) as collected:
        present = [table for table in plan.table if not table.optional or exists(folder, table.files)]
        for table in plan.table:
            if table not in present:
                collected.note(f"There are no files for the table {table.name} ({', '.join(table.files)}).")
        lookups = {
            lookup.name: _load(folder, lookup, plan, collected, _lookup_columns(lookup, present))
            for lookup in plan.lookup
            if any(join.lookup == lookup.name for table in present for join in table.join)
        }
        for table in present:
            telling = Telling(table, plan.layout(table).decimal or ".", collected, lookups)
            done = 0
            for frame in _frames(folder, table, plan.layout(table), collected, telling.wanted):
                telling.take(frame)
                done += frame.height
                if progress is not None:
                    progress(table.name, done)
    return collected.flow


# Reading.


def _frames(
    folder: Path, source: Table | Lookup, layout: Layout, collected: Intake, wanted: Sequence[tuple[str, str]]
) -> Iterator[pl.DataFrame]:
    """Pieces of a table with the wanted (column, what for) columns, stripped, the marks for missing ones null."""

    def choose(file: str, header: Sequence[str]) -> dict[str, int]:
        return {column: _place(column, use, file, header, source.name) for column, use in wanted}

    def refuse(file: str, row: int, reason: str, content: str, advice: str) -> None:
        collected.rows(source.name, 1)
        collected.bad(file, source.name, row, "", reason, content, advice)

    # A table of which all rows are bad has its sums checked, too.
    collected.kept(source.name, 0)
    collected.rows(source.name, 0)
    for frame in read_rows(find(folder, source.files, source.name), layout, choose, refuse):
        collected.rows(source.name, frame.height)
        nulls = layout.null if layout.null is not None else ("",)
        yield frame.with_columns(
            _without(column, kind, {*nulls, *source.column_nulls.get(column, ())})
            for column, kind in frame.schema.items()
            if column not in ("_row", "_file")
        )


def _without(name: str, kind: pl.DataType, marks: set[str]) -> pl.Expr:
    """A column without blanks around texts, null where it has a mark for missing."""
    column = pl.col(name)
    if kind in (pl.Categorical, pl.Enum, pl.Binary):
        column, kind = column.cast(pl.String, strict=False), pl.String()
    if kind == pl.String:
        text = column.str.strip_chars()
        return pl.when(text != "" if marks == {""} else ~text.is_in(sorted(marks))).then(text).alias(name)
    if kind.is_numeric():
        numbers = pl.Series(sorted(marks), dtype=pl.String).cast(pl.Float64, strict=False).drop_nulls()
        missing = column.cast(pl.Float64).is_in(numbers.to_list())
        return pl.when(~(missing | column.is_nan() if kind.is_float() else missing)).then(column).alias(name)
    return column


def _place(column: str, use: str, file: str, header: Sequence[str], table: str) -> int:
    """Where a column stands; upper and lower case count only where they must."""
    for key in (str, str.casefold):
        places = [place for place, there in enumerate(header) if key(there) == key(column)]
        if len(places) == 1:
            return places[0]
        if places:
            raise DataError(
                f"{file}: {table}: the column {column} (for {use}) is there {len(places)} times. Name each differently."
            )
    close = difflib.get_close_matches(column, header, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    if len(header) == 1 and (other := next((mark for mark in ";\t|," if mark in header[0]), None)):
        hint = f" Is the delimiter {other!r}? Then say so in the mapping."
    raise DataError(f"{file}: {table}: no column {column} (for {use}); there are {', '.join(header)}.{hint}")


# Lookups.


def _lookup_columns(lookup: Lookup, tables: Sequence[Table]) -> list[tuple[str, str]]:
    wanted = dict.fromkeys(lookup.key, "key") | dict.fromkeys(lookup.where, "where")
    for table in tables:
        for column, use in table.uses():
            joined = table.joined(column)
            if joined is not None and joined[0] == lookup.name:
                wanted.setdefault(joined[1], f"table {table.name}, {use}")
    return list(wanted.items())


def _load(
    folder: Path, lookup: Lookup, plan: Mapping, collected: Intake, wanted: list[tuple[str, str]]
) -> pl.DataFrame:
    """A lookup in memory: its key as the texts `_key0`, `_key1`, ..., and its columns as `lookup.column`."""
    layout = plan.layout(lookup)
    pieces = []
    for frame in _frames(folder, lookup, layout, collected, wanted):
        columns = Columns(frame, layout.decimal or ".")
        chosen = frame.with_columns(columns.text(key).alias(f"_key{place}") for place, key in enumerate(lookup.key))
        pieces.append(chosen.filter(columns.holds(lookup.where)) if lookup.where else chosen)
    if not pieces:
        raise DataError(f"{folder}: the lookup {lookup.name} has no rows. Export it again.")
    rows = pl.concat(pieces)
    keys = [f"_key{place}" for place in range(len(lookup.key))]
    rows = rows.filter(pl.all_horizontal(pl.col(keys).is_not_null()))
    first = pl.struct(keys).is_first_distinct()
    if lookup.repeated == "bad":
        # Rows that say the same twice do no harm.
        again = rows.unique([*keys, *(column for column, _ in wanted)], keep="first", maintain_order=True).filter(
            ~first
        )
        collected.set_aside(
            again.select(
                file="_file",
                table=pl.lit(lookup.name),
                row="_row",
                column=pl.lit(", ".join(lookup.key)),
                reason=pl.lit("the same key as another row, with other content"),
                content=pl.concat_str(keys, separator=", "),
            ),
            'Remove one of them, choose with where, or say repeated = "leave out" in the lookup',
        )
    aside = sum(collected.flow.quarantined.get(lookup.name, {}).values())
    collected.drop(lookup.name, "looked up", collected.flow.rows[lookup.name] - aside)
    return rows.filter(first).select(*keys, *(pl.col(column).alias(f"{lookup.name}.{column}") for column, _ in wanted))
