"""What the tables of the OMOP CDM look like: columns per version, in order, and which of them become events.

The order matters only for files without a header. 5.3 was published with two orders: "5.3.1" is the one of 2018,
"5.3" the one that OHDSI's own package writes today.

Source: the data definition language of versions 5.2 to 5.4, https://github.com/OHDSI/CommonDataModel
"""

import csv
from dataclasses import dataclass
from pathlib import Path

from tokenizer.errors import ConfigError, DataError

VERSIONS = ("5.2", "5.3", "5.3.1", "5.4")


@dataclass(frozen=True)
class EventTable:
    """A table whose rows are events, and where in it they are.

    Attributes:
        name: of the table.
        kind: first part of a code that only the source knows (`CONDITION//<code>`).
        code: prefix of `_concept_id`, `_source_concept_id` and `_source_value`.
        start: prefix of `_date` and `_datetime`.
        number: column with the value, where there is one.
        texts: columns with an answer in words, the first that isn't empty counts.
    """

    name: str
    kind: str
    code: str
    start: str
    number: str | None = None
    texts: tuple[str, ...] = ()


EVENT_TABLES = (
    EventTable("condition_occurrence", "CONDITION", "condition", "condition_start"),
    EventTable("drug_exposure", "DRUG", "drug", "drug_exposure_start"),
    EventTable("procedure_occurrence", "PROCEDURE", "procedure", "procedure"),
    EventTable("device_exposure", "DEVICE", "device", "device_exposure_start"),
    EventTable("measurement", "MEASUREMENT", "measurement", "measurement", "value_as_number", ("value_source_value",)),
    EventTable(
        "observation",
        "OBSERVATION",
        "observation",
        "observation",
        "value_as_number",
        ("value_as_string", "value_source_value"),
    ),
)

ERA_TABLES = (
    EventTable("condition_era", "CONDITION", "condition", "condition_era_start"),
    EventTable("drug_era", "DRUG", "drug", "drug_era_start"),
    EventTable("dose_era", "DRUG", "drug", "dose_era_start", "dose_value"),
)

UNREAD = {
    "note": "free text",
    "note_nlp": "free text",
    "specimen": "samples, not findings",
    "episode": "derived from other tables",
    "episode_event": "derived from other tables",
    "fact_relationship": "links between rows",
    "cost": "payments",
    "payer_plan_period": "payments",
    "location": "addresses",
    "cdm_source": "about the data",
    "metadata": "about the data",
    "cohort": "study results",
    "cohort_attribute": "study results",
    "cohort_definition": "study results",
    "attribute_definition": "study results",
    "vocabulary": "vocabulary",
    "domain": "vocabulary",
    "concept_class": "vocabulary",
    "relationship": "vocabulary",
    "concept_synonym": "vocabulary",
    "concept_ancestor": "vocabulary",
    "source_to_concept_map": "vocabulary",
    "drug_strength": "vocabulary",
}
"""Tables of the CDM that give no events, and why."""

_PERSON = """person_id gender_concept_id year_of_birth month_of_birth day_of_birth birth_datetime race_concept_id
    ethnicity_concept_id location_id provider_id care_site_id person_source_value gender_source_value
    gender_source_concept_id race_source_value race_source_concept_id ethnicity_source_value
    ethnicity_source_concept_id"""
_PERIOD = """observation_period_id person_id observation_period_start_date observation_period_end_date
    period_type_concept_id"""
_VISIT = """visit_occurrence_id person_id visit_concept_id visit_start_date visit_start_datetime visit_end_date
    visit_end_datetime visit_type_concept_id provider_id care_site_id visit_source_value visit_source_concept_id"""
_VISIT_53 = f"""{_VISIT} admitting_source_concept_id admitting_source_value discharge_to_concept_id
    discharge_to_source_value preceding_visit_occurrence_id"""
_DETAIL = """visit_detail_id person_id visit_detail_concept_id visit_detail_start_date visit_detail_start_datetime
    visit_detail_end_date visit_detail_end_datetime visit_detail_type_concept_id provider_id care_site_id"""
_CONDITION = """condition_occurrence_id person_id condition_concept_id condition_start_date condition_start_datetime
    condition_end_date condition_end_datetime condition_type_concept_id"""
_CONDITION_54 = f"""{_CONDITION} condition_status_concept_id stop_reason provider_id visit_occurrence_id
    visit_detail_id condition_source_value condition_source_concept_id condition_status_source_value"""
