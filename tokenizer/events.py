"""Medical events in the MEDS 0.4 format: read shard by shard, checked, in one canonical order.

Canonical order is subject, time (null = static first), birth before everything and death after
everything at one time, code, value. MEDS asks for less: subjects contiguous, times ascending.

Source: the schemas of the `meds` package, https://github.com/Medical-Event-Data-Standard/meds
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl
import pyarrow.parquet
from meds import schema as meds
from numpy.typing import NDArray

from tokenizer import durable
from tokenizer.errors import DataError
from tokenizer.output import settle
from tokenizer.pieces import CHUNK_ROWS, PIECE_EVENTS, Cut, Piece, cut
from tokenizer.wording import several

_MEDS_VERSION = importlib.metadata.version("meds")
CORE = ("subject_id", "time", "code", "numeric_value")
_CORE_TYPES: dict[str, pl.DataType] = {
    "subject_id": pl.Int64(),
    "time": pl.Datetime("us"),
    "code": pl.String(),
    "numeric_value": pl.Float32(),
}
# Years that records can hold, those included in which de-identification puts birth 300 years before a stay after 2100;
# what lies outside is a typing error or a filler such as 9999-12-31.
EARLIEST, LATEST = "1800-01-01", "2250-01-01"
_BLANKS = "\t\n\v\f\r "
# What polars raises on a file that is damaged; for some damage its reader ends in a panic.
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)


class MedsDataset:
    """A MEDS dataset on disk.

    Attributes:
        path: Its folder.
        name: `dataset_name` of its metadata, or the folder's name.
        shards: Its data files, relative to the folder, sorted.
        pieces: The same rows in parts of bounded size, each with all events of its subjects.
        scattered: Shards in which a subject's rows lie in several places, so that they can't be cut.
        subjects: Number of subjects.
    """

    def __init__(self, path: Path, name: str, cuts: dict[str, Cut]) -> None:
        self.path = path
        self.name = name
        self.shards = tuple(cuts)
        self.pieces = tuple(piece for found in cuts.values() for piece in found.pieces)
        self.scattered = tuple(shard for shard, found in cuts.items() if found.scattered)
        self.subjects = sum(len(found.subjects) for found in cuts.values())
        self._said: list[str] = []
        self._faults: dict[str | Piece, Faults] = {}

    @classmethod
    def open(cls, path: Path, piece_events: int = PIECE_EVENTS) -> "MedsDataset":
        """Open a dataset: its metadata, the schema of every shard and the subjects are checked.

        Args:
            path: Its folder.
            piece_events: Least events of a piece, but for the last one of a shard.

        Raises:
            DataError: No data files, a file that isn't parquet, a missing column or one of the
                wrong type, a null subject id, a subject in two files.
        """
        settle(path.parent)
        shards = [file.relative_to(path).as_posix() for file in _data_files(path)]
        name, notes = _read_name(path)
        cuts = {shard: _cut(path, shard, piece_events) for shard in shards}
        _refuse_shared_subjects({shard: pl.Series(found.subjects) for shard, found in cuts.items()})
        dataset = cls(path, name, cuts)
        dataset._said += notes
        return dataset

    @property
    def events(self) -> int:
        """Rows of all shards."""
        return sum(piece.rows for piece in self.pieces)

    @property
    def prepared(self) -> tuple[str, ...]:
        """Nothing is done to the records before they are read."""
        return ()

    @property
    def reader(self) -> "Reader":
        """What gives a piece's rows as `read` does, and what was odd in them; it can be pickled."""
        return partial(read, self.path)

    def read(self, part: str | Piece, extra: tuple[str, ...] = ()) -> pl.DataFrame:
        """One shard or piece in canonical order: subject_id i64, time datetime[us], code str, numeric_value f32.

        Of the columns `extra`, those that the shard has go along, as text.

        Values that are not finite become null; that, and a shard that was not sorted, is said in
        `notes`.

        Raises:
            DataError: The file is damaged, or a row has no subject or no code.
        """
        frame, faults = read(self.path, part, extra)
        self.count_faults(part, faults)
        return frame

    def count_faults(self, part: str | Piece, faults: "Faults") -> None:
        """Note what was odd in a part that another process has read."""
        self._faults[part] = faults

    @property
    def notes(self) -> list[str]:
        """What was odd and how it was dealt with, in sentences; grows while the dataset is read."""
        found: dict[str, Faults] = {}
        for part, faults in self._faults.items():
            if isinstance(part, Piece):
                found[part.shard] = found.get(part.shard, Faults()) + faults
        # Who read a whole shard has seen all its pieces.
        found |= {part: faults for part, faults in self._faults.items() if isinstance(part, str)}
        return self._said + [note for shard in sorted(found) for note in found[shard].notes(shard)]

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the names and contents of all data files."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        total = hashlib.sha256()
        for shard in self.shards:
            with (self.path / shard).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{content}  {shard}\n".encode())
        return total.hexdigest()


