"""The file that says what the columns of a site's tables mean: read once, checked whole, every fault with its place.

It is TOML. `docs/sources/tables.md` tells the language with an example; the classes below are its reference. A short
form stands for a section with one key: `time = "charttime"` is `time = { column = "charttime" }`.
"""

import difflib
import re
import string
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import polars as pl
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tokenizer.errors import ConfigError

FORMATS = ("upper", "lower", "int", "icd9cm", "icd10cm", "icd9proc")
"""What a template can do to a column's text: `{icd_code:icd10cm}` is upper case with a dot after three letters."""


class _Section(BaseModel):
    """A table of the file: no unknown keys, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class Template:
    """A text with columns in it: `LAB//{itemid}`.

    Attributes:
        text: as written.
        parts: constant texts, and (column, format or "") pairs.
    """

    text: str
    parts: tuple[str | tuple[str, str], ...]

    @classmethod
    def parse(cls, text: Any) -> Any:
        """Read a template; what is no text is left for pydantic to refuse."""
        if not isinstance(text, str):
            return text
        parts: list[str | tuple[str, str]] = []
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError:
            raise ValueError(f"{text!r}: a brace is open or closed alone; write {{{{ for a brace itself") from None
        for constant, column, kind, _ in pieces:
            if constant:
                parts.append(constant)
            if column is None:
                continue
            if not column:
                raise ValueError(f"{text!r}: name a column between the braces, such as {{itemid}}")
            if kind and kind not in FORMATS:
                raise ValueError(f"{text!r}: {kind} is not a format{_suggest(kind, FORMATS)}")
            parts.append((column, kind or ""))
        if not parts:
            raise ValueError("must not be empty")
        return cls(text, tuple(parts))

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it names."""
        return tuple(part[0] for part in self.parts if not isinstance(part, str))

    def fill(self, column: str, text: str) -> "Template":
        """Put a constant in the place of a column."""
        parts = tuple(text if not isinstance(part, str) and part[0] == column else part for part in self.parts)
        return Template(self.text, parts)


def _texts(value: Any) -> Any:
    """One or several texts; numbers and truth values are written as a table holds them."""
    items = value if isinstance(value, list) else [value]
    return tuple(str(item).lower() if isinstance(item, bool) else str(item) for item in items)


def _short(key: str) -> BeforeValidator:
    """Let a plain text (or list, number, date) stand for a section with the one key `key`."""
    return BeforeValidator(lambda value: value if isinstance(value, dict | BaseModel) else {key: value})


def _regex(pattern: str) -> str:
    try:
        pl.Series([""]).str.contains(pattern)
    except pl.exceptions.PolarsError as problem:
        raise ValueError(f"not a regular expression: {' '.join(str(problem).split())[:200]}") from None
    return pattern


_Regex = Annotated[str, Field(min_length=1), BeforeValidator(lambda v: _regex(v) if isinstance(v, str) else v)]
_Name = Annotated[str, Field(min_length=1)]
_Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]
_Columns = Annotated[tuple[_Name, ...], BeforeValidator(_texts)]
_Template = Annotated[Template, BeforeValidator(Template.parse)]


