"""Whether simulated futures look like real ones: generated and recorded events of the same patients and spans.

Each trajectory of `fedcomet rollout` is held against what the record of its patient says of the same span: from the
prediction to the horizon, where the record goes on that long. Trajectories that ran into their cap of tokens before the
horizon would look short, so they are left out and counted.

A code's prevalence is the share of spans with the code; the RMSLE is over codes, of prevalence per 1,000 spans (0 where
both agree); distances of distributions are Wasserstein's, on a logarithmic scale where the unit says so. Impossible
events are counted in real records, too: what real records do is the measure. A code's unit is part of it, so values are
compared by unit. Records are told in the model's words first (`in_words_of`): a model that was trained on mapped codes
can't be held against codes as a source writes them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

from model import metrics
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError, DataError

Floats = NDArray[np.float64]

_DAY_US = 86_400e6
_LEAST = 5
"""Fewest real values of a code whose values are compared."""
_PAIRS = 50

FEMALE_ONLY = (
    "ICD10CM//O",
    "ICD10CM//N7",
    "ICD10CM//N80",
    "ICD10CM//C53",
    "ICD10CM//C54",
    "ICD10CM//C56",
    "ICD10CM//Z33",
)
MALE_ONLY = ("ICD10CM//N40", "ICD10CM//N41", "ICD10CM//C61", "ICD10CM//C62")
NEWBORN_ONLY = ("ICD10CM//P", "ICD10CM//Z38")


@dataclass(frozen=True)
class Finding:
    """A figure of real and of generated spans; None where there is none. `unit` says what it is."""

    name: str
    real: float | None
    generated: float | None
    unit: str = ""


@dataclass(frozen=True)
class Plausibility:
    """What was found.

    Attributes:
        spans: real ones.
        trajectories: generated ones.
        left_out: who is not in it, and how many.
        findings: the figures.
        prevalence: share of spans by code: (code, real, generated), commonest first.
        pairs: share of spans with both codes, of the commonest pairs: (code, code, real, generated).
        values: by code and unit: (code, distance in real interquartile ranges, real median, generated median).
        quantiles: of lengths (events) and gaps (days): name to (real, generated) at 0, 5, ..., 100 %.
    """

    spans: int
    trajectories: int
    left_out: Mapping[str, int]
    findings: tuple[Finding, ...]
    prevalence: tuple[tuple[str, float, float], ...]
    pairs: tuple[tuple[str, str, float, float], ...]
    values: tuple[tuple[str, float, float, float], ...]
    quantiles: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]


def in_words_of(codebook: Codebook, records: pl.DataFrame) -> pl.DataFrame:
    """Tell prepared records' events by the codes that a model can generate: rare ones by their ancestors.

    Args:
        codebook: the model's.
        records: MEDS events, prepared as the codebook's records were; static facts and births stay as they are.
    """
    timed = pl.col("time").is_not_null() & (pl.col("code") != "MEDS_BIRTH")
    told = {}
    for code in records.filter(timed)["code"].unique().to_list():
        nodes = codebook.grammar.events(np.array(codebook.tell(code).tokens, np.int32))[1]
        told[code] = codebook.event(int(nodes[-1])) if len(nodes) else code
    renamed = pl.col("code").replace(told) if told else pl.col("code")
    return records.with_columns(pl.when(timed).then(renamed).otherwise("code").alias("code"))


def plausibility(
    records: pl.DataFrame, generated: pl.DataFrame, trajectories: pl.DataFrame, days: float
) -> Plausibility:
    """Hold simulated futures against records.

    Args:
        records: MEDS events of the patients (subject_id, time, code, numeric_value), births and static facts included.
        generated: MEDS events of the trajectories.
        trajectories: which subject is whose future (`trajectories.parquet`).
        days: the horizon of the rollouts.

    Raises:
        ConfigError: a horizon of 0 or less.
        DataError: no patient's record goes on to the horizon.
    """
    if days <= 0:
        raise ConfigError(f"days is {days}; name the horizon of the rollouts, more than 0")
    whole = trajectories.filter((pl.col("reason") != "cap") | (pl.col("elapsed_days") >= days))
    asked = trajectories.select("patient", "prediction_time").unique(maintain_order=True)
    span = pl.duration(microseconds=round(days * _DAY_US))
    ends = records.filter(pl.col("time").is_not_null()).group_by("subject_id").agg(
        last=pl.col("time").max(), died=pl.col("code").str.starts_with("MEDS_DEATH").any()
    )  # fmt: skip
    asked = asked.join(ends, left_on="patient", right_on="subject_id", how="left")
    known = asked.filter((pl.col("last") >= pl.col("prediction_time") + span) | pl.col("died"))
    if known.is_empty():
        raise DataError(f"no record goes on for {days:g} days after its prediction; look less far, or ask earlier")
    whole = whole.join(known, on=["patient", "prediction_time"], how="semi")
    real = _spans(records, known.with_columns(key=pl.int_range(pl.len())), "patient", span)
    made = _spans(generated, whole.with_columns(key=pl.int_range(pl.len())), "subject_id", span)
    facts = records.join(known.select("patient").unique(), left_on="subject_id", right_on="patient", how="semi")
    sides = _Side(real, known.height, facts), _Side(made, whole.height, facts)
    left_out = {
        "trajectories that reached the cap of tokens": trajectories.height
        - trajectories.filter((pl.col("reason") != "cap") | (pl.col("elapsed_days") >= days)).height,
        "predictions after which the record ends too early": asked.height - known.height,
    }
    return _compared(*sides, left_out, set(records["code"].unique()))


def _spans(events: pl.DataFrame, spans: pl.DataFrame, subject: str, span: pl.Expr) -> pl.DataFrame:
    """The events of every span: key, patient, days (since the prediction), code, numeric_value."""
    joined = events.filter(pl.col("time").is_not_null() & (pl.col("code") != "MEDS_BIRTH")).join(
        spans.select(pl.col(subject).alias("subject_id"), pl.col("patient").alias("owner"), "prediction_time", "key"),
        on="subject_id",
    )
    since = pl.col("time") - pl.col("prediction_time")
    inside = joined.filter((since > pl.duration(microseconds=0)) & (since <= span))
    days = since.dt.total_microseconds() / _DAY_US
    return inside.select("key", "owner", "time", "code", "numeric_value", days=days).sort(
        "key", "days", maintain_order=True
    )


class _Side:
    """Real or generated spans."""

    def __init__(self, events: pl.DataFrame, spans: int, facts: pl.DataFrame) -> None:
        self.events, self.spans, self._facts = events, max(spans, 1), facts

    def prevalence(self) -> dict[str, float]:
        told = self.events.group_by("code").agg(pl.col("key").n_unique())
        return {code: count / self.spans for code, count in told.iter_rows()}

    def pairs(self, codes: list[str]) -> dict[tuple[str, str], float]:
        told = self.events.filter(pl.col("code").is_in(codes)).select("key", "code").unique()
        both = told.join(told, on="key").filter(pl.col("code") < pl.col("code_right"))
        counted = both.group_by("code", "code_right").len()
        return {(one, other): count / self.spans for one, other, count in counted.iter_rows()}

    def lengths(self) -> Floats:
        counts = np.zeros(self.spans)
        told = self.events.group_by("key").len()
        counts[told["key"].to_numpy()] = told["len"].to_numpy()
        return counts

    def gaps(self) -> Floats:
        gaps = self.events.select(pl.col("days").diff().over("key")).to_series().drop_nulls()
        return gaps.filter(gaps > 0).to_numpy()

    def values(self, code: str) -> Floats:
        return self.events.filter(pl.col("code") == code)["numeric_value"].drop_nulls().to_numpy().astype(np.float64)

    def after_death(self) -> float:
        death = (
            self.events.filter(pl.col("code").str.starts_with("MEDS_DEATH"))
            .group_by("key")
            .agg(end=pl.col("days").min())
        )
        late = self.events.join(death, on="key").filter(pl.col("days") > pl.col("end"))
        return self._share(late.height)

    def impossible_by_sex(self) -> float | None:
        """The share of events; None where the records' static facts tell nobody's sex as M or F."""
        sex = self._facts.filter(pl.col("time").is_null() & pl.col("code").str.contains(r"^(GENDER|SEX)//"))
        letter = pl.col("code").str.split("//").list.last().str.slice(0, 1).str.to_uppercase()
        known = sex.select(pl.col("subject_id").alias("owner"), letter.alias("sex")).unique("owner")
        known = known.filter(pl.col("sex").is_in(["M", "F"]))
        if known.is_empty():
            return None
        told = self.events.join(known, on="owner")
        wrong = (pl.col("sex") == "M") & _any(FEMALE_ONLY) | (pl.col("sex") == "F") & _any(MALE_ONLY)
        return self._share(told.filter(wrong).height)

    def impossible_by_age(self) -> float | None:
        """The share of events; None where the records tell nobody's birth."""
        births = self._facts.filter(pl.col("code") == "MEDS_BIRTH").select(
            pl.col("subject_id").alias("owner"), pl.col("time").alias("birth")
        )
        if births.is_empty():
            return None
        told = self.events.join(births.unique("owner"), on="owner")
        years = (pl.col("time") - pl.col("birth")).dt.total_days() / 365.25
        pregnant = pl.col("code").str.starts_with("ICD10CM//O") & ((years < 9) | (years > 60))
        return self._share(told.filter(pregnant | _any(NEWBORN_ONLY) & (years > 2)).height)

    def unseen(self, seen: set[str]) -> float:
        return self._share(self.events.filter(~pl.col("code").is_in(list(seen))).height)

    def _share(self, count: int) -> float:
        return count / max(self.events.height, 1)


