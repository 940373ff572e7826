from datetime import date, datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer import hospital
from tests.tokenizer.hospital import DAY
from tokenizer import cohort
from tokenizer.cohort import Ages, Encounters, Filters, Lives, count_patients, keep
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import canonical_order

EPOCH = datetime(1970, 1, 1)


def at(year, month=1, day=1):
    return (datetime(year, month, day) - EPOCH).days * DAY


def events(*rows):
    return canonical_order(hospital.frame([(*row, None)[:4] for row in rows]))


def left(frame, **filters):
    kept, steps = keep(frame, Filters(**filters))
    assert kept.equals(canonical_order(kept))
    assert [step.events_after for step in steps][-1:] in ([], [kept.height])
    return set(kept.select("subject_id", "code").iter_rows()), steps


LIFE = events(
    (1, None, "GENDER//F"),
    (1, at(1950), "MEDS_BIRTH"),
    (1, at(1949), "TYPO"),
    (1, at(2011, 12, 31), "EARLY"),
    (1, at(2012), "FIRST"),
    (1, at(2015, 6, 1) + DAY - 1, "LAST"),
    (1, at(2015, 6, 2), "LATE"),
    (1, at(2015, 6, 1), "MEDS_DEATH//HOSPITAL"),
)


@pytest.mark.parametrize(
    ("filters", "name", "gone"),
    [
        ({"first_day": date(2012, 1, 1)}, "first day", {"TYPO", "EARLY"}),
        ({"last_day": date(2015, 6, 1)}, "last day", {"LATE"}),
        ({"last_day": date(2015, 5, 31)}, "last day", {"LATE", "LAST", "MEDS_DEATH//HOSPITAL"}),
        ({"after_death_days": 0}, "after death", {"LAST", "LATE"}),
        ({"after_death_days": 1}, "after death", set()),
        ({"before_birth": False}, "before birth", {"TYPO"}),
        ({"include": ("GENDER", "FIRST")}, "included codes", {"TYPO", "EARLY", "LAST", "LATE"}),
        ({"exclude": ("MEDS_DEATH", "LA")}, "excluded codes", {"MEDS_DEATH//HOSPITAL"}),
    ],
)
def test_filters_on_events_drop_what_they_name(filters, name, gone):
    kept, (step,) = left(LIFE, **filters)
    assert set(LIFE["code"]) - {code for _, code in kept} == gone
    assert step == cohort.Step(name, 1, 1, 8, 8 - len(gone))


def test_nothing_is_filtered_unless_asked_for():
    kept, steps = keep(LIFE, Filters())
    assert kept is LIFE
    assert steps == []


def test_duplicates_are_events_alike_in_all_columns():
    frame = events((1, 5, "A", 1.0), (1, 5, "A", 1.0), (1, 5, "A", 2.0), (1, 6, "A", 1.0), (2, 5, "A", 1.0))
    assert keep(frame, Filters(duplicates=False))[0].height == 4
    other_unit = frame.with_columns(unit=pl.Series(["a", "b", "a", "a", "a"]))
    assert keep(other_unit, Filters(duplicates=False))[0].height == 5


def test_age_counts_completed_years_and_needs_a_birth():
    frame = events(
        (1, at(1994, 1, 2), "MEDS_BIRTH"),  # 17 on the day
        (2, at(1993, 12, 31), "MEDS_BIRTH"),  # 18
        (3, at(1890, 12, 1), "MEDS_BIRTH"),  # 121
        (4, at(2000), "X"),
    )
    kept, (known, aged) = left(frame, age=Ages(date(2012, 1, 1)))
    assert kept == {(2, "MEDS_BIRTH")}
    assert (known.name, known.patients_before, known.patients_after) == ("birth known", 4, 3)
    assert (aged.name, aged.patients_before, aged.patients_after) == ("age", 3, 1)


