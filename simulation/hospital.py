"""Synthetic hospitals whose patients' true risks are known.

`generate` draws patients by the law of `simulation.course`, lets `simulation.chart` write their records, and answers
two questions exactly, at every live discharge:

- `death_90d`: death within 90 days, in hospital or not;
- `readmission_30d`: an admission within 30 days, death competing.

The hospitals of `LIFELIKE` are harder to read: their patients have a frailty that no record states, so the exact risk
is what the record tells of it (`simulation.frailty`), and a drug interaction in which only order and time matter brings
a third question, at each patient's first live discharge (`simulation.pathway`):

- `kidney_injury_90d`: acute kidney injury within 90 days, death competing.

Hospitals differ in who comes and in what they measure, not in how patients die: that is what a federation can learn
together. The truth is written beside the records, never in them.
"""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl

from simulation import frailty, pathway
from simulation.chart import REASONS, Practice, chart, winters
from simulation.course import (
    CONDITIONS,
    DAY_US,
    NEVER,
    Facts,
    Floats,
    Ints,
    Stays,
    death_curve,
    follow,
    law,
    readmission_risk,
)
from tokenizer import durable
from tokenizer.errors import ConfigError
from tokenizer.events import write_meds

DEATH_DAYS = 90
READMISSION_DAYS = 30
INJURY_DAYS = 90

_MINUTES_PER_DAY = 24 * 60
_FIRST_DAY = 16_436  # 2015-01-01, days since the epoch
_SHARD_PATIENTS = 2_000


@dataclass(frozen=True)
class HospitalProfile:
    """Who comes to a hospital, and how it measures them.

    Attributes:
        name: short and unique in a federation; part of the seed.
        first_subject_id: its patients are numbered upwards from here, so that hospitals never share a number.
        age: mean and standard deviation of age at entry, years (clipped to 20–98).
        prevalence: chance of each chronic condition, in the order of `simulation.course.CONDITIONS`.
        acuity: how much sicker than elsewhere its patients arrive (log-odds).
        practice: how it admits and measures.
        frailty: whether its patients have one, which no record states.
        pathway: whether they are prescribed what may hurt them.
    """

    name: str
    first_subject_id: int
    age: tuple[float, float]
    prevalence: tuple[float, ...]
    acuity: float
    practice: Practice
    frailty: bool = False
    pathway: bool = False

    def __post_init__(self) -> None:
        """Refuse chances that are none."""
        if len(self.prevalence) != len(CONDITIONS) or not all(0 <= share <= 1 for share in self.prevalence):
            raise ConfigError(
                f"hospital {self.name!r}: prevalence needs {len(CONDITIONS)} numbers from 0 to 1 "
                f"({', '.join(CONDITIONS)}), not {self.prevalence}"
            )
        weights = self.practice.reasons
        if len(weights) != len(REASONS) or min(weights) < 0 or sum(weights) <= 0:
            raise ConfigError(
                f"hospital {self.name!r}: reasons needs {len(REASONS)} weights of 0 or more, not all 0 "
                f"({', '.join(REASONS)}), not {weights}"
            )


#             heart failure, coronary, copd, kidney, diabetes, cancer, liver, dementia
PROFILES: dict[str, HospitalProfile] = {
    profile.name: profile
    for profile in (
        HospitalProfile(
            name="heart",
            first_subject_id=10_000_000,
            age=(71, 11),
            prevalence=(0.48, 0.55, 0.16, 0.24, 0.34, 0.03, 0.03, 0.06),
            acuity=0.1,
            practice=Practice((8, 7, 2, 1, 1, 0, 0, 0, 0, 5), 0.2, lab_rate=0.3, lab_bias=0.1, male=0.6),
        ),
        HospitalProfile(
            name="surgical",
            first_subject_id=20_000_000,
            age=(59, 16),
            prevalence=(0.10, 0.16, 0.12, 0.07, 0.18, 0.10, 0.06, 0.05),
            acuity=-0.3,
            practice=Practice((0, 0, 1, 2, 1, 6, 6, 6, 2, 0), 0.5, lab_rate=0.2, daily_rate=0.4),
        ),
        HospitalProfile(
            name="general",
            first_subject_id=30_000_000,
            age=(68, 16),
            prevalence=(0.22, 0.20, 0.32, 0.16, 0.26, 0.04, 0.10, 0.20),
            acuity=0.2,
            practice=Practice((1, 2, 8, 4, 5, 1, 2, 0, 1, 3), 0.05, lab_bias=-0.1),
        ),
        HospitalProfile(
            name="oncology",
            first_subject_id=40_000_000,
            age=(64, 12),
            prevalence=(0.10, 0.12, 0.14, 0.12, 0.30, 0.52, 0.20, 0.02),
            acuity=0.0,
            practice=Practice((0, 1, 3, 4, 1, 0, 0, 0, 9, 0), 0.4, lab_rate=0.3, lab_bias=0.2, male=0.45),
        ),
    )
}


