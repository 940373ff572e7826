"""A site's own tables become events, as a mapping file says.

Each table is read in pieces of some 16 MiB of text. A row is bad as a whole if any event that it should give is: none
of its events is kept then. A row that gives no event is counted under the first of these names that fits: a filter of
the mapping, "free text", "no value", "nothing to tell" (an optional time or code is missing), "told before" (of events
that are told once), "no event fits".
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from tokenizer.errors import DataError
from tokenizer.sources.columns import Columns, Fault, Moments, time_faults
from tokenizer.sources.delimited import read_rows
from tokenizer.sources.folders import exists, find
from tokenizer.sources.intake import Flow, Intake, intake
from tokenizer.sources.mapping import Event, Layout, Lookup, Mapping, Table, Template, Time, read_mapping

Progress = Callable[[str, int], None]

_LONGEST_ANSWER = 40
_WHY = ("no event fits", "told before", "nothing to tell", "no value", "free text")
_KEPT = len(_WHY)


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
            job = _TableImport(table, plan, collected, lookups)
            done = 0
            for frame in _frames(folder, table, plan.layout(table), collected, job.wanted):
                job.piece(frame)
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
            _without(frame[column], (*nulls, *source.column_nulls.get(column, ())))
            for column in frame.columns
            if column not in ("_row", "_file")
        )


def _without(column: pl.Series, marks: Sequence[str]) -> pl.Series:
    if column.dtype in (pl.Categorical, pl.Enum, pl.Binary):
        column = column.cast(pl.String, strict=False)
    if column.dtype == pl.String:
        text = column.str.strip_chars()
        return text.set(text.is_in(list(marks)), None)
    if column.dtype.is_numeric():
        numbers = pl.Series(marks, dtype=pl.String).cast(pl.Float64, strict=False).drop_nulls()
        missing = column.cast(pl.Float64).is_in(numbers.to_list())
        return column.set(missing | column.is_nan() if column.dtype.is_float() else missing, None)
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


# Events.


@dataclass(frozen=True)
class _Rule:
    """An event of the mapping, of one value."""

    event: Event
    code: Template
    time: Time | None
    value: str | None
    unit: Template | None

    @property
    def time_column(self) -> str:
        return next(self.time.columns(), "") if self.time else ""


def _rules(table: Table) -> Iterator[_Rule]:
    for event in table.event:
        time = None if event.static else event.time or table.time
        if not event.each:
            yield _Rule(event, event.code, time, event.value, event.unit)
        for column, unit in event.each.items():
            yield _Rule(event, event.code.fill("each", column), time, column, Template(unit, (unit,)) if unit else None)


class _TableImport:
    """One table on its way into the intake.

    Attributes:
        wanted: (column, what for) that its files must have.
    """

    def __init__(self, table: Table, plan: Mapping, collected: Intake, lookups: dict[str, pl.DataFrame]) -> None:
        self._table = table
        self._collected = collected
        self._lookups = lookups
        self._decimal = plan.layout(table).decimal or "."
        self._rules = list(_rules(table))
        made = {*table.from_file, *table.from_row, *table.recode}
        self.wanted = list(
            {
                column: use
                for column, use in reversed(list(table.uses()))
                if column not in made and table.joined(column) is None
            }.items()
        )
        times = [rule.time for rule in self._rules if rule.time is not None]
        self._shared_times = [time for n, time in enumerate(times) if time in times[:n] and time not in times[n + 1 :]]
        self._from_row: dict[str, dict[str, str | None]] = {}
        self._seen = pl.DataFrame(schema={"_key": pl.String, "_file": pl.String, "_row": pl.Int64})
        self._told: dict[int, pl.Series] = {}

    def piece(self, frame: pl.DataFrame) -> None:
        """Take rows."""
        frame = self._with_made_columns(frame)
        frame = self._without_dropped(frame)
        frame = self._without_bad_subjects(frame)
        frame = self._without_repeated(frame)
        if frame.height:
            subjects = self._collected.subject_ids(self._columns(frame).text(self._table.subject))
            self._tell(frame.with_columns(_subject=subjects).with_row_index("_index"))

    def _columns(self, frame: pl.DataFrame) -> Columns:
        return Columns(frame, self._decimal)

    def _with_made_columns(self, frame: pl.DataFrame) -> pl.DataFrame:
        for column, pattern in self._table.from_file.items():
            frame = frame.with_columns(pl.col("_file").str.extract(pattern).alias(column))
        if self._table.from_row:
            frame = self._with_other_rows(frame)
        for join in self._table.join:
            lookup = self._lookups[join.lookup]
            columns = self._columns(frame)
            keys = [columns.text(column).alias(f"_key{place}") for place, column in enumerate(join.on)]
            names = [key.name for key in keys]
            frame = frame.with_columns(keys).join(lookup, on=names, how="left", maintain_order="left").drop(names)
        for column, recode in self._table.recode.items():
            text = self._columns(frame).text(recode.column)
            other = recode.other if recode.other is not None else text
            new = text.replace_strict(list(recode.map), list(recode.map.values()), default=other)
            # What is missing stays so, unless the mapping has a word for it.
            new = new.set(text.is_null(), recode.missing)
            frame = frame.with_columns(new.alias(column))
        return frame

    def _with_other_rows(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Columns that stand in another row of the same file, which must be in the file's first piece."""
        columns = self._columns(frame)
        for column, source in self._table.from_row.items():
            known = self._from_row.setdefault(column, {})
            text = columns.text(source.column).alias("text")
            found = frame.select("_file", "_row", text).filter(columns.holds(source.where))
            for file, texts, rows in found.group_by("_file").agg(pl.col("text").unique(), "_row").iter_rows():
                said = {known[file]} if file in known else set()
                if len(said.union(texts)) > 1:
                    raise DataError(
                        f"{file}: {self._table.name}: row {max(rows)} gives {column} a second time, differently."
                        " Correct one of the two rows, or split the file."
                    )
                known[file] = texts[0]
            files = frame["_file"].unique().to_list()
            values = pl.DataFrame(
                {"_file": files, column: [known.setdefault(file, None) for file in files]},
                schema={"_file": pl.String, column: pl.String},
            )
            frame = frame.join(values, on="_file", how="left", maintain_order="left")
        return frame

    def _without_dropped(self, frame: pl.DataFrame) -> pl.DataFrame:
        for step in self._table.drop:
            out = self._columns(frame).holds(step.where)
            self._collected.drop(self._table.name, step.name, int(out.sum()))
            frame = frame.filter(~out)
        return frame

    def _without_bad_subjects(self, frame: pl.DataFrame) -> pl.DataFrame:
        missing = frame[self._table.subject].is_null()
        return self._set_aside(frame, [Fault(missing, self._table.subject, "no subject", "Give the row its patient")])

    def _without_repeated(self, frame: pl.DataFrame) -> pl.DataFrame:
        """Set rows aside that have the same unique columns as one before, in this piece or earlier."""
        if not self._table.unique or not frame.height:
            return frame
        columns = self._columns(frame)
        texts = pl.DataFrame([columns.text(column).alias(column) for column in self._table.unique])
        key = texts.select(_key=pl.concat_str(pl.all(), separator="\x1f")).to_series()
        keyed = frame.select("_file", "_row").with_columns(key)
        first = keyed.filter(pl.col("_key").is_first_distinct() & pl.col("_key").is_not_null())
        fresh = first.join(self._seen, on="_key", how="anti", maintain_order="left")
        self._seen = pl.concat([self._seen, fresh.select("_key", "_file", "_row")])
        known = keyed.join(self._seen, on="_key", how="left", maintain_order="left")
        again = (
            known["_key"].is_not_null()
            & ((known["_row"] != known["_row_right"]) | (known["_file"] != known["_file_right"]))
        ).fill_null(value=False)
        advice = ""
        if again.any():
            there = known.row(int(again.arg_true()[0]), named=True)
            advice = f"Row {there['_row_right']} of {there['_file_right']} has it, too; remove one of them"
        reason = f"the same {', '.join(self._table.unique)} as another row"
        return self._set_aside(frame, [Fault(again, self._table.unique[0], reason, advice)])

    def _set_aside(self, frame: pl.DataFrame, faults: Sequence[Fault]) -> pl.DataFrame:
        """Set rows aside, each for the first of its faults; give the others."""
        faulty = self._faulty(frame.with_row_index("_index"), faults)
        if faulty is None:
            return frame
        self._quarantine([faulty])
        return frame.filter(~pl.int_range(pl.len(), dtype=pl.UInt32).is_in(faulty["_index"].to_list()))

    def _faulty(self, frame: pl.DataFrame, faults: Sequence[Fault]) -> pl.DataFrame | None:
        """The rows that have a fault, one for each fault, in the order of the faults; None if there is none."""
        columns = self._columns(frame)
        found = []
        for fault in faults:
            if not fault.where.any():
                continue
            where = fault.where.fill_null(value=False)
            shown = columns.text(fault.column) if fault.column in frame.columns else pl.Series([""])
            rows = frame.select(
                "_index",
                "_row",
                "_file",
                content=shown.new_from_index(0, frame.height) if len(shown) != frame.height else shown,
            )
            found.append(
                rows.filter(where).with_columns(
                    column=pl.lit(fault.column), reason=pl.lit(fault.reason), advice=pl.lit(fault.advice)
                )
            )
        return pl.concat(found) if found else None

    def _quarantine(self, faulty: Sequence[pl.DataFrame]) -> pl.Series:
        """Set rows aside, each for its first fault; give their indices."""
        rows = pl.concat(faulty).unique("_index", keep="first", maintain_order=True).sort("_index", maintain_order=True)
        aside = rows.select(
            "column",
            "reason",
            pl.col("content").cast(pl.String),
            file="_file",
            table=pl.lit(self._table.name),
            row="_row",
        )
        self._collected.set_aside(aside, rows["advice"][0])
        return rows["_index"]

    def _tell(self, frame: pl.DataFrame) -> None:
        """Give the intake the events of rows that have a subject, and count what became of the rows."""
        columns = self._columns(frame)
        shared = [(time, columns.moments(time)) for time in self._shared_times]
        drafts, faulty = [], []
        for number, rule in enumerate(self._rules):
            mask = columns.holds(rule.event.where) if rule.event.where else None
            rows = frame if mask is None else frame.filter(mask)
            if rows.height:
                at = next((moments for time, moments in shared if time == rule.time), None)
                if at is not None and mask is not None:
                    at = at.filter(mask)
                draft, faults = self._draft(rows, rule, at)
                drafts.append((number, draft))
                found = self._faulty(rows, faults)
                if found is not None:
                    faulty.append(found)
        why = np.zeros(frame.height, np.uint8)
        bad = np.zeros(frame.height, bool)
        if faulty:
            bad[self._quarantine(faulty).to_numpy()] = True
        for number, draft in drafts:
            good = draft.filter(pl.Series(~bad[draft["_index"].to_numpy()])) if faulty else draft
            events = self._judge(good, number, why)
            self._collected.add(self._table.name, events)
        counts = np.bincount(why[~bad], minlength=_KEPT + 1)
        self._collected.kept(self._table.name, int(counts[_KEPT]))
        for reason, count in zip(_WHY, counts, strict=False):
            self._collected.drop(self._table.name, reason, int(count))

    def _draft(self, rows: pl.DataFrame, rule: _Rule, at: Moments | None) -> tuple[pl.DataFrame, list[Fault]]:
        """Events of rows (columns of the intake, `_index`, `_why`: uint8), before it is known which rows are bad."""
        columns, event, faults = self._columns(rows), rule.event, []
        code = columns.fill(rule.code)
        if not event.optional and code.null_count():
            column = next((c for c in rule.code.columns if rows[c].null_count()), "")
            advice = "Give it one, or say optional = true where the event may be left out"
            faults.append(Fault(code.is_null(), column, "no code", advice))
        ready = code.is_not_null()
        time = pl.Series([None], dtype=pl.Datetime("us")).new_from_index(0, rows.height)
        if rule.time is not None:
            at = at or columns.moments(rule.time)
            faults += time_faults(at, rule.time_column, optional=event.optional)
            time, ready = at.at, ready & at.at.is_not_null()
        value = pl.Series([None], dtype=pl.Float64).new_from_index(0, rows.height)
        has_value = pl.Series(
            [(rule.value is None and event.text is None) or event.without_value == "keep"]
        ).new_from_index(0, rows.height)
        if rule.value is not None:
            value, wrong = columns.value(rule.value, words=event.text == rule.value)
            faults += wrong
            has_value = has_value | value.is_not_null()
        why = ready.cast(pl.UInt8) * 3 + (1 - ready.cast(pl.UInt8)) * 2
        free = None
        if event.text is not None:
            answer = columns.text(event.text).str.to_uppercase().set(value.is_not_null(), None)
            free = (answer.str.len_chars() > _LONGEST_ANSWER).fill_null(value=False)
            answer = answer.set(free, None)
            code = pl.select(pl.when(answer.is_not_null()).then(code + "//" + answer).otherwise(code)).to_series()
            has_value = has_value | answer.is_not_null()
            why = why.set(free & ready, 4)
        why = why.set(ready & has_value, _KEPT)
        unit = (
            columns.fill(rule.unit) if rule.unit else pl.Series([None], dtype=pl.String).new_from_index(0, rows.height)
        )
        encounter = (
            columns.text(self._table.encounter)
            if self._table.encounter
            else pl.Series([None], dtype=pl.String).new_from_index(0, rows.height)
        )
        draft = pl.DataFrame(
            {
                "_index": rows["_index"],
                "_why": why,
                "subject_id": rows["_subject"],
                "time": time,
                "code": code,
                "numeric_value": value,
                "unit": unit.set(value.is_null(), None),
                "encounter_id": encounter,
            }
        )
        return draft, faults

    def _judge(self, draft: pl.DataFrame, number: int, why: np.ndarray) -> pl.DataFrame:
        """The events to keep of a draft; notes in `why` (uint8 [rows], changed) how far each row came."""
        events = draft.filter(pl.col("_why") == _KEPT)
        once = self._rules[number].event.once
        if once is not None and events.height:
            who = events[f"{once}_id"].cast(pl.String)
            told = self._told.get(number, pl.Series([], dtype=pl.String))
            # An event that belongs to no encounter can't have been told for it.
            first = (who.is_first_distinct() & ~who.is_in(told.implode())) | who.is_null()
            told_before = events.filter(~first)["_index"].to_numpy()
            why[told_before] = np.maximum(why[told_before], 1)
            events = events.filter(first)
            self._told[number] = pl.concat([told, events[f"{once}_id"].cast(pl.String)])
        rest = draft.filter(pl.col("_why") != _KEPT)
        for index, reasons in (
            (events["_index"].to_numpy(), _KEPT),
            (rest["_index"].to_numpy(), rest["_why"].to_numpy()),
        ):
            why[index] = np.maximum(why[index], reasons)
        return events.drop("_index", "_why")
