"""A survey under differential privacy: what the train patients of a site tell, each of them protected.

Unit: the patient. Neighbours: two sets of records of which one holds one patient more, with the whole record. Whether a
patient trains is a fixed function of the patient's id, so it changes nothing.

What a patient gives is bounded before anything is counted: at most `Bounds.codes` codes, and so on, each adding 1 to
one cell. Which ones is a choice by a keyed hash of the patient's own cells: one patient more changes nobody else's.
Adding a patient therefore changes at most k cells, each by 1: the sensitivity is k in L0 and in L1, sqrt(k) in L2.

Each of the six parts of the survey gets a share of the budget, and every cell that somebody is in gets noise:
- Laplace of scale k / epsilon: epsilon-DP for counts (the parts add up).
- Gaussian of variance k / (2 rho): rho-zCDP (the parts add up), which is turned into (epsilon, delta).

The cells themselves are not known beforehand, so which ones are told can tell of a patient. A cell is told if its
noisy count reaches a threshold T, chosen so that the cells that only one patient is in (at most k, of count 1) are told
with probability q <= delta' together. Then delta' is all that this adds. Proof: let D' be D and one patient, A the
event that a cell that only D' has is told, M' the mechanism without those cells, S any set of outputs,
p = P[M(D) in S], p' = P[M(D') in S], r = P[M'(D') in S]. M'(D') and M(D) = M'(D) differ in cells of both, so
p <= e^epsilon r + delta and r <= e^epsilon p + delta. A is decided by noise that M' doesn't use, so
(1 - q) r <= p' <= q + r. Hence p' <= e^epsilon p + delta + q, and
e^epsilon p' + delta + q >= (1 - q)(p - delta) + delta + q >= p.

Not protected: that the site takes part, the federation's settings, and what else the site publishes. A second survey is
another expense.

Sources: Korolova et al., "Releasing search queries and clicks privately", WWW 2009; Wilson et al., "Differentially
private SQL with bounded user contribution", PoPETs 2020 (bounding and threshold); Canonne et al. (`tokenizer.noise`).
"""

import hashlib
import math
import secrets
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import polars as pl

from tokenizer import noise
from tokenizer.codebook import Survey, TokenizerOptions
from tokenizer.errors import ConfigError
from tokenizer.events import Faults, Reader, Records
from tokenizer.pieces import Piece
from tokenizer.shards import AS_IT_FITS, Crew, each
from tokenizer.sketch import SHIFT
from tokenizer.split import SplitRule
from tokenizer.survey import Pairs, pairs_of

Cells = Mapping[tuple[str, int], int]

# Shares of the budget; they sum to 1.
_SHARES = {
    **{"patients": Fraction(1, 20), "codes": Fraction(8, 20), "prefixes": Fraction(1, 20), "statics": Fraction(2, 20)},
    **{"values": Fraction(7, 20), "gaps": Fraction(1, 20)},
}
_WITH_THRESHOLD = tuple(name for name in _SHARES if name != "patients")


@dataclass(frozen=True)
class Bounds:
    """The most that one patient gives.

    Args:
        codes: Different codes with a time.
        prefixes: Different code systems (first `//` parts).
        statics: Different codes without a time.
        values: Buckets of values; drawn so that each code has the same chance, and a bucket's grows with its events.
        gaps: Buckets of gaps.
    """

    codes: int = 32
    prefixes: int = 8
    statics: int = 4
    values: int = 32
    gaps: int = 16

    def __post_init__(self) -> None:
        for name, bound in vars(self).items():
            if bound < 1:
                raise ConfigError(f"survey privacy: bounds.{name} must be at least 1, got {bound}.")


@dataclass(frozen=True)
class SurveyPrivacy:
    """How strong the protection is.

    Args:
        mechanism: `gaussian` tells more for the same protection; `laplace` needs delta for the thresholds only.
        epsilon, delta: What the whole survey costs a patient.
        bounds: The most that one patient gives.
        join: Neighbouring buckets of the sketches that are put together: wider ones pass their thresholds sooner.
    """

    mechanism: Literal["gaussian", "laplace"] = "gaussian"
    epsilon: float = 1.0
    delta: float = 1e-6
    bounds: Bounds = field(default_factory=Bounds)
    join: int = 9

    def __post_init__(self) -> None:
        checks = (
            (self.mechanism in ("gaussian", "laplace"), 'mechanism must be "gaussian" or "laplace"', self.mechanism),
            (0 < self.epsilon <= 50, "epsilon must be above 0, and 50 at most", self.epsilon),
            (1e-15 <= self.delta <= 0.1, "delta must be 1e-15 to 0.1", self.delta),
            (1 <= self.join <= 100, "join must be 1 to 100", self.join),
        )
        for good, rule, value in checks:
            if not good:
                raise ConfigError(f"survey privacy: {rule}, got {value!r}.")