#   coding habits, SI units, lost values, winter, hours of memory: what sites differ in besides who comes
_HABITS: dict[str, dict[str, float]] = {
    "heart": {"other_codes": 0.1, "missing": 0.05},
    "surgical": {"other_codes": 0.8, "si": True},
    "general": {"other_codes": 0.4, "missing": 0.3},
    "oncology": {"other_codes": 0.95, "si": True, "missing": 0.1},
}
LIFELIKE: dict[str, HospitalProfile] = {
    f"{name}-lifelike": replace(
        profile,
        name=f"{name}-lifelike",
        first_subject_id=profile.first_subject_id + 40_000_000,
        practice=replace(profile.practice, winter=0.4, memory_hours=36.0, **_HABITS[name]),  # type: ignore[arg-type]
        frailty=True,
        pathway=True,
    )
    for name, profile in PROFILES.items()
}
"""The same four hospitals, with all that makes records harder to read (docs/synthetic-hospitals.md)."""


def profile_of(name: str) -> HospitalProfile:
    """Find a hospital of `PROFILES` or `LIFELIKE`.

    Raises:
        ConfigError: there is none of that name.
    """
    known = PROFILES | LIFELIKE
    if name not in known:
        raise ConfigError(f"hospital {name!r} is not known; choose one of {', '.join(known)}.")
    return known[name]


@dataclass(frozen=True)
class Records:
    """What a hospital knows, and what only its maker knows.

    Attributes:
        events: MEDS columns (subject_id int64, time datetime[us], code, numeric_value float32), by patient and time.
        truth: one row per live discharge and task: subject_id int64, prediction_time datetime[us], task str, risk
            float64 (exact, given all that the record shows up to that time), label int8 (1 outcome within the horizon,
            0 not, -1 the record ends first), complete bool (the record was set to last past the horizon: rows chosen
            by it are an unbiased sample, while of the others only early outcomes are labelled).
    """

    events: pl.DataFrame
    truth: pl.DataFrame


@dataclass(frozen=True)
class HospitalFiles:
    """Where a hospital was written: `records` is a MEDS dataset, `truth` one Parquet file."""

    records: Path
    truth: Path
    patients: int
    events: int


def generate(profile: HospitalProfile, patients: int, seed: int) -> Records:
    """Draw a hospital's patients, their records and their true risks; equal arguments give equal frames.

    Raises:
        ConfigError: a negative number of patients.
    """
    if patients < 0:
        raise ConfigError(f"hospital {profile.name!r}: patients must be 0 or more, not {patients}")
    rng = np.random.default_rng([seed, zlib.crc32(profile.name.encode())])
    facts = Facts(
        age=_ages(rng, profile, patients),
        conditions=rng.random((patients, len(CONDITIONS))) < np.array(profile.prevalence),
        acuity_shift=np.full(patients, profile.acuity),
        frailty=frailty.draw(rng, patients) if profile.frailty else None,
    )
    minute = DAY_US // _MINUTES_PER_DAY
    entry = (_FIRST_DAY + rng.integers(0, 7 * 365, patients)) * DAY_US + rng.integers(540, 1020, patients) * minute
    if profile.practice.winter:
        # Half a year later for some who would come in summer makes the density 1 + winter * cos(season).
        late = rng.random(patients) < -profile.practice.winter * winters(entry)
        entry = np.where(late, entry + 182 * DAY_US, entry)
    # The calendar closes a record, whatever the patient's health: censoring tells nothing about risk.
    closed = entry + rng.integers(360 * 24, 900 * 24, patients) * 60 * minute
    stays, death = follow(rng, law(facts), entry, closed)
    beliefs = frailty.believe(facts, stays)
    curves = tuple(death_curve(rules, DEATH_DAYS) for rules in beliefs.laws)
    back = tuple(readmission_risk(rules, READMISSION_DAYS) for rules in beliefs.laws)
    risks = {
        "death_90d": frailty.expected(beliefs, stays, tuple(curve[-1] for curve in curves)),
        "readmission_30d": frailty.expected(beliefs, stays, back),
    }
    path = None
    if profile.pathway:
        path = pathway.prescribe(rng, entry, stays, death)
        tables = tuple(pathway.injury_risk(curve) for curve in curves)
        hurt = np.zeros(len(stays.patient))
        for count in range(pathway.EPISODES + 1):
            risk = frailty.expected(beliefs, stays, tuple(table[count] for table in tables))
            hurt = np.where(path.dangerous[stays.patient] == count, risk, hurt)
        risks["kidney_injury_90d"] = hurt
    events = chart(
        rng,
        profile.practice,
        facts,
        stays,
        entry=entry,
        death=death,
        closed=closed,
        outlook=risks["death_90d"],
        pathway=path,
    )
    truth = _truth(risks, stays, death, closed, None if path is None else path.injury)
    number = pl.col("subject_id") + profile.first_subject_id
    return Records(events.with_columns(number), truth.with_columns(number))


