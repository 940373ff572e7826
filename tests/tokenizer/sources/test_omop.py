"""What OMOP's tables mean: codes, values, visits, people; and the counts of data that others have counted."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data import DATA
from tests.tokenizer.sources import cdm
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import MedsDataset
from tokenizer.sources.intake import Flow
from tokenizer.sources.omop import import_omop
from tokenizer.sources.repeats import Repeats


def bring(tables: cdm.Tables, path: Path, **options: object) -> Flow:
    """Import tables from CSV files to path/out."""
    return import_omop(cdm.write_csv(tables, path / "cdm"), path / "out", name="test", **options)  # type: ignore[arg-type]


def balanced(flow: Flow) -> None:
    """Every row is an event or more, dropped by name, or in quarantine."""
    assert set(flow.kept) == set(flow.rows)
    for table, rows in flow.rows.items():
        gone = sum(flow.dropped.get(table, {}).values()) + sum(flow.quarantined.get(table, {}).values())
        assert rows == flow.kept[table] + gone, table
        assert flow.kept[table] <= flow.events.get(table, 0), table


def test_every_kind_of_record_becomes_the_events_it_should(ram_path: Path) -> None:
    flow = bring(cdm.hospital(), ram_path)
    assert cdm.events(ram_path / "out") == cdm.EXPECTED
    assert flow.dropped == {"measurement": {"free text": 1}, "death": {"a death was recorded before": 1}}
    assert flow.subjects == 2
    assert not flow.quarantined
    balanced(flow)


def test_numbers_that_stand_twice_are_counted_and_their_rows_kept(ram_path: Path) -> None:
    """GiBleed's 4,384 drug exposures with the number of another one are different records."""
    rows = [cdm.measurement(1, measurement_id=n) for n in (5, 7, 5, "5.0", None, None, "x")]
    visits = [
        {"visit_occurrence_id": 3, "person_id": 1, "visit_concept_id": 9201, "visit_start_date": f"2020-01-0{n}"}
        for n in (1, 2)
    ]
    people: list[cdm.Row] = [cdm.person(1)]
    flow = bring({"person": people, "measurement": rows, "visit_occurrence": visits}, ram_path)
    assert flow.events["measurement"] == len(rows)
    notes = " ".join(flow.notes)
    assert "measurement: 2 rows have the measurement_id of an earlier row" in notes
    assert "visit_occurrence: 1 row has the visit_occurrence_id of an earlier row" in notes


@given(st.lists(st.lists(st.integers(-3, 30) | st.sampled_from([-(2**63), 2**63 - 1]))), st.integers(1, 9))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_repeats_are_counted_whatever_is_held_in_memory(ram_path: Path, pieces: list[list[int]], held: int) -> None:
    repeats = Repeats(ram_path, held=held)
    for piece in pieces:
        repeats.add(np.array(piece, np.int64))
    numbers = [number for piece in pieces for number in piece]
    assert repeats.count() == len(numbers) - len(set(numbers))
    assert not list(ram_path.iterdir())


TIMES = {
    "measurement_date": ("measurement", {"measurement_date": "1066-01-01"}, "time out of range"),
    "measurement_datetime": (
        "measurement",
        {"measurement_date": "2020-01-01", "measurement_datetime": "9999-12-31 00:00:00"},
        "time out of range",
    ),
    "death_datetime": ("death", {"death_datetime": None}, "no time"),
    "visit_end_date": (
        "visit_occurrence",
        {"visit_start_date": "2020-01-02", "visit_end_date": "2020-01-01"},
        "ends before it starts",
    ),
    "visit_end_datetime": (
        "visit_occurrence",
        {"visit_start_date": "2020-01-02", "visit_end_datetime": "2020-01-01 00:00:00"},
        "ends before it starts",
    ),
    "birth_datetime": ("person", {"birth_datetime": "1066-01-01", "year_of_birth": None}, "time out of range"),
    "year_of_birth": ("person", {"year_of_birth": 1066}, "time out of range"),
    "month_of_birth": ("person", {"month_of_birth": 13}, "not a date"),
}


