"""A synthetic hospital's extract as OMOP CDM 5.4 csv files, one per table, with the vocabulary tables they need.

Columns and their order are those of the CDM's definition (https://ohdsi.github.io/CommonDataModel/cdm54.html). Concepts
that the CDM itself fixes (sex, race, ethnicity, visits, record types) have their official ids; codes of ICD-10, RxNorm,
LOINC, CVX and UCUM get ids above two billion, which OMOP reserves for sites, and stand in `concept.csv`: no content of
the OHDSI vocabularies is shipped. Diagnoses and procedures have a source concept only (standard concept 0), as a site
has before mapping; all else is standard.

A stay that was still going on when the record was closed has the closing time as its end and the type "Still patient",
as the CDM's conventions ask.
"""

from pathlib import Path
from typing import TypeAlias

import polars as pl

from simulation import coding
from simulation.extract import EMERGENCY, INPATIENT, OUTPATIENT, Extract

_Value: TypeAlias = pl.Expr | str | int

_LOCAL = 2_000_000_001
_DATE, _DATETIME = "%Y-%m-%d", "%Y-%m-%d %H:%M:%S"
_EHR, _ADMINISTERED, _PRESCRIBED, _STILL_PATIENT = 32817, 32818, 32838, 32220
_SEX = {"M": 8507, "F": 8532}
_RACE = {"WHITE": 8527, "BLACK": 8516, "ASIAN": 8515}
_ETHNICITY = {"HISPANIC": 38003563, "NOT HISPANIC": 38003564}
_INTENSIVE_CARE = 32037
_VISIT = {INPATIENT: 9201, OUTPATIENT: 9202, EMERGENCY: 9203}

# id, name, domain, vocabulary, class, code
_FIXED = (
    (0, "No matching concept", "Metadata", "None", "Undefined", "No matching concept"),
    (8507, "MALE", "Gender", "Gender", "Gender", "M"),
    (8532, "FEMALE", "Gender", "Gender", "Gender", "F"),
    (8527, "White", "Race", "Race", "Race", "5"),
    (8516, "Black or African American", "Race", "Race", "Race", "3"),
    (8515, "Asian", "Race", "Race", "Race", "2"),
    (38003563, "Hispanic or Latino", "Ethnicity", "Ethnicity", "Ethnicity", "Hispanic"),
    (38003564, "Not Hispanic or Latino", "Ethnicity", "Ethnicity", "Ethnicity", "Not Hispanic"),
    (9201, "Inpatient Visit", "Visit", "Visit", "Visit", "IP"),
    (9202, "Outpatient Visit", "Visit", "Visit", "Visit", "OP"),
    (9203, "Emergency Room Visit", "Visit", "Visit", "Visit", "ER"),
    (_INTENSIVE_CARE, "Intensive Care", "Visit", "Visit", "Visit", "OMOP4822460"),
    (_EHR, "EHR", "Type Concept", "Type Concept", "Type Concept", "OMOP4976890"),
    (_ADMINISTERED, "EHR administration record", "Type Concept", "Type Concept", "Type Concept", "OMOP4976891"),
    (_PRESCRIBED, "EHR prescription", "Type Concept", "Type Concept", "Type Concept", "OMOP4976911"),
    (_STILL_PATIENT, "Still patient", "Type Concept", "Visit Type", "Visit Type", "OMOP4822036"),
)

