"""What the words of a mapping mean for the columns of a piece: texts, numbers, conditions, codes, times.

Columns are texts where they come from text files, or typed where they come from parquet; missing ones are null. All
is computed for whole columns, and what can't be used is told by masks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import polars as pl

from tokenizer.events import as_text, microseconds, out_of_range
from tokenizer.sources.mapping import Condition, Template, Time

_US = {"days": 86_400_000_000, "hours": 3_600_000_000, "minutes": 60_000_000, "seconds": 1_000_000}
_YEAR_DAYS = 365.25
_OLDEST_YEARS = 150
# Microseconds: more than any record spans, less than what overflows when it is added to a time.
_LONGEST_US = 1e16
_GREATEST = 3.4028234e38

_ISO = (
    "%Y-%m-%d %H:%M:%S",
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%dT%H:%M:%S%.f",
)
_ZONE = r"(:\d\d(?:\.\d+)?) ?(?:Z|[+-]\d\d(?::?\d\d)?)$"


@dataclass(frozen=True)
class Fault:
    """Rows that can't be used.

    Attributes:
        where: bool [rows], which (null: not).
        column: at fault.
        reason: in words, without the value.
        advice: what to do.
    """

    where: pl.Series
    column: str
    reason: str
    advice: str = ""


@dataclass(frozen=True)
class Moments:
    """A time (or a length of time) of each row.

    Attributes:
        at: datetime[us] (duration[us]) [rows], null where a part of it is missing or at fault.
        faults: what is wrong.
    """

    at: pl.Series
    faults: tuple[Fault, ...] = ()

    def filter(self, rows: pl.Series) -> "Moments":
        """Those of some rows."""
        faults = tuple(replace(fault, where=fault.where.filter(rows)) for fault in self.faults)
        return Moments(self.at.filter(rows), faults)


class Columns:
    """The columns of a piece.

    Args:
        frame: the piece.
        decimal: the decimal mark of numbers in texts.
    """

    def __init__(self, frame: pl.DataFrame, decimal: str = ".") -> None:
        self._frame = frame
        self._decimal = decimal

    def text(self, name: str) -> pl.Series:
        """A column as text; whole numbers without a decimal point."""
        column = self._frame[name]
        if column.dtype == pl.String:
            return column
        if column.dtype.is_float():
            whole = column.cast(pl.Int64, strict=False)
            is_whole = (whole == column).fill_null(value=False)
            return whole.cast(pl.String).zip_with(is_whole, column.cast(pl.String))
        # Times without fractions of a second.
        return as_text(column).str.replace(r"\.\d+$", "") if column.dtype == pl.Datetime else as_text(column)

    def number(self, name: str) -> pl.Series:
        """A column as float64; null where it is no number."""
        column = self._frame[name]
        if column.dtype.is_temporal():
            return pl.Series(name, [None], pl.Float64).new_from_index(0, len(column))
        if column.dtype == pl.String and self._decimal == ",":
            # A point would be one of thousands, which is for a person to sort out.
            column = column.set(column.str.contains(".", literal=True), None).str.replace(",", ".", literal=True)
        return column.cast(pl.Float64, strict=False)

    def value(self, name: str, *, words: bool) -> tuple[pl.Series, tuple[Fault, ...]]:
        """A column of values, and what is wrong with it; `words`: what is no number is an answer, not a fault."""
        number = self.number(name)
        unfit = Fault(~(number.abs() <= _GREATEST), name, "a number that is not finite or too large for float32")
        if words:
            return number, (unfit,)
        advice = "Correct it, name the mark for missing ones in null or column_nulls, or map it as text"
        word = Fault(self._frame[name].is_not_null() & number.is_null(), name, "not a number", advice)
        return number, (word, unfit)

    def holds(self, where: Mapping[str, Condition]) -> pl.Series:
        """Whether all conditions hold: bool [rows] without nulls."""
        tests = [test for name, condition in where.items() for test in self._tests(name, condition)]
        result = tests[0]
        for test in tests[1:]:
            result = result & test
        return result

    def _tests(self, name: str, condition: Condition) -> list[pl.Series]:
        text, tests = self.text(name), []
        if condition.any_of is not None:
            tests.append(text.is_in(condition.any_of))
        if condition.none_of is not None:
            tests.append(~text.is_in(condition.none_of).fill_null(value=False))
        if condition.matches is not None:
            tests.append(text.str.contains(condition.matches))
        if condition.missing is not None:
            tests.append(text.is_null() if condition.missing else text.is_not_null())
        if condition.above is not None:
            tests.append(self.number(name) > condition.above)
        if condition.below is not None:
            tests.append(self.number(name) < condition.below)
        return [test.fill_null(value=False) for test in tests]

    def fill(self, template: Template) -> pl.Series:
        """The text of a template; null where one of its columns is."""
        parts: list[pl.Expr] = []
        for part in template.parts:
            parts.append(pl.lit(part) if isinstance(part, str) else pl.lit(self._formatted(*part)))
        filled = self._frame.select(pl.concat_str(parts) if len(parts) > 1 else parts[0]).to_series()
        # A template without columns gives a single text.
        return filled if len(filled) == len(self._frame) else filled.new_from_index(0, len(self._frame))

    def _formatted(self, name: str, kind: str) -> pl.Series:
        text = self.text(name)
        if kind == "upper":
            return text.str.to_uppercase()
        if kind == "lower":
            return text.str.to_lowercase()
        if kind == "int":
            number = self.number(name)
            whole = number.cast(pl.Int64, strict=False)
            return whole.cast(pl.String).zip_with((whole == number).fill_null(value=False), text)
        if kind.startswith("icd"):
            return _dotted(text.str.to_uppercase().str.replace_all(".", "", literal=True), kind)
        return text

    def moments(self, time: Time) -> Moments:
        """The times that a mapping tells of."""
        if time.date is not None:
            return Moments(pl.Series([time.date], dtype=pl.Datetime("us")).new_from_index(0, len(self._frame)))
        if time.column is not None:
            return self._with_clock(self._parsed(time.column, time.format), time.clock)
        if time.year is not None:
            return self._with_clock(self._year(time.year), time.clock)
        assert time.origin is not None
        origin = self.moments(time.origin)
        if time.age is not None:
            born = self._born(time, time.age, origin.at)
            return Moments(born.at, (*origin.faults, *born.faults))
        length = self._length(time.offset or "", time.unit or "")
        way = -length.at if time.before else length.at
        return Moments(_sum(origin.at, way), (*origin.faults, *length.faults))

    def _parsed(self, name: str, formats: Sequence[str]) -> Moments:
        column = self._frame[name]
        if isinstance(column.dtype, pl.Datetime):
            # The clock on the wall counts, whatever its zone.
            return Moments(microseconds(column.dt.replace_time_zone(None)))
        if column.dtype == pl.Date:
            return Moments(microseconds(column))
        text = self.text(name)
        at = _parse(text, formats or _ISO)
        wanted = " or ".join(formats) or "YYYY-MM-DD HH:MM:SS"
        advice = f"Times must read {wanted}; correct it, or give the mapping the right format"
        return Moments(at, (Fault(text.is_not_null() & at.is_null(), name, "not a time", advice),))

    def _with_clock(self, day: Moments, clock: str | None) -> Moments:
        """A day and the time of day in the column `clock`; midnight where there is none."""
        if clock is None:
            return day
        if self._frame[clock].dtype == pl.Time:
            of_day = Moments(self._frame[clock].cast(pl.Duration("us")))
        else:
            of_day = self._length(clock, "HH:MM")
        length = of_day.at.to_physical().fill_null(0).cast(pl.Duration("us"))
        return Moments(_sum(day.at, length), (*day.faults, *of_day.faults))

    def _year(self, name: str) -> Moments:
        number = self.number(name)
        good = ((number >= 1) & (number <= 9999) & (number == number.floor())).fill_null(value=False)
        year = number.set(~good, None).cast(pl.Int32).alias("year").to_frame()
        at = year.select(pl.datetime("year", 1, 1, time_unit="us")).to_series()
        return Moments(at, (Fault(self._frame[name].is_not_null() & ~good, name, "not a year"),))

    def _length(self, name: str, unit: str) -> Moments:
        """Lengths of time, duration[us]."""
        if unit == "HH:MM":
            us, reason, advice = self._clock_us(name), "not a time as HH:MM", "Write hours and minutes, such as 36:05"
        else:
            us, reason, advice = self.number(name) * _US[unit], "not a number", f"It must be a number of {unit}"
        fits = (us.abs() <= _LONGEST_US).fill_null(value=False)
        wrong = Fault(self._frame[name].is_not_null() & us.is_null(), name, reason, advice)
        far = Fault(us.is_not_null() & ~fits, name, "time out of range", "Correct it, or name it in column_nulls")
        return Moments(us.set(~fits, None).round().cast(pl.Int64).cast(pl.Duration("us")), (wrong, far))

    def _clock_us(self, name: str) -> pl.Series:
        """Microseconds (float64) of texts such as 36:05, -0:30 or 07:15:30."""
        text = self.text(name)
        parts = text.str.strip_prefix("-").str.splitn(":", 3).struct.unnest()
        hours, minutes, seconds = (parts[place] for place in parts.columns)
        minute = minutes.cast(pl.UInt8, strict=False)
        us = hours.cast(pl.UInt64, strict=False).cast(pl.Float64) * 3.6e9 + minute.cast(pl.Float64) * 6e7
        good = minute < 60
        if seconds.null_count() < len(seconds):
            second = seconds.cast(pl.Float64, strict=False).set(seconds.is_null(), 0.0)
            us, good = us + second * 1e6, good & (second < 60) & (second >= 0)
        return (us * (1 - 2 * text.str.starts_with("-").cast(pl.Float64))).set(~good.fill_null(value=False), None)

    def _born(self, time: Time, name: str, origin: pl.Series) -> Moments:
        """Times that lie an age before `origin`."""
        number = self.number(name)
        if time.ages:
            texts, ages = list(time.ages), list(time.ages.values())
            named = self.text(name).replace_strict(texts, ages, default=None, return_dtype=pl.Float64)
            number = named.zip_with(named.is_not_null(), number)
        unit = time.unit or "years"
        oldest = _OLDEST_YEARS * {"years": 1.0, "months": 12.0}.get(unit, _YEAR_DAYS)
        fits = ((number >= 0) & (number <= oldest)).fill_null(value=False)
        advice = 'Say what it means in ages, such as ages = { "> 89" = 90 }, or name it in column_nulls'
        wrong = Fault(self._frame[name].is_not_null() & number.is_null(), name, "not an age", advice)
        advice = f"It must be from 0 to {oldest:.0f} {unit}; name marks for missing ones in column_nulls"
        far = Fault(number.is_not_null() & ~fits, name, "age out of range", advice)
        age = number.set(~fits, None)
        if unit == "days" or time.year_days is not None:
            days = age if unit == "days" else age * (time.year_days or 0) / (12 if unit == "months" else 1)
            born = _sum(origin, (days.floor() * -_US["days"]).cast(pl.Int64).cast(pl.Duration("us")))
        else:
            months = (age * (12 if unit == "years" else 1)).floor().cast(pl.Int64)
            table = pl.DataFrame({"origin": origin, "back": "-" + months.cast(pl.String) + "mo"})
            born = table.select(pl.col("origin").dt.offset_by(pl.col("back"))).to_series()
        return Moments(born, (wrong, far))


def time_faults(moments: Moments, column: str, *, optional: bool) -> tuple[Fault, ...]:
    """What can be wrong with the times of events; `optional`: a missing one isn't."""
    missing = Fault(
        moments.at.is_null(), column, "no time", "Give it one, or say optional = true where the event may be left out"
    )
    frame = moments.at.alias("at").to_frame()
    far = Fault(frame.select(out_of_range("at")).to_series(), column, "time out of range")
    return (*moments.faults, *(() if optional else (missing,)), far)