def _any(prefixes: tuple[str, ...]) -> pl.Expr:
    return pl.any_horizontal([pl.col("code").str.starts_with(prefix) for prefix in prefixes])


def _compared(real: _Side, made: _Side, left_out: Mapping[str, int], seen: set[str]) -> Plausibility:
    shares = real.prevalence(), made.prevalence()
    codes = sorted({*shares[0], *shares[1]}, key=lambda code: (-shares[0].get(code, 0.0), code))
    rates = [[1000 * side.get(code, 0.0) for code in codes] for side in shares]
    common = codes[:_PAIRS]
    both = real.pairs(common), made.pairs(common)
    ranked = sorted({*both[0], *both[1]}, key=lambda pair: (-both[0].get(pair, 0.0), pair))
    together = [[1000 * side.get(pair, 0.0) for pair in ranked] for side in both]
    lengths, gaps = (real.lengths(), made.lengths()), (real.gaps(), made.gaps())
    findings = [
        Finding("RMSLE of prevalence", None, metrics.rmsle(*rates) if codes else None, "over codes, per 1,000 spans"),
        Finding("RMSLE of co-occurrence", None, metrics.rmsle(*together) if ranked else None, "over pairs, per 1,000"),
        Finding("codes that the records don't have", real.unseen(seen), made.unseen(seen), "share of events"),
        Finding("events after death", real.after_death(), made.after_death(), "share of events"),
        Finding("events that the sex rules out", real.impossible_by_sex(), made.impossible_by_sex(), "share of events"),
        Finding("events that the age rules out", real.impossible_by_age(), made.impossible_by_age(), "share of events"),
        Finding("events in a span", float(lengths[0].mean()), float(lengths[1].mean()), "mean"),
        Finding("distance of lengths", None, _distance(*map(np.log1p, lengths)), "Wasserstein, of log(1 + events)"),
        Finding("gap between moments", _median(24 * gaps[0]), _median(24 * gaps[1]), "median hours"),
        Finding("distance of gaps", None, _distance(*map(np.log, gaps)), "Wasserstein, of log days"),
    ]  # fmt: skip
    marks = np.arange(0, 101, 5)
    quantiles = {
        name: (_percentiles(one, marks), _percentiles(other, marks))
        for name, (one, other) in {"events in a span": lengths, "days between moments": gaps}.items()
        if len(one) and len(other)
    }
    return Plausibility(
        spans=real.spans,
        trajectories=made.spans,
        left_out=left_out,
        findings=tuple(findings),
        prevalence=tuple((code, shares[0].get(code, 0.0), shares[1].get(code, 0.0)) for code in codes),
        pairs=tuple((*pair, both[0].get(pair, 0.0), both[1].get(pair, 0.0)) for pair in ranked[:_PAIRS]),
        values=tuple(_values(real, made, codes)),
        quantiles=quantiles,
    )


def _values(real: _Side, made: _Side, codes: list[str]) -> list[tuple[str, float, float, float]]:
    found = []
    for code in codes:
        told = real.values(code), made.values(code)
        if len(told[0]) < _LEAST or not len(told[1]):
            continue
        low, high = np.percentile(told[0], [25, 75])
        scale = float(high - low) or max(abs(float(low)), 1e-9)
        distance = float(wasserstein_distance(*told)) / scale
        found.append((code, distance, float(np.median(told[0])), float(np.median(told[1]))))
    return found


def _distance(one: Floats, other: Floats) -> float | None:
    return float(wasserstein_distance(one, other)) if len(one) and len(other) else None


def _median(values: Floats) -> float | None:
    return float(np.median(values)) if len(values) and math.isfinite(float(np.median(values))) else None


def _percentiles(values: Floats, marks: NDArray[np.int64]) -> tuple[float, ...]:
    return tuple(float(value) for value in np.percentile(values, marks))
