"""CSV as warehouses export it, read in blocks: delimiter and header found, every row that is none named or set aside.

Bytes that aren't UTF-8 are marked on their way in, so that they cost their row and not the file.
"""

import codecs
import csv
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv

from tokenizer.errors import DataError
from tokenizer.sources.intake import Intake
from tokenizer.sources.omop_tables import KNOWN_COLUMNS
from tokenizer.wording import several

_BLOCK_BYTES = 16 << 20
_HEAD_BYTES = 1 << 20
_NULLS = ["", "NULL", "\\N"]
_END = "\x04"
# No character, and so in no text; but UTF-8 can write it.
_MARK = "\U0010fffe"
_DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError, pa.ArrowException)


@dataclass(frozen=True)
class Layout:
    """How a CSV file is written.

    Attributes:
        names: of the columns, in lower case.
        delimiter: comma or tab.
        quoted: whether fields may stand in double quotes.
        header_rows: rows before the first of the table.
        empty: whether nothing follows the header.
    """

    names: tuple[str, ...]
    delimiter: str
    quoted: bool
    header_rows: int
    empty: bool


@dataclass
class Oddities:
    """What was odd about a CSV file, up to the piece that came last.

    Attributes:
        rows: with too few or too many fields (`number`, `text`, `actual_columns`, `expected_columns`).
        marked: whether any byte was no UTF-8.
    """

    rows: list[Any] = field(default_factory=list)
    marked: bool = False

    def taken(self) -> list[Any]:
        """Take the odd rows out, while the reader may add more."""
        taken = []
        while self.rows:
            taken.append(self.rows.pop(0))
        return taken


def head_of(stream: Any) -> bytes:
    """The first bytes, at least one of which lies behind the header if there is any."""
    head = b""
    while len(head) < _HEAD_BYTES and (more := stream.read(_HEAD_BYTES - len(head))):
        head += more
    return head


def layout_of(head: bytes, label: str, table: str, order: tuple[str, ...] | None, hint: str) -> Layout:
    """Find delimiter and header in a file's first bytes.

    Args:
        head: what `head_of` gave.
        label: the file, for messages.
        table: that it holds.
        order: the columns, should there be no header.
        hint: what a person can do about a missing header.

    Raises:
        DataError: not UTF-8 at all, empty, or a header that can't be used.
    """
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        kind = "utf-32" if head.startswith(codecs.BOM_UTF32_LE) else "utf-16"
        raise DataError(f"{label}: written as {kind.upper()}. Save it as UTF-8 (iconv -f {kind} -t utf-8 file > new).")
    if b"\0" in head.partition(b"\n")[0]:
        raise DataError(
            f"{label}: NUL characters in the first row, as UTF-16 has them. Save it as UTF-8 (iconv -f utf-16le -t"
            " utf-8 file > new), or export it again."
        )
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    lines = io.StringIO(text, newline=None).readlines()
    if not text.strip():
        raise DataError(f"{label}: empty, without even a header. Remove the file, or export the table again.")
    known = KNOWN_COLUMNS.get(table, frozenset())

    def columns_told(delimiter: str) -> int:
        return max(len(known & set(_cells(line, delimiter))) for line in lines[:2])

    # A comma or a tab may stand in any text, so the header decides; without one, tabs are rare enough in text.
    delimiter = max("\t,", key=columns_told)
    if not columns_told(delimiter):
        delimiter = "\t" if any("\t" in line for line in lines[:2]) else ","
    rows = [_cells(line, delimiter) for line in lines[:2]]
    # An export that lost its header may have it as the first row, below made-up names.
    header = next((at for at, cells in enumerate(rows) if known & set(cells)), None)
    if header is None:
        names = _ordered(len(rows[0]), label, table, order, f"{lines[0].strip()[:80]!r}. {hint}")
    else:
        names = tuple(rows[header])
    # Vocabulary files from Athena have tabs, and quotes that mean nothing.
    quoted = delimiter == "," or (header is not None and '"' in lines[header])
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{label}: the column {twice!r} is there twice. Rename or remove one.")
    header_rows = 0 if header is None else header + 1
    empty = len(head) < _HEAD_BYTES and not "".join(lines[header_rows:]).strip()
    return Layout(names, delimiter, quoted, header_rows, empty)


