"""Take a site's survey: what may be told about its codes, from the patients that train.

A pass over the shards, one in memory at a time. A cell (a code, a bucket of a code's values) is
told only if at least `min_patients` distinct patients are in it; smaller ones are joined first:
rare codes with their siblings under a `//` parent, buckets with the next bucket towards the median.

Notable choice: besides counts, only the patients of cells still below the floor are remembered
between shards, so joined cells are counted exactly (a patient in both counts once) in little
memory.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import polars as pl

from tokenizer import sketch
from tokenizer.codebook import BIRTH, INTERVALS, LONGEST, Survey, TokenizerOptions, parents
from tokenizer.events import MedsDataset
from tokenizer.split import SplitRule

Cells = dict[str, dict[int, tuple[int, int]]]


def survey(
    dataset: MedsDataset,
    rule: SplitRule,
    options: TokenizerOptions,
    progress: Callable[[int, int], None] | None = None,
) -> Survey:
    """Survey the train split of a dataset.

    Args:
        dataset: The site's events.
        rule: Decides which patients train.
        options: The floor, the sketches' accuracy and the rest.
        progress: Called with the shards done and the shards in all.

    Returns:
        The survey; an empty one (0 patients) if fewer patients than the floor train here.
    """
    accuracy, floor = options.sketch_accuracy, options.min_patients
    patients = 0
    codes, statics, values, gaps = (_Tally(floor) for _ in range(4))
    for done, shard in enumerate(dataset.shards, 1):
        events = _training(dataset.read(shard), rule)
        patients += events["subject_id"].n_unique()
        timed = events.filter(pl.col("time").is_not_null() & (pl.col("code") != BIRTH))
        codes.add(timed.select("subject_id", key="code", bucket=pl.lit(0)))
        untimed = events.filter(pl.col("time").is_null() & (pl.col("code") != BIRTH))
        statics.add(untimed.select("subject_id", key="code", bucket=pl.lit(0)))
        measured = timed.filter(pl.col("numeric_value").is_not_null())
        values.add(_sketched(measured, "code", "numeric_value", accuracy))
        gaps.add(_sketched(_gaps(timed), "class", "gap_s", accuracy))
        if progress:
            progress(done, len(dataset.shards))
    return Survey(
        options,
        patients=patients if patients >= floor else 0,
        codes=codes.named(),
        prefixes=codes.rolled_up(),
        statics=statics.named(),
        static_prefixes=statics.rolled_up(),
        values=values.sketches(),
        gaps=gaps.sketches(),
    )


def _training(events: pl.DataFrame, rule: SplitRule) -> pl.DataFrame:
    subjects = events["subject_id"].unique()
    training = subjects.filter(pl.Series(rule.assign(subjects.to_numpy()) == 0, dtype=pl.Boolean))
    return events.join(training.to_frame(), on="subject_id", how="semi", maintain_order="left")


def _sketched(rows: pl.DataFrame, key: str, value: str, accuracy: float) -> pl.DataFrame:
    buckets = sketch.bucket_of(rows[value].cast(pl.Float64).to_numpy(), accuracy)
    return rows.select("subject_id", key=key, bucket=pl.Series(buckets, dtype=pl.Int64))


def _gaps(timed: pl.DataFrame) -> pl.DataFrame:
    """Gaps between a subject's times, the longest class left out: subject_id, class, gap_s."""
    moments = timed.select("subject_id", "time").unique(maintain_order=True)
    gap = pl.col("time").diff().over("subject_id").dt.total_microseconds()
    edges = list(INTERVALS.values())
    return (
        moments.with_columns(gap=gap)
        .filter(pl.col("gap").is_between(edges[0], INTERVALS[LONGEST], closed="left"))
        .select(
            "subject_id",
            pl.col("gap").cut(edges[1:], labels=list(INTERVALS), left_closed=True).cast(pl.String).alias("class"),
            gap_s=pl.col("gap") / 1e6,
        )
    )


