"""What every source shares: events are collected, spilled by subject, and become one MEDS dataset; nothing is lost.

A source reads its tables in any order and in pieces, and gives each piece's events to an `Intake`. Rows that can't be
used are refused with file, table, row and column, or, where the site asked for it, set aside in `quarantine.csv` with
the reason. Rows that a named filter drops are counted under its name. So every row that was read is kept, dropped by
name, or in quarantine, and `Flow` says how many of each.

Memory is bounded by one shard: pieces are spilled to disk by a hash of the subject, and each bucket is sorted by
itself. The dataset appears whole or not at all.
"""

import csv
import hashlib
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
from tokenizer.events import write_meds

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

# Years that a record of a living person can hold; what lies outside is a typing error or a filler such as 9999-12-31.
EARLIEST, LATEST = "1850-01-01", "2250-01-01"

_BUCKETS = 64
_SPILL_EVENTS = 1_000_000
_SHARD_EVENTS = 2_000_000


@dataclass
class Flow:
    """What became of the rows of a source; written beside the events, and never leaves the site.

    Attributes:
        source: kind and place, for people.
        rows: rows (or resources) read, per table.
        events: events kept, per table; one row may give several.
        dropped: rows that gave no event, per table and named filter.
        quarantined: rows set aside, per table and reason.
        subjects: patients with at least one event.
        notes: what was odd, in sentences.
    """

    source: str
    rows: dict[str, int] = field(default_factory=dict)
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
        self._aside = aside
        self._waiting: list[pl.DataFrame] = []
        self._waiting_rows = 0
        self._parts = 0
        self._texts: dict[int, str] = {}
        self._bad_rows: list[tuple[str, str, int, str, str, str]] = []

    def rows(self, table: str, count: int) -> None:
        """Count rows that were read."""
        self.flow.rows[table] = self.flow.rows.get(table, 0) + count

    def add(self, table: str, events: pl.DataFrame) -> None:
        """Take events: the columns of `EVENTS` (those after `code` may be missing), null times are static facts."""
        full = events.select(
            pl.col(name).cast(kind) if name in events.columns else pl.lit(None, kind).alias(name)
            for name, kind in EVENTS.items()
        )
        self.flow.events[table] = self.flow.events.get(table, 0) + full.height
        self._waiting.append(full)
        self._waiting_rows += full.height
        if self._waiting_rows >= _SPILL_EVENTS:
            self._spill()

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
        if not self.quarantine:
            place = f"{file}: {table}, row {row}" + (f", {column}" if column else "")
            shown = f" ({content[:80]!r})" if content else ""
            raise DataError(
                f"{place}: {reason}{shown}. {advice or 'Correct the row'}, or import with --quarantine to set such rows"
                " aside."
            )
        reasons = self.flow.quarantined.setdefault(table, {})
        reasons[reason] = reasons.get(reason, 0) + 1
        self._bad_rows.append((file, table, row, column, reason, content[:2000]))
        if len(self._bad_rows) >= 10_000:
            self._write_bad_rows()

    def bad_rows(
        self, frame: pl.DataFrame, where: pl.Expr, *, file: str, table: str, column: str, reason: str, advice: str = ""
    ) -> pl.DataFrame:
        """Set all rows of a piece aside that fulfil `where`; give the others.

        `frame` must have the column `_row`, the row's number in its file.
        """
        marked = frame.with_columns(_bad=where.fill_null(value=False))
        for row in marked.filter("_bad").iter_rows(named=True):
            content = row.get(column)
            self.bad(file, table, int(row["_row"]), column, reason, "" if content is None else str(content), advice)
        return marked.filter(~pl.col("_bad")).drop("_bad")

    def subject_ids(self, texts: pl.Series) -> pl.Series:
        """Give int64 subject ids for a source's own: numbers stay, other texts are hashed (63 bits, same everywhere).

        Raises:
            DataError: two texts have the same hash (about one chance in 10^5 for ten million patients).
        """
        distinct = texts.drop_nulls().unique().cast(pl.String)
        table = pl.DataFrame(
            {"text": distinct, "id": pl.Series([self._subject_id(t) for t in distinct], dtype=pl.Int64)}
        )
        joined = (
            texts.cast(pl.String).alias("text").to_frame().join(table, on="text", how="left", maintain_order="left")
        )
        return joined["id"].alias(texts.name)

    def note(self, note: str) -> None:
        """Keep a sentence for people."""
        if note not in self.flow.notes:
            self.flow.notes.append(note)

    def shards(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """Give the shards, each with all events of its subjects; to be called once, when all events are in."""
        self._spill()
        sizes = [self._bucket_rows(bucket) for bucket in range(_BUCKETS)]
        subjects: set[int] = set()
        group: list[int] = []
        number = 0
        for bucket in range(_BUCKETS):
            group.append(bucket)
            if sum(sizes[b] for b in group) >= _SHARD_EVENTS or bucket == _BUCKETS - 1:
                files = [file for b in group for file in self._bucket_files(b)]
                group = []
                if files:
                    events = pl.concat([pl.read_ipc(file) for file in files])
                    subjects.update(events["subject_id"].unique())
                    yield f"{number:04d}", events
                    number += 1
        self.flow.subjects = len(subjects)

    def close(self, dataset: Path) -> None:
        """Write quarantine and flow into a dataset's folder that isn't in its place yet."""
        self._write_bad_rows()
        if (self._aside / QUARANTINE).exists():
            shutil.copyfile(self._aside / QUARANTINE, dataset / QUARANTINE)
        text = json.dumps(asdict(self.flow), indent=2, sort_keys=True, ensure_ascii=False)
        (dataset / FLOW).write_text(text + "\n", encoding="utf-8")

    def _subject_id(self, text: str) -> int:
        if text.isascii() and text.isdigit() and text == str(int(text)) and int(text) < 2**63:
            number = int(text)
        else:
            number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
        if (other := self._texts.setdefault(number, text)) != text:
            raise DataError(
                f"The patients {text!r} and {other!r} get the same subject_id {number}; rename one of them."
            )
        return number

    def _spill(self) -> None:
        if not self._waiting_rows:
            return
        events = pl.concat(self._waiting)
        self._waiting, self._waiting_rows = [], 0
        spread = events["subject_id"].to_numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bucket = (spread >> np.uint64(58)).astype(np.int64)
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=_BUCKETS))
        ordered = events[order]
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                ordered[int(start) : int(end)].write_ipc(
                    self._aside / f"{number:02d}-{self._parts:06d}.{end - start}.arrow"
                )
        self._parts += 1

    def _bucket_files(self, bucket: int) -> list[Path]:
        return sorted(self._aside.glob(f"{bucket:02d}-*.arrow"))

    def _bucket_rows(self, bucket: int) -> int:
        return sum(int(file.name.split(".")[1]) for file in self._bucket_files(bucket))

    def _write_bad_rows(self) -> None:
        if not self._bad_rows:
            return
        file = self._aside / QUARANTINE
        fresh = not file.exists()
        with file.open("a", encoding="utf-8", newline="") as out:
            writer = csv.writer(out)
            if fresh:
                writer.writerow(["file", "table", "row", "column", "reason", "content"])
            writer.writerows(self._bad_rows)
        self._bad_rows = []


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
    aside = out.with_name(f".{out.name}.spill")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        collected = Intake(aside, source, quarantine=quarantine)
        yield collected
        if not collected.flow.events_total:
            raise DataError(f"{source}: no event is left to tokenize; look at what was read: {collected.flow.rows}.")
        write_meds(out, collected.shards(), name=name, finish=collected.close)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def out_of_range(column: str) -> pl.Expr:
    """Whether a time lies outside of the years that a record can hold."""
    bounds = [pl.lit(day).str.to_datetime("%Y-%m-%d", time_unit="us") for day in (EARLIEST, LATEST)]
    return (pl.col(column) < bounds[0]) | (pl.col(column) >= bounds[1])