def _ordered(fields: int, label: str, table: str, order: tuple[str, ...] | None, found: str) -> tuple[str, ...]:
    if order is None:
        raise DataError(
            f"{label}: no header with columns of {table}, separated by comma or tab; the first row is {found}"
        )
    if len(order) != fields:
        raise DataError(
            f"{label}: no header, and {several(fields, 'column')} where the order of {table} has {len(order)}. Choose"
            " the version that fits, or give a table spec."
        )
    return order


def _cells(line: str, delimiter: str) -> list[str]:
    return [cell.strip().strip('"').lower() for cell in next(csv.reader([line], delimiter=delimiter), [])]


class _Marked(io.RawIOBase):
    """A stream of bytes that is UTF-8 whatever came: bytes that are none are marked, and it has an end of our own."""

    def __init__(self, stream: Any, end: bytes, odd: Oddities) -> None:
        self._stream = stream
        self._odd = odd
        self._end = end
        self._cut = b""
        self._ready = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """As many bytes as asked for, unless it ends: Arrow refuses a row that spans all of a block, if short."""
        while (size < 0 or len(self._ready) < size) and (more := self._next(size)):
            self._ready += more
        end = len(self._ready) if size < 0 else size
        data, self._ready = self._ready[:end], self._ready[end:]
        return data

    def _next(self, size: int) -> bytes:
        if not (data := self._stream.read(size)):
            rest, self._cut, self._end = self._cut + self._end, b"", b""
            return self._marked(rest)
        data = self._cut + bytes(data) if self._cut else bytes(data)
        whole = len(data) - _started(data)
        self._cut = data[whole:]
        return self._marked(data[:whole]) or self._next(size)

    def _marked(self, data: bytes) -> bytes:
        try:
            data.decode()
        except UnicodeDecodeError:
            self._odd.marked = True
            return data.decode("utf-8", "fedcomet-mark").encode()
        return data


def _started(data: bytes) -> int:
    """How many bytes at the end begin a character that isn't complete."""
    for back, byte in enumerate(reversed(data[-3:]), start=1):
        if byte >= 0xC0:
            return back if back < 2 + (byte >= 0xE0) + (byte >= 0xF0) else 0
        if byte < 0x80:
            return 0
    return 0


def _mark(problem: UnicodeError) -> tuple[str, int]:
    assert isinstance(problem, UnicodeDecodeError)
    return _MARK * (problem.end - problem.start), problem.end


codecs.register_error("fedcomet-mark", _mark)


def read_csv(
    stream: Any,
    names: Sequence[str],
    columns: list[str],
    *,
    delimiter: str,
    quoted: bool,
    skip: int,
    odd: Oddities,
    label: str,
) -> Iterator[pl.DataFrame]:
    """Read CSV in blocks: the chosen columns as text, null where a field is empty; `number_rows` finishes them.

    Args:
        stream: of bytes.
        names: of all columns.
        columns: those to give.
        delimiter: between fields.
        quoted: whether fields may stand in double quotes.
        skip: rows of the header.
        odd: gets the rows with too few or too many fields, which are left out.
        label: the file, for messages.

    Raises:
        DataError: damaged, or quotes that are not closed.
    """

    def note(row: Any) -> str:
        odd.rows.append(row)
        return "skip"

    # A last row of our own: where it doesn't come out, a quote was never closed and has swallowed it, and more.
    marked = _Marked(stream, f"\n{delimiter.join([_END] * len(names))}\n".encode(), odd)
    options = {
        "read_options": pyarrow.csv.ReadOptions(
            use_threads=False, block_size=_BLOCK_BYTES, column_names=list(names), skip_rows=skip
        ),
        "parse_options": pyarrow.csv.ParseOptions(
            delimiter=delimiter,
            quote_char='"' if quoted else False,
            newlines_in_values=quoted,
            invalid_row_handler=note,
        ),
        "convert_options": pyarrow.csv.ConvertOptions(
            include_columns=columns,
            column_types=dict.fromkeys(columns, pa.string()),
            check_utf8=False,
            strings_can_be_null=True,
            null_values=_NULLS,
        ),
    }
    before: pl.DataFrame | None = None
    reader = guarded(label, lambda: pyarrow.csv.open_csv(marked, **options))
    with reader:
        while (batch := guarded(label, lambda: next(reader, None))) is not None:
            if not batch.num_rows:  # all of its rows were odd
                continue
            if before is not None:
                yield before
            before = pl.DataFrame(pl.from_arrow(batch))
    if before is None or set(before.row(-1)) != {_END}:
        raise DataError(f"{label}: a quote is opened and never closed. Close it, or export the table again.")
    if before.height > 1:
        yield before[:-1]