_DRUG = """drug_exposure_id person_id drug_concept_id drug_exposure_start_date drug_exposure_start_datetime
    drug_exposure_end_date drug_exposure_end_datetime verbatim_end_date drug_type_concept_id stop_reason refills
    quantity days_supply sig route_concept_id lot_number provider_id visit_occurrence_id"""
_DRUG_END = "drug_source_value drug_source_concept_id route_source_value dose_unit_source_value"
_PROCEDURE = "procedure_occurrence_id person_id procedure_concept_id procedure_date procedure_datetime"
_PROCEDURE_MIDDLE = "procedure_type_concept_id modifier_concept_id quantity provider_id visit_occurrence_id"
_PROCEDURE_END = "procedure_source_value procedure_source_concept_id"
_DEVICE = """device_exposure_id person_id device_concept_id device_exposure_start_date device_exposure_start_datetime
    device_exposure_end_date device_exposure_end_datetime device_type_concept_id unique_device_id"""
_MEASUREMENT_START = "measurement_id person_id measurement_concept_id measurement_date measurement_datetime"
_MEASUREMENT = """measurement_type_concept_id operator_concept_id value_as_number value_as_concept_id
    unit_concept_id range_low range_high provider_id visit_occurrence_id"""
_MEASUREMENT_END = "measurement_source_value measurement_source_concept_id unit_source_value"
_OBSERVATION = """observation_id person_id observation_concept_id observation_date observation_datetime
    observation_type_concept_id value_as_number value_as_string value_as_concept_id qualifier_concept_id
    unit_concept_id provider_id visit_occurrence_id"""
_OBSERVATION_END = """observation_source_value observation_source_concept_id unit_source_value
    qualifier_source_value"""
_SAME = {
    "person": _PERSON,
    "observation_period": _PERIOD,
    "death": """person_id death_date death_datetime death_type_concept_id cause_concept_id cause_source_value
        cause_source_concept_id""",
    "care_site": """care_site_id care_site_name place_of_service_concept_id location_id care_site_source_value
        place_of_service_source_value""",
    "provider": """provider_id provider_name npi dea specialty_concept_id care_site_id year_of_birth gender_concept_id
        provider_source_value specialty_source_value specialty_source_concept_id gender_source_value
        gender_source_concept_id""",
    "concept": """concept_id concept_name domain_id vocabulary_id concept_class_id standard_concept concept_code
        valid_start_date valid_end_date invalid_reason""",
    "concept_relationship": """concept_id_1 concept_id_2 relationship_id valid_start_date valid_end_date
        invalid_reason""",
    "condition_era": """condition_era_id person_id condition_concept_id condition_era_start_date
        condition_era_end_date condition_occurrence_count""",
    "drug_era": """drug_era_id person_id drug_concept_id drug_era_start_date drug_era_end_date drug_exposure_count
        gap_days""",
    "dose_era": """dose_era_id person_id drug_concept_id unit_concept_id dose_value dose_era_start_date
        dose_era_end_date""",
}
_V52 = {
    "visit_occurrence": _VISIT_53,
    "condition_occurrence": f"""{_CONDITION} stop_reason provider_id visit_occurrence_id condition_source_value
        condition_source_concept_id condition_status_source_value condition_status_concept_id""",
    "drug_exposure": f"{_DRUG} {_DRUG_END}",
    "procedure_occurrence": f"{_PROCEDURE} {_PROCEDURE_MIDDLE} {_PROCEDURE_END} qualifier_source_value",
    "device_exposure": f"""{_DEVICE} quantity provider_id visit_occurrence_id device_source_value
        device_source_concept_id""",
    "measurement": f"{_MEASUREMENT_START} {_MEASUREMENT} {_MEASUREMENT_END} value_source_value",
    "observation": f"{_OBSERVATION} {_OBSERVATION_END}",
}
_V53 = {
    "visit_occurrence": _VISIT_53,
    "visit_detail": f"""{_DETAIL} visit_detail_source_value visit_detail_source_concept_id admitting_source_value
        admitting_source_concept_id discharge_to_source_value discharge_to_concept_id preceding_visit_detail_id
        visit_detail_parent_id visit_occurrence_id""",
    "condition_occurrence": _CONDITION_54,
    "drug_exposure": f"{_DRUG} visit_detail_id {_DRUG_END}",
    "procedure_occurrence": f"""{_PROCEDURE} {_PROCEDURE_MIDDLE} visit_detail_id {_PROCEDURE_END}
        modifier_source_value""",
    "device_exposure": f"""{_DEVICE} quantity provider_id visit_occurrence_id visit_detail_id device_source_value
        device_source_concept_id""",
    "measurement": f"""{_MEASUREMENT_START} measurement_time {_MEASUREMENT} visit_detail_id {_MEASUREMENT_END}
        value_source_value""",
    "observation": f"{_OBSERVATION} visit_detail_id {_OBSERVATION_END}",
}
_V531 = _V53 | {
    "visit_detail": f"""{_DETAIL} admitting_source_concept_id discharge_to_concept_id preceding_visit_detail_id
        visit_detail_source_value visit_detail_source_concept_id admitting_source_value discharge_to_source_value
        visit_detail_parent_id visit_occurrence_id""",
    "condition_occurrence": f"""{_CONDITION} stop_reason provider_id visit_occurrence_id visit_detail_id
        condition_source_value condition_source_concept_id condition_status_source_value
        condition_status_concept_id""",
}
_V54 = _V53 | {
    "visit_occurrence": f"""{_VISIT} admitted_from_concept_id admitted_from_source_value discharged_to_concept_id
        discharged_to_source_value preceding_visit_occurrence_id""",
    "visit_detail": f"""{_DETAIL} visit_detail_source_value visit_detail_source_concept_id admitted_from_concept_id
        admitted_from_source_value discharged_to_source_value discharged_to_concept_id preceding_visit_detail_id
        parent_visit_detail_id visit_occurrence_id""",
    "procedure_occurrence": f"""{_PROCEDURE} procedure_end_date procedure_end_datetime {_PROCEDURE_MIDDLE}
        visit_detail_id {_PROCEDURE_END} modifier_source_value""",
    "device_exposure": f"""{_DEVICE} production_id quantity provider_id visit_occurrence_id visit_detail_id
        device_source_value device_source_concept_id unit_concept_id unit_source_value unit_source_concept_id""",
    "measurement": f"""{_MEASUREMENT_START} measurement_time {_MEASUREMENT} visit_detail_id {_MEASUREMENT_END}
        unit_source_concept_id value_source_value measurement_event_id meas_event_field_concept_id""",
    "observation": f"""{_OBSERVATION} visit_detail_id {_OBSERVATION_END} value_source_value observation_event_id
        obs_event_field_concept_id""",
}

