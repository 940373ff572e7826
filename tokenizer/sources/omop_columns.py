"""Columns of an OMOP table get their types: whole numbers, numbers, times, texts; every cell that is none is named.

A table comes as text (CSV, databases) or with types of its own (parquet); both end in the same four kinds.
"""

from collections.abc import Mapping
from typing import Literal

import polars as pl

from tokenizer.errors import DataError
from tokenizer.events import as_text, decoded, microseconds, out_of_range
from tokenizer.sources.intake import Intake

Kind = Literal["id", "number", "time", "text"]

# What R, pandas and SQL write where nothing is known. In a text "NA" can be sodium, so only other kinds know these.
_MISSING = ("", "NA", "NaN", "nan", "null", "None", "NULL", "\\N", "<NA>", "NaT")

_REASONS = {
    "id": ("not a whole number", "Write it as a 64-bit integer"),
    "number": ("not a number", "Write it with digits and a decimal point"),
    "time": ("not a date", "Write it as YYYY-MM-DD or YYYY-MM-DD HH:MM:SS"),
    "text": ("a NUL character", "The file may be damaged; export it again"),
}
_ZONE = r"^(\.\d+)?\s*(Z|z|[+-]\d\d(:?\d\d)?)?$"


class Rows:
    """Pieces of one table on their way to events: bad rows are set aside, each once.

    Args:
        intake: where bad rows go.
        table: name of the table.
        file: place that messages name.
        counted: whether the table's rows were counted as read; otherwise its bad rows are counted here.
    """

    def __init__(self, intake: Intake, table: str, file: str, *, counted: bool = True) -> None:
        self._intake = intake
        self._table = table
        self._file = file
        self._counted = counted

    def without(
        self, frame: pl.DataFrame, bad: pl.Series, column: str, reason: str, advice: str = "", shown: str | None = None
    ) -> pl.DataFrame:
        """Set rows aside and give the others; `bad` has one truth value a row, null is false.

        Args:
            frame: with the column `_row`, the row's number.
            bad: boolean [N].
            column: the one to name.
            reason: what is wrong.
            advice: what to do.
            shown: the column whose content goes to quarantine, if not `column`.
        """
        bad = bad.fill_null(value=False)
        if not bad.any():
            return frame
        wrong = frame.filter(bad)
        if not self._counted:
            self._intake.rows(self._table, wrong.height)
        content = shown or column
        self._intake.set_aside(
            wrong.select(
                file=pl.lit(self._file),
                table=pl.lit(self._table),
                row="_row",
                column=pl.lit(column),
                reason=pl.lit(reason),
                content=as_text(wrong[content]) if content in wrong.columns else pl.lit(""),
            ).with_columns(pl.col("content").fill_null("")),
            advice,
        )
        return frame.filter(~bad)

    def typed(self, frame: pl.DataFrame, kinds: Mapping[str, Kind]) -> pl.DataFrame:
        """Give columns their kinds: id int64, number float32, time datetime[us], text string; blank is null.

        Rows with a cell that isn't of its kind are set aside.

        Raises:
            DataError: a column holds lists or the like.
        """
        for column, kind in kinds.items():
            if frame[column].dtype.is_nested():
                found = frame[column].dtype
                raise DataError(
                    f"{self._file}: {self._table}: column {column} is of type {found}. Write a plain value in each row."
                )
            if frame[column].dtype == pl.Binary:
                frame = self._decoded(frame, column)
            parsed = _PARSE[kind](frame[column])
            wrong = None
            if kind == "text":
                wrong = _with_nul(frame[column])
            elif parsed.null_count() > frame[column].null_count():
                wrong = parsed.is_null() & ~_is_missing(frame[column])
            if wrong is not None and wrong.any():
                frame = self.without(frame, wrong, column, *_REASONS[kind])
                parsed = parsed.filter(~wrong.fill_null(value=False))
            frame = frame.with_columns(parsed.alias(column))
        return frame

    def _decoded(self, frame: pl.DataFrame, column: str) -> pl.DataFrame:
        """Bytes as text; rows whose bytes are none are set aside."""
        text, wrong = decoded(frame[column])
        frame = self.without(frame, wrong, column, "not UTF-8", "Write the column as text")
        return frame.with_columns(text.filter(~wrong))

    def timed(self, frame: pl.DataFrame, name: str, *columns: str) -> pl.DataFrame:
        """Add the column `name`: the first of the times `columns` that is known.

        Rows without any, and those with a time outside of what a record can hold, are set aside.
        """
        frame = frame.with_columns(pl.coalesce(columns).alias(name))
        unknown = frame[name].is_null()
        if unknown.any():
            # A file may have but one of the columns; what it lacks is null throughout.
            there = next((c for c in reversed(columns) if frame[c].null_count() < frame.height), columns[-1])
            frame = self.without(frame, unknown, there, "no time", "Give the row its date")
        return self.in_range(frame, name, *columns)

    def in_range(self, frame: pl.DataFrame, name: str, *columns: str) -> pl.DataFrame:
        """Set aside rows whose time `name`, read from the first of `columns` that has it, no record can hold."""
        outside = frame.select(out_of_range(name)).to_series()
        if not outside.any():
            return frame
        for column in columns:
            told = outside & frame[column].is_not_null()
            frame = self.without(frame, told, column, "time out of range", "Correct the date", shown=name)
            outside = frame.select(out_of_range(name)).to_series()
        return frame


