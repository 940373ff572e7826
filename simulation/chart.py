"""What a synthetic hospital writes down: codes, times and values for stays, clinic visits, birth and death.

Takes the patients' facts and stays as `simulation.course` made them and gives MEDS events. What moves a risk is always
written (age, the conditions at the first stay, lactate values whose range is the acuity, admissions); everything else
is realistic noise or an echo of those facts: which labs are ordered, their drift, drugs, transfers, where patients are
discharged to, visits in quiet times. A `Practice` may ask for more: winters, laboratories with units and codes of their
own, values that revert to their mean in time and answer to drugs, lost values.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from simulation.course import CONDITIONS, DAY_US, NEVER, Bools, Facts, Floats, Ints, Stays
from simulation.pathway import FIRST, INJURY, SECOND, Pathway

_HOUR = DAY_US // 24
_MINUTE = _HOUR // 60
_STATIC = np.iinfo(np.int64).min

CONDITION_CODES = ("I50.9", "I25.10", "J44.9", "N18.4", "E11.9", "C79.9", "K74.60", "F03.90")
OTHER_CODES = ("I50.22", "I25.9", "J44.1", "N18.9", "E11.65", "C80.1", "K76.9", "G30.9")
"""What hospitals with other habits write for the same conditions; each means one condition, so risks stay visible."""

_DRUGS = (
    "FUROSEMIDE",
    "ASPIRIN",
    "TIOTROPIUM",
    "SEVELAMER",
    "METFORMIN",
    "ONDANSETRON",
    "LACTULOSE",
    "DONEPEZIL",
)
REASONS = (
    "I21.4",
    "I48.91",
    "J18.9",
    "A41.9",
    "N39.0",
    "K35.80",
    "S72.001A",
    "M17.11",
    "C34.90",
    "R07.9",
)
_REASON_DRUGS = (
    "HEPARIN",
    "METOPROLOL",
    "CEFTRIAXONE",
    "VANCOMYCIN",
    "CIPROFLOXACIN",
    "CEFAZOLIN",
    "OXYCODONE",
    "OXYCODONE",
    "CISPLATIN",
    "NITROGLYCERIN",
)
_ONWARD = ("HOME", "HOME HEALTH CARE", "SKILLED NURSING FACILITY", "HOSPICE")
_ONWARD_FROM = np.log(np.array([0.08, 0.25, 0.6]) / np.array([0.92, 0.75, 0.4]))  # log-odds of death


@dataclass(frozen=True)
class _Analyte:
    """One quantity: its code, how it is spread in the healthy, and what illness and acuity add."""

    code: str
    mean: float
    spread: float
    by_condition: dict[str, float]
    by_acuity: float = 0.0
    log: bool = False
    low: float = 0.0
    high: float = float("inf")
    answers_to: str = ""
    answer: float = 0.0


@dataclass(frozen=True)
class Unit:
    """Another unit of a laboratory: the code there, and what a value is multiplied by (its source: molar masses)."""

    code: str
    factor: float


SI: dict[str, Unit] = {
    "LAB//CREATININE//mg/dL": Unit("LAB//CREATININE//umol/L", 88.42),
    "LAB//GLUCOSE//mg/dL": Unit("LAB//GLUCOSE//mmol/L", 0.05551),
    "LAB//BILIRUBIN//mg/dL": Unit("LAB//BILIRUBIN//umol/L", 17.104),
    "LAB//HEMOGLOBIN//g/dL": Unit("LAB//HEMOGLOBIN//g/L", 10.0),
}
"""Laboratories outside the United States report these."""

_LACTATE = "LAB//LACTATE//mmol/L"
# The range of a stay's lactate values is its acuity: the record shows it, so the true risk may depend on it.
_LACTATE_RANGES = ((0.5, 1.8), (2.2, 3.8), (4.2, 9.0))
_LABS = (
    _Analyte(
        "LAB//CREATININE//mg/dL",
        -0.15,
        0.22,
        {"kidney": 1.1, "heart_failure": 0.15},
        0.12,
        log=True,
    ),
    _Analyte("LAB//HEMOGLOBIN//g/dL", 13.4, 1.3, {"kidney": -1.6, "cancer": -1.9, "liver": -1.0}, -0.3, low=4.0),
    _Analyte(
        "LAB//WBC//10*3/uL",
        2.05,
        0.25,
        {"cancer": -0.2},
        0.25,
        log=True,
        answers_to="CEFTRIAXONE",
        answer=-1.6,
    ),
    _Analyte(
        "LAB//GLUCOSE//mg/dL", 4.65, 0.16, {"diabetes": 0.55}, 0.06, log=True, answers_to="METFORMIN", answer=-2.0
    ),
    _Analyte(
        "LAB//NT-PROBNP//pg/mL",
        5.2,
        0.8,
        {"heart_failure": 2.8, "kidney": 0.7},
        0.2,
        log=True,
        answers_to="FUROSEMIDE",
        answer=-1.4,
    ),
    _Analyte("LAB//TROPONIN-T//ng/mL", -4.2, 0.7, {"coronary": 1.6, "heart_failure": 0.5}, 0.3, log=True),
    _Analyte("LAB//ALBUMIN//g/dL", 4.1, 0.35, {"cancer": -0.8, "liver": -1.0}, -0.25, low=1.0),
    _Analyte("LAB//BILIRUBIN//mg/dL", -0.6, 0.4, {"liver": 1.6}, 0.1, log=True),
)
_VITALS = (
    _Analyte("VITAL//HEART_RATE//bpm", 78.0, 11.0, {"heart_failure": 6.0, "copd": 5.0}, 11.0),
    _Analyte("VITAL//SYSTOLIC_BP//mmHg", 132.0, 16.0, {"kidney": 9.0, "liver": -10.0}, -14.0),
    _Analyte("VITAL//SPO2//%", 97.3, 1.1, {"copd": -4.0, "heart_failure": -1.0}, -1.2, high=100.0),
)


@dataclass(frozen=True)
class Practice:
    """How a hospital admits and measures.

    Attributes:
        reasons: weight of each reason for admission, in the order of `REASONS`.
        planned: share of first admissions that are planned, without emergency department.
        lab_rate: chance that a lab is drawn with a panel, for patients whose illness doesn't ask for it.
        daily_rate: chance of a panel on each morning of a stay.
        lab_bias: shift of the laboratory's values, in standard deviations.
        male: share of men.
        other_codes: chance that a condition is written as one of `OTHER_CODES`: the habit of whoever codes.
        si: whether the laboratory reports in the units of `SI`.
        missing: chance that a laboratory value is lost. Lactate, which shows the acuity, never is.
        winter: how much more there is to do in mid-January than on average (0 to 1): first admissions, and among the
            reasons for any admission pneumonia. No hazard depends on the calendar.
        memory_hours: values revert to their mean in time, with this constant (an Ornstein-Uhlenbeck process), and
            answer to the drugs that change them; 0: they correlate from panel to panel, and answer to nothing.
    """

    reasons: tuple[float, ...]
    planned: float = 0.2
    lab_rate: float = 0.25
    daily_rate: float = 0.5
    lab_bias: float = 0.0
    male: float = 0.5
    other_codes: float = 0.0
    si: bool = False
    missing: float = 0.0
    winter: float = 0.0
    memory_hours: float = 0.0


def winters(time: Ints) -> Floats:
    """Return where times stand in the year: 1 in mid-January, -1 in mid-July."""
    day = (time // DAY_US) % 365.25
    return np.asarray(np.cos(2 * np.pi * (day - 15) / 365.25))


def chart(
    rng: np.random.Generator,
    practice: Practice,
    facts: Facts,
    stays: Stays,
    *,
    entry: Ints,
    death: Ints,
    closed: Ints,
    outlook: Floats,
    pathway: Pathway | None = None,
) -> pl.DataFrame:
    """Write the records of P patients.

    Args:
        rng: source of chance.
        practice: how the hospital measures.
        facts: the patients' recorded facts.
        stays: their stays, by patient and time.
        entry: int64 [P], first admission.
        death: int64 [P], time of death, `NEVER` where none was reached.
        closed: int64 [P], when the record is closed; nothing later is written.
        outlook: float64 [N], what a doctor expects at each discharge: the risk of death. Where patients are discharged
            to follows from it, with a doctor's error; it says nothing that the facts don't.
        pathway: clinic visits with prescriptions, and what may come of them; left out, nobody has any.

    Returns:
        MEDS columns (subject_id is the row of the patient), by patient, then time; static facts have no time.
    """
    sheet = _Sheet()
    everyone = np.arange(len(entry))
    sex = np.where(rng.random(len(entry)) < practice.male, "GENDER//M", "GENDER//F")
    sheet.add(everyone, np.full(len(entry), _STATIC), sex)
    birth = entry - np.round(facts.age * 365.25).astype(np.int64) * DAY_US
    sheet.add(everyone, birth // DAY_US * DAY_US, "MEDS_BIRTH")
    _admissions(rng, sheet, practice, facts, stays, outlook)
    given = _diagnoses_and_drugs(rng, sheet, practice, facts, stays)
    _panels(rng, sheet, practice, facts, stays, given)
    end = np.minimum(death, closed)
    _clinics(rng, sheet, facts, stays, end)
    if pathway is not None:
        _pathway(sheet, pathway, stays)
    seen = death <= closed
    sheet.add(everyone[seen], death[seen], "MEDS_DEATH")
    sheet.add(everyone[~seen], closed[~seen], "FOLLOW_UP//END")
    return sheet.frame(end)


class _Sheet:
    """Collects events column by column and turns them into one sorted frame."""

    def __init__(self) -> None:
        self._parts: list[tuple[Ints, Ints, Ints, NDArray[np.float32]]] = []
        self._codes: dict[str, int] = {}

    def add(self, patient: Ints, time: Ints, code: "str | NDArray[np.str_]", value: Floats | None = None) -> None:
        """Write one event per row; `code` is one for all or one for each."""
        numbers = np.full(len(patient), np.nan) if value is None else value
        names, inverse = np.unique(np.broadcast_to(np.asarray(code), patient.shape), return_inverse=True)
        known = np.array([self._codes.setdefault(str(name), len(self._codes)) for name in names], np.int64)
        codes = known[inverse.reshape(-1)] if len(patient) else np.zeros(0, np.int64)
        self._parts.append((patient, time, codes, numbers.astype(np.float32)))

    def frame(self, end: Ints) -> pl.DataFrame:
        """Return all events up to each patient's `end`, by patient and time, else in the order of writing."""
        patient, time, code, value = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        kept = time <= end[patient]
        patient, time, code, value = patient[kept], time[kept], code[kept], value[kept]
        order = np.lexsort((time, patient))
        return pl.DataFrame(
            {
                "subject_id": patient[order],
                "time": time[order],
                "code": pl.Series(list(self._codes), dtype=pl.String).gather(pl.Series(code[order], dtype=pl.UInt32)),
                "numeric_value": value[order],
            }
        ).with_columns(
            pl.when(pl.col("time") != int(_STATIC)).then(pl.col("time")).cast(pl.Datetime("us")).alias("time"),
            pl.col("numeric_value").fill_nan(None),
        )


