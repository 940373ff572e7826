"""OMOP CDM 5.2 to 5.4 becomes MEDS events, from files or straight from a database.

What each table gives, and what is left out and why, is in docs/sources/omop.md. Tables are read in pieces, so a table
may be larger than memory; the vocabulary, the patients and the departments are held.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol, get_args

import polars as pl

from tokenizer.errors import ConfigError
from tokenizer.sources.intake import Flow, Intake, intake
from tokenizer.sources.omop_codes import Choice, Codes, Concepts, clean
from tokenizer.sources.omop_columns import Kind, Rows, whole_numbers
from tokenizer.sources.omop_files import FileRecords
from tokenizer.sources.omop_people import DEATH, PERIOD, PERSON, People
from tokenizer.sources.omop_tables import (
    ERA_TABLES,
    EVENT_TABLES,
    UNREAD,
    EventTable,
    column_order,
    read_table_spec,
)
from tokenizer.sources.omop_visits import CARE_SITE, DETAIL, PROVIDER, VISIT, Visits
from tokenizer.wording import several

LONGEST_ANSWER = 40
"""Characters of an answer in words; what is longer is free text."""

# LOINC's "Chief complaint" as narrative and as reported: the text is the complaint, not an answer among few.
_COMPLAINTS = ("LOINC//10154-3", "LOINC//8661-1")

_CONCEPT: dict[str, Kind] = {
    "concept_id": "id",
    "concept_name": "text",
    "domain_id": "text",
    "vocabulary_id": "text",
    "standard_concept": "text",
    "concept_code": "text",
}
_RELATIONSHIP: dict[str, Kind] = {
    "concept_id_1": "id",
    "concept_id_2": "id",
    "relationship_id": "text",
    "invalid_reason": "text",
}

Progress = Callable[[str, int], None]


class Records(Protocol):
    """Where tables come from: files or a database."""

    source: str
    tables: frozenset[str]
    others: list[str]

    def read(
        self, table: str, wanted: list[str], required: list[tuple[str, ...]], intake: Intake
    ) -> Iterator[tuple[str, pl.DataFrame]]:
        """Give a table in pieces, each with its place and the column `_row`."""
        ...


def import_omop(
    path: Path | str,
    out: Path,
    *,
    name: str,
    quarantine: bool = False,
    progress: Progress | None = None,
    codes: Choice = "standard",
    cdm: str | None = None,
    table_spec: Path | None = None,
    schema: str | None = None,
    vocabulary_schema: str | None = None,
    eras: bool = False,
    visit_details: bool = False,
    observed_only: bool = False,
) -> Flow:
    """Turn an OMOP CDM into the MEDS dataset `out`.

    Args:
        path: a folder or zip archive of tables (csv, csv.gz, parquet), or the SQLAlchemy URL of a database.
        out: the folder to make.
        name: of the dataset.
        quarantine: set bad rows aside instead of refusing the source.
        progress: called with a table and how many of its rows are read.
        codes: "standard": what the standard concepts say; "source": what the source had.
        cdm: version whose column order holds for files without a header.
        table_spec: a file that gives that order instead.
        schema: of the database's tables; the user's default otherwise.
        vocabulary_schema: of the concept tables, where they are apart.
        eras: read the era tables too, which repeat what others say.
        visit_details: read changes of department inside of visits.
        observed_only: keep only what lies in observation periods.

    Raises:
        DataError: records that can't be used as they are.
        ConfigError: options that don't go together.
    """
    if codes not in get_args(Choice):
        raise ConfigError(f"codes = {codes!r} is not known; choose one of {', '.join(get_args(Choice))}.")
    with (
        _records(path, cdm, table_spec, schema, vocabulary_schema) as records,
        intake(out, records.source, name=name, quarantine=quarantine) as collected,
    ):
        job = _Import(records, collected, codes, progress)
        job.vocabulary()
        job.people(observed_only=observed_only)
        job.visits(details=visit_details)
        for table in EVENT_TABLES + (ERA_TABLES if eras else ()):
            job.events(table)
        job.deaths()
        job.notes()
    return collected.flow


def _records(
    path: Path | str, cdm: str | None, table_spec: Path | None, schema: str | None, vocabulary_schema: str | None
) -> AbstractContextManager[Records]:
    if isinstance(path, str) and "://" in path:
        if cdm or table_spec:
            raise ConfigError("A database names its columns: leave out the CDM version and the table spec.")
        from tokenizer.sources.omop_database import database_records

        return database_records(path, schema, vocabulary_schema)
    if schema or vocabulary_schema:
        raise ConfigError(f"{path}: files have no schema; leave the option out, or give a database URL.")
    if cdm and table_spec:
        raise ConfigError("Give either a CDM version or a table spec, not both.")
    spec = column_order(cdm) if cdm else read_table_spec(table_spec) if table_spec else None
    return nullcontext(FileRecords(Path(path), spec))


class _Import:
    """One import: what its steps share. The steps are called once each, in the order of `import_omop`."""

    def __init__(self, records: Records, collected: Intake, choice: Choice, progress: Progress | None) -> None:
        self._records = records
        self._intake = collected
        self._progress = progress
        self._choice = choice
        self._concepts = Concepts()
        self._codes = Codes(self._concepts, choice)
        self._people = People(collected, listed="person" in records.tables)
        self._read: set[str] = set()

    def vocabulary(self) -> None:
        for rows, frame in self._pieces("concept", _CONCEPT, [(c,) for c in _CONCEPT_NEEDS], counted=False):
            self._concepts.add(_required_id(frame, rows, "concept_id"))
        for _, frame in self._pieces("concept_relationship", _RELATIONSHIP, [(c,) for c in _MAP_NEEDS], counted=False):
            self._concepts.add_maps(frame)
        self._concepts.close()

    def people(self, *, observed_only: bool) -> None:
        needs: list[tuple[str, ...]] = [("person_id",), ("year_of_birth", "birth_datetime")]
        for rows, frame in self._pieces("person", PERSON, needs):
            self._people.add(frame, rows, self._codes)
        if observed_only:
            if "observation_period" not in self._records.tables:
                raise ConfigError(f"{self._records.source}: no observation_period, so nothing can be kept by it.")
            for _, frame in self._pieces("observation_period", PERIOD, [(c,) for c in PERIOD], counted=False):
                self._people.observe(frame)

    def visits(self, *, details: bool) -> None:
        visits = Visits(self._intake, self._codes)
        for rows, frame in self._pieces("care_site", CARE_SITE, [("care_site_id",)], counted=False):
            visits.add_sites(_required_id(frame, rows, "care_site_id"))
        for rows, frame in self._pieces("provider", PROVIDER, [("provider_id",)], counted=False):
            visits.add_providers(_required_id(frame, rows, "provider_id"))
        needs = [("visit_occurrence_id",), ("visit_concept_id", "visit_source_value")]
        for rows, frame in self._timed("visit_occurrence", VISIT, needs, "visit_start"):
            numbered = _required_id(frame, rows, "visit_occurrence_id")
            visits.add(self._people.observed(visits.ended(numbered, rows), "visit_occurrence"))
        if details:
            for _, frame in self._timed("visit_detail", DETAIL, [], "visit_detail_start"):
                visits.add_details(self._people.observed(frame, "visit_detail"))
        visits.note()

    def events(self, table: EventTable) -> None:
        kinds, needs = _event_columns(table)
        names = {f"{table.code}_{end}": end for end in ("concept_id", "source_concept_id", "source_value")}
        for _, frame in self._timed(table.name, kinds, needs, table.start):
            kept = self._people.observed(frame, table.name).rename(names).with_row_index("_index")
            coded = self._codes.resolve(kept, table.name, table.kind)
            free = 0
            if table.number:
                events, free = self._valued(coded, table)
            else:
                events = coded.select(*_SHARED, "code")
            self._intake.add(table.name, events)
            self._intake.drop(table.name, "free text", free)
            self._intake.kept(table.name, kept.height - free)

    def deaths(self) -> None:
        for _, frame in self._timed("death", DEATH, [], "death"):
            self._people.die(frame)
        self._people.close()

    def notes(self) -> None:
        self._codes.note(self._intake)
        if "person" not in self._records.tables:
            self._intake.note("There is no person table: nobody has a birth or demographics, and no row was checked.")
        unread = sorted(self._records.tables - self._read)
        if unread:
            why = [f"{table} ({UNREAD[table]})" if table in UNREAD else table for table in unread]
            self._intake.note(f"Tables that were not read: {', '.join(why)}.")
        if self._records.others:
            shown = ", ".join(sorted(self._records.others)[:20])
            others = several(len(self._records.others), "file or table is", "files or tables are")
            self._intake.note(f"{others} none of the CDM's: {shown}.")

    def _pieces(
        self, table: str, kinds: Mapping[str, Kind], needs: list[tuple[str, ...]], *, counted: bool = True
    ) -> Iterator[tuple[Rows, pl.DataFrame]]:
        """Give a table, if it is there, in typed pieces; `counted` tables have their rows in the flow."""
        if table not in self._records.tables:
            return
        self._read.add(table)
        done, key, repeats = 0, f"{table}_id", self._intake.repeats()
        wanted = list(dict.fromkeys([*kinds, key])) if counted else list(kinds)
        for place, frame in self._records.read(table, wanted, needs, self._intake):
            if counted:
                self._intake.rows(table, frame.height)
                repeats.add(whole_numbers(frame[key]).drop_nulls().to_numpy())
            rows = Rows(self._intake, table, place, counted=counted)
            yield rows, rows.typed(frame.select("_row", *kinds), kinds)
            done += frame.height
            if self._progress:
                self._progress(table, done)
        if (again := repeats.count()) and table not in ("person", "death"):
            self._intake.note(
                f"{table}: {several(again, 'row has', 'rows have')} the {key} of an earlier row. All are kept, for they"
                " may be different records; duplicates = false in the settings drops events that are alike."
            )

    def _timed(
        self, table: str, kinds: Mapping[str, Kind], needs: list[tuple[str, ...]], start: str
    ) -> Iterator[tuple[Rows, pl.DataFrame]]:
        """Give a table in typed pieces, its rows those of known people, with `time` from `start`'s columns."""
        exact, day = f"{start}_datetime", f"{start}_date"
        for rows, frame in self._pieces(table, kinds, [("person_id",), (day, exact), *needs]):
            yield rows, rows.timed(self._people.known(frame, rows, table), "time", exact, day)

    def _valued(self, frame: pl.DataFrame, table: EventTable) -> tuple[pl.DataFrame, int]:
        """Events of rows with a value, and how many rows are dropped as free text.

        An event has a number with its unit, or an answer in the code, or the code alone.
        """
        number = table.number or ""
        numbered = frame.filter(pl.col(number).is_not_null())
        units = self._codes.units(numbered["unit_concept_id"], numbered["unit_source_value"]).alias("unit")
        plain = numbered.select(*_SHARED, "code", pl.col(number).alias("numeric_value"), units)
        rest = frame.filter(pl.col(number).is_null())
        if not rest.height:
            return plain, 0
        answered, free = self._answered(rest, table)
        return pl.concat([plain, answered]), free

    def _answered(self, frame: pl.DataFrame, table: EventTable) -> tuple[pl.DataFrame, int]:
        """Events of rows without a number: an answer as part of the code, a number that stands as text, or neither."""
        text = pl.coalesce(*table.texts) if table.texts else pl.lit(None, pl.String)
        answers = self._codes.answers(frame["value_as_concept_id"]).alias("answer")
        units = self._codes.units(frame["unit_concept_id"], frame["unit_source_value"]).alias("unit")
        frame = frame.with_columns(answers, units, text=text)
        read = pl.when(pl.col("answer").is_null()).then(pl.col("text").cast(pl.Float32, strict=False))
        words = pl.coalesce("answer", clean(pl.col("text")).str.to_uppercase())
        frame = frame.with_columns(number=pl.when(read.is_finite()).then(read), words=words)
        no_number = pl.col("number").is_null()
        free = no_number & pl.col("answer").is_null() & (pl.col("words").str.len_chars() > LONGEST_ANSWER)
        kept = frame.filter(~free.fill_null(value=False))
        # One row may be several events by now; it is dropped once.
        dropped = frame["_index"].n_unique() - kept["_index"].n_unique()
        answer = pl.when(no_number).then("words")
        code = pl.when(pl.col("code").is_in(_COMPLAINTS)).then(pl.lit("CHIEF_COMPLAINT")).otherwise("code")
        events = kept.select(
            *_SHARED,
            pl.coalesce(code + "//" + answer, "code").alias("code"),
            pl.col("number").alias("numeric_value"),
            pl.when(~no_number).then("unit").alias("unit"),
        )
        return events, dropped