@dataclass(frozen=True)
class Faults:
    """What was odd in some rows: values that are NaN or infinite, and rows that stand before an earlier one."""

    not_finite: int = 0
    unsorted: int = 0

    def __add__(self, other: "Faults") -> "Faults":
        return Faults(self.not_finite + other.not_finite, self.unsorted + other.unsorted)

    def notes(self, shard: str) -> list[str]:
        """Say it for people."""
        said = []
        if self.not_finite:
            said.append(
                f"{shard}: {several(self.not_finite, 'value was', 'values were')} NaN or infinite, and read as missing."
            )
        if self.unsorted:
            unsorted = several(self.unsorted, "row was", "rows were")
            said.append(f"{shard}: {unsorted} not sorted by subject and time, and sorted here.")
        return said


Reader = Callable[[Piece], tuple[pl.DataFrame, Faults]]


class Records(Protocol):
    """What survey and store need of a dataset: its pieces, who reads them, and a place for what was odd."""

    @property
    def name(self) -> str:
        """The dataset's name."""

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Parts of bounded size, each with all events of its subjects."""

    @property
    def events(self) -> int:
        """Rows of all pieces."""

    @property
    def reader(self) -> Reader:
        """What gives a piece's rows in canonical order, and what was odd in them; it can be pickled."""

    @property
    def prepared(self) -> tuple[str, ...]:
        """Digests of what the rows go through before they are given."""

    @property
    def notes(self) -> list[str]:
        """What was odd, in sentences."""

    def count_faults(self, part: str | Piece, faults: Faults) -> None:
        """Note what was odd in a part."""

    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the rows come from."""


def read(path: Path, part: str | Piece, extra: tuple[str, ...] = ()) -> tuple[pl.DataFrame, Faults]:
    """Read one shard or piece of the dataset at `path`, as `MedsDataset.read` does, and say what was odd."""
    shard, start, rows = (part, 0, None) if isinstance(part, str) else (part.shard, part.start, part.rows)
    file = path / shard
    schema = _schema(file)
    present = [column for column in (*CORE, *extra) if column in schema]
    frame = _canonical_types(_read(file, present, start, rows), str(file), start)
    _refuse_far_times(frame, str(file), start)
    frame = _cast(frame, str(file), start, **{column: pl.String() for column in extra if column in schema})
    if broken := int((~frame["numeric_value"].is_finite()).sum()):
        value = pl.col("numeric_value")
        frame = frame.with_columns(pl.when(value.is_finite()).then(value))
    return canonical_order(frame), Faults(broken, _count_unsorted(frame))


@dataclass(frozen=True)
class Chunk:
    """Some rows of a shard as they stand: from row `start` on, of `total` in all shards."""

    shard: str
    start: int
    total: int
    frame: pl.DataFrame


def rows(path: Path, extra: tuple[str, ...] = ()) -> Iterator[Chunk]:
    """Give all rows of a dataset as they stand, a million at a time, nulls, subject ids of any integer type and all.

    Args:
        path: Its folder.
        extra: Columns to give besides MEDS' own, as text, where they are.

    Raises:
        DataError: No data files, a damaged one, a missing column or one of a wrong type.
    """
    files = {file.relative_to(path).as_posix(): file for file in _data_files(path)}
    total = sum(_count_rows(file) for file in files.values())
    for shard, file in files.items():
        schema = _schema(file)
        _check_types(schema, str(file))
        present = [column for column in (*CORE, *extra) if column in schema]
        kinds = {**_CORE_TYPES, **dict.fromkeys(extra, pl.String())}
        start = 0
        while len(frame := _read(file, present, start, PIECE_EVENTS)):
            types = {name: kinds[name] for name in present if name != "subject_id"}
            yield Chunk(shard, start, total, _cast(frame, str(file), start, **types))
            start += len(frame)


def _data_files(path: Path) -> list[Path]:
    folder = path / meds.data_subdirectory
    for linked in folder.glob("**/*"):
        if linked.is_symlink() and linked.is_dir():
            raise DataError(f"{linked}: a link to a folder, which isn't followed. Put the folder itself there.")
    # Some tools write a folder of that ending, with the files in it.
    if files := sorted(file for file in folder.glob("**/*.parquet") if not file.is_dir()):
        return files
    what = "no parquet files" if path.is_dir() else "is a file" if path.exists() else "there is no such folder"
    raise DataError(
        f"{folder if path.is_dir() else path}: {what}. A MEDS dataset keeps its events in data/**/*.parquet;"
        " give the folder that holds data/ and metadata/."
    )


def _count_rows(file: Path) -> int:
    try:
        return _scan(file).select(pl.len()).collect().item()
    except UNREADABLE as problem:
        raise _damaged(file, problem) from None


def canonical_order(frame: pl.DataFrame) -> pl.DataFrame:
    """Sort events in the canonical order; further columns go along, `unit` and `encounter_id` break ties."""
    code = pl.col("code")
    death = (code == meds.death_code) | code.str.starts_with(f"{meds.death_code}//")
    rank = (death.cast(pl.Int8) - (code == meds.birth_code).cast(pl.Int8)).alias("_rank")
    order = ["subject_id", "time", "_rank", "code", "numeric_value"]
    order += [column for column in ("unit", "encounter_id") if column in frame.columns]
    return frame.with_columns(rank).sort(order, nulls_last=False, maintain_order=True).drop("_rank")


def write_meds(
    path: Path,
    shards: Iterable[tuple[str, pl.DataFrame]],
    *,
    name: str,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a MEDS dataset; the folder appears whole or not at all.

    Args:
        path: The folder to make (one that stands there is replaced).
        shards: Names (`train/0`) and events; columns beyond MEDS' own are kept. No shard at all
            gives an empty one.
        name: The dataset's name.
        finish: Called with the folder before it is in its place, to put further files there.

    Raises:
        DataError: Events that don't fit MEDS, a name given twice, or a subject in two shards.
    """
    subjects: dict[str, pl.Series] = {}
    codes: set[str] = set()
    with durable.directory(path) as aside:
        for shard, frame in shards:
            place = f"{name}, shard {shard}"
            if shard in subjects:
                raise DataError(f"{place}: the name is given twice; number the shards.")
            events = canonical_order(_canonical_types(frame, place))
            subjects[shard] = events["subject_id"].unique()
            codes.update(events["code"].unique())
            _write_shard(aside, shard, events)
        if not subjects:
            _write_shard(aside, "0", pl.DataFrame(schema=_EMPTY))
        _refuse_shared_subjects(subjects)
        _write_metadata(aside, name, sorted(codes))
        if finish is not None:
            finish(aside)


