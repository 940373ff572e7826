"""Frailty that no record states: it raises every hazard, and a patient's course tells of it little by little.

A patient is robust, usual or frail, for good. Nothing is written down about it. What can be known at a discharge is
how likely each is, given all that the record shows: every stay's acuity, that it was survived, and after how many days
each readmission came. These are the draws of `simulation.course`; nothing else depends on frailty, so the posterior
is a product of their chances (Bayes' rule; a hidden Markov model whose state never changes), and the true risk given
the record is the mean of the three classes' risks by it. Exact, and the best that any reader of the record can do.
"""

from dataclasses import dataclass, replace

import numpy as np

from simulation.course import (
    BAND_ENDS,
    DAY_US,
    NEVER,
    Facts,
    Floats,
    Ints,
    Law,
    Stays,
    law,
)

LEVELS = (-0.6, 0.2, 1.4)
"""Log-hazard of death of the robust, the usual and the frail."""

SHARES = (0.45, 0.40, 0.15)


@dataclass(frozen=True)
class Beliefs:
    """The laws of the classes, and what the record tells of who is in which.

    Attributes:
        laws: one for each level.
        weight: float64 [N, levels], chance of each class at each stay's live discharge, given the record up to it.
    """

    laws: tuple[Law, ...]
    weight: Floats


def draw(rng: np.random.Generator, patients: int) -> Floats:
    """Draw each patient's frailty: float64 [P], one of `LEVELS`."""
    return np.array(LEVELS)[rng.choice(len(LEVELS), patients, p=SHARES)]


def believe(facts: Facts, stays: Stays) -> Beliefs:
    """Tell what the record of each stay's patient, up to its discharge, says about frailty.

    Args:
        facts: of the patients; their true frailty is not looked at. Without one (None) there is one class.
        stays: by patient, then time.
    """
    levels, shares = (LEVELS, SHARES) if facts.frailty is not None else ((0.0,), (1.0,))
    laws = tuple(law(replace(facts, frailty=np.full(len(facts.age), level))) for level in levels)
    if len(laws) == 1:
        return Beliefs(laws, np.ones((len(stays.patient), 1)))
    told = np.column_stack([_evidence(rules, stays) for rules in laws]) + np.log(shares)
    told -= told.max(axis=1, keepdims=True)
    weight = np.exp(told)
    return Beliefs(laws, weight / weight.sum(axis=1, keepdims=True))


def _evidence(rules: Law, stays: Stays) -> Floats:
    """Return the log-chance of all draws that led to each stay's live discharge, float64 [N]."""
    kind = rules.kind[stays.patient]
    step = np.log(rules.acuity[kind, stays.run, stays.acuity])
    survived = np.log1p(-rules.fatal[kind, stays.acuity, stays.run])
    back = np.nonzero(~stays.first)[0]
    before = back - 1
    day = (stays.admitted[back] - stays.left[before]) // DAY_US + 1
    step[back] += survived[before] + _log_return(rules, kind[before], stays.acuity[before], stays.run[before], day)
    # A sum within each patient: the sum over all, less what came before the patient's first stay.
    total = np.cumsum(step)
    first = np.nonzero(stays.first)[0]
    offset = np.repeat(total[first] - step[first], np.diff(np.append(first, len(step))))
    return np.asarray(total - offset + survived)


def _log_return(rules: Law, kind: Ints, acuity: Ints, run: Ints, day: Ints) -> Floats:
    """Return the log-chance that the next event after a discharge is a readmission on `day` (1 is the first)."""
    death, back = rules.death[kind, acuity, run], rules.back[kind, acuity, run]
    total = death + back
    edges = np.concatenate([[0], BAND_ENDS, [NEVER]])
    spent = np.clip(day[:, None] - 1 - edges[:-1], 0, np.diff(edges))
    row, band = np.arange(len(day)), np.searchsorted(BAND_ENDS, day, side="left")
    here = total[row, band]
    chance = np.log(back[row, band] / here) - (total * spent).sum(axis=1) + np.log(-np.expm1(-here))
    return np.asarray(chance)


def expected(beliefs: Beliefs, stays: Stays, risks: tuple[Floats, ...]) -> Floats:
    """Return the risk given the record: float64 [N], from each class's risk by kind, acuity and run."""
    known = [
        risk[rules.kind[stays.patient], stays.acuity, stays.run]
        for rules, risk in zip(beliefs.laws, risks, strict=True)
    ]
    return np.asarray((np.column_stack(known) * beliefs.weight).sum(axis=1))
