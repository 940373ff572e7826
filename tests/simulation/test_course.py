import numpy as np
import pytest

from simulation.course import (
    CONDITIONS,
    DAY_US,
    NEVER,
    RUN_DAYS,
    Facts,
    death_risk,
    follow,
    law,
    readmission_risk,
)


def _facts(patients: int, *, seed: int = 0) -> Facts:
    rng = np.random.default_rng(seed)
    conditions = rng.random((patients, len(CONDITIONS))) < 0.2
    return Facts(rng.uniform(30, 95, patients), conditions, np.zeros(patients))


def _alike(patients: int, *, conditions: tuple[str, ...]) -> Facts:
    has = np.array([name in conditions for name in CONDITIONS])
    return Facts(np.full(patients, 78.0), np.tile(has, (patients, 1)), np.zeros(patients))


def test_patients_with_equal_recorded_facts_share_one_risk():
    facts = Facts(np.array([70.1, 74.9, 75.1]), np.zeros((3, len(CONDITIONS)), bool), np.zeros(3))
    rules = law(facts)
    assert rules.kind[0] == rules.kind[1] != rules.kind[2]


def test_risks_are_probabilities_and_grow_with_time_acuity_and_run():
    rules = law(_facts(200))
    for risk in (death_risk, readmission_risk):
        short, long = risk(rules, 30), risk(rules, 90)
        assert ((short > 0) & (long < 1) & (short < long)).all()
    assert (np.diff(death_risk(rules, 90), axis=1) > 0).all()
    assert (np.diff(death_risk(rules, 90), axis=2) > 0).all()


def test_a_stay_ends_whole_days_after_the_last_discharge_and_in_order():
    rules = law(_facts(500))
    entry = np.zeros(500, np.int64)
    stays, death = follow(np.random.default_rng(0), rules, entry, entry + 900 * DAY_US)
    assert (stays.left > stays.admitted).all()
    following = stays.next_admission()
    known = following < NEVER
    assert (following[known] > stays.left[known]).all()
    again = np.nonzero(~stays.first & ~stays.died)[0]
    assert ((stays.left[again] - stays.left[again - 1]) % DAY_US == 0).all()
    assert (death[stays.patient[stays.died]] == stays.left[stays.died]).all()


def test_the_run_counts_admissions_in_close_succession():
    rules = law(_alike(2000, conditions=("heart_failure", "copd")))
    entry = np.zeros(2000, np.int64)
    stays, _ = follow(np.random.default_rng(0), rules, entry, entry + 900 * DAY_US)
    later = np.nonzero(~stays.first)[0]
    close = stays.admitted[later] - stays.left[later - 1] <= RUN_DAYS * DAY_US
    expected = np.where(close, np.minimum(stays.run[later - 1] + 1, 2), 0)
    assert (stays.run[later] == expected).all()
    assert set(stays.run) == {0, 1, 2}


@pytest.mark.parametrize("days", [1, 30, 59, 60, 61, 62, 90, 120])
def test_the_dynamic_program_agrees_with_playing_the_law_out(days: int):
    # One kind of patient who returns often, so that most of the risk goes through readmissions.
    patients = 40_000
    rules = law(_alike(patients, conditions=("heart_failure", "copd", "liver", "kidney")))
    entry = np.zeros(patients, np.int64)
    stays, death = follow(np.random.default_rng(days), rules, entry, entry + 400 * DAY_US)
    asked = stays.first & ~stays.died
    who, left = stays.patient[asked], stays.left[asked]
    dead = death[who] <= left + days * DAY_US
    back = stays.next_admission()[asked] <= left + days * DAY_US
    for happened, table in ((dead, death_risk(rules, days)), (back, readmission_risk(rules, days))):
        risk = table[rules.kind[who], stays.acuity[asked], stays.run[asked]]
        error = np.sqrt((risk * (1 - risk)).sum()) / len(risk)
        assert abs(happened.mean() - risk.mean()) < 4 * error
