"""OMOP tables in files: CSV (plain or gzip), parquet, in a folder or a zip archive; read in pieces of bounded size.

What a file is called says which table it holds: `PERSON.csv`, `person.parquet`, `measurement_0001.csv.gz`,
`measurement/part-00000.parquet`. Names and headers may have any case.
"""

import gzip
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet

from tokenizer.errors import DataError
from tokenizer.sources.intake import Intake
from tokenizer.sources.omop_csv import Oddities, complete, guarded, head_of, layout_of, number_rows, read_csv
from tokenizer.sources.omop_tables import READ, UNREAD

_BATCH_ROWS = 200_000
_NO_HEADER = "Add the header, or say which CDM version's order holds (--cdm 5.3), or give a table spec."


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
                if _is_hidden(file.relative_to(path).parts):
                    continue
                if file.is_file():
                    yield from self._file(file, path)
                elif file.is_symlink() and file.is_dir():
                    self.others.append(f"{file.name} (a link to a folder, which isn't followed)")
                elif not file.is_dir() and _name(PurePosixPath(file.relative_to(path).as_posix())):
                    raise DataError(f"{file}: not a file, or a link that leads nowhere. Mend or remove it.")
                elif _name(PurePosixPath(file.name)) and not any(map(_name, _below(file))):
                    self.others.append(f"{file.name} (a folder without a part of the table)")
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
        archive = guarded(str(path), lambda: zipfile.ZipFile(path))
        with archive:
            members = sorted(entry.filename for entry in archive.infolist() if not entry.is_dir())
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
        order = self._spec.get(part.table, ()) if self._spec is not None else None
        with _opened(part) as stream:
            head = guarded(part.label, lambda: head_of(stream))
        layout = layout_of(head, part.label, part.table, order, _NO_HEADER)
        _require(part, layout.names, required)
        if layout.empty:
            return
        odd = Oddities()
        with _opened(part) as stream:
            batches = read_csv(
                stream,
                layout.names,
                [name for name in wanted if name in layout.names],
                delimiter=layout.delimiter,
                quoted=layout.quoted,
                skip=layout.header_rows,
                odd=odd,
                label=part.label,
            )
            yield from number_rows(batches, odd, wanted, part.label, part.table, intake, layout.header_rows)

    def _read_parquet(
        self, part: _Part, wanted: list[str], required: Sequence[tuple[str, ...]], intake: Intake
    ) -> Iterator[pl.DataFrame]:
        del intake
        with _opened(part) as stream:
            file = guarded(part.label, lambda: pyarrow.parquet.ParquetFile(stream))
            names = {name.strip().lower(): name for name in file.schema_arrow.names}
            if len(names) < len(file.schema_arrow.names):
                raise DataError(f"{part.label}: two columns have the same name but for its case; rename one.")
            _require(part, tuple(names), required)
            columns = [names[name] for name in wanted if name in names]
            batches = file.iter_batches(batch_size=_BATCH_ROWS, columns=columns)
            start = 0
            while (batch := guarded(part.label, lambda: next(batches, None))) is not None:
                frame = pl.DataFrame(pl.from_arrow(batch))
                frame = frame.rename({original: original.strip().lower() for original in frame.columns})
                yield complete(frame, wanted, np.arange(start + 1, start + 1 + frame.height))
                start += frame.height


def _below(folder: Path) -> Iterator[PurePosixPath]:
    """Files in a folder, from its own name on."""
    return (PurePosixPath(file.relative_to(folder.parent).as_posix()) for file in folder.rglob("*") if file.is_file())


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
                guarded(part.label, lambda: shutil.copyfileobj(stream, aside))
                aside.seek(0)
                yield aside
        else:
            yield stream


@contextmanager
def _on_disk(part: _Part) -> Iterator[Any]:
    file = guarded(part.label, lambda: pa.OSFile(str(part.path)))
    with file:
        if part.gzipped and _ends_in_zero(part.path):
            # There may be zeros behind the end, which gzip allows and Arrow doesn't.
            with gzip.open(part.path) as unpacked:
                yield unpacked
        else:
            yield pa.CompressedInputStream(file, "gzip") if part.gzipped else file


def _ends_in_zero(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-min(1, file.seek(0, os.SEEK_END)), os.SEEK_END)
        return file.read() == b"\0"


@contextmanager
def _archived(part: _Part) -> Iterator[IO[bytes]]:
    archive = guarded(part.label, lambda: zipfile.ZipFile(part.path))
    with archive:
        member = guarded(part.label, lambda: archive.open(part.member or ""))
        with member:
            if part.gzipped:
                with gzip.open(member) as unpacked:
                    yield unpacked  # type: ignore[misc]
            else:
                yield member


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
