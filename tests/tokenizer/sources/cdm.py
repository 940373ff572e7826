"""A small hospital in the OMOP CDM, written in every form that the importer reads, and what it must give."""

import csv
import gzip
import io
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import sqlalchemy as sa

from tokenizer.sources.omop_tables import column_order

Row = Mapping[str, object]
Tables = dict[str, list[Row]]


def person(person_id: object, **more: object) -> Row:
    return {"person_id": person_id, "year_of_birth": 1950} | more


def condition(person_id: object, **more: object) -> Row:
    return {"person_id": person_id, "condition_concept_id": 201826, "condition_start_date": "2020-01-02"} | more


def measurement(person_id: object, **more: object) -> Row:
    return {"person_id": person_id, "measurement_concept_id": 3004501, "measurement_date": "2020-01-02"} | more


def concept(concept_id: int, vocabulary: str, code: str, standard: str = "S", name: str = "", domain: str = "") -> Row:
    return {
        "concept_id": concept_id,
        "concept_name": name,
        "domain_id": domain,
        "vocabulary_id": vocabulary,
        "standard_concept": standard,
        "concept_code": code,
    }


def vocabulary() -> list[Row]:
    return [
        concept(0, "None", "No matching concept"),
        concept(201826, "SNOMED", "44054006"),
        concept(45576876, "ICD10CM", "e1165", ""),
        concept(1567956, "ICD10CM", "E11", ""),
        concept(44820682, "ICD9CM", "E8490", ""),
        concept(1503297, "RxNorm", "6809"),
        concept(4336464, "SNOMED", "232717009"),
        concept(2106281, "ICD10PCS", "0DTJ4ZZ", ""),
        concept(45768171, "SNOMED", "706172005"),
        concept(3004501, "LOINC", "2345-7"),
        concept(40766362, "LOINC", "72166-2"),
        concept(3013721, "LOINC", "8661-1"),
        concept(4298794, "SNOMED", "266919005"),
        concept(8840, "UCUM", "mg/dL"),
        concept(38004446, "Medicare Specialty", "01", name="General Practice", domain="Provider"),
        concept(38004207, "CMS Place of Service", "99", name="Ambulatory Clinic / Center", domain="Visit"),
        concept(2000000001, "ours", "X", "", name="Virtual consultation", domain="Visit"),
        concept(581476, "Visit", "OMOP4822461", name="Home Visit", domain="Visit"),
    ]


def hospital() -> Tables:
    """Two patients, each kind of record at least once."""
    return {
        "person": [
            person(1, month_of_birth=2, day_of_birth=3, gender_concept_id=8507, race_concept_id=8527,
                   ethnicity_concept_id=38003564, birth_datetime="1950-02-03 04:05:00"),
            person(2, year_of_birth=1960, gender_concept_id=0, gender_source_value="female", race_concept_id=0,
                   race_source_value="Martian", ethnicity_concept_id=0, ethnicity_source_value="italian"),
        ],
        "visit_occurrence": [
            {"visit_occurrence_id": 10, "person_id": 1, "visit_concept_id": 9201, "visit_start_date": "2020-01-01",
             "visit_start_datetime": "2020-01-01 08:00:00", "visit_end_date": "2020-01-04",
             "visit_end_datetime": "2020-01-04 12:00:00", "care_site_id": 5, "discharged_to_concept_id": 581476},
            {"visit_occurrence_id": 11, "person_id": 2, "visit_concept_id": 2000000001,
             "visit_start_date": "2021-05-05", "visit_start_datetime": "2021-05-05 10:30:00",
             "visit_end_date": "2021-05-05", "provider_id": 6, "discharged_to_source_value": "died//here"},
            {"visit_occurrence_id": 12, "person_id": 2, "visit_concept_id": 0, "visit_source_value": "nursing home",
             "visit_start_date": "2021-06-01"},
        ],
        "care_site": [{"care_site_id": 5, "care_site_name": "Cardiology"}],
        "provider": [{"provider_id": 6, "specialty_concept_id": 38004446}],
        "condition_occurrence": [
            condition(1, condition_start_datetime="2020-01-02 09:00:00", visit_occurrence_id=10,
                      condition_source_concept_id=45576876, condition_source_value="E11.65"),
            condition(2, condition_concept_id=0, condition_source_concept_id=45576876),
            condition(2, condition_concept_id=0, condition_source_value=" strange // code "),
            condition(2, condition_concept_id=0),
            condition(2, condition_concept_id=77777),
        ],
        "drug_exposure": [
            {"person_id": 1, "drug_concept_id": 1503297, "drug_exposure_start_date": "2020-01-02",
             "drug_source_value": "metformin", "visit_occurrence_id": 0},
        ],
        "procedure_occurrence": [
            {"person_id": 1, "procedure_concept_id": 4336464, "procedure_date": "2020-01-03",
             "procedure_source_concept_id": 2106281},
        ],
        "device_exposure": [
            {"person_id": 1, "device_concept_id": 45768171, "device_exposure_start_date": "2020-01-03"},
        ],
        "measurement": [
            measurement(1, value_as_number=101.5, unit_concept_id=8840, unit_source_value="mg per dl"),
            measurement(1, value_as_number=5, unit_source_value="mmol/L"),
            measurement(1, measurement_concept_id=40766362, value_as_concept_id=4298794),
            measurement(1, value_source_value=" 7.25 "),
            measurement(1, value_source_value="not  detected"),
            measurement(1, value_source_value="x" * 41),
            measurement(1),
        ],
        "observation": [
            {"person_id": 2, "observation_concept_id": 3013721, "observation_date": "2021-05-05",
             "value_as_string": "Chest pain", "visit_occurrence_id": 11},
        ],
        "death": [
            {"person_id": 2, "death_date": "2022-01-01", "death_datetime": "2022-01-01 01:00:00"},
            {"person_id": 2, "death_date": "2021-12-31"},
        ],
        "concept": vocabulary(),
        "concept_relationship": [
            {"concept_id_1": 45576876, "concept_id_2": 201826, "relationship_id": "Maps to"},
            {"concept_id_1": 45576876, "concept_id_2": 1503297, "relationship_id": "Maps to", "invalid_reason": "D"},
            {"concept_id_1": 201826, "concept_id_2": 201826, "relationship_id": "Maps to"},
            {"concept_id_1": 45576876, "concept_id_2": 1567956, "relationship_id": "Is a"},
        ],
        "condition_era": [
            {"person_id": 1, "condition_concept_id": 201826, "condition_era_start_date": "2020-01-02"},
        ],
        "note": [{"person_id": 1, "note_text": "secret"}],
    }  # fmt: skip


