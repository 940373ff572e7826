"""Faults put into records on purpose: canaries, patients at two sites, a poisoned site, lost values.

Each takes records (`simulation.hospital.Records`) and gives new ones; what is chosen follows from the seed. The true
risks stay those of the patients as they were made: a poisoned label is wrong, and is meant to be.
"""

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
