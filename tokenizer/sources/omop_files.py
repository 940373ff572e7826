"""OMOP tables in files: CSV (plain or gzip), parquet, in a folder or a zip archive; read in pieces of bounded size.

What a file is called says which table it holds: `PERSON.csv`, `person.parquet`, `measurement_0001.csv.gz`,
`measurement/part-00000.parquet`. Names and headers may have any case.
"""

import csv
import gzip
import io
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from tokenizer.errors import DataError
from tokenizer.sources.intake import Intake
from tokenizer.sources.omop_tables import KNOWN_COLUMNS, READ, UNREAD

_BLOCK_BYTES = 16 << 20
_BATCH_ROWS = 200_000
_HEAD_BYTES = 1 << 20
_NULLS = ["", "NULL", "\\N"]
_DAMAGE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError, pa.ArrowException)


@dataclass(frozen=True)
class _Part:
    """One file of a table, on disk or in an archive."""

    table: str
    kind: str
    gzipped: bool
    path: Path
    member: str | None
    whole: bool

    @property
    def label(self) -> str:
        return f"{self.path}!{self.member}" if self.member else str(self.path)


@dataclass(frozen=True)
class _Layout:
    """How a CSV file is written."""

    names: tuple[str, ...]
    delimiter: str
    quoted: bool
    header_rows: int
    empty: bool


class FileRecords:
    """The OMOP tables under a path.

    Args:
        path: a folder, or a zip archive.
        spec: columns in order per table, for files without a header.

    Attributes:
        source: kind and place, for people.
        tables: names of the tables of the CDM that were found.
        others: files that hold no table of the CDM.

    Raises:
        DataError: no OMOP table, a table twice, or a broken archive.
    """

    def __init__(self, path: Path, spec: dict[str, tuple[str, ...]] | None) -> None:
        self.source = f"OMOP {path}"
        self.others: list[str] = []
        self._spec = spec
        self._parts: dict[str, list[_Part]] = {}
        for part in self._find(path):
            self._parts.setdefault(part.table, []).append(part)
        for table, parts in self._parts.items():
            whole = [part.label for part in parts if part.whole]
            if len(whole) > 1:
                raise DataError(f"{path}: the table {table} is there twice: {whole[0]} and {whole[1]}. Keep one.")
        self.tables = frozenset(self._parts)
        if not self.tables & READ:
            raise DataError(
                f"{path}: no OMOP table. Files are named after their tables: person.csv, visit_occurrence.csv.gz,"
                " measurement.parquet, and so on."
            )

    def read(
        self, table: str, wanted: Sequence[str], required: Sequence[tuple[str, ...]], intake: Intake
    ) -> Iterator[tuple[str, pl.DataFrame]]:
        """Give a table in pieces.

        Args:
            table: its name.
            wanted: the columns to read; those that the file lacks are null.
            required: groups of columns of which the file must have one each.
            intake: where rows that are no rows go.

        Yields:
            The file and a piece of it: the wanted columns as text or as the file types them, and `_row`, the number
            of the row from 1, headers counted.

        Raises:
            DataError: damage, a missing column, no header.
        """
        for part in self._parts[table]:
            reader = self._read_parquet if part.kind == "parquet" else self._read_csv
            for piece in reader(part, list(wanted), required, intake):
                yield part.label, piece

    def _find(self, path: Path) -> Iterator[_Part]:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.is_file() and not _is_hidden(file.relative_to(path).parts):
                    yield from self._file(file, path)
        elif path.suffix.lower() == ".zip":
            yield from self._archive(path)
        elif path.exists():
            raise DataError(f"{path}: give the folder or the zip archive that holds the OMOP tables.")
        else:
            raise DataError(f"{path}: there is no such folder or archive.")

    def _file(self, file: Path, root: Path) -> Iterator[_Part]:
        if file.suffix.lower() == ".zip":
            yield from self._archive(file)
        elif named := _name(PurePosixPath(file.relative_to(root).as_posix())):
            yield _Part(*named[:3], file, None, named[3])
        else:
            self.others.append(file.name)

    def _archive(self, path: Path) -> Iterator[_Part]:
        try:
            with zipfile.ZipFile(path) as archive:
                members = sorted(entry.filename for entry in archive.infolist() if not entry.is_dir())
        except _DAMAGE as problem:
            raise _damaged(str(path), problem) from None
        for member in members:
            if _is_hidden(PurePosixPath(member).parts):
                continue
            if named := _name(PurePosixPath(member)):
                yield _Part(*named[:3], path, member, named[3])
            else:
                self.others.append(member)

    def _read_csv(
        self, part: _Part, wanted: list[str], required: Sequence[tuple[str, ...]], intake: Intake
    ) -> Iterator[pl.DataFrame]:
        with _opened(part) as stream:
            layout = _layout(part, _guarded(part.label, lambda: _head(stream)), self._spec)
        _require(part, layout.names, required)
        if layout.empty:
            return
        invalid: list[Any] = []
        with _opened(part) as stream:
            batches = read_csv(
                stream,
                layout.names,
                [name for name in wanted if name in layout.names],
                delimiter=layout.delimiter,
                quoted=layout.quoted,
                skip=layout.header_rows,
                invalid=invalid,
                label=part.label,
            )
            yield from number_rows(batches, invalid, wanted, part.label, part.table, intake, layout.header_rows)

    def _read_parquet(
        self, part: _Part, wanted: list[str], required: Sequence[tuple[str, ...]], intake: Intake
    ) -> Iterator[pl.DataFrame]:
        del intake
        with _opened(part) as stream:
            file = _guarded(part.label, lambda: pyarrow.parquet.ParquetFile(stream))
            names = {name.strip().lower(): name for name in file.schema_arrow.names}
            if len(names) < len(file.schema_arrow.names):
                raise DataError(f"{part.label}: two columns have the same name but for its case; rename one.")
            _require(part, tuple(names), required)
            columns = [names[name] for name in wanted if name in names]
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
            start = 0
            while (batch := _guarded(part.label, lambda: next(batches, None))) is not None:
                frame = pl.DataFrame(pl.from_arrow(batch))
                frame = frame.rename({original: original.strip().lower() for original in frame.columns})
                yield _complete(frame, wanted, np.arange(start + 1, start + 1 + frame.height))
                start += frame.height


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
    reader = _guarded(label, lambda: pyarrow.csv.open_csv(stream, **options))
    with reader:
        while (batch := _guarded(label, lambda: next(reader, None))) is not None:
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
        yield _decode(_complete(frame, wanted, numbers), label, table, intake)
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
            good = pl.Series([cell is None or text is not None for cell, text in zip(frame[column], texts, strict=True)])
            frame = frame.with_columns(pl.Series(column, texts, dtype=pl.String)).filter(good)
    return frame