EXPECTED = [
    (1, None, "ETHNICITY//NOT HISPANIC", None, None, None),
    (1, None, "GENDER//M", None, None, None),
    (1, None, "RACE//WHITE", None, None, None),
    (1, "1950-02-03 04:05:00", "MEDS_BIRTH", None, None, None),
    (1, "2020-01-01 08:00:00", "DEPARTMENT//CARDIOLOGY", None, None, "10"),
    (1, "2020-01-01 08:00:00", "ENCOUNTER_START//INPATIENT", None, None, "10"),
    (1, "2020-01-02 00:00:00", "LOINC//2345-7", None, None, None),
    (1, "2020-01-02 00:00:00", "LOINC//2345-7", 5.0, "mmol/L", None),
    (1, "2020-01-02 00:00:00", "LOINC//2345-7", 7.25, None, None),
    (1, "2020-01-02 00:00:00", "LOINC//2345-7", 101.5, "mg/dL", None),
    (1, "2020-01-02 00:00:00", "LOINC//2345-7//NOT DETECTED", None, None, None),
    (1, "2020-01-02 00:00:00", "LOINC//72166-2//SNOMED//266919005", None, None, None),
    (1, "2020-01-02 00:00:00", "RxNorm//6809", None, None, None),
    (1, "2020-01-02 09:00:00", "SNOMED//44054006", None, None, "10"),
    (1, "2020-01-03 00:00:00", "SNOMED//232717009", None, None, None),
    (1, "2020-01-03 00:00:00", "SNOMED//706172005", None, None, None),
    (1, "2020-01-04 12:00:00", "DISCHARGE_TO//HOME VISIT", None, None, "10"),
    (1, "2020-01-04 12:00:00", "ENCOUNTER_END//INPATIENT", None, None, "10"),
    (2, None, "GENDER//F", None, None, None),
    (2, None, "RACE//MARTIAN", None, None, None),
    (2, "1960-01-01 00:00:00", "MEDS_BIRTH", None, None, None),
    (2, "2020-01-02 00:00:00", "CONDITION//UNMAPPED", None, None, None),
    (2, "2020-01-02 00:00:00", "CONDITION//strange / code", None, None, None),
    (2, "2020-01-02 00:00:00", "OMOP//77777", None, None, None),
    (2, "2020-01-02 00:00:00", "SNOMED//44054006", None, None, None),
    (2, "2021-05-05 00:00:00", "CHIEF_COMPLAINT//CHEST PAIN", None, None, "11"),
    (2, "2021-05-05 10:30:00", "DEPARTMENT//GENERAL PRACTICE", None, None, "11"),
    (2, "2021-05-05 10:30:00", "DISCHARGE_TO//DIED/HERE", None, None, "11"),
    (2, "2021-05-05 10:30:00", "ENCOUNTER_END//TELEHEALTH", None, None, "11"),
    (2, "2021-05-05 10:30:00", "ENCOUNTER_START//TELEHEALTH", None, None, "11"),
    (2, "2021-06-01 00:00:00", "ENCOUNTER_START//LONG_TERM", None, None, "12"),
    (2, "2021-12-31 00:00:00", "MEDS_DEATH", None, None, None),
]
"""Subject, time, code, value, unit, encounter of every event of `hospital`, as the standard concepts say it."""