def test_encounters_must_be_close_and_face_to_face():
    start = "ENCOUNTER_START//OUTPATIENT"
    frame = events(
        (1, 0, start),
        (1, 730 * DAY, start),
        (2, 0, start),
        (2, 730 * DAY + 1, start),
        (3, 0, start),
        (3, 5, "ENCOUNTER_START//TELEHEALTH"),
        (4, 0, start),
        (5, 0, "ENCOUNTER_START//INPATIENT"),
        (5, 0, "ENCOUNTER_START//EMERGENCY"),
        (6, 1, "X"),
    )
    kept, (step,) = left(frame, encounters=Encounters())
    assert {subject for subject, _ in kept} == {1, 5}
    assert (step.patients_before, step.patients_after) == (6, 2)
    assert left(frame, encounters=Encounters(least=3))[0] == set()


def test_encounter_types_take_all_events_of_an_encounter_along():
    frame = events(
        (1, 0, "ENCOUNTER_START//INPATIENT"), (1, 1, "A"), (1, 2, "B"), (1, 3, "ENCOUNTER_START//HOME"), (2, 1, "C")
    ).with_columns(encounter_id=pl.Series(["a", "a", None, "b", "a"]))
    kept, _ = left(frame, encounter_types=("INPATIENT",))
    assert kept == {(1, "ENCOUNTER_START//INPATIENT"), (1, "A"), (1, "B"), (2, "C")}
    with pytest.raises(DataError, match="needs the column encounter_id"):
        keep(frame.drop("encounter_id"), Filters(encounter_types=("INPATIENT",)))


def test_patients_with_few_events_go():
    frame = events((1, 1, "A"), (1, 2, "A"), (2, 1, "A"), (2, None, "SEX"), (2, 0, "MEDS_BIRTH"))
    assert {subject for subject, _ in left(frame, min_events=2)[0]} == {1}


def test_comets_cohort_runs():
    frame = LIFE.with_columns(encounter_id=pl.lit(None, pl.String))
    kept, steps = keep(frame, cohort.COMET)
    assert kept.is_empty()
    names = ["first day", "last day", "encounter types", "birth known", "age", "encounters", "few events"]
    assert [step.name for step in steps] == names


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Filters(first_day=date(2020, 1, 1), last_day=date(2019, 1, 1)),
        lambda: Filters(after_death_days=-1),
        lambda: Filters(min_events=-1),
        lambda: Filters(age=Ages(date(2012, 1, 1), 20, 10)),
        lambda: Filters(encounters=Encounters(codes=())),
    ],
)
def test_filters_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match="filters: "):
        wrong()


@given(hospital.histories(codes=(*hospital.NAMED, "MEDS_DEATH")))
def test_births_and_deaths_are_those_that_a_loop_finds(rows):
    frame = canonical_order(hospital.frame(rows))
    lives = Lives.of(frame)
    for place, subject in enumerate(frame["subject_id"]):
        for code, found in (("MEDS_BIRTH", lives.born), ("MEDS_DEATH", lives.died)):
            times = [time for who, time, what, _ in rows if (who, what) == (subject, code) and time is not None]
            assert found[place] == min(times, default=np.iinfo(np.int64).min)
    assert len(lives.starts) == count_patients(frame) == frame["subject_id"].n_unique()


@given(
    hospital.histories(codes=(*hospital.NAMED, "MEDS_DEATH")),
    st.builds(
        Filters,
        after_death_days=st.one_of(st.none(), st.integers(0, 9)),
        before_birth=st.booleans(),
        duplicates=st.booleans(),
        min_events=st.integers(0, 3),
        include=st.sampled_from([(), ("LAB",)]),
    ),
)
def test_filtering_patients_apart_gives_what_filtering_them_together_gives(rows, filters):
    frame = canonical_order(hospital.frame(rows))
    together, steps = keep(frame, filters)
    apart = [keep(part, filters) for part in frame.partition_by("subject_id")]
    assert together.equals(pl.concat([part for part, _ in apart]) if apart else frame)
    for place, step in enumerate(steps):
        assert step.events_after == sum(flow[place].events_after for _, flow in apart)
        assert step.patients_after == sum(flow[place].patients_after for _, flow in apart)
