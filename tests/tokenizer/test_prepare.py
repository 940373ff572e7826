from datetime import date

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer import hospital
from tokenizer.accounting import Accounting
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.cohort import Filters
from tokenizer.errors import ConfigError
from tokenizer.events import CORE, MedsDataset, canonical_order, write_meds
from tokenizer.maps import VocabularyMap
from tokenizer.prepare import Preparation, Prepared, UnitRule, prepare
from tokenizer.split import SplitRule
from tokenizer.store import build_store
from tokenizer.survey import survey


def events(*rows, unit=True):
    """(subject, time, code, value, unit) rows in canonical order."""
    frame = hospital.frame([row[:4] for row in rows])
    if unit:
        frame = frame.with_columns(unit=pl.Series([row[4] for row in rows], dtype=pl.String))
    return canonical_order(frame)


def keys(frame, preparation=Preparation()):  # noqa: B008
    """Codes and values after preparation."""
    prepared, account = prepare(frame, preparation)
    assert prepared.columns == list(CORE)
    assert prepared.equals(canonical_order(prepared))
    return list(prepared.select("code", "numeric_value").iter_rows()), account


def test_units_in_the_column_and_in_the_code_give_the_same_key():
    column = events((1, 1, "LAB//X", 1.0, "g/L"), (1, 2, "LAB//X", 150.0, "MG/DL"), (1, 3, "LAB//X", None, "mg/dL"))
    inside = events(
        (1, 1, "LAB//X//g/L", 1.0), (1, 2, "LAB//X//mg/dl", 150.0), (1, 3, "LAB//X//mg/dL", None), unit=False
    )
    wanted = [("LAB//X//mg/dL", 100.0), ("LAB//X//mg/dL", 150.0), ("LAB//X", None)]
    assert keys(column)[0] == keys(inside)[0] == wanted
    both = events((1, 1, "LAB//X//mg/dL", 1.0, "g/L"))
    assert keys(both)[0] == wanted[:1]


def test_the_end_of_a_short_code_is_never_a_unit():
    frame = events((1, 1, "LAB//K", 4.0), (1, 1, "WEIGHT//kg", 70.0), (1, 2, "LAB//ABG//K", 4.0), unit=False)
    same, account = prepare(frame, Preparation())
    assert same.equals(frame)
    assert not account.converted


def test_temperatures_meet():
    frame = events((1, 1, "LOINC//8310-5", 98.6, "[degF]"), (1, 2, "LOINC//8310-5", 37.0, "Cel"))
    (low, high), account = keys(frame)
    assert low[0] == high[0] == "LOINC//8310-5//Cel"
    assert low[1] == pytest.approx(37.0, abs=1e-4)
    assert not account.collisions


def test_units_that_do_not_meet_stay_apart_and_are_flagged():
    frame = events(
        (1, 1, "LOINC//2345-7", 5.0, "mmol/L"),
        (1, 2, "LOINC//2345-7", 90.0, "mg/dL"),
        (1, 3, "LOINC//2345-7", 7.0, None),
    )
    found, account = keys(frame)
    assert [code for code, _ in found] == ["LOINC//2345-7//mmol/L", "LOINC//2345-7//mg/dL", "LOINC//2345-7"]
    assert account.collisions == {"LOINC//2345-7": dict.fromkeys([code for code, _ in found], 1)}


def test_a_rule_tells_what_ucum_cannot_know():
    frame = events((1, 1, "LOINC//2345-7", 5.0, "mmol/l"), (1, 2, "LOINC//2345-7", 90.0, "mg/dL"))
    found, account = keys(frame, Preparation(unit_rules=(UnitRule("LOINC//2345-7", "mmol/L", "g/L", 0.18016),)))
    assert [code for code, _ in found] == ["LOINC//2345-7//mg/dL"] * 2
    assert found[0][1] == pytest.approx(90.08)
    assert not account.collisions


def test_a_rule_for_every_code_reads_a_text_that_is_not_understood():
    frame = events((1, 1, "LAB//INSULIN", 5.0, "units"))
    assert keys(frame)[0] == [("LAB//INSULIN//units", 5.0)]
    assert keys(frame)[1].unknown_units == {"units": 1}
    assert keys(frame, Preparation(unit_rules=(UnitRule("", "units", "[IU]", 1.0),)))[0] == [
        ("LAB//INSULIN//[IU]", 5.0)
    ]


def test_a_canonical_unit_can_be_chosen_per_code_and_above():
    frame = events((1, 1, "LOINC//718-7", 140.0, "g/L"), (1, 2, "LAB//HGB//g/L", 140.0, None))
    chosen = Preparation(canonical_units={"LOINC//718-7": "g/dL", "LAB": "g/L", "LOINC": "mmol/L"})
    assert keys(frame, chosen)[0] == [("LOINC//718-7//g/dL", 14.0), ("LAB//HGB//g/L", 140.0)]