def _text(cell: bytes | None) -> str | None:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError:
        return None


def _complete(frame: pl.DataFrame, wanted: list[str], numbers: np.ndarray) -> pl.DataFrame:
    missing = [pl.lit(None, pl.String).alias(name) for name in wanted if name not in frame.columns]
    return frame.with_columns(*missing, pl.Series("_row", numbers, dtype=pl.Int64)).select("_row", *wanted)


def _is_hidden(parts: Sequence[str]) -> bool:
    return any(part.startswith((".", "_")) for part in parts)


def _name(path: PurePosixPath) -> tuple[str, str, bool, bool] | None:
    """Table, kind, whether gzipped, and whether the file is the whole table; None for other files."""
    name = path.name.lower()
    gzipped = name.endswith(".gz")
    stem, _, suffix = name.removesuffix(".gz").rpartition(".")
    kind = {"csv": "csv", "tsv": "csv", "txt": "csv", "parquet": "parquet"}.get(suffix)
    if kind is None:
        return None
    known = READ | UNREAD.keys()
    if stem in known:
        return stem, kind, gzipped, True
    numbered = re.fullmatch(r"(.+?)[-_. ]?(?:part)?[-_. ]?\d+", stem)
    folder = path.parent.name.lower().removesuffix(f".{suffix}")
    for table in (numbered and numbered[1], folder):
        if table in known:
            return str(table), kind, gzipped, False
    return None


@contextmanager
def _opened(part: _Part) -> Iterator[Any]:
    """Open a part for reading; a parquet file in an archive is unpacked aside, for it can't be read in one go."""
    with _archived(part) if part.member else _on_disk(part) as stream:
        if part.kind == "parquet" and (part.member or part.gzipped):
            with tempfile.TemporaryFile() as aside:
                _guarded(part.label, lambda: shutil.copyfileobj(stream, aside))
                aside.seek(0)
                yield aside
        else:
            yield stream