def _admissions(
    rng: np.random.Generator, sheet: _Sheet, practice: Practice, facts: Facts, stays: Stays, outlook: Floats
) -> None:
    """Write arrival, admission, intensive care and discharge."""
    who, start, count = stays.patient, stays.admitted, len(stays.patient)
    planned = stays.first & (rng.random(count) < practice.planned)
    urgent = ~planned
    arrived = start[urgent] - rng.integers(60, 300, int(urgent.sum())) * _MINUTE
    sheet.add(who[urgent], arrived, "ED_REGISTRATION")
    _vitals(rng, sheet, facts, who=who[urgent], time=arrived, acuity=stays.acuity[urgent])
    sheet.add(who, start, np.where(planned, "HOSPITAL_ADMISSION//ELECTIVE", "HOSPITAL_ADMISSION//EMERGENCY"))
    intensive = (stays.acuity == 2) & (rng.random(count) < 0.7)
    sheet.add(who[intensive], start[intensive] + 3 * _HOUR, "TRANSFER_TO//ICU")
    judged = np.log(outlook / (1 - outlook)) + 0.7 * rng.normal(size=count)
    onward = np.array(_ONWARD)[np.searchsorted(_ONWARD_FROM, judged)]
    whither = np.char.add("HOSPITAL_DISCHARGE//", np.where(stays.died, "DIED", onward))
    sheet.add(who, stays.left, whither)


