"""Visits of an OMOP source: encounters with their type, the department, and where the patient went."""

import polars as pl

from tokenizer.sources.intake import Intake
from tokenizer.sources.omop_codes import Codes, clean
from tokenizer.sources.omop_columns import Kind, Rows
from tokenizer.wording import several

VISIT: dict[str, Kind] = {
    "visit_occurrence_id": "id",
    "person_id": "id",
    "visit_concept_id": "id",
    "visit_start_date": "time",
    "visit_start_datetime": "time",
    "visit_end_date": "time",
    "visit_end_datetime": "time",
    "visit_type_concept_id": "id",
    "provider_id": "id",
    "care_site_id": "id",
    "visit_source_value": "text",
    # CDM 5.4 has renamed them.
    "discharge_to_concept_id": "id",
    "discharge_to_source_value": "text",
    "discharged_to_concept_id": "id",
    "discharged_to_source_value": "text",
}
DETAIL: dict[str, Kind] = {
    "person_id": "id",
    "visit_detail_start_date": "time",
    "visit_detail_start_datetime": "time",
    "provider_id": "id",
    "care_site_id": "id",
    "visit_occurrence_id": "id",
}
CARE_SITE: dict[str, Kind] = {"care_site_id": "id", "care_site_name": "text", "care_site_source_value": "text"}
PROVIDER: dict[str, Kind] = {"provider_id": "id", "specialty_concept_id": "id", "specialty_source_value": "text"}

_TYPES = {
    "INPATIENT": (9201, 262, 8717, 8971, 8920, 32037, 581379, 581382, 581383, 581384),
    "EMERGENCY": (9203, 8870, 581381),
    "OUTPATIENT": (9202, 581477, 8940, 8756, 8782, 8883, 5084, 32036, 38004207, 581380, 581385, 581458),
    "TELEHEALTH": (5083, 722455),
    "HOME": (581476, 8536),
    "LONG_TERM": (42898160, 8546, 8615, 8676, 8827, 8863),
}
"""Visit and place-of-service concepts of the standard vocabularies; an observation room is outpatient care."""

# Every visit must have an end: that of one which still goes on is the day of the extract, and this its visit type.
_STILL_PATIENT = 32220

# In this order: a nursing home is no home, and an emergency visit that became an admission is an inpatient one.
_WORDS = (
    ("LONG_TERM", r"NURSING|LONG.?TERM|HOSPICE|CUSTODIAL|ASSISTED LIVING|NON-HOSPITAL INSTITUTION"),
    ("INPATIENT", r"\bINPATIENT|INTENSIVE CARE|^(IMP|ACUTE|NONAC|IP)$"),
    ("EMERGENCY", r"EMERGENCY|^(EMER|ED|ER)$"),
    ("TELEHEALTH", r"TELE|VIRTUAL|^VR$"),
    ("HOME", r"\bHOME\b|^HH$"),
    ("OUTPATIENT", r"OUTPATIENT|OFFICE|CLINIC|AMBULATORY|LABORATORY|PHARMACY|OBSERVATION|^(AMB|OP|OBSENC|SS)$"),
)