@pytest.mark.parametrize("column", TIMES)
def test_the_column_is_named_that_the_time_is_from(column: str, ram_path: Path) -> None:
    table, cells, reason = TIMES[column]
    fixed = {"measurement": {"measurement_concept_id": 5}, "visit_occurrence": {"visit_occurrence_id": 1}}
    good: dict[str, object] = {**cells, "death_datetime": "2020-01-01"} if table == "death" else {}
    rows: list[cdm.Row] = [cdm.person(2, **cells)] if table == "person" else []
    if table == "visit_occurrence":
        cells = {**cells, "visit_concept_id": 9201}
    tables: cdm.Tables = {"person": [cdm.person(1), cdm.person(3), *rows]}
    if table != "person":
        own = {"person_id": 1, **fixed.get(table, {})}
        tables[table] = [own | cells, *([{**own, "person_id": 3} | good] if good else [])]
    with pytest.raises(DataError, match=rf"{table}, row \d, {column}: {reason}"):
        bring(tables, ram_path)


@pytest.mark.parametrize("form", [cdm.write_csv, cdm.write_parquet])
def test_a_nul_in_a_code_is_a_bad_row(form: Callable[[cdm.Tables, Path], Path], ram_path: Path) -> None:
    rows = [cdm.condition(1, condition_concept_id=0, condition_source_value=text) for text in ("A\0B", "AB")]
    folder = form({"person": [cdm.person(1)], "condition_occurrence": rows}, ram_path / "cdm")
    with pytest.raises(DataError, match=r"condition_occurrence, row [12], condition_source_value: a NUL character"):
        import_omop(folder, ram_path / "out", name="x")
    flow = import_omop(folder, ram_path / "out", name="x", quarantine=True)
    assert flow.quarantined == {"condition_occurrence": {"a NUL character": 1}}
    assert "CONDITION//AB" in cdm.codes(ram_path / "out")


def test_what_is_imported_is_a_meds_dataset(ram_path: Path) -> None:
    flow = bring(cdm.hospital(), ram_path)
    dataset = MedsDataset.open(ram_path / "out")
    assert sum(dataset.read(shard).height for shard in dataset.shards) == flow.events_total
    assert not dataset.notes
    assert Flow.load(ram_path / "out") == flow


def test_notes_say_what_was_not_read_and_what_could_not_be_told(ram_path: Path) -> None:
    notes = " ".join(bring(cdm.hospital(), ram_path).notes)
    assert "condition_era, note (free text)" in notes
    assert "condition_occurrence: 1 row with a concept that the concept table lacks" in notes
    assert "condition_occurrence: 1 row with neither a concept nor a code" in notes
    assert "1 visit has no end" in notes


def test_source_codes_come_first_where_the_site_wants_them(ram_path: Path) -> None:
    bring(cdm.hospital(), ram_path, codes="source")
    assert {
        "ICD10CM//E11.65",
        "DRUG//metformin",
        "ICD10PCS//0DTJ4ZZ",
        "CONDITION//strange / code",
        "CONDITION//UNMAPPED",
        "OMOP//77777",
    } <= set(cdm.codes(ram_path / "out"))


def test_without_concepts_the_numbers_speak(ram_path: Path) -> None:
    tables = cdm.hospital()
    del tables["concept"], tables["concept_relationship"]
    flow = bring(tables, ram_path)
    seen = cdm.events(ram_path / "out")
    assert {"OMOP//201826", "OMOP//3004501", "OMOP//45576876", "OMOP//40766362//OMOP//4298794"} <= {e[2] for e in seen}
    assert (1, "2020-01-02 00:00:00", "OMOP//3004501", 101.5, "mg per dl", None) in seen
    assert any("no concept table" in note for note in flow.notes)
    bring(tables, ram_path / "source", codes="source")
    assert {"CONDITION//E11.65", "OMOP//201826"} <= {e[2] for e in cdm.events(ram_path / "source/out")} | {
        "OMOP//201826"
    }