def _parse(text: pl.Series, formats: Sequence[str]) -> pl.Series:
    """Times in the first format that fits; each next one is tried on what is left, then all without their zone."""
    at = pl.Series([None], dtype=pl.Datetime("us")).new_from_index(0, len(text))
    bare = [form.replace("%z", "").strip() for form in formats if "%z" in form or formats is _ISO]
    for zoned, forms in ((True, [form for form in formats if "%z" not in form]), (False, bare)):
        for form in forms:
            left = at.is_null() & text.is_not_null()
            if not left.any():
                return at
            every = bool(left.all())
            rest = text if every else text.filter(left)
            if not zoned:
                rest = rest.str.replace(_ZONE, "$1")
            found = rest.str.to_datetime(form, time_unit="us", strict=False)
            at = found if every else at.scatter(left.arg_true(), found)
    return at


def _sum(time: pl.Series, length: pl.Series) -> pl.Series:
    """Times and lengths; what can't be a time of a record is far in the future, rather than an overflow."""
    us = time.to_physical().cast(pl.Float64) + length.to_physical().cast(pl.Float64)
    return us.clip(-4 * _LONGEST_US, 4 * _LONGEST_US).cast(pl.Int64).cast(pl.Datetime("us"))


def _dotted(code: pl.Series, kind: str) -> pl.Series:
    """ICD codes, upper case and bare, with their dots."""
    head = pl.lit({"icd9proc": 2}.get(kind, 3))
    if kind == "icd9cm":
        head = pl.when(pl.col("code").str.starts_with("E")).then(4).otherwise(3)
    text = pl.col("code")
    rest = text.str.slice(head)
    dotted = pl.when(rest != "").then(pl.concat_str(text.str.head(head), pl.lit("."), rest)).otherwise(text)
    return code.alias("code").to_frame().select(dotted).to_series()