@dataclass
class _Tally:
    """Events and distinct patients per (key, bucket), summed over shards."""

    floor: int
    cells: pl.DataFrame = field(
        default_factory=lambda: pl.DataFrame(
            schema={"key": pl.String, "bucket": pl.Int64, "events": pl.Int64, "patients": pl.Int64}
        )
    )
    few: pl.DataFrame = field(
        default_factory=lambda: pl.DataFrame(schema={"key": pl.String, "bucket": pl.Int64, "subject_id": pl.Int64})
    )

    def add(self, rows: pl.DataFrame) -> None:
        """Add a shard's rows: subject_id, key, bucket."""
        rows = rows.cast({"bucket": pl.Int64})
        cell = ["key", "bucket"]
        pairs = rows.group_by(*cell, "subject_id").agg(events=pl.len().cast(pl.Int64))
        fresh = pairs.group_by(cell).agg(pl.col("events").sum(), patients=pl.len().cast(pl.Int64))
        # No subject is in two shards, so patients add up.
        joined = pl.concat([self.cells, fresh.select(self.cells.columns)])
        self.cells = joined.group_by(cell).sum()
        below = self.cells.filter(pl.col("patients") < self.floor)
        known = pl.concat([self.few, pairs.select(self.few.columns)])
        self.few = known.join(below, on=cell, how="semi")

    def named(self) -> dict[str, int]:
        """Patients per key that reached the floor."""
        enough = self.cells.filter(pl.col("patients") >= self.floor)
        return dict(enough.select("key", "patients").sort("key").iter_rows())

    def rolled_up(self) -> dict[str, int]:
        """Patients per `//` parent of keys below the floor; a key counts in one parent only."""
        waiting: dict[str, set[int]] = {}
        for key, subject in self.few.select("key", "subject_id").iter_rows():
            waiting.setdefault(key, set()).add(subject)
        released: dict[str, int] = {}
        for depth in range(max((len(parents(key)) for key in waiting), default=0), 0, -1):
            groups: dict[str, list[str]] = {}
            for key in waiting:
                above = parents(key)
                if len(above) >= depth:
                    groups.setdefault(above[-depth], []).append(key)
            for prefix, keys in groups.items():
                together = set().union(*(waiting[key] for key in keys))
                if len(together) >= self.floor:
                    released[prefix] = len(together)
                    for key in keys:
                        del waiting[key]
        return released

    def sketches(self) -> dict[str, dict[int, int]]:
        """Events per bucket of each key, buckets joined until each has enough patients."""
        subjects: dict[tuple[str, int], set[int]] = {}
        for key, bucket, subject in self.few.iter_rows():
            subjects.setdefault((key, bucket), set()).add(subject)
        cells: dict[str, list[_Cell]] = {}
        for key, bucket, events, _ in self.cells.sort("key", "bucket").iter_rows():
            cells.setdefault(key, []).append(_Cell(bucket, events, subjects.get((key, bucket))))
        folded = {key: _fold(buckets, self.floor) for key, buckets in cells.items()}
        return {key: buckets for key, buckets in folded.items() if buckets}


@dataclass(frozen=True)
class _Cell:
    """Events in a bucket and their patients; None: the floor is reached."""

    bucket: int
    events: int
    subjects: set[int] | None

    def join(self, other: "_Cell", floor: int) -> "_Cell":
        """Both cells at the place of the other one."""
        both = None
        if self.subjects is not None and other.subjects is not None:
            both = self.subjects | other.subjects
        return _Cell(other.bucket, self.events + other.events, both if both and len(both) < floor else None)


def _fold(cells: list[_Cell], floor: int) -> dict[int, int]:
    """Join each bucket below the floor with the next one towards the median; {} if all lie below."""
    so_far = list(accumulate(cell.events for cell in cells))
    middle = next(place for place, seen in enumerate(so_far) if 2 * seen >= so_far[-1])
    full, below = _sweep(cells[:middle], floor)
    full_right, above = _sweep(reversed(cells[middle + 1 :]), floor)
    centre = cells[middle]
    for rest in (below, above):
        if rest:
            centre = rest.join(centre, floor)
    full += full_right
    if centre.subjects is None:
        full.append(centre)
    elif full:
        nearest = min(full, key=lambda cell: (abs(cell.bucket - centre.bucket), cell.bucket))
        full[full.index(nearest)] = centre.join(nearest, floor)
    return {cell.bucket: cell.events for cell in full}


def _sweep(cells: Iterable[_Cell], floor: int) -> tuple[list[_Cell], _Cell | None]:
    """Join from the tail inwards; the cells that reached the floor, and what is left over."""
    full: list[_Cell] = []
    rest: _Cell | None = None
    for cell in cells:
        joined = rest.join(cell, floor) if rest else cell
        rest = joined if joined.subjects is not None else None
        if rest is None:
            full.append(joined)
    return full, rest