def _diagnoses_and_drugs(
    rng: np.random.Generator, sheet: _Sheet, practice: Practice, facts: Facts, stays: Stays
) -> dict[str, Bools]:
    """Write why the patient came, what they live with, and what they are given for it.

    Returns:
        The stays with each drug, bool [N].
    """
    who, start, count = stays.patient, stays.admitted, len(stays.patient)
    reason = rng.choice(len(REASONS), count, p=np.array(practice.reasons) / sum(practice.reasons))
    if practice.winter:
        cold = rng.random(count) < 0.5 * practice.winter * winters(start)
        reason = np.where(cold, REASONS.index("J18.9"), reason)
    sheet.add(who, start, np.char.add("DIAGNOSIS//ICD10CM//", np.array(REASONS))[reason])
    given = rng.random(count) < 0.5
    drug = np.char.add("MEDICATION//", np.array(_REASON_DRUGS))[reason]
    sheet.add(who[given], start[given] + 3 * _HOUR, drug[given])
    taken = {name: given & (np.array(_REASON_DRUGS)[reason] == name) for name in set(_REASON_DRUGS)}
    for index, (icd, drug_name) in enumerate(zip(CONDITION_CODES, _DRUGS, strict=True)):
        has = facts.conditions[who, index]
        # The first stay lists every chronic condition: from then on the record shows all that a risk depends on.
        coded = has & (stays.first | (rng.random(count) < 0.7))
        code: str | NDArray[np.str_] = f"DIAGNOSIS//ICD10CM//{icd}"
        if practice.other_codes:
            other = rng.random(int(coded.sum())) < practice.other_codes
            code = np.where(other, f"DIAGNOSIS//ICD10CM//{OTHER_CODES[index]}", str(code))
        sheet.add(who[coded], start[coded], code)
        treated = has & (rng.random(count) < 0.35)
        sheet.add(who[treated], start[treated] + 3 * _HOUR, f"MEDICATION//{drug_name}")
        taken[drug_name] = treated
    return taken