def test_a_source_concept_that_maps_to_two_becomes_both(ram_path: Path) -> None:
    tables: cdm.Tables = {
        "person": [cdm.person(1)],
        "condition_occurrence": [cdm.condition(1, condition_concept_id=0, condition_source_concept_id=45576876)],
        "concept": cdm.vocabulary(),
        "concept_relationship": [
            {"concept_id_1": 45576876, "concept_id_2": target, "relationship_id": "Maps to"}
            for target in (201826, 4298794)
        ],
    }  # fmt: skip
    flow = bring(tables, ram_path)
    assert cdm.codes(ram_path / "out") == ["MEDS_BIRTH", "SNOMED//266919005", "SNOMED//44054006"]
    balanced(flow)


def test_a_local_concept_gives_way_to_a_standard_number(ram_path: Path) -> None:
    local = 2_000_000_005
    tables: cdm.Tables = {
        "person": [cdm.person(1)],
        "condition_occurrence": [
            cdm.condition(1, condition_concept_id=4078442, condition_source_concept_id=local),
            cdm.condition(1, condition_concept_id=0, condition_source_concept_id=local),
            cdm.condition(1, condition_concept_id=local + 1, condition_source_value="ours"),
        ],
        "concept": [cdm.concept(local, "mine", "7", "")],
    }
    bring(tables, ram_path)
    assert cdm.codes(ram_path / "out") == ["CONDITION//ours", "MEDS_BIRTH", "OMOP//4078442", "mine//7"]


@pytest.mark.parametrize(
    ("vocabulary", "code", "expected"),
    [
        ("ICD10CM", "E1165", "ICD10CM//E11.65"),
        ("ICD10CM", "e11.65", "ICD10CM//E11.65"),
        ("ICD10CM", "I10", "ICD10CM//I10"),
        ("ICD9CM", "25000", "ICD9CM//250.00"),
        ("ICD9CM", "E8490", "ICD9CM//E849.0"),
        ("ICD9CM", "V1005", "ICD9CM//V10.05"),
        ("ICD9Proc", "3893", "ICD9Proc//38.93"),
        ("ICD10PCS", "0dtj4zz", "ICD10PCS//0DTJ4ZZ"),
        ("ICD10CM", "E08-E13", "ICD10CM//E08-E13"),
        ("LOINC", "2345-7", "LOINC//2345-7"),
        ("odd//one", "a//b", "odd/one//a/b"),
    ],
)
def test_codes_are_spelled_as_the_rest_of_fedcomet_does(
    vocabulary: str, code: str, expected: str, ram_path: Path
) -> None:
    tables: cdm.Tables = {
        "person": [cdm.person(1)],
        "condition_occurrence": [cdm.condition(1, condition_concept_id=7)],
        "concept": [cdm.concept(7, vocabulary, code)],
    }
    bring(tables, ram_path)
    assert expected in cdm.codes(ram_path / "out")


@pytest.mark.parametrize(
    ("concept", "source", "expected"),
    [
        (9201, None, "INPATIENT"),
        (262, None, "INPATIENT"),
        (9202, None, "OUTPATIENT"),
        (9203, None, "EMERGENCY"),
        (8870, None, "EMERGENCY"),
        (5083, None, "TELEHEALTH"),
        (581476, None, "HOME"),
        (42898160, None, "LONG_TERM"),
        (0, "Inpatient", "INPATIENT"),
        (0, "EMER", "EMERGENCY"),
        (0, "AMB", "OUTPATIENT"),
        (0, "home health", "HOME"),
        (0, "video/telephone", "TELEHEALTH"),
        (0, "b2a6f7d3-bed4-4e23", "OTHER"),
        (581478, None, "OTHER"),
        (0, None, "OTHER"),
    ],
)
def test_visits_have_a_type(concept: int, source: str | None, expected: str, ram_path: Path) -> None:
    visit = {"visit_occurrence_id": 3, "person_id": 1, "visit_concept_id": concept, "visit_source_value": source}
    visit |= {"visit_start_date": "2020-01-01", "visit_end_date": "2020-01-02"}
    bring({"person": [cdm.person(1)], "visit_occurrence": [visit]}, ram_path)
    assert f"ENCOUNTER_START//{expected}" in cdm.codes(ram_path / "out")
    assert f"ENCOUNTER_END//{expected}" in cdm.codes(ram_path / "out")