def number_rows(
    batches: Iterator[pl.DataFrame],
    odd: Oddities,
    wanted: list[str],
    label: str,
    table: str,
    intake: Intake,
    header_rows: int = 0,
) -> Iterator[pl.DataFrame]:
    """Give CSV blocks their row numbers and turn bytes to text; rows that are none of the table's are set aside."""
    at = header_rows + 1
    ahead = np.zeros(0, np.int64)
    for frame in batches:
        # The reader may be a block ahead: rows that it left out can lie behind this piece.
        left_out = odd.taken()
        ahead = np.concatenate([ahead[ahead >= at], [row.number for row in left_out]]).astype(np.int64)
        _set_aside(left_out, label, table, intake)
        numbers = np.arange(at, at + frame.height + len(ahead))
        numbers = numbers[~np.isin(numbers, ahead)][: frame.height]
        at = int(numbers[-1]) + 1 if len(numbers) else at
        yield _decode(complete(frame, wanted, numbers), odd, label, table, intake)
    _set_aside(odd.taken(), label, table, intake)


def _set_aside(left_out: list[Any], label: str, table: str, intake: Intake) -> None:
    for row in left_out:
        text = row.text.replace(_MARK, "\ufffd")
        joined = "\n" in text.strip()
        reason = (
            f"{several(row.actual_columns, 'field')} where {row.expected_columns} are needed"
            + ", over several lines" * joined
        )
        advice = "Close the quote that joins them" if joined else "Quote fields that hold a delimiter"
        intake.rows(table, 1)
        intake.bad(label, table, row.number, "", reason, text, advice)


def _decode(frame: pl.DataFrame, odd: Oddities, label: str, table: str, intake: Intake) -> pl.DataFrame:
    """Turn bytes to text, and set aside rows with text that isn't UTF-8."""
    for column in frame.columns[1:]:
        if frame[column].dtype == pl.Binary:
            frame = frame.with_columns(_decoded(frame[column], odd))
        if not odd.marked or frame[column].dtype != pl.String:
            continue
        bad = frame[column].str.contains(_MARK, literal=True).fill_null(value=False)
        if bad.any():
            for row, cell in frame.filter(bad).select("_row", column).iter_rows():
                intake.rows(table, 1)
                advice = "Save the file as UTF-8 (iconv -f latin1 -t utf-8 file > new)"
                intake.bad(label, table, row, column, "not UTF-8", cell.replace(_MARK, "\ufffd"), advice)
            frame = frame.filter(~bad)
    return frame


def _decoded(column: pl.Series, odd: Oddities) -> pl.Series:
    try:
        return column.cast(pl.String)
    except pl.exceptions.ComputeError:
        odd.marked = True
        texts = [None if cell is None else cell.decode("utf-8", "fedcomet-mark") for cell in column]
        return pl.Series(column.name, texts, dtype=pl.String)


def complete(frame: pl.DataFrame, wanted: list[str], numbers: np.ndarray) -> pl.DataFrame:
    """Add row numbers (int64 [N]) as `_row`, and null columns for those that a file lacks; in the order of `wanted`."""
    missing = [pl.lit(None, pl.String).alias(name) for name in wanted if name not in frame.columns]
    return frame.with_columns(*missing, pl.Series("_row", numbers, dtype=pl.Int64)).select("_row", *wanted)


def guarded(label: str, act: Callable[[], Any]) -> Any:
    """Do something with a file, and give what it gives; damage is an error that names the file."""
    try:
        return act()
    except _DAMAGE as problem:
        raise damaged(label, problem) from None


def damaged(label: str, problem: BaseException) -> DataError:
    """The error of a file that can't be read, or only in part."""
    if isinstance(problem, PermissionError):
        return DataError(f"{label}: may not be read. Ask for the right to read it.")
    reason = (str(problem) or type(problem).__name__).splitlines()[0]
    if "straddl" in reason or "out of sync" in reason:
        return DataError(f"{label}: a quote is opened and not closed within {_BLOCK_BYTES >> 20} MiB. Close it.")
    return DataError(f"{label}: damaged or cut short ({reason}). Export or copy the file again.")
