"""A drug interaction in which only order and time matter, with its exact risk.

Before the first stay, a patient of such a hospital visits a clinic twelve times, in six episodes. In each, two drugs
are begun, LISINOPRIL and IBUPROFEN, one at each visit. An episode is dangerous when IBUPROFEN is begun `SHORT` days
(less than a week) after LISINOPRIL; the other order, or a longer gap, is harmless. Everybody gets both drugs six times,
so counts of codes tell nothing, and the days since each was last seen tell of the last episode only. From the first
discharge on, acute kidney injury (N17.9, at most once) has a constant daily hazard that grows `_PER_EPISODE`-fold with
every dangerous episode. It changes neither death nor readmission.

The risk at a discharge, death competing, is a sum over days in closed form: the injury of day d is recorded in the
first hours of that day, before any death of it, so

    risk = sum_{d<=h} exp(-(d-1) hazard) (1 - exp(-hazard)) (1 - V_{d-1}),

with V the chance of death of `simulation.course.death_curve`. After the injury it is 0.
"""

from dataclasses import dataclass

import numpy as np

from simulation.course import DAY_US, NEVER, Bools, Floats, Ints, Stays

INJURY = "N17.9"
FIRST, SECOND = "LISINOPRIL", "IBUPROFEN"
EPISODES = 6
SHORT, LONG = (2, 5), (12, 26)
"""Days between the two drugs of an episode: lowest, and one more than the highest."""

_DANGEROUS = 0.4  # the other three kinds of episode share the rest
_BASE_90D = 0.008
_PER_EPISODE = 2.8
_BETWEEN = (28, 43)
_HOUR = DAY_US // 24


@dataclass(frozen=True)
class Pathway:
    """What P patients are prescribed, and when the injury comes.

    Attributes:
        visit: int64 [P, 2 * EPISODES], time of each clinic visit, in order.
        first: bool [P, 2 * EPISODES], LISINOPRIL is begun there, else IBUPROFEN.
        dangerous: int64 [P], dangerous episodes.
        injury: int64 [P], time of the injury; `NEVER` if it would come after death.
    """

    visit: Ints
    first: Bools
    dangerous: Ints
    injury: Ints


def hazards() -> Floats:
    """Return the hazard of the injury per day by dangerous episodes: float64 [EPISODES + 1]."""
    return np.asarray(-np.log1p(-_BASE_90D) / 90 * _PER_EPISODE ** np.arange(EPISODES + 1))


def prescribe(rng: np.random.Generator, entry: Ints, stays: Stays, death: Ints) -> Pathway:
    """Draw the episodes before `entry` and the injury after the first discharge.

    Args:
        rng: source of chance.
        entry: int64 [P], each patient's first admission.
        stays: by patient, then time.
        death: int64 [P], time of death.
    """
    shape = (len(entry), EPISODES)
    kind = rng.choice(4, shape, p=[_DANGEROUS, *[(1 - _DANGEROUS) / 3] * 3])  # 0: first drug first, short gap
    lisinopril_first, short = (kind == 0) | (kind == 1), (kind == 0) | (kind == 2)
    gap = np.where(short, rng.integers(*SHORT, shape), rng.integers(*LONG, shape))
    length = rng.integers(*_BETWEEN, shape)
    # Counted back from the day before the first admission, each episode with its pause after it.
    begin = -np.cumsum(length[:, ::-1], axis=1)[:, ::-1] - 1
    day = np.stack([begin, begin + gap], axis=2).reshape(len(entry), -1)
    visit = (entry[:, None] // DAY_US + day) * DAY_US + rng.integers(9 * 60, 16 * 60, day.shape) * (_HOUR // 60)
    first = np.stack([lisinopril_first, ~lisinopril_first], axis=2).reshape(len(entry), -1)
    dangerous = (kind == 0).sum(axis=1)
    wait = np.ceil(rng.exponential(size=len(entry)) / hazards()[dangerous])
    start = np.full(len(entry), NEVER)
    opening = stays.first & ~stays.died
    start[stays.patient[opening]] = stays.left[opening]
    # Past the calendar's end of a record nothing is written: far waits are cut before they overflow.
    days = np.clip(wait, 1, 36_500).astype(np.int64) - 1
    early = (rng.integers(5, 60, len(entry)) * (_HOUR // 15)).astype(np.int64)
    at = np.where(start == NEVER, NEVER, np.minimum(start, NEVER // 2) + days * DAY_US + early)
    return Pathway(visit, first, dangerous, np.where(at < death, at, NEVER))


def injury_risk(curve: Floats) -> Floats:
    """Return the chance of the injury, death competing: float64 [EPISODES + 1, U, acuity, run].

    Args:
        curve: float64 [days + 1, U, acuity, run], chance of death within 0, ..., days (`course.death_curve`).
    """
    days = np.arange(len(curve) - 1)
    hazard = hazards()[:, None]
    on_day = np.exp(-hazard * days) * -np.expm1(-hazard)
    return np.asarray(np.tensordot(on_day, 1 - curve[:-1], axes=1))
