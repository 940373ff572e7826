"""The law of the synthetic patients: how they fall ill, return and die, and the exact risk that follows from it.

A patient is one row of fixed, recorded facts (age at entry, chronic conditions) and a chain of stays. Each stay has an
acuity (0 mild, 1 moderate, 2 severe; visible in the record as the range of its lactate values) and a run (how many
admissions in a row, each within `RUN_DAYS` of the last discharge, came just before; 2 means two or more). Nothing else
moves a hazard, so the record shows all that the future depends on.

Time runs in days since the last discharge, so that every discharge lies a whole number of days after the one before it:
- day d: death or readmission with the hazards below, constant within a band of days;
- a readmission draws an acuity and a length L: the stay ends L days after the end of its first day, alive or dead.

`follow` plays this law out; nothing here knows of codes, values or files. Since no other thing moves a hazard,
`readmission_risk` is a cumulative incidence in closed form, and `death_risk` an exact dynamic program over the
days that remain.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]

CONDITIONS = (
    "heart_failure",
    "coronary",
    "copd",
    "kidney",
    "diabetes",
    "cancer",
    "liver",
    "dementia",
)
ACUITIES = 3
RUNS = 3
RUN_DAYS = 60
DAY_US = 86_400_000_000
NEVER = np.iinfo(np.int64).max
LONGEST_STAY = 21

_AGE_EDGES = np.array([40.0, 55.0, 65.0, 75.0, 85.0])
_AGE_DEATH = np.array([-1.2, -0.7, -0.2, 0.3, 0.8, 1.3])
_AGE_RETURN = np.array([-0.5, -0.3, 0.0, 0.2, 0.4, 0.5])
#                          heart_f coronary copd kidney diabetes cancer liver dementia
_IN_HOSPITAL = np.array([0.5, 0.3, 0.4, 0.4, 0.0, 1.0, 0.8, 0.4])
_AFTERWARDS = np.array([0.7, 0.0, 0.4, 0.4, 0.0, 1.7, 0.9, 0.7])
_RETURN = np.array([1.2, 0.3, 1.0, 0.7, 0.2, 0.9, 1.1, 0.0])
_SICKER = np.array([0.35, 0.0, 0.35, 0.25, 0.0, 0.5, 0.35, 0.0])

_IN_HOSPITAL_BASE, _IN_HOSPITAL_ACUITY, _IN_HOSPITAL_RUN = -5.4, (0.0, 1.2, 2.4), (0.0, 0.4, 0.8)
_DEATH_BASE, _DEATH_ACUITY, _DEATH_RUN = -9.2, (0.0, 0.8, 1.6), (0.0, 0.4, 0.8)
_RETURN_BASE, _RETURN_ACUITY, _RETURN_RUN = -7.5, (0.0, 0.8, 1.5), (0.0, 0.7, 1.2)
_MEAN_DAYS = (2.5, 4.0, 6.5)
# What a unit of frailty adds to the log-odds of a graver stay and of death in it, and to the hazard of readmission.
_FRAIL_SICKER, _FRAIL_FATAL, _FRAIL_RETURN = 0.5, 0.7, 0.7

BAND_ENDS = np.array([7, 30, 90])
_DEATH_BANDS = np.array([1.5, 1.0, 0.6, 0.12])
_RETURN_BANDS = np.array([1.8, 1.0, 0.3, 0.08])


@dataclass(frozen=True)
class Facts:
    """The fixed, recorded facts of P patients.

    Attributes:
        age: float64 [P], years at entry into the record.
        conditions: bool [P, 8], in the order of `CONDITIONS`.
        acuity_shift: float64 [P], how much sicker the hospital's arrivals are (log-odds).
        frailty: float64 [P], what no record states (log-hazard of death); none when left out. See `simulation.frailty`.
    """

    age: Floats
    conditions: Bools
    acuity_shift: Floats
    frailty: Floats | None = None


@dataclass(frozen=True)
class Law:
    """What the facts imply: the probabilities and daily hazards of U distinct kinds of patients.

    Attributes:
        kind: int64 [P], each patient's row in the other fields.
        acuity: float64 [U, run, acuity], chance of each acuity at an admission.
        fatal: float64 [U, acuity, run], chance that a stay ends in death.
        death: float64 [U, acuity, run, band], hazard of death after discharge, per day.
        back: float64 [U, acuity, run, band], hazard of readmission, per day.
    """

    kind: Ints
    acuity: Floats
    fatal: Floats
    death: Floats
    back: Floats


@dataclass(frozen=True)
class Stays:
    """N stays of many patients, in no particular order; times are int64 microseconds since the epoch.

    Attributes:
        patient: int64 [N], row of the patient in `Facts`.
        admitted, left: int64 [N].
        acuity, run: int64 [N], as the module says.
        died: bool [N], the stay ended in death at `left`.
        first: bool [N], the patient's first stay.
    """

    patient: Ints
    admitted: Ints
    left: Ints
    acuity: Ints
    run: Ints
    died: Bools
    first: Bools

    def sorted(self) -> "Stays":
        """Return the same stays by patient, then time."""
        order = np.lexsort((self.admitted, self.patient))
        return Stays(*(column[order] for column in vars(self).values()))

    def next_admission(self) -> Ints:
        """Return the time of each sorted stay's successor, int64 [N]; `NEVER` for a patient's last."""
        following = np.append(self.admitted[1:], NEVER)
        return np.where(np.append(self.patient[1:] == self.patient[:-1], np.False_), following, NEVER)


def law(facts: Facts) -> Law:
    """Turn recorded facts into hazards; patients with equal facts share a row."""
    band = np.searchsorted(_AGE_EDGES, facts.age, side="right")
    frailty = np.zeros(len(band)) if facts.frailty is None else facts.frailty
    rows = np.column_stack([band, facts.conditions, facts.acuity_shift, frailty])
    distinct, kind = np.unique(rows, axis=0, return_inverse=True)
    age, ill, shift, frail = distinct[:, 0].astype(np.int64), distinct[:, 1:-2], distinct[:, -2], distinct[:, -1]

    def grid(base: Floats, acuity: tuple[float, ...], run: tuple[float, ...]) -> Floats:
        return base[:, None, None] + np.array(acuity)[:, None] + np.array(run)

    sicker = shift + ill @ _SICKER + _FRAIL_SICKER * frail
    logits = np.zeros((len(distinct), RUNS, ACUITIES))
    logits[..., 1] = (-1.3 + sicker)[:, None] + 0.3 * np.arange(RUNS)
    logits[..., 2] = (-2.6 + 1.4 * sicker)[:, None] + 0.6 * np.arange(RUNS)
    odds = np.exp(logits)
    fatal = grid(
        _IN_HOSPITAL_BASE + 0.7 * _AGE_DEATH[age] + ill @ _IN_HOSPITAL + _FRAIL_FATAL * frail,
        _IN_HOSPITAL_ACUITY,
        _IN_HOSPITAL_RUN,
    )
    death = grid(_DEATH_BASE + _AGE_DEATH[age] + ill @ _AFTERWARDS + frail, _DEATH_ACUITY, _DEATH_RUN)
    back = grid(_RETURN_BASE + _AGE_RETURN[age] + ill @ _RETURN + _FRAIL_RETURN * frail, _RETURN_ACUITY, _RETURN_RUN)
    return Law(
        kind=kind.reshape(-1).astype(np.int64),
        acuity=odds / odds.sum(-1, keepdims=True),
        fatal=1 / (1 + np.exp(-fatal)),
        death=np.exp(death)[..., None] * _DEATH_BANDS,
        back=np.exp(back)[..., None] * _RETURN_BANDS,
    )


def _stay_days() -> Floats:
    """Return the chance of each length: float64 [acuity, LONGEST_STAY + 1], by days after the first (0 never)."""
    days = np.arange(LONGEST_STAY + 1)
    chance = np.array([(1 - 1 / mean) ** days for mean in _MEAN_DAYS])
    chance[:, 0] = 0.0
    return chance / chance.sum(1, keepdims=True)


def _band_of(day: Ints) -> Ints:
    """Return the hazard band of each day since discharge (1 is the first day)."""
    return np.searchsorted(BAND_ENDS, day, side="left").astype(np.int64)


def _draw_next(rng: np.random.Generator, death: Floats, back: Floats) -> tuple[Ints, Bools]:
    """Draw the day of the next event after a discharge, and whether it is death.

    Args:
        rng: source of chance; two numbers a row.
        death: float64 [n, band], hazards per day.
        back: the same for readmission.

    Returns:
        The day, int64 [n], at least 1 and possibly decades away; and bool [n], true for death.
    """
    total = death + back
    widths = np.diff(np.concatenate([[0], BAND_ENDS]))
    passed = np.concatenate([np.zeros((len(total), 1)), np.cumsum(total[:, :-1] * widths, axis=1)], axis=1)
    target = rng.exponential(size=len(total))
    band = (target[:, None] >= passed[:, 1:]).sum(1)
    row = np.arange(len(total))
    start = np.concatenate([[0], BAND_ENDS])[band]
    day = start + np.ceil((target - passed[row, band]) / total[row, band])
    dies = rng.random(len(total)) * total[row, band] < death[row, band]
    return np.maximum(day, start + 1).astype(np.int64), dies


def _next_run(run: Ints, day: Ints) -> Ints:
    """Return the run of a stay that begins `day` days after the discharge of a stay with run `run`."""
    return np.where(day <= RUN_DAYS, np.minimum(run + 1, RUNS - 1), 0)


def follow(rng: np.random.Generator, rules: Law, entry: Ints, closed: Ints) -> tuple[Stays, Ints]:
    """Follow every patient from stay to stay until death or the end of the record.

    Args:
        rng: source of chance.
        rules: the law for these patients.
        entry: int64 [P], time of each patient's first admission.
        closed: int64 [P], time when each record is closed.

    Returns:
        The stays that begin before the record is closed, by patient and time, and each patient's time of death
        (int64 [P]; `NEVER` where none was reached). Each live discharge comes whole days after the one before.
    """
    length = np.cumsum(_stay_days(), axis=1)
    arrive = np.cumsum(rules.acuity, axis=-1)
    death = np.full(len(entry), NEVER)
    who, run = np.arange(len(entry)), np.zeros(len(entry), np.int64)
    admitted = entry
    # Before the first stay, the clock starts at the patient's usual hour of discharge, less than a day ago.
    dawn = entry - rng.integers(1, 20, len(entry)) * (DAY_US // 24)
    chapters: list[Stays] = []
    while len(who) or not chapters:
        kind = rules.kind[who]
        acuity = (rng.random((len(who), 1)) >= arrive[kind, run]).sum(1).clip(max=ACUITIES - 1)
        days = (rng.random((len(who), 1)) >= length[acuity]).sum(1).clip(1, LONGEST_STAY)
        died = rng.random(len(who)) < rules.fatal[kind, acuity, run]
        evening = dawn + (1 + days) * DAY_US
        left = np.where(died, evening - (rng.random(len(who)) * 0.7 * DAY_US).astype(np.int64), evening)
        chapters.append(Stays(who, admitted, left, acuity, run, died, np.full(len(who), not chapters)))
        death[who[died]] = left[died]
        day, dies = _draw_next(rng, rules.death[kind, acuity, run], rules.back[kind, acuity, run])
        at = left + (day - 1) * DAY_US + ((0.25 + 0.7 * rng.random(len(who))) * DAY_US).astype(np.int64)
        alone = ~died & dies
        death[who[alone]] = at[alone]
        again = ~died & ~dies & (at < closed[who])
        run, dawn, admitted, who = (
            _next_run(run, day)[again],
            (left + (day - 1) * DAY_US)[again],
            at[again],
            who[again],
        )
    columns = zip(*(vars(chapter).values() for chapter in chapters), strict=True)
    return Stays(*(np.concatenate(column) for column in columns)).sorted(), death


def readmission_risk(law: Law, days: int) -> Floats:
    """Return the chance of readmission within `days` of a discharge, death competing: float64 [U, acuity, run]."""
    _, share_back, event = _incidence(law, days)
    return (event * share_back).sum(-1)


def death_risk(law: Law, days: int) -> Floats:
    """Return the chance of death within `days` of a discharge, through any readmissions: float64 [U, acuity, run]."""
    return np.asarray(death_curve(law, days)[days])


def death_curve(law: Law, days: int) -> Floats:
    """Return the chance of death within 0, 1, ..., `days` of a discharge: float64 [days + 1, U, acuity, run].

    With V_h(a, n) the chance of death within h days after a discharge and W_r(n) that within r days after the first
    day of a stay, both follow from shorter horizons only:

        V_h(a, n) = sum_{d<=h} e_d(a, n) [ death share + readmission share x W_{h-d}(next run) ]
        W_r(n)    = sum_a P(a | n) [ fatal F_a(r) + (1 - fatal) sum_{L<=r} f_a(L) V_{r-L}(a, n) ]
    """
    share_death, share_back, event = _incidence(law, days)
    length = _stay_days()
    kinds = len(law.fatal)
    after_discharge = np.zeros((days + 1, kinds, ACUITIES, RUNS))
    after_admission = np.zeros((days + 1, kinds, RUNS))
    dies = np.cumsum(event * share_death, axis=-1)
    returns = event * share_back
    lasting = np.cumsum(length, axis=1)
    onward = np.minimum(np.arange(RUNS) + 1, RUNS - 1)
    for horizon in range(days + 1):
        if horizon:
            # Day d of the sum meets W with the horizon - d days that are left.
            left = after_admission[horizon - 1 :: -1] if horizon > 1 else after_admission[:1]
            soon, late = left[:RUN_DAYS], left[RUN_DAYS:, :, :1]
            again = np.einsum("uand,dun->uan", returns[..., : len(soon)], soon[..., onward])
            again += np.einsum("uand,dun->uan", returns[..., len(soon) : horizon], np.repeat(late, RUNS, -1))
            after_discharge[horizon] = dies[..., horizon - 1] + again
        reach = min(horizon, LONGEST_STAY)
        later = after_discharge[horizon - np.arange(1, reach + 1)]
        survivors = np.einsum("al,luan->uan", length[:, 1 : reach + 1], later)
        inside = law.fatal * lasting[:, reach, None] + (1 - law.fatal) * survivors
        after_admission[horizon] = np.einsum("una,uan->un", law.acuity, inside)
    return after_discharge


def _incidence(law: Law, days: int) -> tuple[Floats, Floats, Floats]:
    """Return the shares of death and of readmission, and the chance that the next event falls on each day."""
    band = _band_of(np.arange(1, days + 1))
    death, back = law.death[..., band], law.back[..., band]
    total = death + back
    alive_before = np.exp(-(np.cumsum(total, axis=-1) - total))
    return death / total, back / total, alive_before * -np.expm1(-total)