def _panels(
    rng: np.random.Generator,
    sheet: _Sheet,
    practice: Practice,
    facts: Facts,
    stays: Stays,
    given: dict[str, Bools],
) -> None:
    """Draw blood at admission, on some mornings, and on the last day; values drift from one to the next."""
    who, acuity, start = stays.patient, stays.acuity, stays.admitted[:, None]
    mornings = start // DAY_US * DAY_US + np.arange(1, 7) * DAY_US + 6 * _HOUR
    usual = (rng.random(mornings.shape) < practice.daily_rate) & (mornings < stays.left[:, None] - 12 * _HOUR)
    times = np.column_stack([start + _HOUR, mornings, stays.left - 4 * _HOUR])
    wanted = np.column_stack([np.ones(len(who), bool), usual, ~stays.died])
    drawn = wanted & (times >= start) & (times < stays.left[:, None])
    low, high = np.array(_LACTATE_RANGES)[acuity].T[:, :, None]
    lactate = low + (high - low) * (0.5 + 0.5 * np.tanh(0.8 * _noise(rng, times, practice.memory_hours)))
    row, column = np.nonzero(np.asarray(drawn))
    sheet.add(who[row], times[row, column], _LACTATE, lactate[row, column])
    for analyte in _LABS:
        relevant = (facts.conditions[:, [CONDITIONS.index(name) for name in analyte.by_condition]].sum(axis=1) > 0)[who]
        rate = np.where(relevant, min(1.0, 2.5 * practice.lab_rate), practice.lab_rate)
        centre = _centre(analyte, facts, who, acuity) + practice.lab_bias * analyte.spread
        value = centre[:, None] + analyte.spread * _noise(rng, times, practice.memory_hours)
        if practice.memory_hours and analyte.answers_to:
            value += analyte.spread * analyte.answer * _answer(times - start, given[analyte.answers_to])
        row, column = np.nonzero(drawn & (rng.random(times.shape) < rate[:, None] * (1 - practice.missing)))
        unit = SI.get(analyte.code, Unit(analyte.code, 1.0)) if practice.si else Unit(analyte.code, 1.0)
        sheet.add(who[row], times[row, column], unit.code, unit.factor * _reading(analyte, value[row, column]))