def _is_missing(column: pl.Series) -> pl.Series:
    if column.dtype == pl.String:
        return column.is_null() | column.str.strip_chars().is_in(_MISSING)
    if column.dtype.is_float():
        return column.is_null() | column.is_nan()
    return column.is_null()


def _with_nul(column: pl.Series) -> pl.Series | None:
    return column.str.contains("\0", literal=True) if column.dtype == pl.String else None


def whole_numbers(column: pl.Series) -> pl.Series:
    """A column as int64; null where it is no whole number."""
    if column.dtype == pl.String:
        parsed = column.cast(pl.Int64, strict=False)
        if parsed.null_count() > column.null_count():
            # Tools that keep whole numbers as floats write 4181.0; the digits stay digits, floats would round them.
            plain = column.str.strip_chars().str.replace(r"\.0*$", "")
            parsed = plain.cast(pl.Int64, strict=False)
        return parsed
    if column.dtype.is_float():
        whole = column.is_finite() & (column == column.round())
        return column.set(~whole, None).cast(pl.Int64, strict=False)
    if column.dtype.is_decimal():
        return whole_numbers(column.cast(pl.String))
    if column.dtype.is_integer() or column.dtype == pl.Null:
        return column.cast(pl.Int64, strict=False)
    return pl.repeat(None, len(column), dtype=pl.Int64, eager=True)


def _numbers(column: pl.Series) -> pl.Series:
    if column.dtype == pl.String:
        column = column.str.strip_chars()
    elif not (column.dtype.is_numeric() or column.dtype == pl.Null):
        return pl.repeat(None, len(column), dtype=pl.Float32, eager=True)
    numbers = column.cast(pl.Float64, strict=False).cast(pl.Float32, strict=False)
    return numbers.set(~numbers.is_finite(), None)


def _times(column: pl.Series) -> pl.Series:
    kind = column.dtype
    if isinstance(kind, pl.Datetime):
        # The wall clock counts, not the instant.
        return microseconds(column.dt.replace_time_zone(None))
    if kind in (pl.Date, pl.Null):
        return microseconds(column)
    if kind.is_integer():
        column = column.cast(pl.String)
    if column.dtype != pl.String:
        return pl.repeat(None, len(column), dtype=pl.Datetime("us"), eager=True)
    column = column.str.strip_chars()
    lengths = column.str.len_bytes()
    if (days := _parse(column, lengths == 10, "%Y-%m-%d")) is not None:
        return days
    return _mixed_times(column, lengths)


def _mixed_times(column: pl.Series, lengths: pl.Series) -> pl.Series:
    text = column.str.replace("T", " ", literal=True)
    if (seconds := _parse(text, lengths == 19, "%Y-%m-%d %H:%M:%S")) is not None:
        return seconds
    t, size, rest = pl.col("text"), pl.col("size"), pl.col("text").str.slice(19)

    def read(where: pl.Expr, format_: str) -> pl.Expr:
        value = pl.when(where).then(t.str.slice(0, 19))
        return value.str.to_datetime(format_, time_unit="us", strict=False)

    digits = rest.str.extract(r"^\.(\d{1,6})").str.pad_end(6, "0").cast(pl.Int64).fill_null(0)
    parsed = pl.coalesce(
        read(size == 10, "%Y-%m-%d"),
        read((size >= 19) & rest.str.contains(_ZONE), "%Y-%m-%d %H:%M:%S") + pl.duration(microseconds=digits),
        read(size == 16, "%Y-%m-%d %H:%M"),
        read(size == 8, "%Y%m%d"),
    )
    return pl.DataFrame({"text": text, "size": lengths}).select(parsed.alias(column.name)).to_series()


def _parse(column: pl.Series, fits: pl.Series, format_: str) -> pl.Series | None:
    """Parse a column if all of it may have one format; the fast way for what nearly all tables hold."""
    if not fits.all():
        return None
    return column.str.to_datetime(format_, time_unit="us", strict=False)


def _texts(column: pl.Series) -> pl.Series:
    if column.dtype != pl.String:
        column = column.cast(pl.String, strict=False)
    distinct = column.unique()
    if len(distinct) * 4 > len(column):
        return _clean(column)
    return column.replace_strict(distinct, _clean(distinct), return_dtype=pl.String)


def _clean(column: pl.Series) -> pl.Series:
    # Control characters and line ends would break tables that list codes.
    clean = column.str.replace_all(r"[\s\p{Cc}]+", " ").str.strip_chars()
    return clean.set(clean == "", None)


_PARSE = {"id": whole_numbers, "number": _numbers, "time": _times, "text": _texts}