_CONCEPT_NEEDS = ("concept_id", "vocabulary_id", "concept_code")
_MAP_NEEDS = ("concept_id_1", "concept_id_2", "relationship_id")
_VISIT_ID = pl.col("visit_occurrence_id")
_SHARED = (
    pl.col("person_id").alias("subject_id"),
    pl.col("time"),
    pl.when(_VISIT_ID != 0).then(_VISIT_ID.cast(pl.String)).alias("encounter_id"),
)


def _event_columns(table: EventTable) -> tuple[dict[str, Kind], list[tuple[str, ...]]]:
    code, start = table.code, table.start
    kinds: dict[str, Kind] = {
        "person_id": "id",
        f"{code}_concept_id": "id",
        f"{code}_source_concept_id": "id",
        f"{code}_source_value": "text",
        f"{start}_date": "time",
        f"{start}_datetime": "time",
        "visit_occurrence_id": "id",
    }
    if table.number:
        kinds |= {table.number: "number", "value_as_concept_id": "id"}
        kinds |= {"unit_concept_id": "id", "unit_source_value": "text"}
        for text in table.texts:
            kinds[text] = "text"
    return kinds, [(f"{code}_concept_id", f"{code}_source_concept_id", f"{code}_source_value")]


def _required_id(frame: pl.DataFrame, rows: Rows, column: str) -> pl.DataFrame:
    return rows.without(frame, frame[column].is_null(), column, f"no {column}", "Give the row its number")