def test_older_names_of_the_discharge_are_known(ram_path: Path) -> None:
    visit = {"visit_occurrence_id": 3, "person_id": 1, "visit_concept_id": 9201, "discharge_to_source_value": "Home"}
    visit |= {"visit_start_date": "2020-01-01", "visit_end_date": "2020-01-02"}
    bring({"person": [cdm.person(1)], "visit_occurrence": [visit]}, ram_path)
    assert "DISCHARGE_TO//HOME" in cdm.codes(ram_path / "out")


@pytest.mark.parametrize(
    ("born", "expected"),
    [
        ({"month_of_birth": 5, "day_of_birth": 6}, "1950-05-06 00:00:00"),
        ({"month_of_birth": 5}, "1950-05-01 00:00:00"),
        ({"birth_datetime": "1950-05-06T07:08:09"}, "1950-05-06 07:08:09"),
        ({"birth_datetime": "1951-05-06 07:08:09"}, "1950-01-01 00:00:00"),
        ({"year_of_birth": None, "birth_datetime": "1951-05-06"}, "1951-05-06 00:00:00"),
    ],
)
def test_births_are_as_exact_as_the_record(born: dict[str, object], expected: str, ram_path: Path) -> None:
    bring({"person": [cdm.person(1, **born), cdm.person(2, birth_datetime="1950-01-01")]}, ram_path)
    assert cdm.events(ram_path / "out")[0][1] == expected


def test_records_of_a_person_who_is_not_listed_are_dropped_by_name(ram_path: Path) -> None:
    flow = bring({"person": [cdm.person(1)], "condition_occurrence": [cdm.condition(1), cdm.condition(2)]}, ram_path)
    assert flow.dropped == {"condition_occurrence": {"no person row": 1}}
    assert flow.subjects == 1
    balanced(flow)


def test_a_part_of_the_tables_is_enough(ram_path: Path) -> None:
    flow = bring({"condition_occurrence": [cdm.condition(7)]}, ram_path)
    assert cdm.codes(ram_path / "out") == ["OMOP//201826"]
    assert any("no person table" in note for note in flow.notes)


def test_empty_tables_are_fine_and_no_record_at_all_is_not(ram_path: Path) -> None:
    folder = ram_path / "cdm"
    folder.mkdir()
    (folder / "person.csv").write_text("person_id,year_of_birth\n")
    (folder / "death.csv").write_text("PERSON_ID,DEATH_DATE")
    with pytest.raises(DataError, match="no event is left"):
        import_omop(folder, ram_path / "out", name="test")


def test_eras_are_read_when_asked_for(ram_path: Path) -> None:
    tables = cdm.hospital() | {
        "drug_era": [{"person_id": 1, "drug_concept_id": 1503297, "drug_era_start_date": "2020-02-02"}],
        "dose_era": [{"person_id": 1, "drug_concept_id": 1503297, "dose_era_start_date": "2020-02-03",
                      "dose_value": 500, "unit_concept_id": 8840}],
    }  # fmt: skip
    flow = bring(tables, ram_path, eras=True)
    assert (flow.events["condition_era"], flow.events["drug_era"]) == (1, 1)
    assert (1, "2020-02-03 00:00:00", "RxNorm//6809", 500.0, "mg/dL", None) in cdm.events(ram_path / "out")


def test_changes_of_department_are_read_when_asked_for(ram_path: Path) -> None:
    details = [
        {"person_id": 1, "visit_detail_start_datetime": time, "care_site_id": site, "visit_occurrence_id": 10}
        for time, site in (("2020-01-02 10:00:00", 5), ("2020-01-03 10:00:00", 99))
    ]
    flow = bring(cdm.hospital() | {"visit_detail": details}, ram_path, visit_details=True)
    assert (1, "2020-01-02 10:00:00", "DEPARTMENT//CARDIOLOGY", None, None, "10") in cdm.events(ram_path / "out")
    assert flow.dropped["visit_detail"] == {"no department": 1}
    balanced(flow)