class Condition(_Section):
    """What a column must be; all that is given must hold. Short form: a text, number or list for `is`."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    any_of: Annotated[_Texts | None, Field(alias="is")] = None
    none_of: Annotated[_Texts | None, Field(alias="not")] = None
    matches: _Regex | None = None
    missing: bool | None = None
    above: float | None = None
    below: float | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("give a test: is, not, matches, missing, above or below")
        return self


_Where = dict[str, Annotated[Condition, _short("is")]]


def _moment(value: Any) -> Any:
    # A date in TOML is no text, and can only be a fixed day.
    return {"date": value} if isinstance(value, date) else value


class Time(_Section):
    """A moment, told in one of five ways.

    `column`: a time as text (ISO 8601 if no `format` is given), with the time of day in the column `clock` if it stands
    apart. `date`: the same for all. `year`: 1 January of it, at `clock` if given. `offset`: so many `unit`s after
    `origin`, or before it if `before` is true. `age`: so many years before `origin`, whole months by the calendar, or
    in days of which a year has `year_days`; `ages` says what texts such as "> 89" mean.
    """

    column: _Name | None = None
    format: _Texts = ()
    clock: _Name | None = None
    date: datetime | None = None
    year: _Name | None = None
    offset: _Name | None = None
    age: _Name | None = None
    unit: Literal["years", "months", "days", "hours", "minutes", "seconds", "HH:MM"] | None = None
    origin: "Annotated[Time, _short('column'), BeforeValidator(_moment)] | None" = None
    before: bool = False
    ages: dict[str, float] = Field(default_factory=dict)
    year_days: Annotated[float, Field(ge=360, le=370)] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [way for way in ("column", "date", "year", "offset", "age") if getattr(self, way) is not None]
        if len(ways) != 1:
            raise ValueError("give exactly one of column, date, year, offset and age")
        fitting = {
            "column": {"format", "clock"},
            "date": set(),
            "year": {"clock"},
            "offset": {"unit", "origin", "before"},
            "age": {"unit", "origin", "ages", "year_days"},
        }
        for key in sorted(self.model_fields_set - {ways[0]} - fitting[ways[0]]):
            raise ValueError(f"{key} doesn't go with {ways[0]}")
        if ways[0] in ("offset", "age") and self.origin is None:
            raise ValueError(f'{ways[0]} needs an origin, such as origin = "admittime" or origin = 2010-01-01')
        if self.offset is not None and self.unit in (None, "years", "months"):
            raise ValueError("offset needs unit = one of days, hours, minutes, seconds, HH:MM")
        if self.age is not None and self.unit not in (None, "years", "months", "days"):
            raise ValueError("age has a unit of years (if none is given), months or days")
        if self.date is not None and self.date.tzinfo is not None:
            raise ValueError("date is local time; leave the zone out")
        return self

    def columns(self) -> Iterator[str]:
        """The columns that it needs."""
        yield from (c for c in (self.column, self.clock, self.year, self.offset, self.age) if c is not None)
        if self.origin is not None:
            yield from self.origin.columns()


_Time = Annotated[Time, _short("column"), BeforeValidator(_moment)]


def _each(value: Any) -> Any:
    return dict.fromkeys(value, "") if isinstance(value, list) else value


class Event(_Section):
    """What one row may give.

    Attributes:
        code: template; `{each}` stands for the column's name where `each` is given.
        where: conditions on columns, all of which must hold.
        time: of the event, if not the table's.
        static: a fact without a time.
        value: column with a number.
        text: column with an answer in words, part of the code (`CODE//ANSWER`) where there is no number.
        unit: template for the unit of the value.
        each: columns (with their units) that each give an event with their number; takes the place of value and unit.
        optional: leave the event out where its time or code is missing, instead of refusing the row.
        without_value: whether an event that should have a value or a text is kept where both are missing.
        once: give it for the first row of a patient (or encounter) only.
    """

    code: _Template
    where: _Where = Field(default_factory=dict)
    time: _Time | None = None
    static: bool = False
    value: _Name | None = None
    text: _Name | None = None
    unit: _Template | None = None
    each: Annotated[dict[_Name, str], BeforeValidator(_each)] = Field(default_factory=dict)
    optional: bool = False
    without_value: Literal["drop", "keep"] = "drop"
    once: Literal["subject", "encounter"] | None = None

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.static and self.time is not None:
            raise ValueError("a static fact has no time; leave out one of the two")
        if self.each and (self.value or self.text or self.unit):
            raise ValueError("each names the columns with the values and their units; leave out value, text and unit")
        if bool(self.each) != ("each" in self.code.columns):
            raise ValueError("each = [columns] and {each} in the code go together")
        if self.unit and not self.value:
            raise ValueError("unit needs value")
        return self

    def columns(self, table: "Table") -> Iterator[tuple[str, str]]:
        """The columns that it needs, each with what for."""
        yield from ((column, "where") for column in self.where)
        yield from ((column, "code") for column in self.code.columns if not (self.each and column == "each"))
        moment = self.time or (None if self.static else table.time)
        yield from ((column, "time") for column in (moment.columns() if moment else ()))
        yield from ((column, "value") for column in (self.value, *self.each) if column)
        yield from ((column, "text") for column in (self.text,) if column)
        yield from ((column, "unit") for column in (self.unit.columns if self.unit else ()))


class Filter(_Section):
    """Rows to leave out, counted under a name."""

    name: _Name
    where: Annotated[_Where, Field(min_length=1)]


class FromRow(_Section):
    """A value that stands in another row of the same file: that of `column` where the conditions hold."""

    where: Annotated[_Where, Field(min_length=1)]
    column: _Name


class Recode(_Section):
    """A new column: the texts of another, translated.

    `other` is for texts that `map` doesn't have (they stay as they are if it isn't given), `missing` for none.
    """

    column: _Name
    map: dict[str, str]
    other: str | None = None
    missing: str | None = None


class Join(_Section):
    """Columns of a lookup for each row, named `lookup.column`; `on` gives this table's columns for its key."""

    lookup: _Name
    on: _Columns


