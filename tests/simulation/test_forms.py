import json
import re
from pathlib import Path

import polars as pl
import pytest

from simulation import coding
from simulation.extract import Extract, events, extract
from simulation.forms import FORMS, write
from simulation.hospital import PROFILES, Records, generate
from tokenizer.errors import ConfigError
from tokenizer.events import MedsDataset, canonical_order

CONTRACT = re.compile(
    r"MEDS_BIRTH|MEDS_DEATH|GENDER//[MF]|RACE//(WHITE|BLACK|ASIAN)|ETHNICITY//(NOT )?HISPANIC"
    r"|ENCOUNTER_(START|END)//(INPATIENT|EMERGENCY|OUTPATIENT)|(DEPARTMENT|DISCHARGE_TO|CHIEF_COMPLAINT)//[A-Z ]+"
    r"|ICD10CM//[A-Z]\d\d\.\w+|ICD10PCS//\w{7}|RxNorm//\d+|CVX//\d+"
    r"|LOINC//\d+-\d(//LOINC//LA\d+-\d|//[A-Z ]+)?"
)


@pytest.fixture(scope="module")
def made() -> Records:
    return generate(PROFILES["surgical"], 1500, seed=3)


@pytest.fixture(scope="module")
def tables(made: Records) -> Extract:
    return extract(made, PROFILES["surgical"], seed=3)


def test_every_code_of_the_chart_is_coded_in_the_names_that_importers_use(tables: Extract):
    codes = events(tables)["code"].unique().to_list()
    assert [code for code in codes if not CONTRACT.fullmatch(code)] == []
    kinds = {code.split("//")[0] for code in codes}
    assert {
        "ICD10CM",
        "ICD10PCS",
        "RxNorm",
        "CVX",
        "LOINC",
        "DEPARTMENT",
        "DISCHARGE_TO",
        "CHIEF_COMPLAINT",
        "ETHNICITY",
    } <= kinds


def test_no_event_of_the_chart_is_lost_but_those_that_not_every_form_has_a_place_for(made: Records, tables: Extract):
    def count(*prefixes: str) -> int:
        return sum(made.events["code"].str.starts_with(prefix).sum() for prefix in prefixes)

    found = events(tables)["code"]
    assert tables.patients.height == 1500 == (found == "MEDS_BIRTH").sum()
    assert tables.diagnoses.height == count("DIAGNOSIS//")
    assert tables.drugs.height == count("MEDICATION//")
    assert tables.results["value"].count() == count("LAB//", "VITAL//")
    assert tables.encounters.height == count("ED_REGISTRATION", "OUTPATIENT//", "HOSPITAL_ADMISSION//")
    assert tables.encounters["discharge_to"].count() == count("HOSPITAL_DISCHARGE//")
    assert tables.encounters["intensive"].count() == count("TRANSFER_TO//ICU") > 0
    left = made.events["code"].unique().to_list()
    told = ("TRANSFER", "DIAGNOSIS", "MEDICATION", "LAB", "VITAL", "ED_", "OUTPATIENT", "HOSPITAL_", "GENDER", "MEDS_")
    assert sorted(code for code in left if not code.startswith(told)) == ["FOLLOW_UP//END"]


def test_encounters_hold_their_events_and_no_two_are_at_once(tables: Extract):
    stays = tables.encounters.sort("subject_id", "start")
    assert stays["encounter_id"].is_unique().all()
    assert (stays["start"] <= stays["end"].fill_null(stays["start"])).all()
    following = stays.with_columns(next=pl.col("start").shift(-1).over("subject_id"))
    assert following.filter(pl.col("end").fill_null(pl.col("start")) > pl.col("next")).height == 0
    # A patient can only still be there if nothing came after.
    assert following.filter(pl.col("end").is_null() & pl.col("next").is_not_null()).height == 0
    for name in ("diagnoses", "drugs", "procedures", "vaccinations", "results"):
        joined = getattr(tables, name).join(stays, on=["subject_id", "encounter_id"], how="left")
        assert joined["start"].null_count() == 0, name
        assert (joined["time"] >= joined["start"]).all(), name
        assert (joined["time"] <= joined["end"].fill_null(joined["time"])).all(), name


def test_questions_are_asked_at_discharges_and_lactate_still_shows_the_acuity(made: Records, tables: Extract):
    stays = tables.encounters.filter((pl.col("kind") == "INPATIENT") & (pl.col("discharge_to") != coding.EXPIRED))
    asked = made.truth.filter(pl.col("task") == "death_90d").select("subject_id", end="prediction_time")
    assert asked.sort("subject_id", "end").equals(stays.select("subject_id", "end").sort("subject_id", "end"))
    lactate = tables.results.filter(pl.col("code") == "2524-7")["value"].cast(pl.Float64).round(3)
    inside = [lactate.is_between(low, high) for low, high in ((0.5, 1.8), (2.2, 3.8), (4.2, 9.0))]
    assert (inside[0] | inside[1] | inside[2]).all()