def test_only_what_was_under_observation_is_kept_when_asked_for(ram_path: Path) -> None:
    def period(person: int, start: str, end: str) -> dict[str, object]:
        return {"person_id": person, "observation_period_start_date": start, "observation_period_end_date": end}

    tables: cdm.Tables = {
        "person": [cdm.person(1), cdm.person(2)],
        "observation_period": [period(1, "2020-01-01", "2020-01-31"), period(1, "2020-01-10", "2020-01-12"),
                               period(1, "2020-03-01", "2020-03-02")],
        "condition_occurrence": [
            cdm.condition(1, condition_start_date=None, condition_start_datetime=time)
            for time in ("2019-12-31 23:59:59", "2020-01-01 00:00:00", "2020-01-31 23:59:59", "2020-02-01 00:00:00",
                         "2020-03-01 12:00:00")
        ] + [cdm.condition(2)],
    }  # fmt: skip
    flow = bring(tables, ram_path, observed_only=True)
    times = [event[1] for event in cdm.events(ram_path / "out") if event[2] != "MEDS_BIRTH"]
    assert times == ["2020-01-01 00:00:00", "2020-01-31 23:59:59", "2020-03-01 12:00:00"]
    assert flow.dropped == {"condition_occurrence": {"outside of observation periods": 3}}
    balanced(flow)


def test_options_that_do_not_go_together_are_refused(ram_path: Path) -> None:
    folder = cdm.write_csv({"person": [cdm.person(1)]}, ram_path / "cdm")
    for options, message in (
        ({"codes": "both"}, "standard, source"),
        ({"schema": "cdm"}, "files have no schema"),
        ({"cdm": "6.0"}, "choose one of 5.2"),
        ({"cdm": "5.3", "table_spec": folder}, "not both"),
        ({"observed_only": True}, "no observation_period"),
    ):
        with pytest.raises(ConfigError, match=message):
            import_omop(folder, ram_path / "out", name="test", **options)  # type: ignore[arg-type]


def test_progress_is_told_table_by_table(ram_path: Path) -> None:
    told: list[tuple[str, int]] = []
    bring(cdm.hospital(), ram_path, progress=lambda table, rows: told.append((table, rows)))
    assert ("measurement", 7) in told