_EMPTY: dict[str, type[pl.DataType] | pl.DataType] = {
    "subject_id": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "numeric_value": pl.Float32,
}


def _write_shard(root: Path, shard: str, events: pl.DataFrame) -> None:
    file = root / meds.data_subdirectory / f"{shard}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    extra = [column for column in events.columns if column not in CORE]
    table = meds.DataSchema.align(events.select(*CORE, *extra).to_arrow())
    pyarrow.parquet.write_table(table, file)


def _write_metadata(root: Path, name: str, codes: list[str]) -> None:
    about = {"dataset_name": name, "meds_version": _MEDS_VERSION, "etl_name": "fedcomet"}
    meds.DatasetMetadataSchema.validate(about)
    file = root / meds.dataset_metadata_filepath
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(about, indent=2) + "\n")
    described = {
        "code": pl.Series(codes, dtype=pl.String),
        "description": pl.Series([None] * len(codes), dtype=pl.String),
        "parent_codes": pl.Series([None] * len(codes), dtype=pl.List(pl.String)),
    }
    table = meds.CodeMetadataSchema.align(pl.DataFrame(described).to_arrow())
    pyarrow.parquet.write_table(table, root / meds.code_metadata_filepath)


def _read_name(path: Path) -> tuple[str, list[str]]:
    """The dataset's name, and a note if its metadata is missing (MEDS recommends it)."""
    file = path / meds.dataset_metadata_filepath
    if not file.exists():
        return path.name, [f"{meds.dataset_metadata_filepath} is missing; named after its folder."]
    try:
        about = json.loads(file.read_bytes())
    except OSError as problem:
        raise DataError(f"{file}: can't be read ({problem.strerror}). Ask for the right to, or remove it.") from None
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{file}: not JSON ({problem}). Correct it, or remove it.") from None
    if not isinstance(about, dict):
        raise DataError(f"{file}: must be a JSON object with fields such as dataset_name. Correct it, or remove it.")
    try:
        meds.DatasetMetadataSchema.validate(about)
    except Exception as problem:
        # What the schema's package tells by itself is only that it doesn't fit; the cause knows the field.
        cause = problem.__cause__ or problem
        field, reason = getattr(cause, "json_path", "$").removeprefix("$."), getattr(cause, "message", cause)
        raise DataError(f"{file}: {field}: {reason}, as MEDS asks for. Correct the field, or remove it.") from None
    return about.get("dataset_name") or path.name, []


