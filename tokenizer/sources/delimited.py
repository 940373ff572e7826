"""Tables in files become frames, piece by piece, each row with the number of its line in the file.

Well-formed text takes the fast path: a block is cut at the end of a row, parsed whole by Arrow, and its rows are
numbered from the positions of line ends and quotes. A block in which anything is odd (a row with too few or too many
columns, bytes that are no text, a quote that isn't closed) goes through the `csv` module row by row, which says which
rows are bad; both give the same rows (a test compares them on random text). Small files with the same header are put
together and parsed as one block.
"""

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import polars as pl
import pyarrow
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from tokenizer.errors import DataError
from tokenizer.events import as_text, decoded
from tokenizer.sources.folders import DAMAGED, Found, damaged
from tokenizer.sources.mapping import Layout

BLOCK = 1 << 24
"""Bytes of text that are parsed at a time."""

_SMALL = 1 << 20
_LONGEST_FIELD = 1 << 20
_LONGEST_LINE = 1 << 27
_PARQUET_ROWS = 250_000
_UTF8 = ("utf-8", "utf-8-sig", "ascii")

Choose = Callable[[str, Sequence[str]], dict[str, int]]
"""Gives the columns that are wanted, with their places, of a file with this name and these columns."""

Refuse = Callable[[str, int, str, str, str], None]
"""Takes a bad row: file, row, reason, content, advice."""


@dataclass(frozen=True)
class Dialect:
    """How text is written; `Layout` with nothing left open.

    Attributes:
        delimiter: between columns.
        quote: around them, or "".
        encoding: of the text.
        columns: their names where there is no header.
    """

    delimiter: str
    quote: str
    encoding: str
    columns: tuple[str, ...] | None

    @classmethod
    def of(cls, layout: Layout, name: str) -> "Dialect":
        """The dialect of the file `name`: tabs in .tsv and .tab, commas elsewhere if nothing else is said."""
        tabs = name.lower().endswith((".tsv", ".tab"))
        return cls(
            layout.delimiter or ("\t" if tabs else ","),
            '"' if layout.quote is None else layout.quote,
            codecs.lookup(layout.encoding or "utf-8").name,
            layout.columns if layout.header is False else None,
        )


def read_rows(files: Iterable[Found], layout: Layout, choose: Choose, refuse: Refuse) -> Iterator[pl.DataFrame]:
    """Give the rows of files, in pieces.

    Args:
        files: parquet where the name says so, else text.
        layout: of the text.
        choose: names the columns to read.
        refuse: takes the rows that can't be read.

    Returns:
        Frames of the chosen columns (texts; of parquet, whatever they are), with `_file` and `_row`: the line on which
        the row begins, from 1, headers counted (of parquet, which has no lines, the number of the row from 1).

    Raises:
        DataError: a file that is damaged, empty or no text.
    """
    batch: _Batch | None = None
    for found in files:
        name = found.unpacked_name
        with found.open() as stream:
            if name.lower().endswith((".parquet", ".pq")):
                yield from _parquet(found.name, stream, choose, refuse)
                continue
            dialect = Dialect.of(layout, name)
            start = _read(found.name, stream, _SMALL + 1, 1)
            small = _small(found.name, start, dialect) if len(start) <= _SMALL else None
            if small is not None and batch is not None and batch.takes(small, dialect):
                batch.add(small)
                continue
            if batch is not None:
                yield from batch.frames(choose, refuse)
                batch = None
            if small is not None:
                batch = _Batch(dialect, small)
                continue
            yield from _Text(found.name, stream, start, dialect).frames(choose, refuse)
    if batch is not None:
        yield from batch.frames(choose, refuse)