_COLUMNS = {
    "person": "person_id gender_concept_id year_of_birth month_of_birth day_of_birth birth_datetime race_concept_id"
    " ethnicity_concept_id location_id provider_id care_site_id person_source_value gender_source_value"
    " gender_source_concept_id race_source_value race_source_concept_id ethnicity_source_value"
    " ethnicity_source_concept_id",
    "observation_period": "observation_period_id person_id observation_period_start_date observation_period_end_date"
    " period_type_concept_id",
    "visit_occurrence": "visit_occurrence_id person_id visit_concept_id visit_start_date visit_start_datetime"
    " visit_end_date visit_end_datetime visit_type_concept_id provider_id care_site_id visit_source_value"
    " visit_source_concept_id admitted_from_concept_id admitted_from_source_value discharged_to_concept_id"
    " discharged_to_source_value preceding_visit_occurrence_id",
    "visit_detail": "visit_detail_id person_id visit_detail_concept_id visit_detail_start_date"
    " visit_detail_start_datetime visit_detail_end_date visit_detail_end_datetime visit_detail_type_concept_id"
    " provider_id care_site_id visit_detail_source_value visit_detail_source_concept_id admitted_from_concept_id"
    " admitted_from_source_value discharged_to_source_value discharged_to_concept_id preceding_visit_detail_id"
    " parent_visit_detail_id visit_occurrence_id",
    "condition_occurrence": "condition_occurrence_id person_id condition_concept_id condition_start_date"
    " condition_start_datetime condition_end_date condition_end_datetime condition_type_concept_id"
    " condition_status_concept_id stop_reason provider_id visit_occurrence_id visit_detail_id condition_source_value"
    " condition_source_concept_id condition_status_source_value",
    "drug_exposure": "drug_exposure_id person_id drug_concept_id drug_exposure_start_date"
    " drug_exposure_start_datetime drug_exposure_end_date drug_exposure_end_datetime verbatim_end_date"
    " drug_type_concept_id stop_reason refills quantity days_supply sig route_concept_id lot_number provider_id"
    " visit_occurrence_id visit_detail_id drug_source_value drug_source_concept_id route_source_value"
    " dose_unit_source_value",
    "procedure_occurrence": "procedure_occurrence_id person_id procedure_concept_id procedure_date procedure_datetime"
    " procedure_end_date procedure_end_datetime procedure_type_concept_id modifier_concept_id quantity provider_id"
    " visit_occurrence_id visit_detail_id procedure_source_value procedure_source_concept_id modifier_source_value",
    "measurement": "measurement_id person_id measurement_concept_id measurement_date measurement_datetime"
    " measurement_time measurement_type_concept_id operator_concept_id value_as_number value_as_concept_id"
    " unit_concept_id range_low range_high provider_id visit_occurrence_id visit_detail_id measurement_source_value"
    " measurement_source_concept_id unit_source_value unit_source_concept_id value_source_value"
    " measurement_event_id meas_event_field_concept_id",
    "observation": "observation_id person_id observation_concept_id observation_date observation_datetime"
    " observation_type_concept_id value_as_number value_as_string value_as_concept_id qualifier_concept_id"
    " unit_concept_id provider_id visit_occurrence_id visit_detail_id observation_source_value"
    " observation_source_concept_id unit_source_value qualifier_source_value value_source_value"
    " observation_event_id obs_event_field_concept_id",
    "death": "person_id death_date death_datetime death_type_concept_id cause_concept_id cause_source_value"
    " cause_source_concept_id",
    "care_site": "care_site_id care_site_name place_of_service_concept_id location_id care_site_source_value"
    " place_of_service_source_value",
    "cdm_source": "cdm_source_name cdm_source_abbreviation cdm_holder source_description"
    " source_documentation_reference cdm_etl_reference source_release_date cdm_release_date cdm_version"
    " cdm_version_concept_id vocabulary_version",
    "concept": "concept_id concept_name domain_id vocabulary_id concept_class_id standard_concept concept_code"
    " valid_start_date valid_end_date invalid_reason",
}

# vocabulary, code, domain, class, standard
_CODED = (
    *(("ICD10CM", code, "Condition", "ICD10 code", "") for code in coding.DIAGNOSES),
    *(("ICD10PCS", code, "Procedure", "ICD10PCS", "") for code in coding.PROCEDURES.values()),
    *(("RxNorm", code, "Drug", "Ingredient", "S") for code in coding.RXNORM.values()),
    ("CVX", coding.INFLUENZA_VACCINE, "Drug", "CVX", "S"),
    *(
        ("LOINC", loinc, "Measurement", "Lab Test", "S")
        for loinc in dict.fromkeys(quantity.loinc for quantity in coding.QUANTITIES.values())
    ),
    ("LOINC", coding.TOBACCO, "Observation", "Clinical Observation", "S"),
    ("LOINC", coding.BLOOD_GROUP, "Observation", "Lab Test", "S"),
    ("LOINC", coding.COMPLAINT, "Observation", "Clinical Observation", "S"),
    *(("LOINC", code, "Meas Value", "Answer", "S") for code in coding.TOBACCO_ANSWERS),
    *(("UCUM", unit, "Unit", "Unit", "S") for unit in dict.fromkeys(q.unit for q in coding.QUANTITIES.values())),
)
_IDS = {(vocabulary, code): _LOCAL + place for place, (vocabulary, code, *_) in enumerate(_CODED)}