def _scan(file: Path) -> pl.LazyFrame:
    """A file as it is: neither its name nor its folders' say anything."""
    return pl.scan_parquet(file, hive_partitioning=False, glob=False)


def _schema(file: Path) -> dict[str, pl.DataType]:
    try:
        return dict(_scan(file).collect_schema())
    except UNREADABLE as problem:
        raise _damaged(file, problem) from None


def _read(file: Path, columns: list[str], start: int = 0, rows: int | None = None) -> pl.DataFrame:
    try:
        return _scan(file).select(columns).slice(start, rows).collect()
    except UNREADABLE as problem:
        raise _damaged(file, problem) from None


def _damaged(file: Path, problem: BaseException) -> DataError:
    if isinstance(problem, PermissionError):
        return DataError(f"{file}: may not be read. Ask for the right to read it.")
    reason = str(problem).splitlines()[0]
    return DataError(f"{file}: not a readable parquet file ({reason}). Write the shard again.")


def _check_types(schema: dict[str, pl.DataType], place: str) -> None:
    """Refuse a missing column and a type that can't be read without a guess."""
    for column in CORE[:3]:
        if column not in schema:
            raise DataError(
                f"{place}: column {column} is missing (it has {', '.join(schema) or 'none'})."
                " MEDS needs subject_id, time and code."
            )
    zoned = schema["time"]
    if isinstance(zoned, pl.Datetime) and zoned.time_zone is not None:
        raise DataError(
            f"{place}: column time has the time zone {zoned.time_zone}, MEDS times have none."
            " Convert to the hospital's local time and drop the zone."
        )
    rules = (
        ("subject_id", lambda kind: kind.is_integer(), "a 64-bit integer"),
        ("time", lambda kind: kind in (pl.Datetime, pl.Null), "a timestamp"),
        ("code", lambda kind: kind in (pl.String, pl.Categorical, pl.Enum), "a string"),
        ("numeric_value", lambda kind: kind.is_numeric() or kind == pl.Null, "a number"),
    )
    for column, good, wanted in rules:
        if column in schema and not good(schema[column]):
            raise DataError(
                f"{place}: column {column} is of type {schema[column]}, it must be {wanted}."
                " Convert the column and write the shard again."
            )