def _pathway(sheet: _Sheet, pathway: Pathway, stays: Stays) -> None:
    """Write the visits of a pathway, their prescriptions, and the injury: at a clinic, unless the patient lies in."""
    patients, visits = pathway.visit.shape
    who, at = np.repeat(np.arange(patients), visits), pathway.visit.reshape(-1)
    sheet.add(who, at, "OUTPATIENT//CLINIC")
    lisinopril = pathway.first.reshape(-1)
    sheet.add(who[lisinopril], at[lisinopril], f"MEDICATION//{FIRST}")
    sheet.add(who[~lisinopril], at[~lisinopril], f"MEDICATION//{SECOND}")
    hurt = np.nonzero(pathway.injury < NEVER)[0]
    injury = pathway.injury[stays.patient]
    inside = (injury >= stays.admitted - 6 * _HOUR) & (injury <= stays.left)
    visiting = np.setdiff1d(hurt, stays.patient[inside])
    sheet.add(visiting, pathway.injury[visiting], "OUTPATIENT//CLINIC")
    sheet.add(hurt, pathway.injury[hurt], f"DIAGNOSIS//ICD10CM//{INJURY}")


def _answer(since: Ints, given: Bools) -> Floats:
    """Return how far a drug works, [N, T] from 0 to 1: 9 h after admission it begins, and takes days."""
    working = np.maximum(since - 9 * _HOUR, 0) / (36.0 * _HOUR)
    return np.asarray(given[:, None] * -np.expm1(-working))


def _clinics(rng: np.random.Generator, sheet: _Sheet, facts: Facts, stays: Stays, end: Ints) -> None:
    """Fill quiet times, later than 90 days after a discharge, with visits that move no risk."""
    following = stays.next_admission()
    until = np.where(following == NEVER, end[stays.patient], following - DAY_US // 2)
    gaps = rng.integers(60, 150, (len(until), 8))
    gaps[:, 0] = rng.integers(92, 150, len(until))
    at = stays.left[:, None] + np.cumsum(gaps, axis=1) * DAY_US + rng.integers(-120, 300, gaps.shape) * _MINUTE
    row, column = np.nonzero((at < until[:, None]) & ~stays.died[:, None])
    who, visit = stays.patient[row], at[row, column]
    treated = rng.random(len(row)) < 0.15
    sheet.add(who, visit, np.where(treated, "ED_REGISTRATION", "OUTPATIENT//CLINIC"))
    _vitals(rng, sheet, facts, who=who, time=visit, acuity=np.zeros_like(row))
    sheet.add(who[treated], visit[treated] + 3 * _HOUR, "ED_OUT")


def _vitals(rng: np.random.Generator, sheet: _Sheet, facts: Facts, *, who: Ints, time: Ints, acuity: Ints) -> None:
    for analyte in _VITALS:
        taken = rng.random(len(who)) < 0.7
        value = _centre(analyte, facts, who, acuity) + analyte.spread * rng.normal(size=len(who))
        sheet.add(who[taken], time[taken], analyte.code, _reading(analyte, value[taken]))


def _centre(analyte: _Analyte, facts: Facts, who: Ints, acuity: Ints) -> Floats:
    centre = analyte.mean + analyte.by_acuity * acuity.astype(np.float64)
    for name, amount in analyte.by_condition.items():
        centre = centre + amount * facts.conditions[who, CONDITIONS.index(name)]
    return centre


def _reading(analyte: _Analyte, value: Floats) -> Floats:
    return np.exp(value) if analyte.log else np.clip(value, analyte.low, analyte.high)


def _noise(rng: np.random.Generator, times: Ints, memory_hours: float) -> Floats:
    """Return unit-variance noise [N, T]: by panel, or in time where a memory is given (exact for any gaps)."""
    if not memory_hours:
        return _ar1(rng, times.shape)
    noise = rng.normal(size=times.shape)
    # Mornings after the last column, the day of discharge, are never used: no time passes until they are over.
    clock = np.minimum(times, times[:, -1:])
    kept = np.exp(-np.diff(clock, axis=1) / (memory_hours * _HOUR))
    for column in range(1, times.shape[1]):
        keep = kept[:, column - 1]
        noise[:, column] = keep * noise[:, column - 1] + np.sqrt(1 - keep**2) * noise[:, column]
    return noise


def _ar1(rng: np.random.Generator, shape: tuple[int, ...], memory: float = 0.7) -> Floats:
    """Return unit-variance rows of noise whose neighbours correlate by `memory`."""
    noise = rng.normal(size=shape)
    for column in range(1, shape[1]):
        noise[:, column] = memory * noise[:, column - 1] + np.sqrt(1 - memory**2) * noise[:, column]
    return noise