def test_times_are_whole_minutes_and_values_have_the_decimals_of_a_laboratory(tables: Extract):
    found = events(tables)
    assert (found["time"].drop_nulls() == found["time"].drop_nulls().dt.truncate("1m")).all()
    digits = pl.col("value").cast(pl.String).str.split(".").list.last().str.len_chars()
    assert tables.results.drop_nulls("value").select(digits.max()).item() == 3


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_with_the_true_risks_and_says_that_it_is_synthetic(tmp_path: Path, form):
    files = write("heart", tmp_path, form=form, patients=30, seed=5)
    made = generate(PROFILES["heart"], 30, seed=5)
    assert pl.read_parquet(files.truth).equals(made.truth)
    assert files.events == events(extract(made, PROFILES["heart"], 5)).height
    assert files.patients == 30
    assert not any("truth" in path.name for path in files.records.rglob("*"))
    sign = {
        "meds": "metadata/dataset.json",
        "omop": "cdm_source.csv",
        "fhir": "Location.ndjson",
        "tables": "mapping.toml",
    }[form]
    assert "synthetic hospital heart" in (files.records / sign).read_text()


def test_the_meds_form_is_the_events(tmp_path: Path):
    files = write("oncology", tmp_path, form="meds", patients=2100, seed=1)
    dataset = MedsDataset.open(files.records)
    assert (dataset.subjects, len(dataset.shards), dataset.notes) == (2100, 2, [])
    read = pl.concat([pl.read_parquet(files.records / shard) for shard in dataset.shards])
    expected = events(extract(generate(PROFILES["oncology"], 2100, seed=1), PROFILES["oncology"], 1))
    assert read.equals(canonical_order(expected))


def test_the_csv_files_of_omop_have_the_columns_of_the_common_data_model(tmp_path: Path):
    files = write("general", tmp_path, form="omop", patients=40, seed=2)
    frames = {path.stem: pl.read_csv(path, infer_schema_length=None) for path in files.records.glob("*.csv")}
    concepts = set(frames["concept"]["concept_id"])
    for table, frame in frames.items():
        for column in frame.columns:
            if column.endswith("concept_id") and table not in ("concept", "cdm_source"):
                assert set(frame[column].drop_nulls().cast(pl.Int64)) <= concepts, (table, column)
        key = frame.columns[0]
        if table not in ("death", "cdm_source"):
            assert frame[key].is_unique().all(), table
        if "visit_occurrence_id" in frame.columns:
            assert set(frame["visit_occurrence_id"]) <= set(frames["visit_occurrence"]["visit_occurrence_id"])
    assert (len(frames["person"].columns), len(frames["measurement"].columns)) == (18, 23)
    required = ("visit_end_date", "visit_start_date", "person_id", "visit_concept_id", "visit_type_concept_id")
    assert all(frames["visit_occurrence"][column].null_count() == 0 for column in required)


def test_every_line_of_the_fhir_export_is_a_resource_whose_references_lead_somewhere(tmp_path: Path):
    files = write("surgical", tmp_path, form="fhir", patients=60, seed=2)
    resources = {}
    for path in files.records.glob("*.ndjson"):
        for line in path.read_text().splitlines():
            resource = json.loads(line)
            assert resource["resourceType"] == path.stem
            assert resource["meta"]["security"][0]["code"] == "HTEST"
            assert re.fullmatch(r"[A-Za-z0-9\-.]{1,64}", resource["id"])
            assert "null" not in line
            resources[f"{path.stem}/{resource['id']}"] = resource
    referred = set(re.findall(r'"reference": "([^"]+)"', json.dumps(list(resources.values()))))
    assert referred <= set(resources)
    kinds = {name.split("/")[0] for name in resources}
    assert {"Patient", "Encounter", "Condition", "Observation", "MedicationRequest", "Immunization"} <= kinds
    values = ["valueQuantity", "valueString", "valueCodeableConcept", "component"]
    observations = [r for name, r in resources.items() if name.startswith("Observation/")]
    assert all(sum(value in observation for value in values) == 1 for observation in observations)


def test_equal_arguments_give_equal_files_and_an_unknown_form_or_hospital_is_named(tmp_path: Path):
    for form in FORMS:
        for place in ("a", "b"):
            write("heart", tmp_path / form / place, form=form, patients=12, seed=9)
        first = {path.name: path.read_bytes() for path in sorted((tmp_path / form / "a").rglob("*")) if path.is_file()}
        again = {path.name: path.read_bytes() for path in sorted((tmp_path / form / "b").rglob("*")) if path.is_file()}
        assert first == again
    with pytest.raises(ConfigError, match=r"'xml' is not known; choose one of meds, omop"):
        write("heart", tmp_path, form="xml", patients=1, seed=0)
    with pytest.raises(ConfigError, match=r"'village' is not known; choose one of heart"):
        write("village", tmp_path, form="meds", patients=1, seed=0)
    with pytest.raises(ConfigError, match="patients must be 0 or more, not -1"):
        write("heart", tmp_path, form="meds", patients=-1, seed=0)