@contextmanager
def _on_disk(part: _Part) -> Iterator[Any]:
    file = _guarded(part.label, lambda: pa.OSFile(str(part.path)))
    with file:
        yield pa.CompressedInputStream(file, "gzip") if part.gzipped else file


@contextmanager
def _archived(part: _Part) -> Iterator[IO[bytes]]:
    archive = _guarded(part.label, lambda: zipfile.ZipFile(part.path))
    with archive:
        member = _guarded(part.label, lambda: archive.open(part.member or ""))
        with member:
            yield gzip.open(member) if part.gzipped else member  # type: ignore[misc]


def _head(stream: Any) -> bytes:
    """The first bytes, at least one of which lies behind the header if there is any."""
    head = b""
    while len(head) < _HEAD_BYTES and (more := stream.read(_HEAD_BYTES - len(head))):
        head += more
    return head


def _layout(part: _Part, head: bytes, spec: dict[str, tuple[str, ...]] | None) -> _Layout:
    """Find delimiter and header in a file's first bytes."""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{part.label}: written as UTF-16. Save it as UTF-8 (iconv -f utf-16 -t utf-8 file > new).")
    text = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    lines = text.splitlines(keepends=True)
    if not text.strip():
        raise DataError(f"{part.label}: empty, without even a header. Remove the file, or export the table again.")
    delimiter = "\t" if "\t" in lines[0] else ","
    quoted = delimiter == "," or '"' in lines[0]
    rows = [_cells(line, delimiter, quoted) for line in lines[:2]]
    known = KNOWN_COLUMNS.get(part.table, frozenset())
    # An export that lost its header may have it as the first row, below made-up names.
    header = next((at for at, cells in enumerate(rows) if known & set(cells)), None)
    if header is not None:
        names = tuple(rows[header])
    else:
        names = _spec_names(part, len(rows[0]), spec, lines[0])
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{part.label}: the column {twice!r} is there twice. Rename or remove one.")
    header_rows = 0 if header is None else header + 1
    empty = len(head) < _HEAD_BYTES and not "".join(lines[header_rows:]).strip()
    return _Layout(names, delimiter, quoted, header_rows, empty)


def _spec_names(part: _Part, fields: int, spec: dict[str, tuple[str, ...]] | None, line: str) -> tuple[str, ...]:
    if spec is None:
        raise DataError(
            f"{part.label}: no header with columns of {part.table}, separated by comma or tab; the first row is"
            f" {line.strip()[:80]!r}. Add the header, or say which CDM version's order (--cdm 5.3) or table spec holds."
        )
    if part.table not in spec:
        raise DataError(f"{part.label}: no header, and the table spec has no {part.table}. Add it there.")
    if len(spec[part.table]) != fields:
        raise DataError(
            f"{part.label}: no header, and {fields} columns where the table spec has {len(spec[part.table])} for"
            f" {part.table}. Choose the version that fits, or give a table spec."
        )
    return spec[part.table]


def _cells(line: str, delimiter: str, quoted: bool) -> list[str]:
    row = next(csv.reader(io.StringIO(line), delimiter=delimiter, quotechar='"' if quoted else None,
                          quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE), [])  # fmt: skip
    return [cell.strip().lower() for cell in row]


def _require(part: _Part, names: Sequence[str], required: Sequence[tuple[str, ...]]) -> None:
    for group in required:
        if not set(group) & set(names):
            raise missing_column(part.label, part.table, group, names)


def missing_column(label: str, table: str, group: tuple[str, ...], names: Sequence[str]) -> DataError:
    """The error that a table lacks every column of a group."""
    return DataError(
        f"{label}: {table} has no column {' or '.join(group)} (it has {', '.join(names)[:300]})."
        " Export the table with it, or rename the column that holds it."
    )


def _guarded(label: str, act: Callable[[], Any]) -> Any:
    """Do something with a file; damage is an error that names it."""
    try:
        return act()
    except _DAMAGE as problem:
        raise _damaged(label, problem) from None


def _damaged(label: str, problem: BaseException) -> DataError:
    reason = (str(problem) or type(problem).__name__).splitlines()[0]
    if "straddl" in reason or "out of sync" in reason:
        return DataError(f"{label}: a quote is opened and not closed within {_BLOCK_BYTES >> 20} MiB. Close it.")
    return DataError(f"{label}: damaged or cut short ({reason}). Export or copy the file again.")
