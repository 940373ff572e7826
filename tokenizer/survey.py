"""Take a site's survey: what may be told about its codes, from the patients that train.

A pass over the shards, one in memory at a time. A cell (a code, a bucket of a code's values) is
told only if at least `min_patients` distinct patients are in it; smaller ones are joined first:
rare codes with their siblings under an ancestor, buckets with the next bucket towards the median.

Notable choice: besides counts, only the patients of cells still below the floor are remembered
between shards, so joined cells are counted exactly (a patient in both counts once) in little
memory.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import polars as pl

from tokenizer import sketch
from tokenizer.codebook import BIRTH, LONGEST, Survey, TokenizerOptions
from tokenizer.events import Faults, Reader, Records
from tokenizer.pieces import Piece
from tokenizer.shards import AS_IT_FITS, Crew, each
from tokenizer.spelling import ancestors, canonical
from tokenizer.split import SplitRule


def survey(
    dataset: Records,
    rule: SplitRule,
    options: TokenizerOptions,
    progress: Callable[[int, int], None] | None = None,
    crew: Crew = AS_IT_FITS,
) -> Survey:
    """Survey the train split of a dataset.

    Args:
        dataset: The site's events.
        rule: Decides which patients train.
        options: The floor, the sketches' accuracy and the rest.
        progress: Called with the pieces done and the pieces in all.
        crew: Who counts; the survey is the same whoever does.

    Returns:
        The survey; an empty one (0 patients) if fewer patients than the floor train here.
    """
    counted = Partial.empty(options)
    jobs = [(dataset.reader, piece, rule, options) for piece in dataset.pieces]
    with closing(each(_survey_piece, jobs, crew, events=dataset.events, what="the survey")) as partials:
        for done, (piece, (partial, faults)) in enumerate(zip(dataset.pieces, partials, strict=True), 1):
            counted = join([counted, partial])
            dataset.count_faults(piece, faults)
            if progress:
                progress(done, len(jobs))
    return counted.release(dataset.prepared)


def _survey_piece(read: Reader, piece: Piece, rule: SplitRule, options: TokenizerOptions) -> "tuple[Partial, Faults]":
    frame, faults = read(piece)
    return survey_shard(frame, rule, options), faults


@dataclass(frozen=True)
class Partial:
    """What some shards hold, before anything is released: it names patients and never leaves the site.

    Partials of different shards join exactly, in any order and grouping (no subject is in two shards).
    They can be pickled.
    """

    options: TokenizerOptions
    patients: int
    codes: "_Tally"
    statics: "_Tally"
    values: "_Tally"
    gaps: "_Tally"

    @classmethod
    def empty(cls, options: TokenizerOptions) -> "Partial":
        """No shard at all."""
        nothing = _Tally.of(pl.DataFrame(schema=_PAIRS), options.min_patients)
        return cls(options, 0, nothing, nothing, nothing, nothing)

    def release(self, prepared: Sequence[str] = ()) -> Survey:
        """The survey: only what the floor lets through.

        Args:
            prepared: Digests of the maps and unit tables that the events went through.
        """
        floor = self.options.min_patients

        def told(counts: dict[str, int]) -> dict[str, int]:
            # All but a few patients would tell of those few.
            return {key: n if n <= self.patients - floor else self.patients for key, n in counts.items()}

        return Survey(
            self.options,
            patients=self.patients if self.patients >= floor else 0,
            codes=told(self.codes.named()),
            prefixes=told(self.codes.rolled_up()),
            statics=told(self.statics.named()),
            static_prefixes=told(self.statics.rolled_up()),
            values=self.values.sketches(),
            gaps=self.gaps.sketches(),
            prepared=tuple(sorted(set(prepared))),
        )


def survey_shard(events: pl.DataFrame, rule: SplitRule, options: TokenizerOptions) -> Partial:
    """Count one shard's train patients.

    Args:
        events: A shard, as `MedsDataset.read` gives it.
        rule: Decides which patients train.
        options: The floor, the sketches' accuracy and the rest.
    """
    pairs = pairs_of(events, rule, options)
    told = (pairs.codes, pairs.statics, pairs.values, pairs.gaps)
    return Partial(options, pairs.patients, *(_Tally.of(frame, options.min_patients) for frame in told))


@dataclass(frozen=True)
class Pairs:
    """Who has what in a shard's train split: columns key, bucket, subject_id and events, one row a pair.

    Attributes:
        patients: Patients in all.
        codes, statics: Codes with and without a time; the bucket is 0.
        values: Buckets of the codes' values.
        gaps: Interval classes and buckets of the gaps.
    """

    patients: int
    codes: pl.DataFrame
    statics: pl.DataFrame
    values: pl.DataFrame
    gaps: pl.DataFrame


def pairs_of(events: pl.DataFrame, rule: SplitRule, options: TokenizerOptions) -> Pairs:
    """Find the pairs of a shard's train patients."""
    accuracy = options.sketch_accuracy
    events = _training(events, rule)
    patients = events["subject_id"].n_unique()
    events = events.filter(pl.col("code") != BIRTH)
    timed = events.filter(pl.col("time").is_not_null())
    untimed = events.filter(pl.col("time").is_null())
    buckets = _buckets(timed["numeric_value"], accuracy)
    cells = _canonical_names(_count(timed.select("subject_id", key="code", bucket=buckets)))
    codes = cells.with_columns(bucket=pl.lit(0, pl.Int64)).group_by("key", "bucket", "subject_id").sum()
    statics = _canonical_names(_count(untimed.select("subject_id", key="code", bucket=pl.lit(0, pl.Int64))))
    gaps = _count(_gaps(timed, options))
    return Pairs(patients, codes, statics, cells.drop_nulls("bucket"), gaps)