class Visits:
    """Turns visits into encounters.

    Args:
        intake: where the events go.
        codes: for names of concepts.
    """

    def __init__(self, intake: Intake, codes: Codes) -> None:
        self._intake = intake
        self._codes = codes
        self._sites = pl.DataFrame(schema={"care_site_id": pl.Int64, "_site": pl.String})
        self._providers = pl.DataFrame(schema={"provider_id": pl.Int64, "_specialty": pl.String})
        self._open = 0

    def add_sites(self, frame: pl.DataFrame) -> None:
        """Take rows of `care_site` (the columns of `CARE_SITE`, typed)."""
        name = pl.coalesce(clean(pl.col("care_site_name")), clean(pl.col("care_site_source_value"))).str.to_uppercase()
        self._sites = pl.concat([self._sites, frame.select("care_site_id", _site=name)]).unique(
            "care_site_id", keep="first", maintain_order=True
        )

    def add_providers(self, frame: pl.DataFrame) -> None:
        """Take rows of `provider` (the columns of `PROVIDER`, typed)."""
        names = self._codes.names(frame["specialty_concept_id"]).alias("_name")
        specialty = pl.coalesce("_name", clean(pl.col("specialty_source_value")).str.to_uppercase())
        few = frame.with_columns(names).select("provider_id", _specialty=specialty).drop_nulls()
        self._providers = pl.concat([self._providers, few]).unique("provider_id", keep="first", maintain_order=True)

    def ended(self, frame: pl.DataFrame, rows: Rows) -> pl.DataFrame:
        """Add `end`, null where it isn't known; visits that end before they start are set aside.

        A visit that ends on the day it started, with no hour given, ends at its start. One that still went on at the
        extract has no end, whatever stands there.
        """
        time, day = pl.col("time"), pl.col("visit_end_date")
        same_day = (day.dt.date() == time.dt.date()) & (day < time)
        end = pl.coalesce("visit_end_datetime", pl.when(same_day).then(time).otherwise(day))
        ended = (pl.col("visit_type_concept_id") != _STILL_PATIENT).fill_null(value=True)
        frame = frame.with_columns(end=pl.when(ended).then(end))
        frame = rows.in_range(frame, "end", "visit_end_datetime", "visit_end_date")
        for column in ("visit_end_datetime", "visit_end_date"):
            early = (frame["end"] < frame["time"]) & frame[column].is_not_null()
            frame = rows.without(frame, early, column, "ends before it starts", "Correct start or end", "end")
        return frame

    def add(self, frame: pl.DataFrame) -> None:
        """Take visits with `time` and `end`: start, end, department, destination."""
        frame = self._placed(frame).with_columns(self._types(frame), self._destinations(frame))
        self._open += frame["end"].null_count()
        base = {"subject_id": pl.col("person_id"), "encounter_id": pl.col("visit_occurrence_id").cast(pl.String)}
        parts = [
            frame.select(**base, time="time", code=pl.lit("ENCOUNTER_START//") + pl.col("_type")),
            frame.select(**base, time="time", code=pl.lit("DEPARTMENT//") + pl.col("_department")),
            frame.select(**base, time="end", code=pl.lit("DISCHARGE_TO//") + pl.col("_to")),
            frame.select(**base, time="end", code=pl.lit("ENCOUNTER_END//") + pl.col("_type")),
        ]
        self._intake.kept("visit_occurrence", frame.height)
        self._intake.add("visit_occurrence", pl.concat(parts).drop_nulls(["time", "code"]))

    def add_details(self, frame: pl.DataFrame) -> None:
        """Take rows of `visit_detail` with `time`: changes of department inside of a visit."""
        placed = self._placed(frame).drop_nulls("_department")
        self._intake.drop("visit_detail", "no department", frame.height - placed.height)
        events = placed.select(
            subject_id="person_id",
            time="time",
            code=pl.lit("DEPARTMENT//") + pl.col("_department"),
            encounter_id=pl.col("visit_occurrence_id").cast(pl.String),
        )
        self._intake.kept("visit_detail", placed.height)
        self._intake.add("visit_detail", events)

    def note(self) -> None:
        """Say in the flow's notes what was odd."""
        if self._open:
            visits = several(self._open, "visit has", "visits have")
            self._intake.note(f"visit_occurrence: {visits} no end; nothing ends what started.")

    def _placed(self, frame: pl.DataFrame) -> pl.DataFrame:
        joined = frame.join(self._sites, on="care_site_id", how="left", maintain_order="left").join(
            self._providers, on="provider_id", how="left", maintain_order="left"
        )
        return joined.with_columns(_department=pl.coalesce("_site", "_specialty"))

    def _types(self, frame: pl.DataFrame) -> pl.Series:
        known = {concept: kind for kind, concepts in _TYPES.items() for concept in concepts}
        names = self._codes.names(frame["visit_concept_id"])
        table = frame.select("visit_concept_id", "visit_source_value").with_columns(names.alias("_name"))
        kind = pl.coalesce(
            pl.col("visit_concept_id").replace_strict(known, default=None, return_dtype=pl.String),
            _by_words(pl.col("_name")),
            _by_words(pl.col("visit_source_value").str.to_uppercase()),
            pl.lit("OTHER"),
        )
        return table.select(kind.alias("_type")).to_series()

    def _destinations(self, frame: pl.DataFrame) -> pl.Series:
        concept = frame.select(pl.coalesce("discharged_to_concept_id", "discharge_to_concept_id")).to_series()
        name = self._codes.names(concept).alias("_name")
        texts = [clean(pl.col(f"{word}_to_source_value")).str.to_uppercase() for word in ("discharged", "discharge")]
        return frame.with_columns(name).select(pl.coalesce("_name", *texts).alias("_to")).to_series()


def _by_words(text: pl.Expr) -> pl.Expr:
    found = [pl.when(text.str.contains(words)).then(pl.lit(kind)) for kind, words in _WORDS]
    return pl.coalesce(found)