def test_pieces_of_any_size_give_the_same(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = cdm.hospital()
    tables["condition_occurrence"] = [cdm.condition(1 + n % 2, condition_source_value=f"{n}" * 20) for n in range(500)]
    bring(tables, ram_path)
    monkeypatch.setattr("tokenizer.sources.omop_csv._BLOCK_BYTES", 2048)
    bring(tables, ram_path / "small")
    assert cdm.events(ram_path / "small/out") == cdm.events(ram_path / "out")


@pytest.mark.skipif(not DATA.exists(), reason="the real data are not on this machine; the small hospital stands in")
class TestKnownCounts:
    """Counts that others have found in published data."""

    def test_gibleed_gives_what_another_tool_counts(self, ram_path: Path) -> None:
        flow = import_omop(DATA / "gibleed_omop53", ram_path / "out", name="gibleed", codes="source")
        kinds = Counter(code.split("//")[0] for code in cdm.codes(ram_path / "out"))
        assert kinds == {
            "SNOMED": 115_627, "RxNorm": 39_268, "LOINC": 32_138, "CVX": 25_710, "MEDS_BIRTH": 2_694, "NDC": 2_694,
            "ENCOUNTER_START": 1_037, "ICD10CM": 479,
            # Ours besides: ends, demographics, and 62 rows whose source code has no concept.
            "ENCOUNTER_END": 1_037, "GENDER": 2_694, "RACE": 2_694, "ETHNICITY": 435, "DRUG": 35, "CONDITION": 27,
        }  # fmt: skip
        theirs = kinds.total() - 1_037 - 2_694 - 2_694 - 435 - 35 - 27
        assert theirs == 219_647
        assert flow.subjects == 2_694
        balanced(flow)

    def test_gibleed_in_standard_concepts_has_a_code_for_every_row(self, ram_path: Path) -> None:
        flow = import_omop(DATA / "gibleed_omop53", ram_path / "out", name="gibleed")
        kinds = Counter(code.split("//")[0] for code in cdm.codes(ram_path / "out"))
        assert kinds["SNOMED"] == 116_133
        assert kinds["RxNorm"] == 41_997
        assert (
            sum(kinds[kind] for kind in ("SNOMED", "RxNorm", "LOINC", "CVX"))
            == 65_332 + 67_707 + 37_409 + 44_053 + 1_477
        )
        balanced(flow)

    def test_synthea_keeps_values_units_and_deaths(self, ram_path: Path) -> None:
        flow = import_omop(DATA / "Synthea27Nj_5.4.zip", ram_path / "out", name="synthea")
        frame = pl.read_parquet(ram_path / "out/data/*.parquet")
        assert flow.rows == {
            "person": 28, "visit_occurrence": 1_791, "condition_occurrence": 470, "drug_exposure": 883,
            "procedure_occurrence": 1_649, "device_exposure": 1, "measurement": 10_040, "observation": 8_099,
            "death": 3,
        }  # fmt: skip
        # 9,107 numbers, and three that stand as text.
        assert frame["numeric_value"].count() == 9_110
        assert frame.filter(pl.col("code") == "LOINC//29463-7")["unit"].unique().to_list() == ["kg"]
        assert (frame["code"] == "MEDS_DEATH").sum() == 3
        balanced(flow)

    def test_mimic_is_kept_row_by_row(self, ram_path: Path) -> None:
        flow = import_omop(DATA / "mimic_iv_demo_omop53", ram_path / "out", name="mimic", visit_details=True)
        assert flow.events | {} == {
            "person": 300, "visit_occurrence": 1_937, "visit_detail": 825, "condition_occurrence": 16_441,
            "drug_exposure": 18_229, "procedure_occurrence": 18_447, "device_exposure": 3_855, "death": 15,
        }  # fmt: skip
        balanced(flow)


# A kind of measurement, and whether its row is kept, dropped by name, or set aside.
FATES: dict[str, tuple[cdm.Row, str]] = {
    "number": (cdm.measurement(1, value_as_number=1), "kept"),
    "answer": (cdm.measurement(1, value_as_concept_id=4298794), "kept"),
    "two codes": (cdm.measurement(1, measurement_concept_id=0, measurement_source_concept_id=45576876), "kept"),
    "two codes and free text": (
        cdm.measurement(
            1, measurement_concept_id=0, measurement_source_concept_id=45576876, value_source_value="y" * 50
        ),
        "dropped",
    ),
    "free text": (cdm.measurement(1, value_source_value="x" * 50), "dropped"),
    "nobody's": (cdm.measurement(9), "dropped"),
    "no date": (cdm.measurement(1, measurement_date=None), "aside"),
    "bad number": (cdm.measurement(1, value_as_number="much"), "aside"),
    "bad everything": (cdm.measurement("x", value_as_number="much", measurement_date="never"), "aside"),
}


@settings(max_examples=10)
@given(kinds=st.lists(st.sampled_from(sorted(FATES)), min_size=1, max_size=40))
def test_every_row_has_one_fate_whatever_stands_beside_it(
    kinds: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    maps = [{"concept_id_1": 45576876, "concept_id_2": to, "relationship_id": "Maps to"} for to in (201826, 4298794)]
    tables: cdm.Tables = {
        "person": [cdm.person(1)],
        "measurement": [FATES[kind][0] for kind in kinds],
        "concept": cdm.vocabulary(),
        "concept_relationship": maps,  # type: ignore[dict-item]
    }
    flow = bring(tables, tmp_path_factory.mktemp("fates"), quarantine=True)
    fates = Counter(FATES[kind][1] for kind in kinds)
    assert flow.kept["measurement"] == fates["kept"]
    assert sum(flow.dropped.get("measurement", {}).values()) == fates["dropped"]
    assert sum(flow.quarantined.get("measurement", {}).values()) == fates["aside"]
    assert flow.events["measurement"] == fates["kept"] + kinds.count("two codes")