class Layout(_Section):
    """How the files of a table are written."""

    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = None
    quote: Annotated[str, Field(max_length=1)] | None = None
    encoding: str | None = None
    header: bool | None = None
    columns: tuple[_Name, ...] | None = None
    null: _Texts | None = None
    decimal: Literal[".", ","] | None = None

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if self.delimiter is not None and (not self.delimiter.isascii() or self.delimiter in '\r\n"'):
            raise ValueError("delimiter must be one ASCII character")
        if self.quote and (not self.quote.isascii() or self.quote in "\r\n" or self.quote == self.delimiter):
            raise ValueError('quote must be one ASCII character, or "" where there are no quotes')
        if self.encoding is not None:
            try:
                "".encode(self.encoding)
            except LookupError:
                raise ValueError(f"encoding {self.encoding!r} is not known; try utf-8, cp1252 or latin-1") from None
        if self.header is False and not self.columns:
            raise ValueError("header = false needs columns = [the names, in the order of the file]")
        if self.columns and self.header is not False:
            raise ValueError("columns names those of a file without a header; it needs header = false")
        return self


class _Files(Layout):
    """Where a table's rows are."""

    name: Annotated[str, Field(pattern=r"^[^.{}\s][^.{}]*$")]
    files: Annotated[_Texts, Field(min_length=1)]
    column_nulls: dict[str, _Texts] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _inside(self) -> Self:
        for pattern in self.files:
            if not pattern or pattern.startswith("/") or ".." in pattern.split("/"):
                raise ValueError(f"files: {pattern!r} must be a path inside the folder that is imported")
        return self


class Lookup(_Files):
    """A table that others are joined with: one row for each `key`. It is held in memory.

    Attributes:
        key: columns that tell its rows apart.
        where: conditions on the rows to use.
        repeated: whether a second row for a key is bad, or left out.
    """

    key: _Columns
    where: _Where = Field(default_factory=dict)
    repeated: Literal["bad", "leave out"] = "bad"


