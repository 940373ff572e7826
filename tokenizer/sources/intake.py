"""What every source shares: events are collected, spilled by subject, and become one MEDS dataset; nothing is lost.

A source reads its tables in any order and in pieces, and gives each piece's events to an `Intake`. Rows that can't be
used are refused with file, table, row and column, or, where the site asked for it, set aside in `quarantine.csv` with
the reason. Rows that a named filter drops are counted under its name. So every row that was read is kept, dropped by
name, or in quarantine, and `Flow` says how many of each.

Memory is bounded by one shard: pieces are spilled to disk by a hash of the subject, and each bucket is sorted by
itself. The dataset appears whole or not at all.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tokenizer.errors import DataError
from tokenizer.events import as_text, write_meds
from tokenizer.sources.quarantine import Quarantine
from tokenizer.sources.repeats import Repeats
from tokenizer.sources.spill import Spill, spill_folder
from tokenizer.sources.subjects import SubjectIds
from tokenizer.spelling import LONGEST, fit
from tokenizer.wording import several

EVENTS: dict[str, Any] = {
    "subject_id": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "numeric_value": pl.Float32,
    "unit": pl.String,
    "encounter_id": pl.String,
}
"""The columns that sources give: MEDS' own, the unit of the value as recorded, and the encounter it belongs to."""

QUARANTINE, FLOW = "quarantine.csv", "metadata/fedcomet_flow.json"


@dataclass
class Flow:
    """What became of the rows of a source; written beside the events, and never leaves the site.

    Attributes:
        source: kind and place, for people.
        rows: rows (or resources) read, per table.
        kept: rows that gave at least one event, per table, where the source counts them.
        events: events kept, per table; one row may give several.
        dropped: rows that gave no event, per table and named filter.
        quarantined: rows set aside, per table and reason.
        subjects: patients with at least one event.
        notes: what was odd, in sentences.
    """

    source: str
    rows: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    quarantined: dict[str, dict[str, int]] = field(default_factory=dict)
    subjects: int = 0
    notes: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, dataset: Path) -> "Flow | None":
        """Read the flow of a dataset that a source wrote; None where another tool wrote it."""
        file = dataset / FLOW
        if not file.exists():
            return None
        try:
            return cls(**json.loads(file.read_bytes()))
        except (ValueError, TypeError) as problem:
            raise DataError(f"{file}: not a flow table ({problem}); import the records again.") from None

    @property
    def events_total(self) -> int:
        """Events of all tables."""
        return sum(self.events.values())

    @property
    def dropped_total(self) -> int:
        """Rows that named filters left out, of all tables."""
        return sum(sum(filters.values()) for filters in self.dropped.values())

    @property
    def quarantined_total(self) -> int:
        """Rows set aside, of all tables."""
        return sum(sum(reasons.values()) for reasons in self.quarantined.values())


