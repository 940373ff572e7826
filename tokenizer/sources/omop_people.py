"""Who the patients of an OMOP source are: birth, demographics, death, and the time under observation."""

import numpy as np
import polars as pl

from tokenizer.sources.intake import Intake
from tokenizer.sources.omop_codes import Codes, clean
from tokenizer.sources.omop_columns import Kind, Rows

PERSON: dict[str, Kind] = {
    "person_id": "id",
    "gender_concept_id": "id",
    "year_of_birth": "id",
    "month_of_birth": "id",
    "day_of_birth": "id",
    "birth_datetime": "time",
    "race_concept_id": "id",
    "ethnicity_concept_id": "id",
    "gender_source_value": "text",
    "race_source_value": "text",
    "ethnicity_source_value": "text",
}
DEATH: dict[str, Kind] = {"person_id": "id", "death_date": "time", "death_datetime": "time"}
PERIOD: dict[str, Kind] = {
    "person_id": "id",
    "observation_period_start_date": "time",
    "observation_period_end_date": "time",
}

_GENDERS = {8507: "M", 8532: "F", 8521: "OTHER", 8570: "OTHER"}
_GENDER_TEXTS = {"M": "M", "MALE": "M", "F": "F", "FEMALE": "F", "O": "OTHER", "OTHER": "OTHER", "X": "OTHER"}
_RACES = {
    8527: "WHITE",
    8516: "BLACK",
    8515: "ASIAN",
    8522: "OTHER",
    8557: "NATIVE HAWAIIAN OR OTHER PACIFIC ISLANDER",
    8657: "AMERICAN INDIAN OR ALASKA NATIVE",
}
_RACE_TEXTS = {
    "CAUCASIAN": "WHITE",
    "BLACK OR AFRICAN AMERICAN": "BLACK",
    "BLACK/AFRICAN AMERICAN": "BLACK",
    "AFRICAN AMERICAN": "BLACK",
    "OTHER RACE": "OTHER",
}
_ETHNICITIES = {38003563: "HISPANIC", 38003564: "NOT HISPANIC"}
_ETHNICITY_TEXTS = {
    "HISPANIC": "HISPANIC",
    "HISPANIC OR LATINO": "HISPANIC",
    "HISPANIC/LATINO": "HISPANIC",
    "NONHISPANIC": "NOT HISPANIC",
    "NON-HISPANIC": "NOT HISPANIC",
    "NOT HISPANIC": "NOT HISPANIC",
    "NOT HISPANIC OR LATINO": "NOT HISPANIC",
}


class People:
    """The patients that `person` lists; with no such table, everybody is one.

    Args:
        intake: where their events go.
        listed: whether there is a `person` table.
    """

    def __init__(self, intake: Intake, *, listed: bool) -> None:
        self._intake = intake
        self._listed = listed
        self._ids = np.zeros(0, np.int64)
        self._deaths: list[pl.DataFrame] = []
        self._periods: list[pl.DataFrame] = []
        self._spans: pl.DataFrame | None = None

    def add(self, frame: pl.DataFrame, rows: Rows, codes: Codes) -> None:
        """Take rows of `person` (the columns of `PERSON`, typed): birth and demographics."""
        frame = rows.without(
            frame, frame["person_id"].is_null(), "person_id", "no person_id", "Give the row its person"
        )
        again = frame["person_id"].is_first_distinct().not_() | pl.Series(self._has(frame["person_id"]))
        advice = "Keep one row for each person"
        frame = rows.without(frame, again, "person_id", "a person for the second time", advice)
        frame = _born(frame, rows)
        self._ids = np.union1d(self._ids, frame["person_id"].to_numpy())
        birth = frame.select(subject_id="person_id", time="birth", code=pl.lit("MEDS_BIRTH"))
        facts = [_fact(frame, codes, *of) for of in _FACTS]
        self._intake.add("person", pl.concat([birth, *facts]))
        self._intake.kept("person", frame.height)

    def known(self, frame: pl.DataFrame, rows: Rows, table: str) -> pl.DataFrame:
        """Give the rows of people; rows of nobody are set aside, those of a person who isn't listed dropped by name."""
        frame = rows.without(
            frame, frame["person_id"].is_null(), "person_id", "no person_id", "Give the row its person"
        )
        if not self._listed:
            return frame
        listed = pl.Series(self._has(frame["person_id"]), dtype=pl.Boolean)
        self._intake.drop(table, "no person row", int((~listed).sum()))
        return frame.filter(listed)

    def observe(self, frame: pl.DataFrame) -> None:
        """Take rows of `observation_period` (the columns of `PERIOD`, typed): only what lies inside is kept."""
        self._periods.append(frame.select(*PERIOD).drop_nulls())

    def observed(self, frame: pl.DataFrame, table: str) -> pl.DataFrame:
        """Give the rows whose `time` lies in one of their person's observation periods, if those were given."""
        if not self._periods or not frame.height:
            return frame
        if self._spans is None:
            self._spans = _merged(pl.concat(self._periods))
        at = frame.with_row_index("_at").sort("person_id", "time")
        joined = at.join_asof(
            self._spans, left_on="time", right_on="start", by="person_id", strategy="backward", check_sortedness=False
        ).sort("_at")
        inside = (joined["time"].dt.truncate("1d") <= joined["end"]).fill_null(value=False)
        self._intake.drop(table, "outside of observation periods", int((~inside).sum()))
        return frame.filter(inside)

    def die(self, frame: pl.DataFrame) -> None:
        """Take rows of `death`, each with its `time`."""
        self._deaths.append(frame.select("person_id", "time"))

    def close(self) -> None:
        """Give the deaths: the earliest of each person, for CDM 5.4 may have several."""
        if not self._deaths:
            return
        deaths = pl.concat(self._deaths).sort("person_id", "time")
        first = deaths.unique("person_id", keep="first", maintain_order=True)
        self._intake.drop("death", "a death was recorded before", deaths.height - first.height)
        self._intake.kept("death", first.height)
        self._intake.add("death", first.select(subject_id="person_id", time="time", code=pl.lit("MEDS_DEATH")))

    def _has(self, ids: pl.Series) -> np.ndarray:
        wanted = ids.to_numpy()
        at = np.searchsorted(self._ids, wanted)
        found = np.zeros(len(wanted), bool)
        inside = at < len(self._ids)
        found[inside] = self._ids[at[inside]] == wanted[inside]
        return found