def events(dataset: Path) -> list[tuple[Any, ...]]:
    """What a dataset holds, in canonical order, times as text."""
    frame = pl.read_parquet(dataset / "data/**/*.parquet", hive_partitioning=False)
    time = pl.col("time").dt.strftime("%Y-%m-%d %H:%M:%S")
    return sorted(
        frame.select("subject_id", time, "code", "numeric_value", "unit", "encounter_id").rows(),
        key=lambda event: (event[0], event[1] or "", event[2], event[3] or 0),
    )


def codes(dataset: Path) -> list[str]:
    """The codes of a dataset, sorted."""
    return sorted(str(event[2]) for event in events(dataset))


def columns(table: str, rows: Sequence[Row]) -> list[str]:
    """Columns of a table: version 5.4's, and whatever its rows have besides."""
    own = dict.fromkeys(column for row in rows for column in row)
    order = column_order("5.4").get(table, ())
    return [*(column for column in order if column in own), *(column for column in own if column not in order)]


def csv_text(
    rows: Sequence[Row], header: Iterable[str], *, delimiter: str = ",", upper: bool = False, headless: bool = False
) -> str:
    names = list(header)
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, lineterminator="\n")
    if not headless:
        writer.writerow([name.upper() if upper else name for name in names])
    writer.writerows([["" if row.get(name) is None else row.get(name) for name in names] for row in rows])
    return out.getvalue()


def write_csv(tables: Tables, folder: Path, *, ending: str = ".csv", upper: bool = False) -> Path:
    """Write tables to a folder; `ending` says how: .csv, .tsv, .csv.gz."""
    folder.mkdir(parents=True, exist_ok=True)
    for table, rows in tables.items():
        text = csv_text(rows, columns(table, rows), delimiter="\t" if "tsv" in ending else ",", upper=upper)
        data = gzip.compress(text.encode()) if ending.endswith("gz") else text.encode()
        (folder / f"{table.upper() if upper else table}{ending}").write_bytes(data)
    return folder


def write_zip(tables: Tables, file: Path, *, folder: str = "export/cdm/") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/export/._person.csv", b"\0\5\x16\7")
        for table, rows in tables.items():
            archive.writestr(f"{folder}{table.upper()}.csv", csv_text(rows, columns(table, rows), upper=True))
    return file


def write_parquet(tables: Tables, folder: Path) -> Path:
    """Write tables with the types that a warehouse gives them."""
    folder.mkdir(parents=True, exist_ok=True)
    for table, rows in tables.items():
        typed(table, rows).write_parquet(folder / f"{table}.parquet")
    return folder


def typed(table: str, rows: Sequence[Row]) -> pl.DataFrame:
    names = columns(table, rows)
    cells = {name: [None if row.get(name) is None else str(row[name]) for row in rows] for name in names}
    frame = pl.DataFrame(cells, schema=dict.fromkeys(names, pl.String))
    casts = []
    for name in names:
        if name.endswith("_datetime"):
            casts.append(pl.col(name).str.to_datetime("%Y-%m-%d %H:%M:%S", time_unit="ns"))
        elif name.endswith("_date"):
            casts.append(pl.col(name).str.to_date("%Y-%m-%d"))
        elif name in ("domain_id", "vocabulary_id", "relationship_id"):
            continue
        elif name.endswith(("_id", "_id_1", "_id_2", "_of_birth")):
            casts.append(pl.col(name).cast(pl.Int32))
        elif name == "value_as_number":
            casts.append(pl.col(name).cast(pl.Float64))
    return frame.with_columns(casts)


def write_database(tables: Tables, engine: sa.Engine, schema: str | None = None) -> None:
    """Create the tables in a database, with its own types, and fill them."""
    metadata = sa.MetaData(schema=schema)
    with engine.begin() as connection:
        for name, rows in tables.items():
            frame = typed(name, rows)
            table = sa.Table(name, metadata, *(sa.Column(c, _sql(kind)) for c, kind in frame.schema.items()))
            table.create(connection)
            connection.execute(table.insert(), frame.to_dicts())


def _sql(kind: pl.DataType) -> sa.types.TypeEngine[Any]:
    if isinstance(kind, pl.Datetime):
        return sa.DateTime()
    return {pl.Date: sa.Date(), pl.Int32: sa.Integer(), pl.Float64: sa.Numeric()}.get(type(kind), sa.Text())  # type: ignore[call-overload, no-any-return]