@dataclass(frozen=True)
class Release:
    """One part of a survey: its sensitivities, what its noise is, and the least count that is told.

    Attributes:
        l0, l1, l2: The most by which one patient changes its counts, in cells, in sum, in Euclid's norm.
        scale: Of the Laplace noise, or the Gaussian's variance.
        threshold: 0 where the cell is known beforehand.
        epsilon: Of Laplace; `rho` of the Gaussian.
        delta: The chance that a threshold fails a patient.
    """

    name: str
    l0: int
    l1: int
    l2: float
    scale: Fraction
    threshold: int
    epsilon: float | None
    rho: float | None
    delta: float


@dataclass(frozen=True)
class Spend:
    """What a survey has cost every patient who trained: to be charged before the survey leaves the site."""

    mechanism: str
    epsilon: float
    delta: float
    rho: float | None
    unit: str
    releases: tuple[Release, ...]


@dataclass(frozen=True)
class Counted:
    """Bounded counts of some shards; without noise yet, so they stay at the site. Shards add up."""

    patients: int = 0
    codes: Cells = field(default_factory=dict)
    prefixes: Cells = field(default_factory=dict)
    statics: Cells = field(default_factory=dict)
    values: Cells = field(default_factory=dict)
    gaps: Cells = field(default_factory=dict)

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(
            self.patients + other.patients,
            *(_sum(getattr(self, name), getattr(other, name)) for name in _WITH_THRESHOLD),
        )


def noisy_survey(
    dataset: Records,
    rule: SplitRule,
    options: TokenizerOptions,
    privacy: SurveyPrivacy,
    progress: Callable[[int, int], None] | None = None,
    crew: Crew = AS_IT_FITS,
    key: bytes | None = None,
) -> tuple[Survey, Spend]:
    """Survey the train split of a dataset, as `tokenizer.survey.survey` does, under differential privacy.

    Args:
        dataset, rule, options, progress, crew: As there.
        privacy: How strong.
        key: 32 secret random bytes from which all choices and noise follow; a fresh one if not given.
    """
    key = secrets.token_bytes(32) if key is None else key
    choice = int.from_bytes(hashlib.blake2b(b"choice", key=key, digest_size=8).digest())
    counted = Counted()
    jobs = [(dataset.reader, piece, rule, options, privacy, choice) for piece in dataset.pieces]
    with closing(each(_count_piece, jobs, crew, events=dataset.events, what="the survey")) as counts:
        for done, (piece, (fresh, faults)) in enumerate(zip(dataset.pieces, counts, strict=True), 1):
            counted += fresh
            dataset.count_faults(piece, faults)
            if progress:
                progress(done, len(jobs))
    told, spend = release(counted, options, privacy, hashlib.blake2b(b"noise", key=key, digest_size=32).digest())
    return replace(told, prepared=tuple(sorted(set(dataset.prepared)))), spend


def _count_piece(
    read: Reader, piece: Piece, rule: SplitRule, options: TokenizerOptions, privacy: SurveyPrivacy, choice: int
) -> tuple[Counted, Faults]:
    frame, faults = read(piece)
    return count(pairs_of(frame, rule, options), privacy, choice), faults


def count(pairs: Pairs, privacy: SurveyPrivacy, seed: int | None = None) -> Counted:
    """Count a shard, each patient giving no more than the bounds.

    Args:
        pairs: Who has what.
        privacy: The bounds.
        seed: Key of the choice, of 64 bits; a fresh secret one if not given.
    """
    key = secrets.randbits(64) if seed is None else seed
    system = pl.col("key").str.split_exact("//", 1).struct.field("field_0")
    systems = pairs.codes.filter(pl.col("key").str.contains("//", literal=True)).with_columns(key=system)
    systems = systems.group_by("key", "bucket", "subject_id").agg(pl.col("events").sum())
    one = pl.lit(1.0)
    of_code = pl.col("events") / pl.col("events").sum().over("subject_id", "key")
    of_all = pl.col("events").cast(pl.Float64)
    most = privacy.bounds
    return Counted(
        pairs.patients,
        _bounded(pairs.codes, most.codes, one, key),
        _bounded(systems, most.prefixes, one, key),
        _bounded(pairs.statics, most.statics, one, key),
        _bounded(_coarse(pairs.values, privacy.join), most.values, of_code, key),
        _bounded(_coarse(pairs.gaps, privacy.join), most.gaps, of_all, key),
    )