_FACTS = (
    ("GENDER", "gender", _GENDERS, _GENDER_TEXTS),
    ("RACE", "race", _RACES, _RACE_TEXTS),
    ("ETHNICITY", "ethnicity", _ETHNICITIES, _ETHNICITY_TEXTS),
)


def _fact(
    frame: pl.DataFrame, codes: Codes, kind: str, prefix: str, concepts: dict[int, str], texts: dict[str, str]
) -> pl.DataFrame:
    """A static fact of each person, where it is known: by standard concept, by the concept's name, by the source."""
    source = clean(pl.col(f"{prefix}_source_value")).str.to_uppercase()
    name = codes.names(frame[f"{prefix}_concept_id"]).alias("_name")
    by_text = [text.replace_strict(texts, default=None, return_dtype=pl.String) for text in (pl.col("_name"), source)]
    # Races go by any name; the others have few, and a text that is none of them may be something else.
    other = [pl.col("_name"), source] if kind == "RACE" else []
    value = pl.coalesce(
        pl.col(f"{prefix}_concept_id").replace_strict(concepts, default=None, return_dtype=pl.String), *by_text, *other
    )
    facts = frame.with_columns(name).select(
        subject_id="person_id", time=pl.lit(None, pl.Datetime("us")), code=pl.lit(f"{kind}//") + value
    )
    return facts.drop_nulls("code")


def _born(frame: pl.DataFrame, rows: Rows) -> pl.DataFrame:
    """Add `birth`: year, month and day, with the hour where `birth_datetime` tells of the same day."""
    exact, year = pl.col("birth_datetime"), pl.col("year_of_birth")
    month, day = pl.col("month_of_birth"), pl.col("day_of_birth")
    agrees = (
        (year.is_null() | (exact.dt.year() == year))
        & (month.is_null() | (exact.dt.month() == month))
        & (day.is_null() | (exact.dt.day() == day))
    )
    written = pl.format("{}-{}-{}", *(part.cast(pl.String).str.zfill(size) for part, size in
                                      ((year, 4), (month.fill_null(1), 2), (day.fill_null(1), 2))))  # fmt: skip
    composed = written.str.to_datetime("%Y-%m-%d", time_unit="us", strict=False)
    frame = frame.with_columns(
        birth=pl.when(agrees & exact.is_not_null()).then(exact).otherwise(composed), _written=written
    )
    unknown = frame.select(year.is_null() & exact.is_null()).to_series()
    frame = rows.without(frame, unknown, "year_of_birth", "no time", "Give the person a year of birth")
    for column in ("day_of_birth", "month_of_birth", "year_of_birth"):
        wrong = frame["birth"].is_null() & frame[column].is_not_null()
        frame = rows.without(frame, wrong, column, "not a date", "Correct the birth", "_written")
    frame = rows.in_range(frame, "birth", "year_of_birth", "birth_datetime")
    return frame.drop("_written")


def _merged(periods: pl.DataFrame) -> pl.DataFrame:
    """Observation periods that don't overlap: person_id, start, end, sorted."""
    start, end = "observation_period_start_date", "observation_period_end_date"
    ordered = periods.filter(pl.col(start) <= pl.col(end)).sort("person_id", start, end)
    before = pl.col(end).cum_max().shift(1).over("person_id")
    fresh = (pl.col(start) > before).fill_null(value=True)
    return (
        ordered.with_columns(_number=fresh.cum_sum())
        .group_by("person_id", "_number", maintain_order=True)
        .agg(start=pl.col(start).min(), end=pl.col(end).max())
        .drop("_number")
        .sort("person_id", "start")
    )
