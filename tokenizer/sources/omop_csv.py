"""CSV as warehouses export it, read in blocks: delimiter and header found, every row that is none named or set aside.

A block is parsed as bytes, so that text which isn't UTF-8 costs its row and not the file.
"""

import csv
import io
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv

from tokenizer.errors import DataError
from tokenizer.sources.intake import Intake
from tokenizer.sources.omop_tables import KNOWN_COLUMNS

_BLOCK_BYTES = 16 << 20
_HEAD_BYTES = 1 << 20
_NULLS = ["", "NULL", "\\N"]
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
        raise DataError(f"{label}: written as UTF-16. Save it as UTF-8 (iconv -f utf-16 -t utf-8 file > new).")
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    lines = io.StringIO(text, newline=None).readlines()
    if not text.strip():
        raise DataError(f"{label}: empty, without even a header. Remove the file, or export the table again.")
    delimiter = "\t" if any("\t" in line for line in lines[:2]) else ","
    quoted = delimiter == "," or '"' in "".join(lines[:2])
    rows = [_cells(line, delimiter, quoted) for line in lines[:2]]
    known = KNOWN_COLUMNS.get(table, frozenset())
    # An export that lost its header may have it as the first row, below made-up names.
    header = next((at for at, cells in enumerate(rows) if known & set(cells)), None)
    names = _ordered(len(rows[0]), label, table, order, f"{lines[0].strip()[:80]!r}. {hint}") if header is None else \
        tuple(rows[header])  # fmt: skip
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
            f"{label}: no header, and {fields} columns where the order of {table} has {len(order)}. Choose the"
            " version that fits, or give a table spec."
        )
    return order


def _cells(line: str, delimiter: str, quoted: bool) -> list[str]:
    row = next(csv.reader(io.StringIO(line), delimiter=delimiter, quotechar='"' if quoted else None,
                          quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE), [])  # fmt: skip
    return [cell.strip().lower() for cell in row]


def read_csv(
    stream: Any,
    names: Sequence[str],
    columns: list[str],
    *,
    delimiter: str,
    quoted: bool,
    skip: int,
    invalid: list[Any],
    label: str,
) -> Iterator[pl.DataFrame]:
    """Read CSV in blocks: the chosen columns as bytes, null where a field is empty.

    Args:
        stream: of bytes.
        names: of all columns.
        columns: those to give.
        delimiter: between fields.
        quoted: whether fields may stand in double quotes.
        skip: rows of the header.
        invalid: gets the rows with too few or too many fields (their `number` and `text`); they are left out.
        label: the file, for messages.

    Raises:
        DataError: damaged, or quotes that are not closed.
    """

    def note(row: Any) -> str:
        invalid.append(row)
        return "skip"

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
            column_types={name: pa.binary() for name in columns},
            strings_can_be_null=True,
            null_values=_NULLS,
        ),
    }
    reader = guarded(label, lambda: pyarrow.csv.open_csv(stream, **options))
    with reader:
        while (batch := guarded(label, lambda: next(reader, None))) is not None:
            yield pl.DataFrame(pl.from_arrow(batch))


def number_rows(
    batches: Iterator[pl.DataFrame],
    invalid: list[Any],
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
        ahead = np.concatenate([ahead[ahead >= at], [row.number for row in invalid]]).astype(np.int64)
        _set_aside(invalid, label, table, intake)
        numbers = np.arange(at, at + frame.height + len(ahead))
        numbers = numbers[~np.isin(numbers, ahead)][: frame.height]
        at = int(numbers[-1]) + 1 if len(numbers) else at
        yield _decode(complete(frame, wanted, numbers), label, table, intake)
    _set_aside(invalid, label, table, intake)


def _set_aside(invalid: list[Any], label: str, table: str, intake: Intake) -> None:
    for row in invalid:
        reason = f"{row.actual_columns} fields where {row.expected_columns} are needed"
        advice = "A quote that isn't closed joins rows" if "\n" in row.text else "Quote fields that hold a delimiter"
        intake.rows(table, 1)
        intake.bad(label, table, row.number, "", reason, row.text, advice)
    invalid.clear()


def _decode(frame: pl.DataFrame, label: str, table: str, intake: Intake) -> pl.DataFrame:
    for column in frame.columns:
        if frame[column].dtype != pl.Binary:
            continue
        try:
            frame = frame.with_columns(pl.col(column).cast(pl.String))
        except pl.exceptions.ComputeError:
            texts = [_text(cell) for cell in frame[column]]
            for row, cell, text in zip(frame["_row"], frame[column], texts, strict=True):
                if cell is not None and text is None:
                    intake.rows(table, 1)
                    advice = "Save the file as UTF-8 (iconv -f latin1 -t utf-8 file > new)"
                    intake.bad(label, table, row, column, "not UTF-8", repr(cell), advice)
            good = pl.Series(
                [cell is None or text is not None for cell, text in zip(frame[column], texts, strict=True)]
            )
            frame = frame.with_columns(pl.Series(column, texts, dtype=pl.String)).filter(good)
    return frame


def _text(cell: bytes | None) -> str | None:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError:
        return None


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
    reason = (str(problem) or type(problem).__name__).splitlines()[0]
    if "straddl" in reason or "out of sync" in reason:
        return DataError(f"{label}: a quote is opened and not closed within {_BLOCK_BYTES >> 20} MiB. Close it.")
    return DataError(f"{label}: damaged or cut short ({reason}). Export or copy the file again.")