def release(
    counted: Counted, options: TokenizerOptions, privacy: SurveyPrivacy, key: bytes | None = None
) -> tuple[Survey, Spend]:
    """Add the noise and tell what reaches the thresholds.

    Args:
        counted: Of all shards.
        options: The floor, which noisy counts must reach too.
        privacy: How strong.
        key: Of the noise (`noise.Noise`).

    Returns:
        The survey, whose counts in sketches are of patients, not of events; and what it cost.
    """
    spend = price(privacy, options.min_patients)
    parts = {part.name: part for part in spend.releases}
    source = noise.Noise(key)
    draw = source.gaussian if privacy.mechanism == "gaussian" else source.laplace
    patients = counted.patients + draw(parts["patients"].scale)
    told = {name: _told(getattr(counted, name), parts[name], draw) for name in _WITH_THRESHOLD}
    codes = _flat(told["codes"])
    values = {key: cells for key, cells in _nested(told["values"]).items() if key in codes}
    survey = Survey(
        options,
        patients=patients if patients >= options.min_patients else 0,
        codes=codes,
        prefixes=_flat(told["prefixes"]),
        statics=_flat(told["statics"]),
        values=values,
        gaps=_nested(told["gaps"]),
    )
    return survey, spend


def price(privacy: SurveyPrivacy, floor: int = 1) -> Spend:
    """What a survey will cost and how noisy it will be; no record is needed to know."""
    gaussian = privacy.mechanism == "gaussian"
    # Half of delta turns rho into epsilon; the other half, or all, is for the thresholds.
    rho = noise.rho_of(privacy.epsilon, privacy.delta / 2) if gaussian else None
    failing = privacy.delta / (2 if gaussian else 1) / len(_WITH_THRESHOLD)
    releases = []
    for name, share in _SHARES.items():
        most = 1 if name == "patients" else getattr(privacy.bounds, name)
        if rho is not None:
            scale = noise.rounded_up(most / (2 * rho * float(share)))
            epsilon, cost = None, float(most / (2 * scale))
        else:
            scale = noise.rounded_up(most / (privacy.epsilon * float(share)))
            epsilon, cost = float(most / scale), None
        known = name == "patients"
        threshold = 0 if known else max(_threshold(most, scale, failing, gaussian=gaussian), floor)
        releases.append(
            Release(name, most, most, math.sqrt(most), scale, threshold, epsilon, cost, 0.0 if known else failing)
        )
    unit = "patient: one whole record more or less"
    return Spend(privacy.mechanism, privacy.epsilon, privacy.delta, rho, unit, tuple(releases))


def _threshold(most: int, scale: Fraction, failing: float, *, gaussian: bool) -> int:
    """The least T such that `most` cells of count 1 reach it with probability `failing` at most."""
    tail = noise.gaussian_tail if gaussian else noise.laplace_tail
    low, high = 1, 2
    while most * tail(high, scale) > failing:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if most * tail(middle, scale) <= failing else (middle, high)
    if most * tail(low, scale) <= failing:
        high = low
    return 1 + high


def _told(cells: Cells, part: Release, draw: Callable[[Fraction], int]) -> dict[tuple[str, int], int]:
    # Sorted: nothing of the order in which patients came shows.
    noisy = {cell: cells[cell] + draw(part.scale) for cell in sorted(cells)}
    return {cell: n for cell, n in noisy.items() if n >= part.threshold}


def _bounded(pairs: pl.DataFrame, most: int, weight: pl.Expr, seed: int) -> Cells:
    """Patients per cell, each patient being in `most` cells at most.

    Weighted choice without replacement: the smallest -log(u) / weight, u uniform (Efraimidis, Spirakis 2006).
    """
    cell = ["subject_id", "key", "bucket"]
    uniform = (pl.struct(cell).hash(seed).cast(pl.Float64) + 0.5) / 2.0**64
    chosen = pairs.with_columns(_order=-uniform.log() / weight).sort("subject_id", "_order", "key", "bucket")
    chosen = chosen.filter(pl.int_range(pl.len()).over("subject_id") < most)
    return {(key, bucket): n for key, bucket, n in chosen.group_by("key", "bucket").len().iter_rows()}


def _coarse(pairs: pl.DataFrame, join: int) -> pl.DataFrame:
    """Every `join` buckets as the middle one of them."""
    bucket = pl.col("bucket")
    size = bucket.abs() - SHIFT
    wide = (size.floordiv(join) * join + join // 2 + SHIFT) * bucket.sign()
    joined = pairs.with_columns(bucket=pl.when(bucket == 0).then(0).otherwise(wide).cast(pl.Int64))
    return joined.group_by("key", "bucket", "subject_id").agg(pl.col("events").sum())


def _flat(cells: Cells) -> dict[str, int]:
    return {key: n for (key, _), n in cells.items()}


def _nested(cells: Cells) -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    for (key, bucket), n in cells.items():
        found.setdefault(key, {})[bucket] = n
    return found


def _sum(mine: Cells, theirs: Cells) -> dict[tuple[str, int], int]:
    total = dict(mine)
    for cell, n in theirs.items():
        total[cell] = total.get(cell, 0) + n
    return total