class Intake:
    """Collects the events of one source; made by `intake`.

    Attributes:
        flow: what became of the rows so far.
        quarantine: whether bad rows are set aside; otherwise the first one ends the import.
    """

    def __init__(self, aside: Path, source: str, *, quarantine: bool) -> None:
        self.flow = Flow(source)
        self.quarantine = quarantine
        self._spill = Spill(aside)
        self._aside = Quarantine(aside / QUARANTINE, allowed=quarantine)
        self._ids = SubjectIds()
        self._folder = aside
        self._unfit: dict[str, int] = {}
        self.flow.quarantined = self._aside.counts

    def rows(self, table: str, count: int) -> None:
        """Count rows that were read."""
        self.flow.rows[table] = self.flow.rows.get(table, 0) + count

    def kept(self, table: str, count: int) -> None:
        """Count rows that gave at least one event; a source that does so has its sums checked at the end."""
        self.flow.kept[table] = self.flow.kept.get(table, 0) + count

    def add(self, table: str, events: pl.DataFrame) -> None:
        """Take events: the columns of `EVENTS` (those after `code` may be missing), null times are static facts.

        Raises:
            DataError: an event without a subject or a code, which a source should have set aside.
        """
        full = events.select(
            pl.col(name).cast(kind) if name in events.columns else pl.lit(None, kind).alias(name)
            for name, kind in EVENTS.items()
        )
        for needed in ("subject_id", "code"):
            if full[needed].null_count():
                raise DataError(f"{self.flow.source}: {table} gave an event without {needed}; set such rows aside.")
        full = self._fit(table, full)
        self.flow.events[table] = self.flow.events.get(table, 0) + full.height
        self._spill.add(full)

    def _fit(self, table: str, events: pl.DataFrame) -> pl.DataFrame:
        """Write codes otherwise that can't be tokens as they are; how many, is noted in the end."""
        if not _may_be_unfit(events["code"]):
            return events
        new = {code: better for code in events["code"].unique() if (better := fit(code)) != code}
        if not new:
            return events
        self._unfit[table] = self._unfit.get(table, 0) + int(events["code"].is_in(list(new)).sum())
        return events.with_columns(pl.col("code").replace(new))

    def drop(self, table: str, filter_name: str, count: int) -> None:
        """Count rows that a named filter left out."""
        if count:
            reasons = self.flow.dropped.setdefault(table, {})
            reasons[filter_name] = reasons.get(filter_name, 0) + int(count)

    def bad(
        self, file: str, table: str, row: int, column: str, reason: str, content: str = "", advice: str = ""
    ) -> None:
        """Set a row aside, or refuse the source because of it.

        Args:
            file: of the source.
            table: for counting; the file's kind.
            row: number of the row (or line) in the file, from 1, headers counted, as an editor shows it.
            column: or field; "" for the whole row.
            reason: what is wrong, without the value.
            content: the value or the row; goes to the quarantine file only.
            advice: what to do.

        Raises:
            DataError: bad rows are not set aside in this import.
        """
        self._aside.add(file, table, row, column, reason, content, advice)

    def bad_rows(
        self, frame: pl.DataFrame, where: pl.Expr, *, file: str, table: str, column: str, reason: str, advice: str = ""
    ) -> pl.DataFrame:
        """Set all rows of a piece aside that fulfil `where`; give the others.

        `frame` must have the column `_row`, the row's number in its file.
        """
        marked = frame.with_columns(_bad=where.fill_null(value=False))
        bad = marked.filter("_bad")
        if not bad.height:
            return frame
        content = as_text(bad[column]) if column in frame.columns else pl.lit(None, pl.String)
        self.set_aside(
            bad.select(
                file=pl.lit(file),
                table=pl.lit(table),
                row=pl.col("_row"),
                column=pl.lit(column),
                reason=pl.lit(reason),
                content=content,
            ),
            advice,
        )
        return marked.filter(~pl.col("_bad")).drop("_bad")

    def set_aside(self, rows: pl.DataFrame, advice: str = "") -> None:
        """Set rows aside that stand in a frame with the columns of the quarantine file, as `bad` does one by one."""
        self._aside.add_all(rows, advice)

    def subject_ids(self, texts: pl.Series) -> pl.Series:
        """Give int64 subject ids for a source's own: numbers stay, other texts are hashed (63 bits, same everywhere).

        Raises:
            DataError: two texts have the same hash (about one chance in 10^5 for ten million patients).
        """
        return self._ids.of(texts)

    def repeats(self) -> Repeats:
        """Something to count with how many rows of a table have the number of another row."""
        return Repeats(self._folder)

    def note(self, note: str) -> None:
        """Keep a sentence for people."""
        if note not in self.flow.notes:
            self.flow.notes.append(note)

    def shards(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """Give the shards, each with all events of its subjects; to be called once, when all events are in."""
        self._ids.check()
        self._check_sums()
        for table, count in self._unfit.items():
            those = several(count, "event has a code", "events have codes")
            self.note(
                f"{table}: {those} with control characters, of more than {LONGEST} characters or with * as a part;"
                " they are written otherwise (docs/tokenizer.md, Tokens)."
            )
        for name, events in self._spill.shards():
            self.flow.subjects += events["subject_id"].n_unique()
            yield name, events

    def close(self, dataset: Path) -> None:
        """Write quarantine and flow into a dataset's folder that isn't in its place yet."""
        file = self._aside.flush()
        if file is not None:
            shutil.copyfile(file, dataset / QUARANTINE)
        text = json.dumps(asdict(self.flow), indent=2, sort_keys=True, ensure_ascii=False)
        (dataset / FLOW).write_text(text + "\n", encoding="utf-8")

    def _check_sums(self) -> None:
        for table, kept in self.flow.kept.items():
            dropped = sum(self.flow.dropped.get(table, {}).values())
            aside = sum(self.flow.quarantined.get(table, {}).values())
            rows = self.flow.rows.get(table, 0)
            if kept + dropped + aside != rows:
                raise DataError(
                    f"{self.flow.source}: of {several(rows, 'row')} of {table}, {kept} were kept, {dropped} dropped"
                    f" and {aside} set aside, which doesn't add up. This is a fault of the importer; please report it."
                )


@contextmanager
def intake(out: Path, source: str, *, name: str, quarantine: bool = False) -> Iterator[Intake]:
    """Collect the events of a source; when the block ends without an error, they become the MEDS dataset `out`.

    Args:
        out: the folder to make; one that stands there is replaced, in one step.
        source: kind and place, for people.
        name: of the dataset.
        quarantine: set bad rows aside in `out/quarantine.csv` instead of refusing the source.

    Raises:
        DataError: no event was left, or one that doesn't fit MEDS.
    """
    out = out.absolute()
    with spill_folder(out) as aside:
        collected = Intake(aside, source, quarantine=quarantine)
        yield collected
        if not collected.flow.events_total:
            raise DataError(_nothing_left(collected.flow))
        write_meds(out, collected.shards(), name=name, finish=collected.close)


def _may_be_unfit(codes: pl.Series) -> bool:
    """Whether some code may have to be written otherwise, by its bytes: distinct codes take longer to find."""
    if not len(codes):
        return False
    if int(codes.str.len_bytes().max()) > LONGEST:  # type: ignore[arg-type]
        return True
    text = codes.to_arrow()
    data = np.frombuffer(text.buffers()[2] or b"", np.uint8)
    return bool(((data < ord(" ")) | (data == ord("*")) | (data > ord("~"))).any())


def _nothing_left(flow: Flow) -> str:
    read = ", ".join(f"{several(count, 'row')} of {table}" for table, count in flow.rows.items()) or "no rows"
    why = [
        f"{count} of {table}: {reason}"
        for kind in (flow.dropped, flow.quarantined)
        for table, reasons in kind.items()
        for reason, count in reasons.items()
    ]
    return f"{flow.source}: no event is left to tokenize; read were {read}" + (f" ({'; '.join(why)})." if why else ".")