class _Text:
    """One file of text, read from its start to its end.

    Attributes:
        line: number of the line at the start of the buffer.
    """

    def __init__(self, name: str, stream: BinaryIO, start: bytes, dialect: Dialect) -> None:
        self.line = 1
        self._name = name
        self._stream = stream
        self._dialect = dialect
        self._ended = False
        self._old_mac = False
        self._decoder: Any = None
        if dialect.encoding not in _UTF8:
            self._decoder = codecs.getincrementaldecoder(dialect.encoding)(errors="surrogateescape")
        elif start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            width = 32 if start[:4] == codecs.BOM_UTF32_LE else 16
            raise DataError(f'{name}: is UTF-{width} text. Say so in the mapping: encoding = "utf-{width}".')
        self._buffer = self._clean(start.removeprefix(codecs.BOM_UTF8), first=True)

    def frames(self, choose: Choose, refuse: Refuse) -> Iterator[pl.DataFrame]:
        """The rows, in pieces."""
        header = self._header()
        if header is None:
            raise DataError(f"{self._name}: the file is empty, without even a header. Export it again, or remove it.")
        wanted = choose(self._name, header)
        while True:
            self._read_more()
            if not self._buffer:
                return
            parsed = _fast(self._buffer, len(header), wanted, self._dialect)
            # What is left begins with a quote that isn't closed, if it is long or the last.
            if parsed is None or len(self._buffer) - parsed.size > (0 if self._ended else 2 * _LONGEST_FIELD):
                parsed = _slow(self._buffer, len(header), wanted, self._dialect, self._ended, self._refuse(refuse))
            self._buffer = self._buffer[parsed.size :]
            if len(self._buffer) > _LONGEST_LINE:
                raise DataError(
                    f"{self._name}: row {self.line + parsed.lines} has no end in {_LONGEST_LINE >> 20} MiB. Is this a"
                    " table of text, and are its quotes closed?"
                )
            if parsed.frame.height:
                rows = pl.Series("_row", parsed.numbers + self.line)
                yield parsed.frame.with_columns(rows, _file=pl.lit(self._name))
            self.line += parsed.lines

    def _refuse(self, refuse: Refuse) -> Callable[[int, str, str, str], None]:
        base = self.line
        return lambda number, reason, content, advice: refuse(self._name, base + number, reason, content, advice)

    def _read_more(self) -> None:
        if self._ended:
            return
        data = _read(self._name, self._stream, BLOCK, self.line)
        self._ended = not data
        self._buffer += self._clean(data, first=False)
        if self._ended and self._buffer and not self._buffer.endswith(b"\n"):
            self._buffer += b"\n"

    def _clean(self, data: bytes, *, first: bool) -> bytes:
        """UTF-8 with line ends that have a line feed; bytes that are no text stay what they are."""
        if self._decoder is not None:
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError as problem:
                raise DataError(
                    f"{self._name}: after row {self.line}: not {self._dialect.encoding} text ({problem.reason})."
                    " Give the mapping the right encoding."
                ) from None
            data = text.encode("utf-8", "surrogateescape")
        if first:
            data = data.removeprefix(codecs.BOM_UTF8)
            self._old_mac = b"\r" in data and b"\n" not in data
        return data.replace(b"\r", b"\n") if self._old_mac else data

    def _header(self) -> list[str] | None:
        """The names of the columns; the buffer begins after them."""
        while b"\n" not in self._buffer and not self._ended:
            self._read_more()
        if self._dialect.columns is not None:
            return list(self._dialect.columns)
        lines = _lines(self._buffer[:_LONGEST_FIELD])
        reader = _reader(iter(lines), self._dialect)
        try:
            names = next((record for record in reader if any(text.strip() for text in record)), None)
        except csv.Error as problem:
            raise DataError(f"{self._name}, row 1: the header can't be read ({problem}).") from None
        if names is None:
            return None
        size = sum(len(line.encode("utf-8", "surrogateescape")) for line in lines[: reader.line_num])
        self._buffer, self.line = self._buffer[size:], self.line + reader.line_num
        return _names(names, self._name)


@dataclass(frozen=True)
class _Parsed:
    """Rows of a block.

    Attributes:
        frame: the wanted columns.
        numbers: int64, the line on which each row begins, from 0.
        size: bytes of the block that were read.
        lines: lines of it.
    """

    frame: pl.DataFrame
    numbers: NDArray[np.int64]
    size: int
    lines: int


def _fast(block: bytes, width: int, wanted: dict[str, int], dialect: Dialect) -> _Parsed | None:
    """Parse the whole rows of a block at once; None where anything in it is odd."""
    if b"\0" in block or block.count(b"\r") != block.count(b"\r\n") or not _is_text(block):
        return None
    quoted = bool(dialect.quote) and dialect.quote.encode() in block
    ends = _row_ends(block, dialect) if quoted else None
    if (quoted and ends is None) or _has_long_row(block, ends):
        return None
    size = block.rfind(b"\n") + 1 if ends is None else (int(ends[-1]) + 1 if len(ends) else 0)
    lines = block.count(b"\n", 0, size)
    if not size:
        return _Parsed(_texts({name: [] for name in wanted}), np.empty(0, np.int64), 0, 0)
    frame = _arrow(block, size, width, wanted, dialect)
    if frame is None:
        return None
    if frame.height == lines:
        return _Parsed(frame, np.arange(lines), size, lines)
    numbers = _row_lines(np.frombuffer(block, np.uint8, size), ends)
    return _Parsed(frame, numbers, size, lines) if len(numbers) == frame.height else None


