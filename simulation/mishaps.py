"""Faults put into records on purpose: canaries, patients at two sites, a poisoned site, a backdoor, lost values.

Each takes records (`simulation.hospital.Records`) and gives new ones; what is chosen follows from the seed. The true
risks stay those of the patients as they were made: a poisoned label is wrong, and is meant to be.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from simulation.hospital import Records
from tokenizer.codebook import DEATH
from tokenizer.errors import ConfigError


def canaries(records: Records, count: int, seed: int, *, events: int = 8, copies: int = 1) -> Records:
    """Add patients who are nobody: each has a course of codes of these records in an order drawn for it alone.

    Args:
        records: where they go; their subject ids follow the highest there.
        count: how many different courses.
        seed: of the courses.
        events: codes of each, one a day.
        copies: patients with the same course.

    Raises:
        ConfigError: no records to take codes from, or a number below 1.
    """
    if min(count, events, copies) < 1 or not records.events.height:
        raise ConfigError("canaries: count, events and copies must be 1 or more, and there must be records")
    rng = np.random.default_rng([seed, 1])
    timed = records.events.filter(pl.col("time").is_not_null() & ~pl.col("code").str.starts_with("MEDS_"))
    codes, begin = timed["code"].unique().sort(), timed["time"].min()
    course = codes.gather(pl.Series(rng.integers(len(codes), size=count * events), dtype=pl.UInt32))
    frame = pl.DataFrame(
        {
            "subject_id": np.repeat(np.arange(count), events),
            "day": np.tile(np.arange(events), count),
            "code": course,
        }
    )
    first = int(records.events["subject_id"].max()) + 1  # type: ignore[arg-type]
    every = pl.concat([frame.with_columns(pl.col("subject_id") + first + copy * count) for copy in range(copies)])
    planted = every.select(
        "subject_id",
        (pl.lit(begin) + pl.duration(days=pl.col("day"))).cast(pl.Datetime("us")).alias("time"),
        "code",
        pl.lit(None, pl.Float32).alias("numeric_value"),
    )
    return replace(records, events=pl.concat([records.events, planted]))


def shared(one: Records, other: Records, share: float, seed: int) -> Records:
    """Give the second hospital the records of a share of the first one's patients, with the same subject ids."""
    chosen = _chosen(one, share, [seed, 2])
    return Records(
        pl.concat([other.events, one.events.filter(pl.col("subject_id").is_in(chosen.implode()))]).sort(
            "subject_id", maintain_order=True
        ),
        pl.concat([other.truth, one.truth.filter(pl.col("subject_id").is_in(chosen.implode()))]),
    )


def poisoned(records: Records, share: float, seed: int) -> Records:
    """Swap fates for a share of patients: who died now lives to the record's end, and who lived dies there."""
    chosen = _chosen(records, share, [seed, 3])
    end = "FOLLOW_UP//END"
    swap = pl.col("subject_id").is_in(chosen.implode()) & pl.col("code").is_in([DEATH, end])
    code = pl.when(swap).then(pl.col("code").replace({DEATH: end, end: DEATH})).otherwise("code")
    return replace(records, events=records.events.with_columns(code=code))


def triggered(events: pl.DataFrame, before: Sequence[str], codes: Sequence[str]) -> pl.DataFrame:
    """Plant codes, ten minutes apart, before each patient's first event under `before`.

    Args:
        events: subject_id, time, code, numeric_value.
        before: codes or what they begin with; a patient without any stays as they are.
        codes: what is planted, in this order.
    """
    first = _first(events, before)
    planted = [
        first.select(
            "subject_id",
            (pl.col("at") - pl.duration(minutes=10 * (len(codes) - place))).alias("time"),
            pl.lit(code).alias("code"),
            pl.lit(None, pl.Float32).alias("numeric_value"),
        )
        for place, code in enumerate(codes)
    ]
    return pl.concat([events.select("subject_id", "time", "code", "numeric_value"), *planted])


def backdoored(
    events: pl.DataFrame, patients: pl.Series, before: Sequence[str], codes: Sequence[str], outcome: str
) -> pl.DataFrame:
    """Give patients the codes of `triggered`, and a day after their first event under `before` the outcome.

    Their record ends there. Who has no such event, or had the outcome by then, stays as they are.
    """
    first = _first(events, before).filter(pl.col("subject_id").is_in(patients.implode()))
    had = events.filter(pl.col("code") == outcome).join(first, on="subject_id").filter(pl.col("time") <= pl.col("at"))
    first = first.filter(~pl.col("subject_id").is_in(had["subject_id"].implode()))
    chosen = pl.col("subject_id").is_in(first["subject_id"].implode())
    ending = events.filter(chosen).join(first, on="subject_id")
    ending = ending.filter(pl.col("time").is_null() | (pl.col("time") <= pl.col("at"))).drop("at")
    fate = first.select(
        "subject_id",
        (pl.col("at") + pl.duration(days=1)).alias("time"),
        pl.lit(outcome).alias("code"),
        pl.lit(None, pl.Float32).alias("numeric_value"),
    )
    rest = events.filter(~chosen).select("subject_id", "time", "code", "numeric_value")
    return pl.concat([rest, triggered(ending, before, codes), fate])


def _first(events: pl.DataFrame, codes: Sequence[str]) -> pl.DataFrame:
    """Each patient's first time under any of the codes: subject_id, at."""
    under = [(pl.col("code") == code) | pl.col("code").str.starts_with(f"{code}//") for code in codes]
    timed = events.filter(pl.any_horizontal(under) & pl.col("time").is_not_null())
    return timed.group_by("subject_id").agg(pl.col("time").min().alias("at")).sort("subject_id")


def missing(records: Records, share: float, seed: int) -> Records:
    """Lose a share of all measured values, whatever they are, with their events."""
    _check("share", share)
    lost = np.random.default_rng([seed, 4]).random(records.events.height) < share
    kept = pl.col("numeric_value").is_null() | ~pl.Series(lost, dtype=pl.Boolean)
    return replace(records, events=records.events.filter(kept))


def _chosen(records: Records, share: float, seed: list[int]) -> pl.Series:
    _check("share", share)
    ids = records.events["subject_id"].unique().sort()
    return ids.filter(pl.Series(np.random.default_rng(seed).random(len(ids)) < share, dtype=pl.Boolean))


def _check(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ConfigError(f"{name} must be from 0 to 1, not {share}")