class Table(_Files):
    """A table whose rows become events.

    Attributes:
        optional: whether the files may be missing.
        subject: column with the patient.
        encounter: column with the stay or visit.
        time: of its events.
        unique: columns of which each combination may stand once.
        from_file: new columns out of the file's path: a regular expression with one group.
        from_row: new columns out of another row of the same file.
        join: lookups.
        recode: new columns by translation.
        drop: rows to leave out.
        event: what rows give.
    """

    optional: bool = False
    subject: _Name
    encounter: _Name | None = None
    time: _Time | None = None
    unique: _Columns = ()
    from_file: dict[_Name, _Regex] = Field(default_factory=dict)
    from_row: dict[_Name, FromRow] = Field(default_factory=dict)
    join: tuple[Join, ...] = ()
    recode: dict[_Name, Recode] = Field(default_factory=dict)
    drop: tuple[Filter, ...] = ()
    event: Annotated[tuple[Event, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        for number, event in enumerate(self.event, 1):
            if not event.static and event.time is None and self.time is None:
                raise ValueError(f"event {number} ({event.code.text}) needs a time, or static = true")
        for name, pattern in self.from_file.items():
            if re.compile(pattern).groups != 1:
                raise ValueError(f"from_file.{name}: {pattern!r} must have one group in parentheses")
        if any(event.once == "encounter" for event in self.event) and self.encounter is None:
            raise ValueError('once = "encounter" needs encounter = the column with it')
        names = [step.name for step in self.drop]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"drop: two filters are named {min(twice)!r}")
        return self

    def uses(self) -> Iterator[tuple[str, str]]:
        """The columns that it needs (also made and joined ones), each with what for."""
        yield self.subject, "subject"
        if self.encounter:
            yield self.encounter, "encounter"
        yield from ((column, "unique") for column in self.unique)
        for name, source in self.from_row.items():
            yield from ((column, f"from_row.{name}") for column in (*source.where, source.column))
        for join in self.join:
            yield from ((column, f"join {join.lookup}") for column in join.on)
        yield from ((source.column, f"recode.{name}") for name, source in self.recode.items())
        for step in self.drop:
            yield from ((column, f"drop {step.name!r}") for column in step.where)
        for number, event in enumerate(self.event, 1):
            yield from ((column, f"event {number}, {use}") for column, use in event.columns(self))

    def joined(self, column: str) -> tuple[str, str] | None:
        """(lookup, column) if the name `column` means one of a joined lookup."""
        lookup, dot, inner = column.partition(".")
        return (lookup, inner) if dot and any(join.lookup == lookup for join in self.join) else None


class Mapping(_Section):
    """The whole file.

    `defaults` holds for all tables and lookups that say nothing else; a `moment` has a name by which times are told:
    `origin = { moment = "admission" }`.
    """

    about: str = ""
    defaults: Layout = Layout()
    moment: dict[str, _Time] = Field(default_factory=dict)
    lookup: tuple[Lookup, ...] = ()
    table: Annotated[tuple[Table, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        names = [source.name for source in (*self.lookup, *self.table)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two tables or lookups are named {twice[0]!r}")
        keys = {lookup.name: lookup.key for lookup in self.lookup}
        for table in self.table:
            for join in table.join:
                if join.lookup not in keys:
                    known = tuple(keys)
                    raise ValueError(f"table {table.name}: no [[lookup]] {join.lookup!r}{_suggest(join.lookup, known)}")
                if len(join.on) != len(keys[join.lookup]):
                    raise ValueError(
                        f"table {table.name}, join {join.lookup}: on must name {len(keys[join.lookup])} columns,"
                        f" for {', '.join(keys[join.lookup])}"
                    )
        return self

    def layout(self, source: Layout) -> Layout:
        """How a table's files are written, with the file's defaults where it says nothing."""
        fields = ("delimiter", "quote", "encoding", "header", "columns", "null", "decimal")
        chosen = {}
        for field in fields:
            own = getattr(source, field)
            chosen[field] = getattr(self.defaults, field) if own is None else own
        if source.header:
            chosen["columns"] = None
        return Layout.model_construct(**chosen)


def read_mapping(path: Path) -> Mapping:
    """Read the mapping in the TOML file `path`.

    Raises:
        ConfigError: the file is missing or no TOML, or keys or values are wrong (all are named).
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror}); give the path of a mapping file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}") from error
    try:
        return Mapping.model_validate({name: _with_moments(part, raw, path) for name, part in raw.items()})
    except ValidationError as error:
        raise ConfigError("\n".join(f"{path}: {_explain(e, raw)}" for e in _own_faults(error))) from error


def _with_moments(part: Any, raw: dict[str, Any], path: Path, within: tuple[str, ...] = ()) -> Any:
    """A part of the file, with `{ moment = "name" }` replaced by the time of that name."""
    if isinstance(part, list):
        return [_with_moments(item, raw, path, within) for item in part]
    if not isinstance(part, dict):
        return part
    if list(part) == ["moment"] and isinstance(name := part["moment"], str):
        known = raw.get("moment", {})
        if name not in known:
            raise ConfigError(f"{path}: there is no [moment.{name}]{_suggest(name, tuple(known))}")
        if name in within:
            raise ConfigError(f"{path}: [moment.{name}] is told by itself")
        return _with_moments(known[name], raw, path, (*within, name))
    return {key: _with_moments(value, raw, path, within) for key, value in part.items()}


def _own_faults(error: ValidationError) -> list[Any]:
    """The faults, without those that only say that a list has none of its faulty items left."""
    faults = error.errors()
    places = [fault["loc"] for fault in faults]

    def follows(fault: Any) -> bool:
        size = len(fault["loc"])
        return fault["type"] == "too_short" and any(len(p) > size and p[:size] == fault["loc"] for p in places)

    return [fault for fault in faults if not follows(fault)]


def _explain(error: Any, raw: dict[str, Any]) -> str:
    place = tuple(part for part in error["loc"] if part != "[key]")
    # A person counts the [[table]] sections of a file from one, and knows them by their names.
    key = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    named = _named(place, raw)
    if error["type"] == "extra_forbidden":
        return f"{key}{named} is not a known key{_suggest(str(place[-1]), tuple(_keys_at(place[:-1])))}"
    if error["type"] == "missing":
        return f"{key}{named} is missing"
    said = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{key or 'the file'}{named}: {said}"
    return f"{key}{named} = {repr(error['input'])[:80]}: {said}"


def _named(place: tuple[Any, ...], raw: dict[str, Any]) -> str:
    if len(place) > 1 and place[0] in ("table", "lookup") and isinstance(place[1], int):
        section = raw[place[0]][place[1]]
        if isinstance(section, dict) and isinstance(section.get("name"), str):
            return f" ({section['name']})"
    return ""


def _suggest(name: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(known)}" if known else ""


def _keys_at(place: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `place` knows."""
    kind: Any = Mapping
    for part in place:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            fields = {field.alias or name: field for name, field in kind.model_fields.items()}
            kind = _bare(fields[part].annotation)
        else:
            kind = _bare(get_args(kind)[-1 if get_origin(kind) is dict else 0])
    return sorted(field.alias or name for name, field in kind.model_fields.items())


def _bare(kind: Any) -> Any:
    """A type without Annotated and without `| None`."""
    while get_origin(kind) is Annotated or type(None) in get_args(kind):
        kind = get_args(kind)[0]
    return kind