def _has_long_row(block: bytes, ends: NDArray[np.int64] | None) -> bool:
    """Whether a whole row of a block may hold a text that is too long."""
    if ends is not None:
        return bool(len(ends)) and int(np.diff(ends, prepend=-1).max()) > _LONGEST_FIELD
    size, half = block.rfind(b"\n") + 1, _LONGEST_FIELD // 2
    return any(block.find(b"\n", at, at + half) < 0 for at in range(0, size - half + 1, half))


def _is_text(block: bytes) -> bool:
    if block.isascii():
        return True
    try:
        # A character may be cut at the end of a block, never at the end of a line.
        block[: block.rfind(b"\n") + 1].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _row_ends(block: bytes, dialect: Dialect) -> NDArray[np.int64] | None:
    """Positions of the line feeds outside of quotes; None where quotes don't stand as RFC 4180 has them."""
    text = np.frombuffer(block, np.uint8)
    quote, delimiter = ord(dialect.quote), ord(dialect.delimiter)
    quotes = np.flatnonzero(text == quote)
    opening, closing = quotes[0::2], quotes[1::2]
    before = text[np.maximum(opening - 1, 0)]
    # A doubled quote closes and opens again.
    well = (opening == 0) | (before == delimiter) | (before == 10) | (before == quote)
    inside = closing[closing + 1 < len(text)]
    after = text[inside + 1]
    well_closed = (after == delimiter) | (after == 10) | (after == 13) | (after == quote)
    if not (well.all() and well_closed.all()):
        return None
    feeds = np.flatnonzero(text == 10)
    return feeds[np.searchsorted(quotes, feeds) % 2 == 0]


def _row_lines(text: NDArray[np.uint8], ends: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """The lines on which the rows begin that aren't blank, from 0."""
    feeds = np.flatnonzero(text == 10)
    ends = feeds if ends is None else ends
    starts = np.concatenate([[0], ends[:-1] + 1])
    length = ends - starts
    blank = (length == 0) | ((length == 1) & (text[starts] == 13))
    return np.searchsorted(feeds, starts[~blank]).astype(np.int64)


def _arrow(block: bytes, size: int, width: int, wanted: dict[str, int], dialect: Dialect) -> pl.DataFrame | None:
    """The rows of `block[:size]` as texts; None where one has too few or too many columns."""
    places = {str(place): name for name, place in wanted.items()}
    try:
        table = pyarrow.csv.read_csv(
            pyarrow.py_buffer(block).slice(0, size),
            read_options=pyarrow.csv.ReadOptions(
                column_names=[str(place) for place in range(width)], use_threads=False, block_size=size + 1
            ),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=dialect.delimiter,
                quote_char=dialect.quote or False,
                newlines_in_values=True,
            ),
            convert_options=pyarrow.csv.ConvertOptions(
                include_columns=list(places) or ["0"],
                column_types={place: pyarrow.string() for place in places},
                strings_can_be_null=False,
            ),
        )
    except pyarrow.ArrowInvalid:
        return None
    frame = pl.from_arrow(table)
    assert isinstance(frame, pl.DataFrame)
    return frame.select(pl.col(place).alias(name) for place, name in places.items()) if places else frame