def write_hospital(path: Path, profile: HospitalProfile, patients: int, seed: int) -> HospitalFiles:
    """Write a hospital into the directory `path`: its records in `records/`, the true risks in `truth.parquet`."""
    made = generate(profile, patients, seed)
    write_meds(path / "records", _shards(made.events), name=f"synthetic hospital {profile.name}")
    buffer = io.BytesIO()
    made.truth.write_parquet(buffer)
    durable.write_bytes(path / "truth.parquet", buffer.getvalue())
    return HospitalFiles(path / "records", path / "truth.parquet", patients, made.events.height)


def _shards(events: pl.DataFrame) -> Iterator[tuple[str, pl.DataFrame]]:
    ids = events["subject_id"].unique().sort()
    for number, first in enumerate(range(0, max(len(ids), 1), _SHARD_PATIENTS)):
        yield f"{number}", events.filter(pl.col("subject_id").is_in(ids[first : first + _SHARD_PATIENTS].implode()))


def _ages(rng: np.random.Generator, profile: HospitalProfile, patients: int) -> Floats:
    age = np.clip(rng.normal(*profile.age, patients), 20.0, 98.0)
    # The five-year bucket decides the risk: keep a week away from its edges, which birth dates by the day would blur.
    return np.clip(age, age // 5 * 5 + 0.02, age // 5 * 5 + 4.98)


def _truth(risks: dict[str, Floats], stays: Stays, death: Ints, closed: Ints, injury: Ints | None) -> pl.DataFrame:
    """Tabulate the exact risks and what came to pass, at live discharges within the record."""
    asked = np.nonzero(~stays.died & (stays.left <= closed[stays.patient]))[0]
    first = asked[stays.first[asked]]
    never = np.full(len(death), NEVER)
    questions = [
        ("death_90d", DEATH_DAYS, asked, death[stays.patient], never[stays.patient]),
        ("readmission_30d", READMISSION_DAYS, asked, stays.next_admission(), death[stays.patient]),
    ]
    if injury is not None:
        questions.append(("kidney_injury_90d", INJURY_DAYS, first, injury[stays.patient], death[stays.patient]))
    tables = []
    for task, days, rows, outcomes, rivals in questions:
        who, left, outcome, competing = stays.patient[rows], stays.left[rows], outcomes[rows], rivals[rows]
        horizon = left + days * DAY_US
        complete = closed[who] >= horizon
        seen = np.minimum(horizon, closed[who])
        happened = (outcome <= seen) & (outcome <= competing)
        label = np.where(happened, 1, np.where((competing <= seen) | complete, 0, -1))
        columns = {
            "subject_id": who,
            "prediction_time": pl.Series(left).cast(pl.Datetime("us")),
            "task": np.full(len(rows), task),
            "risk": risks[task][rows],
            "label": label.astype(np.int8),
            "complete": complete,
        }
        tables.append(pl.DataFrame(columns))
    return pl.concat(tables)