_BY_VERSION = {
    version: {table: tuple(columns.split()) for table, columns in (_SAME | own).items()}
    for version, own in (("5.2", _V52), ("5.3", _V53), ("5.3.1", _V531), ("5.4", _V54))
}

READ = frozenset(_BY_VERSION["5.4"])
"""Tables that are read, each where it is needed."""

KNOWN_COLUMNS = {
    table: frozenset(column for tables in _BY_VERSION.values() for column in tables.get(table, ())) for table in READ
}
"""Columns of each table that is read, of all versions: what a header can be known by."""


def column_order(version: str) -> dict[str, tuple[str, ...]]:
    """Columns of every table that is read, in the order of a version of the CDM.

    Raises:
        ConfigError: the version isn't one of `VERSIONS`.
    """
    if version not in _BY_VERSION:
        raise ConfigError(f"OMOP CDM {version!r} is not known; choose one of {', '.join(VERSIONS)}.")
    return _BY_VERSION[version]


def read_table_spec(file: Path) -> dict[str, tuple[str, ...]]:
    """Columns of tables, in order, from a CSV file with a line per column.

    The names may be OHDSI's (`cdmTableName,cdmFieldName`, as its field level specification has them) or plain
    (`table,column`; `table,field`); further columns are ignored.

    Raises:
        DataError: the file can't be read, or has other columns.
    """
    try:
        lines = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as problem:
        raise DataError(f"{file}: the table spec can't be read ({problem}).") from None
    names = [name.strip().lower() for name in lines[0]] if lines else []
    table = next((names.index(name) for name in ("cdmtablename", "table") if name in names), None)
    column = next((names.index(name) for name in ("cdmfieldname", "column", "field") if name in names), None)
    if table is None or column is None:
        raise DataError(f"{file}: a table spec has the columns table,column, one line per column of a table.")
    spec: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], start=2):
        if len(line) <= max(table, column):
            raise DataError(f"{file}: row {number} is too short; a line names a table and a column.")
        spec.setdefault(line[table].strip().lower(), []).append(line[column].strip().lower())
    return {name: tuple(columns) for name, columns in spec.items()}