def test_texts_that_hold_slashes_stay_one_part():
    assert keys(events((1, 1, "A//B", 1.0, "x // y")))[0] == [("A//B//x / y", 1.0)]


def test_codes_are_named_mapped_and_brought_to_icd10():
    drugs = VocabularyMap("drugs", {"MEDICATION//Insulin": ("ATC//A10A", "RxNorm//5856")})
    frame = events(
        (1, 1, "DIAGNOSIS//ICD//9//25000", None),
        (1, 2, "DIAGNOSIS//ICD//10//E785", None),
        (1, 3, "MEDICATION//Insulin//Given", None),
        (1, 4, "MEDICATION//Water", None),
        (1, 5, "ICD9CM//073.0", None),
        (1, 6, "ICD9CM//365.70", None),
        unit=False,
    )
    found, account = keys(frame, Preparation(maps=(drugs,)))
    assert [code for code, _ in found] == [
        "ICD10CM//E11.9",
        "ICD10CM//E78.5",
        "ATC//A10A//Given",
        "RxNorm//5856//Given",
        "MEDICATION//Water",
        "ICD10CM//A70",
        "ICD10CM//J17",
        "ICD9CM//365.70",
    ]
    assert account.unmapped == {"MEDICATION//Water": 1, "ICD9CM//365.70": 1}
    assert account.local == {"MEDICATION//Water": 1}
    assert [(step.name, step.events_before, step.events_after) for step in account.flow] == [
        ("read", 6, 6),
        ("maps", 6, 8),
    ]


def test_maps_see_through_to_units_and_answers():
    labs = VocabularyMap("labs", {"LAB//50912": ("LOINC//2160-0",)})
    frame = events((1, 1, "LAB//50912//umol/L", 88.4), (1, 2, "LAB//50912//HIGH", None), unit=False)
    found, _ = keys(frame, Preparation(maps=(labs,)))
    assert [code for code, _ in found] == ["LOINC//2160-0//mmol/L", "LOINC//2160-0//HIGH"]
    assert found[0][1] == pytest.approx(0.0884)


def test_everything_can_be_switched_off():
    frame = events((1, 1, "DIAGNOSIS//ICD//9//25000", None, None), (1, 2, "LAB//X//g/L", 1.0, "mg/dL"))
    off = Preparation(names=False, icd9=False, units=False)
    assert prepare(frame, off)[0].equals(frame.select(CORE))


def test_faults_of_time_are_counted_and_kept():
    frame = events(
        (1, 10 * hospital.DAY, "MEDS_BIRTH", None),
        (1, 9 * hospital.DAY, "A", None),
        (1, 20 * hospital.DAY + 1, "MEDS_DEATH", None),
        (1, 21 * hospital.DAY - 1, "A", None),
        (1, 21 * hospital.DAY, "A", None),
        (2, 1, "A", None),
        (3, 1, "MEDS_BIRTH", None),
        (3, 2, "MEDS_BIRTH", None),
        unit=False,
    )
    prepared, account = prepare(frame, Preparation(), today=date(1970, 1, 21))
    assert prepared.equals(frame)
    assert account.faults == {
        "events before birth": 1,
        "events after the day of death": 1,
        "patients without a birth": 1,
        "patients with several births": 1,
        "events in the future": 1,
    }


def test_a_value_that_is_too_large_after_conversion_is_missing_and_counted():
    found, account = keys(events((1, 1, "A//B", 1e38, "kg/L")))
    assert found == [("A//B//mg/dL", None)]
    assert account.faults["values too large after conversion"] == 1


def test_the_digest_changes_with_all_that_changes_events():
    one = VocabularyMap("m", {"A//1": ("B//1",)})
    kinds = [
        Preparation(),
        Preparation(names=False),
        Preparation(icd9=False),
        Preparation(units=False),
        Preparation(filters=Filters(min_events=1)),
        Preparation(canonical_units={"A": "g/L"}),
        Preparation(unit_rules=(UnitRule("", "units", "[IU]", 1.0),)),
        Preparation(maps=(one,)),
        Preparation(maps=(VocabularyMap("m", {"A//1": ("B//2",)}),)),
    ]
    assert len({kind.digest for kind in kinds}) == len(kinds)
    assert Preparation(maps=(one,)).common_digest == Preparation().common_digest
    assert Preparation(maps=(VocabularyMap("renamed", one.targets),)).digest == Preparation(maps=(one,)).digest


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Preparation(canonical_units={"A": "foo"}),
        lambda: Preparation(unit_rules=(UnitRule("A", "x", "1", 1.0),)),
        lambda: Preparation(unit_rules=(UnitRule("A", "x", "mg", 0.0),)),
        lambda: Preparation(unit_rules=(UnitRule("A", "x", "mg", float("nan")),)),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match="correct it"):
        wrong()