def join(partials: Sequence[Partial]) -> Partial:
    """Put the partials of different shards together."""
    first, *_ = partials
    return Partial(
        first.options,
        sum(partial.patients for partial in partials),
        *(
            _join_tallies([getattr(partial, name) for partial in partials])
            for name in ("codes", "statics", "values", "gaps")
        ),
    )


def _training(events: pl.DataFrame, rule: SplitRule) -> pl.DataFrame:
    subjects = events["subject_id"].unique()
    training = subjects.filter(pl.Series(rule.assign(subjects.to_numpy()) == 0, dtype=pl.Boolean))
    return events.join(training.to_frame(), on="subject_id", how="semi", maintain_order="left")


def _buckets(values: pl.Series, accuracy: float) -> pl.Series:
    """The sketch's bucket of each value, null for null."""
    known = values.cast(pl.Float64).fill_null(0.0).to_numpy()
    buckets = pl.Series(sketch.bucket_of(known, accuracy), dtype=pl.Int64)
    return pl.select(pl.when(values.is_not_null()).then(buckets)).to_series()


def _gaps(timed: pl.DataFrame, options: TokenizerOptions) -> pl.DataFrame:
    """Gaps between a subject's times but the longest class: subject_id, key (class), bucket."""
    subject, time = timed["subject_id"].to_numpy(), timed["time"].to_physical().to_numpy()
    gap = np.where(subject[1:] == subject[:-1], time[1:] - time[:-1], 0)
    table = options.interval_edges
    edges = np.array(list(table.values()))
    at = np.flatnonzero((gap >= edges[0]) & (gap < table[LONGEST]))
    classes = pl.Series(list(table))[np.searchsorted(edges, gap[at], side="right") - 1]
    seconds = pl.Series(gap[at] / 1e6, dtype=pl.Float64)
    return pl.DataFrame(
        {
            "subject_id": pl.Series(subject[1:][at], dtype=pl.Int64),
            "key": classes,
            "bucket": _buckets(seconds, options.sketch_accuracy),
        }
    )


def _count(rows: pl.DataFrame) -> pl.DataFrame:
    """Events per key, bucket and subject."""
    cells = rows.group_by("key", "bucket", "subject_id")
    return cells.agg(events=pl.len().cast(pl.Int64))


def _canonical_names(cells: pl.DataFrame) -> pl.DataFrame:
    """The same under the codes' canonical names; two ways of writing a code are one code."""
    names = {name: canonical(name) for name in cells["key"].unique()}
    other = {name: right for name, right in names.items() if name != right}
    if not other:
        return cells
    renamed = cells.with_columns(pl.col("key").replace(other))
    return renamed.group_by("key", "bucket", "subject_id").agg(pl.col("events").sum())


_PAIRS: dict[str, type[pl.DataType]] = {
    "key": pl.String,
    "bucket": pl.Int64,
    "subject_id": pl.Int64,
    "events": pl.Int64,
}
_CELL = ["key", "bucket"]


@dataclass(frozen=True)
class _Tally:
    """Events and distinct patients per cell, and who is in the cells still below the floor.

    Attributes:
        floor: Patients that a released cell needs.
        cells: key, bucket, events, patients.
        few: key, bucket, subject_id of the cells below the floor.
    """

    floor: int
    cells: pl.DataFrame
    few: pl.DataFrame

    @classmethod
    def of(cls, pairs: pl.DataFrame, floor: int) -> "_Tally":
        """Count events per key, bucket and subject, one row each."""
        cells = pairs.group_by(_CELL).agg(pl.col("events").sum(), patients=pl.len().cast(pl.Int64))
        return cls(floor, cells, _below(cells, pairs.select(*_CELL, "subject_id"), floor))

    def named(self) -> dict[str, int]:
        """Patients per key that reached the floor."""
        enough = self.cells.filter(pl.col("patients") >= self.floor)
        return dict(enough.select("key", "patients").sort("key").iter_rows())

    def rolled_up(self) -> dict[str, int]:
        """Patients per ancestor of keys below the floor; a key counts in one ancestor only, the nearest that can."""
        waiting: dict[str, set[int]] = {}
        for key, subject in self.few.select("key", "subject_id").iter_rows():
            waiting.setdefault(key, set()).add(subject)
        above = {key: ancestors(key) for key in waiting}
        released: dict[str, int] = {}
        for depth in range(max(map(len, above.values()), default=0), 0, -1):
            groups: dict[str, list[str]] = {}
            for key in waiting:
                if len(above[key]) >= depth:
                    groups.setdefault(above[key][-depth], []).append(key)
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


def _join_tallies(tallies: Sequence[_Tally]) -> _Tally:
    # Patients add up, as no subject is in two shards. A cell below the floor in all was so in each.
    floor = tallies[0].floor
    cells = pl.concat([tally.cells for tally in tallies]).group_by(_CELL).sum()
    return _Tally(floor, cells, _below(cells, pl.concat([tally.few for tally in tallies]), floor))


def _below(cells: pl.DataFrame, who: pl.DataFrame, floor: int) -> pl.DataFrame:
    """The rows of `who` whose cell has fewer patients than the floor."""
    return who.join(cells.filter(pl.col("patients") < floor), on=_CELL, how="semi")


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