class OmopWriter:
    """Writes an extract piece by piece; rows are numbered on from piece to piece."""

    def __init__(self, folder: Path, title: str) -> None:
        self._folder = folder
        self._rows = dict.fromkeys(_COLUMNS, 0)
        for table, columns in _COLUMNS.items():
            (folder / f"{table}.csv").write_text(",".join(columns.split()) + "\n", encoding="utf-8")
        sites = pl.DataFrame({"care_site_name": coding.PLACES})
        self._append("care_site", sites, care_site_name=pl.col("care_site_name"), place_of_service_concept_id=0)
        self._append("concept", _concepts(), **{name: pl.col(name) for name in _COLUMNS["concept"].split()})
        self._append("cdm_source", pl.DataFrame({"": [0]}), **_about(title))

    def add(self, piece: Extract) -> None:
        """Write some patients."""
        self._append("person", piece.patients, **_person())
        self._append("observation_period", piece.patients, **_period())
        self._append("death", piece.patients.drop_nulls("death"), **_death())
        closed = piece.patients.select("subject_id", "closed")
        visits = piece.encounters.join(closed, on="subject_id", how="left", maintain_order="left")
        self._append("visit_occurrence", visits, **_visit())
        self._append("visit_detail", visits.drop_nulls("intensive"), **_detail())
        source = {"condition_concept_id": 0, "condition_status_concept_id": 0}
        self._append(
            "condition_occurrence", piece.diagnoses, **_row("condition", "ICD10CM", "condition_start"), **source
        )
        source = {"procedure_concept_id": 0, "modifier_concept_id": 0}
        self._append("procedure_occurrence", piece.procedures, **_row("procedure", "ICD10PCS", "procedure"), **source)
        given = pl.when("administered").then(_ADMINISTERED).otherwise(_PRESCRIBED)
        self._append("drug_exposure", piece.drugs, **_drug("RxNorm"), drug_type_concept_id=given)
        self._append("drug_exposure", piece.vaccinations, **_drug("CVX"), drug_type_concept_id=_ADMINISTERED)
        self._append("measurement", piece.results.drop_nulls("value"), **_measurement())
        self._append("observation", piece.results.filter(pl.col("value").is_null()), **_observation())
        self._append("observation", _complaints(piece), **_observation())

    def _append(self, table: str, frame: pl.DataFrame, **given: _Value) -> None:
        """Write rows of a table; columns that are not given stay empty, the first one is the row's number."""
        columns = _COLUMNS[table].split()
        unknown = set(given) - set(columns)
        assert not unknown, f"{table} has no {unknown}"
        start = self._rows[table] + 1
        number = pl.int_range(start, start + pl.len(), dtype=pl.Int64)
        values = {columns[0]: number, **given}
        row = [_expression(values.get(column)).alias(column) for column in columns]
        with (self._folder / f"{table}.csv").open("ab") as file:
            frame.select(row).write_csv(file, include_header=False, date_format=_DATE, datetime_format=_DATETIME)
        self._rows[table] += frame.height


def _expression(value: _Value | None) -> pl.Expr:
    return value if isinstance(value, pl.Expr) else pl.lit(value, pl.String if value is None else None)


def _concept(vocabulary: str, code: str | pl.Expr = "code") -> pl.Expr:
    """The concept id of a column's codes."""
    known = {code: number for (name, code), number in _IDS.items() if name == vocabulary}
    column = pl.col(code) if isinstance(code, str) else code
    return column.replace_strict(known, return_dtype=pl.Int64)


def _when(prefix: str, time: str = "time") -> dict[str, _Value]:
    return {f"{prefix}_date": pl.col(time).dt.date(), f"{prefix}_datetime": pl.col(time)}


def _person() -> dict[str, _Value]:
    birth = pl.col("birth")
    return {
        "person_id": pl.col("subject_id"),
        "gender_concept_id": pl.col("sex").replace_strict(_SEX, return_dtype=pl.Int64),
        "year_of_birth": birth.dt.year(),
        "month_of_birth": birth.dt.month(),
        "day_of_birth": birth.dt.day(),
        "race_concept_id": pl.col("race").replace_strict(_RACE, return_dtype=pl.Int64),
        "ethnicity_concept_id": pl.col("ethnicity").replace_strict(_ETHNICITY, return_dtype=pl.Int64),
        "person_source_value": pl.col("subject_id"),
        "gender_source_value": pl.col("sex"),
        "gender_source_concept_id": 0,
        "race_source_value": pl.col("race"),
        "race_source_concept_id": 0,
        "ethnicity_source_value": pl.col("ethnicity"),
        "ethnicity_source_concept_id": 0,
    }


def _period() -> dict[str, _Value]:
    return {
        "person_id": pl.col("subject_id"),
        "observation_period_start_date": pl.col("opened").dt.date(),
        "observation_period_end_date": pl.col("closed").dt.date(),
        "period_type_concept_id": _EHR,
    }


def _death() -> dict[str, _Value]:
    return {"person_id": pl.col("subject_id"), **_when("death", "death"), "death_type_concept_id": _EHR}