CODES = (
    "LAB//A",
    "LAB//A//g/L",
    "LAB//A//mg/dL",
    "DIAGNOSIS//ICD//9//0730",
    "ICD9CM//250.00",
    "MEDS_DEATH",
    "B//mmHg//x",
)
UNITS = st.sampled_from([None, "", "g/L", "mg/dL", "mmol/L", "foo", "%", "1"])


@st.composite
def recorded(draw):
    rows = draw(hospital.histories(codes=CODES))
    units = draw(st.lists(UNITS, min_size=len(rows), max_size=len(rows)))
    frame = hospital.frame(rows).with_columns(unit=pl.Series(units, dtype=pl.String))
    return canonical_order(frame)


EVERYTHING = Preparation(
    filters=Filters(before_birth=False, after_death_days=1, min_events=1),
    maps=(VocabularyMap("m", {"B//mmHg": ("C//1", "C//2")}),),
    unit_rules=(UnitRule("LAB", "foo", "mg/L", 2.0),),
)


@given(recorded())
def test_shards_prepared_apart_sum_to_all_prepared_together(frame):
    together, whole = prepare(frame, EVERYTHING, today=date(2000, 1, 1))
    parts = [prepare(part, EVERYTHING, today=date(2000, 1, 1)) for part in frame.partition_by("subject_id")]
    assert sum((account for _, account in parts), Accounting()) == (whole if parts else Accounting())
    if parts:
        assert canonical_order(pl.concat([part for part, _ in parts])).equals(together)


@given(recorded())
def test_preparing_twice_changes_nothing_more(frame):
    once = prepare(frame, Preparation())[0]
    assert prepare(once, Preparation())[0].equals(once)


@given(recorded())
def test_every_value_is_counted_once_and_counting_changes_nothing(frame):
    prepared, account = prepare(frame, Preparation())
    assert sum(account.units.values()) == prepared["numeric_value"].count()
    if "DIAGNOSIS//ICD//9//0730" not in frame["code"]:  # it becomes two
        assert frame["numeric_value"].count() == prepared["numeric_value"].count()
    assert prepare(frame, Preparation(), count=False)[0].equals(prepared)
    steps = account.flow
    assert steps[0].events_before == frame.height
    assert steps[-1].events_after == prepared.height


def test_a_prepared_dataset_reads_as_a_dataset_does(tmp_path):
    rows = [(n, 1, "LAB//X", 1.0, "g/L" if n % 2 else "mg/dL") for n in range(6)]
    shards = [("0", events(*rows[:3])), ("1", events(*rows[3:]))]
    write_meds(tmp_path / "meds", shards, name="small")
    dataset = MedsDataset.open(tmp_path / "meds")
    prepared = Prepared(dataset, Preparation())
    assert (prepared.name, prepared.shards, prepared.subjects, prepared.notes) == ("small", dataset.shards, 6, [])
    values = [value for shard in prepared.shards for value in prepared.read(shard)["numeric_value"]]
    assert values == [1.0, 100.0, 1.0, 100.0, 1.0, 100.0]
    assert prepared.account().units == {("LAB//X", "g/L", "LAB//X//mg/dL"): 3, ("LAB//X", "mg/dL", "LAB//X//mg/dL"): 3}
    assert prepared.account().converted == {("LAB//X", "g/L", "LAB//X//mg/dL"): 3}
    other = Prepared(dataset, Preparation(units=False))
    assert len({dataset.fingerprint(), prepared.fingerprint(), other.fingerprint()}) == 3
    assert prepared.prepared == (Preparation().common_digest,)


def test_reading_extra_columns_leaves_datasets_without_them_as_they_are(tmp_path):
    write_meds(tmp_path / "meds", [("0", hospital.stays(range(5)))], name="small")
    dataset = MedsDataset.open(tmp_path / "meds")
    assert dataset.read("data/0.parquet", ("unit", "encounter_id")).equals(dataset.read("data/0.parquet"))
    assert Prepared(dataset, Preparation()).read("data/0.parquet").equals(dataset.read("data/0.parquet"))


def test_survey_and_store_take_a_prepared_dataset_as_it_is(tmp_path):
    mixed = hospital.stays(range(60)).with_columns(
        unit=pl.when(pl.col("code") == "LAB//HR").then(pl.lit("bpm")), numeric_value=pl.col("numeric_value")
    )
    write_meds(tmp_path / "meds", [("0", mixed)], name="small")
    prepared = Prepared(MedsDataset.open(tmp_path / "meds"), Preparation())
    rule = SplitRule("key", tuning=0.2, held_out=0.2)
    words = Codebook.build(survey(prepared, rule, TokenizerOptions(min_patients=2)))
    assert "LAB//HR//1/min" in words.breaks
    store = build_store(prepared, words, rule, tmp_path / "store")
    assert store.manifest["dataset_fingerprint"] == prepared.fingerprint()
    assert sum(counts["patients"] for counts in store.manifest["splits"].values()) == 60