def _slow(
    block: bytes,
    width: int,
    wanted: dict[str, int],
    dialect: Dialect,
    ended: bool,
    refuse: Callable[[int, str, str, str], None],
) -> _Parsed:
    """Parse a block row by row; a row whose end isn't in the block is left for the next one, unless there is none."""
    lines = _lines(block[: block.rfind(b"\n") + 1])
    rows: list[list[str]] = []
    numbers: list[int] = []
    start, limit = 0, csv.field_size_limit(_LONGEST_FIELD)
    try:
        while start < len(lines):
            begin, reader = start, _reader(iter(lines[start:]), dialect)
            try:
                for record in reader:
                    fault = _fault(record, width, dialect)
                    if fault is None:
                        rows.append(record)
                        numbers.append(start)
                    elif record:
                        refuse(start, fault[0], dialect.delimiter.join(record), fault[1])
                    start = begin + reader.line_num
            except csv.Error as problem:
                reason, advice, ahead = _csv_fault(str(problem))
                if reason == _OPEN and str(problem) == _UNEXPECTED_END and not ended:
                    break
                refuse(start, reason, lines[start].rstrip("\r\n"), advice)
                start = begin + reader.line_num if ahead else start + 1
    finally:
        csv.field_size_limit(limit)
    size = len("".join(lines[:start]).encode("utf-8", "surrogateescape"))
    columns = {name: [row[place] for row in rows] for name, place in wanted.items()}
    return _Parsed(_texts(columns), np.array(numbers, np.int64), size, start)


_NUL = ("a NUL character", "The file may be damaged; export it again")
_OPEN, _UNEXPECTED_END = "a quote is opened and not closed", "unexpected end of data"


def _fault(record: list[str], width: int, dialect: Dialect) -> tuple[str, str] | None:
    """What is wrong with a row, and what to do."""
    if len(record) != width:
        few = "too few" if len(record) < width else "too many"
        return f"{few} columns", f"It has {len(record)} of {width}; quote texts that contain {dialect.delimiter!r}"
    text = "".join(record)
    if "\0" in text:
        return _NUL
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return (
            f"not {dialect.encoding} text",
            'Give the mapping the right encoding, such as encoding = "cp1252"',
        )
    return None


def _csv_fault(problem: str) -> tuple[str, str, bool]:
    """Reason, advice, and whether to go on after what was read, for an error of the csv module."""
    if problem.startswith("field larger"):
        return "a text of more than a million characters", "Cut it, or close the quote that opens it", False
    if problem == _UNEXPECTED_END:
        return _OPEN, 'Close it, or say quote = "" in the mapping if quotes mean nothing in this file', False
    if problem.startswith("new-line"):
        return "a carriage return inside of a row", "Quote texts with line ends", True
    return "text after a closing quote", "Double the quotes inside of quotes", True


def _texts(columns: dict[str, list[str]]) -> pl.DataFrame:
    return pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String))


def _lines(block: bytes) -> list[str]:
    """Lines with their ends; bytes that are no UTF-8 become lone surrogates."""
    return io.StringIO(block.decode("utf-8", "surrogateescape"), newline="\n").readlines()


def _reader(lines: Iterator[str], dialect: Dialect) -> Any:
    if not dialect.quote:
        return csv.reader(lines, delimiter=dialect.delimiter, quoting=csv.QUOTE_NONE, strict=True)
    return csv.reader(lines, delimiter=dialect.delimiter, quotechar=dialect.quote, strict=True)


def _names(names: list[str], file: str) -> list[str]:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{file}, row 1: the header isn't UTF-8 text. Give the mapping its encoding.") from None
        if "\0" in name:
            raise DataError(
                f"{file}, row 1: the header has NUL characters, as UTF-16 text has. Give the mapping its encoding, such"
                ' as encoding = "utf-16-le", or export the file again.'
            )
    return [name.strip() for name in names]


@dataclass(frozen=True)
class _SmallFile:
    name: str
    header: bytes
    body: bytes


def _small(name: str, content: bytes, dialect: Dialect) -> _SmallFile | None:
    """A small file that can be put together with others; None where that would take more care."""
    content = content.removeprefix(codecs.BOM_UTF8)
    quote = dialect.quote.encode()
    if dialect.encoding not in _UTF8 or b"\r" in content or b"\0" in content or (quote and quote in content):
        return None
    if dialect.columns is not None:
        header, body = b"", content
    else:
        header, _, body = content.partition(b"\n")
        if not header.strip():
            return None
    return _SmallFile(name, header, body if body.endswith(b"\n") or not body else body + b"\n")