def _visit() -> dict[str, _Value]:
    end = pl.col("end").fill_null(pl.col("closed"))
    site = pl.col("department").replace_strict(coding.PLACES, range(1, len(coding.PLACES) + 1), return_dtype=pl.Int64)
    return {
        "visit_occurrence_id": pl.col("encounter_id"),
        "person_id": pl.col("subject_id"),
        "visit_concept_id": pl.col("kind").replace_strict(_VISIT, return_dtype=pl.Int64),
        **_when("visit_start", "start"),
        "visit_end_date": end.dt.date(),
        "visit_end_datetime": end,
        "visit_type_concept_id": pl.when(pl.col("end").is_null()).then(_STILL_PATIENT).otherwise(_EHR),
        "care_site_id": site,
        "visit_source_value": pl.col("kind"),
        "visit_source_concept_id": 0,
        "discharged_to_concept_id": 0,
        "discharged_to_source_value": pl.col("discharge_to"),
    }


def _detail() -> dict[str, _Value]:
    end = pl.col("end").fill_null(pl.col("closed"))
    return {
        "person_id": pl.col("subject_id"),
        "visit_detail_concept_id": _INTENSIVE_CARE,
        **_when("visit_detail_start", "intensive"),
        "visit_detail_end_date": end.dt.date(),
        "visit_detail_end_datetime": end,
        "visit_detail_type_concept_id": _EHR,
        "care_site_id": coding.PLACES.index(coding.INTENSIVE_CARE) + 1,
        "visit_detail_source_value": "ICU",
        "visit_detail_source_concept_id": 0,
        "visit_occurrence_id": pl.col("encounter_id"),
    }


def _row(table: str, vocabulary: str, start: str) -> dict[str, _Value]:
    """What conditions, procedures and drugs share: person, visit, time and source code."""
    return {
        "person_id": pl.col("subject_id"),
        "visit_occurrence_id": pl.col("encounter_id"),
        **_when(start),
        **({} if table == "drug" else {f"{table}_type_concept_id": _EHR}),
        f"{table}_source_value": pl.col("code"),
        f"{table}_source_concept_id": _concept(vocabulary),
    }


def _drug(vocabulary: str) -> dict[str, _Value]:
    return {
        **_row("drug", vocabulary, "drug_exposure_start"),
        **_when("drug_exposure_end"),
        "drug_concept_id": _concept(vocabulary),
        "route_concept_id": 0,
    }


def _measurement() -> dict[str, _Value]:
    return {
        **_row("measurement", "LOINC", "measurement"),
        "measurement_concept_id": _concept("LOINC"),
        "value_as_number": pl.col("value"),
        "value_source_value": pl.col("value"),
        "unit_concept_id": _concept("UCUM", "unit"),
        "unit_source_value": pl.col("unit"),
        "unit_source_concept_id": _concept("UCUM", "unit"),
    }


def _observation() -> dict[str, _Value]:
    return {
        **_row("observation", "LOINC", "observation"),
        "observation_concept_id": _concept("LOINC"),
        "value_as_string": pl.col("text"),
        "value_as_concept_id": _concept("LOINC", "answer"),
        "value_source_value": pl.coalesce("answer", "text"),
    }


def _complaints(piece: Extract) -> pl.DataFrame:
    """Chief complaints as results in words."""
    return piece.encounters.drop_nulls("complaint").select(
        "subject_id",
        "encounter_id",
        time=pl.col("start"),
        code=pl.lit(coding.COMPLAINT),
        answer=pl.lit(None, pl.String),
        text=pl.col("complaint"),
    )


def _concepts() -> pl.DataFrame:
    local = [
        (_IDS[vocabulary, code], f"{vocabulary} {code}", domain, vocabulary, kind, standard, code)
        for vocabulary, code, domain, kind, standard in _CODED
    ]
    fixed = [(*row[:5], "S" if row[0] else "", row[5]) for row in _FIXED]
    columns = _COLUMNS["concept"].split()
    table = pl.DataFrame(
        [*fixed, *local], schema=dict.fromkeys(columns[:7], pl.String) | {columns[0]: pl.Int64}, orient="row"
    )
    return table.with_columns(
        pl.col("standard_concept").replace("", None),
        valid_start_date=pl.lit("1970-01-01"),
        valid_end_date=pl.lit("2099-12-31"),
        invalid_reason=pl.lit(None, pl.String),
    )


def _about(title: str) -> dict[str, _Value]:
    return {
        "cdm_source_name": title,
        "cdm_source_abbreviation": "SYNTHETIC",
        "cdm_holder": "nobody",
        "source_description": "SYNTHETIC: invented patients, no record of any person",
        "source_release_date": "2025-01-01",
        "cdm_release_date": "2025-01-01",
        "cdm_version": "5.4",
        "cdm_version_concept_id": 756265,
        "vocabulary_version": "none; see concept.csv",
    }
