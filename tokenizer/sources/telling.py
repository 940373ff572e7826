"""Rows of one table become events by the rules of a mapping; every row is accounted for.

A row is bad as a whole if any event that it should give is: none of its events is kept then. A row that gives no event
is counted under the name of the filter that left it out, or the last of these that fits: "no event fits", "told before"
(by the patient's first row), "nothing to tell" (an optional time or code is missing), "no value", "free text".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tokenizer.errors import DataError
from tokenizer.sources.columns import Columns, Fault, Moments, time_faults
from tokenizer.sources.intake import Intake
from tokenizer.sources.mapping import Event, Table, Template, Time

_LONGEST_ANSWER = 40
_WHY = ("no event fits", "told before", "nothing to tell", "no value", "free text")
_TOLD_BEFORE, _NOTHING, _NO_VALUE, _FREE_TEXT = range(1, 5)
_KEPT = len(_WHY)


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


class Telling:
    """One table on its way into the intake.

    Args:
        table: of the mapping.
        decimal: mark of numbers in texts.
        collected: where events and bad rows go.
        lookups: by name: frames with the keys as texts `_key0`, `_key1`, ..., and columns `lookup.column`.

    Attributes:
        wanted: (column, what for) that its files must have.
    """

    def __init__(self, table: Table, decimal: str, collected: Intake, lookups: dict[str, pl.DataFrame]) -> None:
        self._table = table
        self._decimal = decimal
        self._collected = collected
        self._lookups = lookups
        self._rules = list(_rules(table))
        made = {*table.from_file, *table.from_row, *table.recode}
        uses = dict(reversed(list(table.uses())))
        self.wanted = [(c, use) for c, use in uses.items() if c not in made and table.joined(c) is None]
        times = [rule.time for rule in self._rules if rule.time is not None]
        self._shared_times = [time for n, time in enumerate(times) if time in times[:n] and time not in times[n + 1 :]]
        self._from_row: dict[str, dict[str, str | None]] = {}
        self._seen = pl.DataFrame(schema={"_key": pl.String, "_file": pl.String, "_row": pl.Int64})
        self._told: dict[int, pl.Series] = {}

    def take(self, frame: pl.DataFrame) -> None:
        """Give the intake the events of a piece: the wanted columns, `_file` and `_row`."""
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
                        f"{file}: {self._table.name}: row {max(rows)} gives {column} differently from a row before, or"
                        " too late for the first rows. Correct one of the rows, or split the file."
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
        return frame.filter(~pl.int_range(pl.len(), dtype=pl.UInt32).is_in(faulty["_index"].implode()))

    def _faulty(self, frame: pl.DataFrame, faults: Sequence[Fault]) -> pl.DataFrame | None:
        """The rows that have a fault, one for each fault, in the order of the faults; None if there is none."""
        columns = self._columns(frame)
        found = []
        for fault in faults:
            if not fault.where.any():
                continue
            where = fault.where.fill_null(value=False)
            content = columns.text(fault.column) if fault.column else pl.lit(None, pl.String)
            rows = frame.select("_index", "_row", "_file", content=content).filter(where)
            told = {"column": fault.column, "reason": fault.reason, "advice": fault.advice}
            found.append(rows.with_columns(pl.lit(text).alias(name) for name, text in told.items()))
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
        time, value = _nothing(rows.height, pl.Datetime("us")), _nothing(rows.height, pl.Float64())
        encounter = _nothing(rows.height, pl.String())
        code = columns.fill(rule.code)
        if code.null_count() and not event.optional:
            column = next(c for c in rule.code.columns if rows[c].null_count())
            advice = "Give it one, or say optional = true where the event may be left out"
            faults.append(Fault(code.is_null(), column, "no code", advice))
        ready = code.is_not_null()
        if rule.time is not None:
            at = at or columns.moments(rule.time)
            faults += time_faults(at, rule.time_column, optional=event.optional)
            time, ready = at.at, ready & at.at.is_not_null()
        if rule.value is not None:
            value, wrong = columns.value(rule.value, words=event.text == rule.value)
            faults += wrong
        code, why = self._answered(columns, rule, code, value, ready)
        if self._table.encounter:
            encounter = columns.text(self._table.encounter)
        unit = columns.fill(rule.unit).set(value.is_null(), None) if rule.unit else _nothing(rows.height, pl.String())
        draft = {
            "_index": rows["_index"],
            "_why": why,
            "subject_id": rows["_subject"],
            "time": time,
            "code": code,
            "numeric_value": value,
            "unit": unit,
            "encounter_id": encounter,
        }
        return pl.DataFrame(draft), faults

    def _answered(
        self, columns: Columns, rule: _Rule, code: pl.Series, value: pl.Series, ready: pl.Series
    ) -> tuple[pl.Series, pl.Series]:
        """Codes with their answers in words, and what becomes of each row as far as this rule goes (uint8)."""
        event = rule.event
        why = pl.Series([_NOTHING], dtype=pl.UInt8).new_from_index(0, len(code)).set(ready, _NO_VALUE)
        if (rule.value is None and event.text is None) or event.without_value == "keep":
            why = why.set(ready, _KEPT)
        if event.text is not None:
            answer = columns.text(event.text).str.to_uppercase().set(value.is_not_null(), None)
            free = (answer.str.len_chars() > _LONGEST_ANSWER).fill_null(value=False)
            answer = answer.set(free, None)
            table = pl.DataFrame({"code": code, "answer": answer})
            full = pl.concat_str("code", pl.lit("//"), "answer")
            code = table.select(pl.coalesce(full, "code")).to_series()
            why = why.set(free & ready & (why == _NO_VALUE), _FREE_TEXT).set(ready & answer.is_not_null(), _KEPT)
        return code, why.set(ready & value.is_not_null(), _KEPT)

    def _judge(self, draft: pl.DataFrame, number: int, why: NDArray[np.uint8]) -> pl.DataFrame:
        """The events to keep of a draft; notes in `why` (uint8 [rows], changed) how far each row came."""
        events = draft.filter(pl.col("_why") == _KEPT)
        once = self._rules[number].event.once
        if once is not None and events.height:
            who = events[f"{once}_id"].cast(pl.String)
            told = self._told.get(number, pl.Series([], dtype=pl.String))
            # An event that belongs to no encounter can't have been told for it.
            first = (who.is_first_distinct() & ~who.is_in(told.implode())) | who.is_null()
            told_before = events.filter(~first)["_index"].to_numpy()
            why[told_before] = np.maximum(why[told_before], _TOLD_BEFORE)
            events = events.filter(first)
            self._told[number] = pl.concat([told, events[f"{once}_id"].cast(pl.String)])
        rest = draft.filter(pl.col("_why") != _KEPT)
        for index, reasons in (
            (events["_index"].to_numpy(), _KEPT),
            (rest["_index"].to_numpy(), rest["_why"].to_numpy()),
        ):
            why[index] = np.maximum(why[index], reasons)
        return events.drop("_index", "_why")


def _nothing(count: int, kind: pl.DataType) -> pl.Series:
    return pl.Series([None], dtype=kind).new_from_index(0, count)