class _Batch:
    """Small files with the same header."""

    def __init__(self, dialect: Dialect, first: _SmallFile) -> None:
        self.dialect = dialect
        self.files = [first]
        self._size = len(first.body)

    def takes(self, small: _SmallFile, dialect: Dialect) -> bool:
        """Whether a file fits; the batch is full after a block's bytes."""
        return dialect == self.dialect and small.header == self.files[0].header and self._size < BLOCK

    def add(self, small: _SmallFile) -> None:
        """Take a file that fits."""
        self.files.append(small)
        self._size += len(small.body)

    def frames(self, choose: Choose, refuse: Refuse) -> Iterator[pl.DataFrame]:
        """The rows of all files."""
        first = self.files[0]
        if self.dialect.columns is not None:
            names = list(self.dialect.columns)
        else:
            names = _names(next(_reader(iter(_lines(first.header)), self.dialect)), first.name)
        wanted = choose(first.name, names)
        body = b"".join(file.body for file in self.files)
        parsed = _fast(body, len(names), wanted, self.dialect) if body else None
        if parsed is None:
            for file in self.files:
                content = file.header + b"\n" + file.body if file.header else file.body
                yield from _Text(file.name, io.BytesIO(), content, self.dialect).frames(choose, refuse)
            return
        ends = np.cumsum([file.body.count(b"\n") for file in self.files])
        which = np.searchsorted(ends, parsed.numbers, side="right")
        before = np.concatenate([[0], ends[:-1]])[which]
        first_row = 1 if self.dialect.columns is not None else 2
        yield parsed.frame.with_columns(
            pl.Series("_row", parsed.numbers - before + first_row),
            pl.Series([file.name for file in self.files])[which].alias("_file"),
        )


def _parquet(name: str, stream: BinaryIO, choose: Choose, refuse: Refuse) -> Iterator[pl.DataFrame]:
    row = 1
    try:
        source = stream if stream.seekable() else io.BytesIO(stream.read())
        file = pyarrow.parquet.ParquetFile(source)
        wanted = choose(name, file.schema_arrow.names)
        columns = list(wanted)
        names = [file.schema_arrow.names[wanted[column]] for column in columns]
        for batch in file.iter_batches(_PARQUET_ROWS, columns=names):
            frame = pl.from_arrow(pyarrow.Table.from_batches([batch]))
            assert isinstance(frame, pl.DataFrame)
            numbers = pl.Series("_row", np.arange(row, row + frame.height))
            row += frame.height
            chosen = (pl.col(there).alias(column) for column, there in zip(columns, names, strict=True))
            yield _plain(name, frame.select(*chosen, numbers, _file=pl.lit(name)), columns, refuse)
    except (pyarrow.ArrowException, OSError) as problem:
        reason = str(problem).splitlines()[0]
        raise DataError(f"{name}: not a readable parquet file ({reason}). Write it again.") from None


def _plain(name: str, frame: pl.DataFrame, columns: Sequence[str], refuse: Refuse) -> pl.DataFrame:
    """The rows whose texts are texts, as `_slow` has it."""
    for column in columns:
        kind = frame.schema[column]
        if kind.is_nested():
            raise DataError(f"{name}: column {column} is of type {kind}. Write a plain value in each row.")
        if kind == pl.Binary:
            text, wrong = decoded(frame[column])
            frame = _without(name, frame, wrong, column, ("not utf-8 text", "Write the column as text"), refuse)
            frame = frame.with_columns(text.filter(~wrong))
        if frame.schema[column] in (pl.String, pl.Categorical, pl.Enum):
            wrong = frame[column].cast(pl.String).str.contains("\0", literal=True).fill_null(value=False)
            frame = _without(name, frame, wrong, column, _NUL, refuse)
    return frame


def _without(
    name: str, frame: pl.DataFrame, wrong: pl.Series, column: str, fault: tuple[str, str], refuse: Refuse
) -> pl.DataFrame:
    if not wrong.any():
        return frame
    bad = frame.filter(wrong)
    for row, content in zip(bad["_row"], as_text(bad[column]), strict=True):
        refuse(name, row, fault[0], content, fault[1])
    return frame.filter(~wrong)


def _read(name: str, stream: BinaryIO, count: int, line: int) -> bytes:
    """Read up to `count` bytes, fewer only at the end; `line` is the number of the first line, for the message."""
    pieces: list[bytes] = []
    while count:
        try:
            # In small steps, as a packed stream that is cut off gives nothing of the step in which it ends.
            data = stream.read(min(count, 1 << 16))
        except DAMAGED as problem:
            rows = sum(piece.count(b"\n") for piece in pieces)
            raise damaged(name, problem, after_row=line + rows) from None
        if not data:
            break
        pieces.append(data)
        count -= len(data)
    return b"".join(pieces)