def _canonical_types(frame: pl.DataFrame, place: str, first_row: int = 0) -> pl.DataFrame:
    """Bring the core columns to MEDS' types; a null subject or code is refused with its row."""
    _check_types(dict(frame.schema), place)
    if "numeric_value" not in frame.columns:
        frame = frame.with_columns(numeric_value=pl.lit(None, pl.Float32))
    frame = _cast(frame, place, first_row, **_CORE_TYPES)
    _refuse_nulls(frame, "subject_id", place, first_row)
    _refuse_nulls(frame, "code", place, first_row)
    return frame


def without(column: str) -> pl.Expr:
    """Whether a row has no subject_id or no code; a blank code is none."""
    cell = pl.col(column)
    return cell.is_null() | (cell.str.strip_chars(_BLANKS) == "") if column == "code" else cell.is_null()


def _refuse_nulls(frame: pl.DataFrame, column: str, place: str, first_row: int = 0) -> None:
    # Blanks sort before all else, and comparing is six times as fast as stripping.
    if column == "code" and not (frame["code"].null_count() or (frame["code"] < "!").any()):
        return
    missing = frame.select(without(column)).to_series()
    if missing.any():
        row = first_row + (missing.arg_max() or 0)
        raise DataError(
            f"{place}: row {row} (from 0) has no {column}."
            " Give it one, or read the dataset with --quarantine, which sets such rows aside."
        )


def out_of_range(column: str | pl.Expr) -> pl.Expr:
    """Whether a time lies outside of the years that a record can hold."""
    time = pl.col(column) if isinstance(column, str) else column
    bounds = [pl.lit(day).str.to_datetime("%Y-%m-%d", time_unit="us") for day in (EARLIEST, LATEST)]
    return (time < bounds[0]) | (time >= bounds[1])


def microseconds(column: pl.Series) -> pl.Series:
    """A column of dates or times without a zone as datetime[us]; what doesn't fit ends up far out of range."""
    kind, most = column.dtype, np.iinfo(np.int64).max // 1000
    if kind == pl.Date:
        column = column.to_physical().clip(-1_000_000, 1_000_000).cast(pl.Date)
    elif isinstance(kind, pl.Datetime) and kind.time_unit == "ms":
        column = column.to_physical().clip(-most, most).cast(kind)
    return column.cast(pl.Datetime("us"))


def decoded(column: pl.Series) -> tuple[pl.Series, pl.Series]:
    """A column of bytes as text, and which cells are no UTF-8: null in the text, true in a bool column."""
    texts: list[str | None] = []
    for cell in column:
        try:
            texts.append(None if cell is None else cell.decode())
        except UnicodeDecodeError:
            texts.append(None)
    text = pl.Series(column.name, texts, dtype=pl.String)
    return text, text.is_null() & column.is_not_null()


