"""Who and what is left out before tokens are made: named filters, each counted in patients and events.

All are off unless asked for. They apply in the order of `Filters`' fields: those on events first, so that the ones on
patients judge what is left. A patient whose last event goes is gone too. `COMET` has the cohort of CoMET, as far as it
is known.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, datetime, timedelta

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tokenizer.codebook import BIRTH, DEATH, STATIC
from tokenizer.errors import ConfigError, DataError

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

DAY_US = 86_400_000_000
_YEAR_US = 1461 * DAY_US // 4
START = "ENCOUNTER_START"


@dataclass(frozen=True)
class Ages:
    """Completed years on a day; a year is 365.25 days. Patients without a birth go, too."""

    on: date
    least: int = 18
    most: int = 120


@dataclass(frozen=True)
class Encounters:
    """At least so many encounters that begin within so many days of one another, whichever days these are."""

    least: int = 2
    within_days: int = 730
    codes: tuple[str, ...] = (f"{START}//INPATIENT", f"{START}//EMERGENCY", f"{START}//OUTPATIENT")


@dataclass(frozen=True)
class Filters:
    """What is kept.

    Args:
        first_day: Events from this day on; static facts, birth and death stay.
        last_day: Events until the end of this day; static facts and birth stay.
        encounter_types: Events of encounters of these types (`INPATIENT`), and those of no encounter.
        include: Events whose code is one of these or below it (`LAB` is for `LAB//HR`); birth and death stay.
        exclude: Events whose code is none of these nor below it.
        after_death_days: Events until so many days after the patient's death.
        before_birth: Whether events before the patient's birth stay.
        duplicates: Whether repetitions of an event (all columns alike) stay.
        age: Patients of an age.
        encounters: Patients who were seen often enough.
        min_events: Patients with at least so many events with a time, birth aside.
    """

    first_day: date | None = None
    last_day: date | None = None
    encounter_types: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    after_death_days: float | None = None
    before_birth: bool = True
    duplicates: bool = True
    age: Ages | None = None
    encounters: Encounters | None = None
    min_events: int = 0

    def __post_init__(self) -> None:
        ages, seen = self.age, self.encounters
        checks = (
            (not (self.first_day and self.last_day and self.first_day > self.last_day), "first_day is after last_day"),
            (self.after_death_days is None or self.after_death_days >= 0, "after_death_days is below 0"),
            (ages is None or 0 <= ages.least <= ages.most, "age: least and most must ascend from 0"),
            (seen is None or (seen.least >= 1 and seen.within_days >= 0 and seen.codes), "encounters asks for nothing"),
            (self.min_events >= 0, "min_events is below 0"),
        )
        for good, problem in checks:
            if not good:
                raise ConfigError(f"filters: {problem}; correct it.")


COMET = Filters(
    first_day=date(2012, 1, 1),
    last_day=date(2025, 4, 17),
    encounter_types=("OUTPATIENT", "EMERGENCY", "INPATIENT", "TELEHEALTH"),
    age=Ages(date(2012, 1, 1), 18, 120),
    encounters=Encounters(2, 730),
    min_events=1,
)


@dataclass(frozen=True)
class Step:
    """One line of the flow: patients and events before and after a named step."""

    name: str
    patients_before: int
    patients_after: int
    events_before: int
    events_after: int

    def __add__(self, other: "Step") -> "Step":
        if self.name != other.name:
            raise ValueError(f"{self.name!r} and {other.name!r} are different steps")
        return Step(
            self.name,
            self.patients_before + other.patients_before,
            self.patients_after + other.patients_after,
            self.events_before + other.events_before,
            self.events_after + other.events_after,
        )


def keep(frame: pl.DataFrame, filters: Filters) -> tuple[pl.DataFrame, list[Step]]:
    """Apply the filters that are on.

    Args:
        frame: Events of whole patients in canonical order; with the column encounter_id if encounter types matter.
        filters: Which.

    Returns:
        What is left, in the same order, and the flow, a step for each filter.

    Raises:
        DataError: Encounter types are asked for, and no event tells its encounter.
    """
    steps = []
    for name, chosen in _active(filters):
        mask = chosen(frame)
        before = frame
        if not bool(mask.all()):
            frame = frame.filter(pl.Series(mask, dtype=pl.Boolean))
        steps.append(Step(name, count_patients(before), count_patients(frame), before.height, frame.height))
    return frame, steps


def count_patients(frame: pl.DataFrame) -> int:
    """Patients of a frame that is sorted by them."""
    subject = frame["subject_id"].to_numpy()
    return int((subject[1:] != subject[:-1]).sum()) + bool(len(subject))


def under(prefixes: tuple[str, ...]) -> pl.Expr:
    """Whether a code is one of these or below it."""
    code = pl.col("code")
    wanted = [prefix.removesuffix("//") for prefix in prefixes]
    tests = [(code == w) | code.str.starts_with(f"{w}//") for w in wanted]
    return pl.any_horizontal(tests) if tests else pl.lit(value=False)


@dataclass(frozen=True)
class Lives:
    """Births and deaths, spread over the rows of a frame in canonical order.

    Attributes:
        time: int64 [N], us; STATIC without a time.
        born, died: int64 [N], us, the first of each; STATIC if unknown.
        starts: int64 [P], first row of each patient.
    """

    time: Ints
    born: Ints
    died: Ints
    starts: Ints

    @classmethod
    def of(cls, frame: pl.DataFrame) -> "Lives":
        """Look them up."""
        subject = frame["subject_id"].to_numpy()
        time = frame["time"].to_physical().fill_null(STATIC).to_numpy()
        starts = np.flatnonzero(np.concatenate([[len(subject) > 0], subject[1:] != subject[:-1]]))
        lengths = np.diff(np.append(starts, len(subject)))

        def first(codes: pl.Expr) -> Ints:
            rows = frame.select(codes.arg_true()).to_series().to_numpy().astype(np.int64)
            rows = rows[time[rows] != STATIC]
            found = np.full(len(starts), STATIC)
            # Backwards, so that the first one is written last.
            found[np.searchsorted(starts, rows[::-1], side="right") - 1] = time[rows[::-1]]
            return np.repeat(found, lengths)

        return cls(time, first(pl.col("code") == BIRTH), first(under((DEATH,))), starts)


def _active(filters: Filters) -> list[tuple[str, Callable[[pl.DataFrame], Mask]]]:
    """Names and masks of what to keep, in order."""
    f = filters
    rules: list[tuple[bool, str, Callable[[pl.DataFrame], Mask]]] = [
        (f.first_day is not None, "first day", lambda frame: _since(frame, f.first_day)),
        (f.last_day is not None, "last day", lambda frame: _until(frame, f.last_day)),
        (bool(f.encounter_types), "encounter types", lambda frame: _of_types(frame, f.encounter_types)),
        (bool(f.include), "included codes", lambda frame: _mask(frame, under((*f.include, BIRTH, DEATH)))),
        (bool(f.exclude), "excluded codes", lambda frame: _mask(frame, ~under(f.exclude))),
        (f.after_death_days is not None, "after death", lambda frame: _alive(frame, f.after_death_days)),
        (not f.before_birth, "before birth", _born),
        (not f.duplicates, "duplicates", _first_ones),
        (f.age is not None, "birth known", lambda frame: Lives.of(frame).born != STATIC),
        (f.age is not None, "age", lambda frame: _of_age(frame, f.age)),
        (f.encounters is not None, "encounters", lambda frame: _seen(frame, f.encounters)),
        (f.min_events > 0, "few events", lambda frame: _eventful(frame, f.min_events)),
    ]
    return [(name, mask) for on, name, mask in rules if on]


def _mask(frame: pl.DataFrame, where: pl.Expr) -> Mask:
    return frame.select(where.alias("kept")).to_series().to_numpy()


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day)


def _since(frame: pl.DataFrame, day: date | None) -> Mask:
    assert day is not None
    time = pl.col("time")
    return _mask(frame, time.is_null() | (time >= _midnight(day)) | under((BIRTH, DEATH)))


def _until(frame: pl.DataFrame, day: date | None) -> Mask:
    assert day is not None
    time = pl.col("time")
    return _mask(frame, time.is_null() | (time < _midnight(day) + timedelta(days=1)) | under((BIRTH,)))


def _of_types(frame: pl.DataFrame, types: tuple[str, ...]) -> Mask:
    if "encounter_id" not in frame.columns:
        raise DataError(
            "filters: encounter_types needs the column encounter_id, and these events have none."
            " Import the records again with fedcomet, or leave the filter out."
        )
    key = ["subject_id", "encounter_id"]
    starts = frame.filter(under((START,)) & pl.col("encounter_id").is_not_null())
    wanted = starts.group_by(key).agg(_wanted=under(tuple(f"{START}//{kind}" for kind in types)).any())
    kept = frame.select(key).join(wanted, on=key, how="left", maintain_order="left")["_wanted"]
    return kept.fill_null(value=True).to_numpy()


def _alive(frame: pl.DataFrame, days: float | None) -> Mask:
    assert days is not None
    lives = Lives.of(frame)
    # Half of the range is beyond any time and can't overflow.
    last = np.where(lives.died == STATIC, np.iinfo(np.int64).max // 2, lives.died + int(days * DAY_US))
    return lives.time <= last


def _born(frame: pl.DataFrame) -> Mask:
    lives = Lives.of(frame)
    return (lives.time == STATIC) | (lives.time >= lives.born)


def _first_ones(frame: pl.DataFrame) -> Mask:
    rows = frame.with_row_index("_row")
    kept = np.zeros(frame.height, bool)
    kept[rows.unique(subset=frame.columns, keep="first")["_row"].to_numpy()] = True
    return kept


def _of_age(frame: pl.DataFrame, ages: Ages | None) -> Mask:
    assert ages is not None
    born = Lives.of(frame).born
    day = int((_midnight(ages.on) - datetime(1970, 1, 1)) / timedelta(microseconds=1))
    years = (day - born) // _YEAR_US
    return (years >= ages.least) & (years <= ages.most)


def _seen(frame: pl.DataFrame, rule: Encounters | None) -> Mask:
    assert rule is not None
    starts = frame.filter(under(rule.codes) & pl.col("time").is_not_null())
    subject, time = starts["subject_id"].to_numpy(), starts["time"].to_physical().to_numpy()
    ahead = rule.least - 1
    end = len(subject) - ahead
    first, last = slice(0, max(end, 0)), slice(ahead, None)
    close = (subject[first] == subject[last]) & (time[last] - time[first] <= rule.within_days * DAY_US)
    return np.isin(frame["subject_id"].to_numpy(), subject[first][close])


def _eventful(frame: pl.DataFrame, least: int) -> Mask:
    lives = Lives.of(frame)
    counted = _mask(frame, pl.col("time").is_not_null() & (pl.col("code") != BIRTH)).astype(np.int64)
    if not len(counted):
        return counted.astype(bool)
    lengths = np.diff(np.append(lives.starts, len(counted)))
    return np.repeat(np.add.reduceat(counted, lives.starts) >= least, lengths)