def as_text(column: pl.Series) -> pl.Series:
    """A column as text, for people; dates of more than four digits of year, which polars can't write, as numbers."""
    kind = column.dtype
    if kind == pl.Binary:
        texts = [None if cell is None else cell.decode("utf-8", "backslashreplace") for cell in column]
        return pl.Series(column.name, texts, dtype=pl.String)
    if kind == pl.Duration:
        return column.to_physical().cast(pl.String)
    if kind.is_nested():
        return pl.Series(column.name, [None if cell is None else str(cell) for cell in column.to_list()], pl.String)
    if not isinstance(kind, pl.Datetime | pl.Date):
        return column.cast(pl.String, strict=False)
    number = column.to_physical()
    per_day = {"ms": 86_400_000, "us": 86_400_000_000, "ns": 86_400_000_000_000}
    day = number if isinstance(kind, pl.Date) else number // per_day[kind.time_unit]
    first, last = (int(np.datetime64(text, "D").astype(np.int64)) for text in ("0001-01-01", "9999-12-31"))
    return column.set(~day.is_between(first, last), None).cast(pl.String).fill_null(number.cast(pl.String))


def _refuse_far_times(frame: pl.DataFrame, place: str, first_row: int) -> None:
    far = frame.select(out_of_range("time").fill_null(value=False)).to_series()
    if far.any():
        at = far.arg_max() or 0
        # polars writes no years of more than four digits.
        time = np.datetime64(frame["time"].to_physical()[at], "us")
        raise DataError(
            f"{place}: row {first_row + at} (from 0) has the time {time}, outside of {EARLIEST} to"
            f" {LATEST}. Correct it, or read the dataset with --quarantine, which sets such rows aside."
        )


def _cast(frame: pl.DataFrame, place: str, first_row: int = 0, /, **types: pl.DataType) -> pl.DataFrame:
    if isinstance(frame.schema.get("time"), pl.Datetime):
        frame = frame.with_columns(microseconds(frame["time"]))
    for column, wanted in types.items():
        if wanted == pl.String and (frame.schema[column].is_nested() or frame.schema[column] == pl.Binary):
            frame = frame.with_columns(as_text(frame[column]))
        try:
            frame = frame.with_columns(pl.col(column).cast(wanted))
        except pl.exceptions.PolarsError:
            lost = frame[column].cast(wanted, strict=False).is_null() & frame[column].is_not_null()
            at = lost.arg_max() or 0
            instead = "write the shard again"
            if column == "subject_id":
                instead = "read the dataset with --quarantine, which sets such rows aside"
            raise DataError(
                f"{place}: row {first_row + at} (from 0): {column} can't be read as {wanted} ({frame[column][at]!r})."
                f" Correct it, or {instead}."
            ) from None
    return frame


def _count_unsorted(frame: pl.DataFrame) -> int:
    """Rows before which a later row of their subject, or the end of its block, stands."""
    subject = frame["subject_id"].to_numpy()
    time = frame["time"].to_physical().fill_null(np.iinfo(np.int64).min).to_numpy()
    same = subject[1:] == subject[:-1]
    blocks = int((~same).sum()) + bool(len(subject))
    return blocks - frame["subject_id"].n_unique() + int((same & (time[1:] < time[:-1])).sum())


def _cut(path: Path, shard: str, piece_events: int) -> Cut:
    """Check a shard's schema and subjects, and cut it."""
    file = path / shard
    _check_types(_schema(file), str(file))
    return cut(shard, _subject_chunks(file), piece_events)


def _subject_chunks(file: Path) -> Iterator[NDArray[np.int64]]:
    start = 0
    while len(column := _read(file, ["subject_id"], start, CHUNK_ROWS)):
        _refuse_nulls(column, "subject_id", str(file), start)
        yield _cast(column, str(file), start, subject_id=pl.Int64())["subject_id"].to_numpy()
        start += CHUNK_ROWS


def _refuse_shared_subjects(subjects: dict[str, pl.Series]) -> None:
    if not subjects:
        return
    ids = pl.concat(list(subjects.values()))
    twice = ids.filter(ids.is_duplicated())
    if len(twice):
        first = int(twice.sort()[0])
        places = [shard for shard, column in subjects.items() if first in column]
        raise DataError(
            f"Subject {first} is in {places[0]} and in {places[1]}. MEDS keeps all events of a"
            " subject in one file; write them again with each subject in one shard, or read the dataset with"
            " --quarantine, which does that."
        )
