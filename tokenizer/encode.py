"""Events become tokens and tokens readable events; `tokenizer.codebook` tells the grammar.

Whole columns at a time: a shard of a million events takes a fraction of a second. The time of an
interval token is that of the event after it, so a history cut at `time <= t` never tells of a gap
that has not passed yet.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tokenizer.codebook import BIRTH, STATIC, Codebook, Told, age_bucket, age_width
from tokenizer.events import canonical_order
from tokenizer.spelling import fit

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """Token sequences of some patients, one after the other.

    Attributes:
        tokens: int32 [N].
        times: int64 [N], us since 1970; STATIC for tokens without a time.
        offsets: int64 [P + 1], where each patient starts.
        subject_ids: int64 [P], ascending.
        events: int64 [P], events (births aside) per patient.
        fallbacks: Events per code without a path of its own: under `ancestor` those told by the nearest
            ancestor, under `unknown` those of which only the system is told, if that.
    """

    tokens: NDArray[np.int32]
    times: Ints
    offsets: Ints
    subject_ids: Ints
    events: Ints
    fallbacks: dict[str, dict[str, int]]


def encode(frame: pl.DataFrame, codebook: Codebook) -> Encoded:
    """Encode events in canonical order (as `MedsDataset.read` gives them).

    Every patient gets a timeline, if only of EOT. Numeric values of codes without value bins, of
    rare codes and of static codes leave no token.
    """
    subjects, births = _subjects(frame)
    events = frame.filter(pl.col("code") != BIRTH)
    subject = np.searchsorted(subjects, events["subject_id"].to_numpy())
    time = _times(events)
    codes = _Codes.of(events, time, codebook)
    bins = codes.bins(events, time, codebook)
    timed = time != STATIC
    # A row starts a moment if it is timed and the row before has another subject or time.
    follows = np.zeros(len(time), bool)
    follows[1:] = (subject[1:] == subject[:-1]) & timed[:-1]
    gap = np.zeros(len(time), np.int64)
    gap[1:] = np.where(follows[1:], time[1:] - time[:-1], 0)
    intervals, repeats = _intervals(gap, codebook)
    ages, aged = _ages(time, births[subject], subject, timed & (~follows | (repeats > 0)), codebook)

    # Bins are fused with the code's only token, but written apart behind spelled codes.
    apart = (bins > 0) & codes.apart[codes.place]
    pieces = codes.pieces[codes.place]
    widths = repeats + aged + 1 + pieces + apart
    # One more place after each patient's last row, for EOT.
    rows = np.bincount(subject, minlength=len(subjects))
    row_ends = np.cumsum(widths)
    last = np.cumsum(rows) - 1
    token_ends = np.concatenate([[0], row_ends])[last + 1] + np.arange(1, len(subjects) + 1)
    offsets = np.concatenate([[0], token_ends])
    start = row_ends - widths + subject

    tokens = np.full(offsets[-1], codebook.eot, np.int32)
    gaps = np.flatnonzero(repeats)
    tokens[_ranges(start[gaps], repeats[gaps])] = np.repeat(intervals[gaps], repeats[gaps])
    at = start + repeats
    tokens[at[aged]] = ages[aged]
    at += aged
    tokens[at] = codes.first[codes.place] + np.where(apart, 0, bins)
    spelled = np.flatnonzero(pieces)
    rest = codes.place[spelled]
    tokens[_ranges(at[spelled] + 1, pieces[spelled])] = codes.rest[_ranges(codes.rest_start[rest], codes.pieces[rest])]
    valued = np.flatnonzero(apart)
    tokens[at[valued] + 1 + pieces[valued]] = _first_value(codebook) - 1 + bins[valued]

    # A row's tokens have its time, and EOT has that of the patient's last row.
    widths[last[rows > 0]] += 1
    times = np.repeat(time, widths)
    silent = np.flatnonzero(rows == 0)
    if len(silent):
        times = np.insert(times, token_ends[silent] - 1 - np.arange(len(silent)), STATIC)
    return Encoded(tokens, times, offsets, subjects, rows, codes.fallbacks())


def decode(
    tokens: NDArray[np.int32],
    codebook: Codebook,
    *,
    start_us: int = 0,
    subject_id: int = 0,
    passed_us: Ints | None = None,
) -> pl.DataFrame:
    """Readable MEDS events of one patient's tokens: subject_id, time, code, numeric_value.

    Times count from `start_us` by the time that passed with each token, where that is known, else by the
    intervals' mean durations; values are the medians of their bins, an ancestor of rare codes reads `LAB//*`,
    and an age gives a MEDS_BIRTH that agrees with all ages of the timeline where that is possible. Tokens that
    the grammar doesn't hold together (a value after no code, a piece that leads nowhere) are passed over; a
    code that breaks off reads like an ancestor.

    For a timeline that the grammar accepts, `encode(decode(tokens)) == tokens` if its ages change where the
    mean durations put them and the events of a moment stand in canonical order (for those that
    `encode` wrote: if no ancestors stand for rare codes, and moments are as far apart as the shortest
    interval). Ages aside, and with the events between two intervals taken as a set, it holds for every one.
    """
    kinds = np.array([token.kind for token in codebook.tokens])[tokens]
    time = start_us + np.cumsum(codebook.advance_us[tokens] if passed_us is None else passed_us)
    rows: list[tuple[int | None, str, float | None]] = [
        (None, codebook.tokens[token].text, None) for token in tokens[kinds == "static"]
    ]
    for place, node in zip(*(x.tolist() for x in codebook.grammar.events(tokens)), strict=True):
        value_bin = codebook.tokens[node].bin if node < len(codebook) else 0
        if place + 1 < len(tokens) and kinds[place + 1] == "value":
            value_bin = int(codebook.tokens[tokens[place + 1]].text[1:])
        code = codebook.event(node)
        value = codebook.value_of(code, value_bin)
        rows.append((int(time[place]), code, None if np.isnan(value) else value))
    birth = _birth(tokens, kinds, time, codebook)
    if birth is not None:
        rows.append((birth, BIRTH, None))
    frame = pl.DataFrame(
        rows,
        schema={"time": pl.Int64, "code": pl.String, "numeric_value": pl.Float32},
        orient="row",
    )
    typed = frame.select(
        pl.lit(subject_id, pl.Int64).alias("subject_id"),
        pl.col("time").cast(pl.Datetime("us")),
        "code",
        "numeric_value",
    )
    return canonical_order(typed)


def _times(events: pl.DataFrame) -> Ints:
    return events["time"].to_physical().fill_null(STATIC).to_numpy()


def _subjects(frame: pl.DataFrame) -> tuple[Ints, Ints]:
    """Subject ids ascending, and each one's birth in us (STATIC: unknown)."""
    births = frame.filter((pl.col("code") == BIRTH) & pl.col("time").is_not_null())
    born = births.group_by("subject_id").agg(pl.col("time").min())
    subjects = frame.select(pl.col("subject_id").unique().sort())
    joined = subjects.join(born, on="subject_id", how="left", maintain_order="left")
    return joined["subject_id"].to_numpy(), _times(joined)


@dataclass(frozen=True)
class _Codes:
    """How the rows' codes are written; every name has two places, for rows without and with a time.

    Attributes:
        names: the distinct codes, sorted.
        place: int64 [rows].
        told: per place, None where no row is.
        first: int64 [places], the first token.
        pieces: int64 [places], tokens after the first.
        rest, rest_start: those tokens, one place after the other, and where each place's begin.
        apart: bool [places], whether a value is a token of its own.
    """

    names: list[str]
    place: Ints
    told: list[Told | None]
    first: Ints
    pieces: Ints
    rest: Ints
    rest_start: Ints
    apart: NDArray[np.bool_]

    @classmethod
    def of(cls, events: pl.DataFrame, time: Ints, codebook: Codebook) -> "_Codes":
        names = events["code"].unique().sort().to_list()
        local = events["code"].cast(pl.Enum(names)).to_physical().to_numpy()
        place = local.astype(np.int64) * 2 + (time != STATIC)
        used = np.bincount(place, minlength=2 * len(names)) > 0
        told = [
            codebook.tell(name, static=not timed) if used[2 * n + timed] else None
            for n, name in enumerate(names)
            for timed in (False, True)
        ]
        tokens = [(0,) if way is None else way.tokens for way in told]
        pieces = np.array([len(path) - 1 for path in tokens], np.int64)
        separate = codebook.options.values == "separate"
        return cls(
            names,
            place,
            told,
            first=np.array([path[0] for path in tokens], np.int64),
            pieces=pieces,
            rest=np.array([token for path in tokens for token in path[1:]], np.int64),
            rest_start=np.cumsum(pieces) - pieces,
            apart=np.array([separate or (way is not None and way.text in codebook.spelled) for way in told], bool),
        )

    def bins(self, events: pl.DataFrame, time: Ints, codebook: Codebook) -> Ints:
        """Value bin of each row, from 1; 0 where there is no value or the code has no bins."""
        values = events["numeric_value"].cast(pl.Float32).fill_null(float("nan")).to_numpy()
        edges = np.full((codebook.options.value_bins - 1, len(self.told)), np.inf, np.float32)
        has_bins = np.zeros(len(self.told), bool)
        for place, way in enumerate(self.told):
            # A value is told in the bins of its own code only: an ancestor's are other values, or another unit's.
            if place % 2 and way is not None and way.level == "itself" and way.text in codebook.breaks:
                breaks = codebook.breaks[way.text]
                edges[: len(breaks), place] = _below(breaks)
                has_bins[place] = True
        bins = np.zeros(len(self.place), np.int64)
        rows = np.flatnonzero(has_bins[self.place] & ~np.isnan(values))
        measured, places = values[rows], self.place[rows]
        inside = np.ones(len(rows), np.int16)
        for row in edges:
            inside += row.take(places) < measured
        bins[rows] = inside
        return bins

    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Rows per code that isn't told by its own tokens."""
        rows = np.bincount(self.place, minlength=len(self.told))
        counts: dict[str, dict[str, int]] = {"ancestor": {}, "unknown": {}}
        for place, way in enumerate(self.told):
            if way is not None and way.level != "itself":
                level, name = counts[way.level], fit(self.names[place // 2])
                level[name] = level.get(name, 0) + int(rows[place])
        return counts


def _intervals(gap: Ints, codebook: Codebook) -> tuple[Ints, Ints]:
    """Interval token for each gap, and how often it is written (0: the gap is below a minute)."""
    edges = np.array(list(codebook.intervals.values()), np.int64)
    kind = np.searchsorted(edges, gap, side="right") - 1
    longest = edges[-1]
    # Half-way rounds up, in integers.
    repeats = np.where(gap >= longest, (2 * gap + longest) // (2 * longest), kind >= 0)
    return codebook.first_id("interval") + kind, repeats.astype(np.int64)


def _below(breaks: NDArray[np.float64]) -> NDArray[np.float32]:
    """The largest float32 at or below each break: a float32 value lies above both or above neither."""
    near = breaks.astype(np.float32)
    return np.where(near > breaks, np.nextafter(near, np.float32(-np.inf)), near)


def _first_value(codebook: Codebook) -> int:
    return codebook.first_id("value") if any(token.kind == "value" for token in codebook.tokens) else 0


def _ages(
    time: Ints, born: Ints, subject: Ints, opens: NDArray[np.bool_], codebook: Codebook
) -> tuple[Ints, NDArray[np.bool_]]:
    """Age token at each row; whether it is written: at the first timed row, and at an interval when it changed."""
    at = np.flatnonzero(opens & (born != STATIC))
    bucket = age_bucket(time[at] - born[at], codebook.options.age_years)
    changed = np.ones(len(at), bool)
    changed[1:] = (subject[at[1:]] != subject[at[:-1]]) | (bucket[1:] != bucket[:-1])
    ages, aged = np.zeros(len(time), np.int64), np.zeros(len(time), bool)
    ages[at], aged[at] = codebook.first_id("age") + bucket, changed
    return ages, aged


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """The integers of all ranges [start, start + length), one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _birth(tokens: NDArray[np.int32], kinds: NDArray, time: Ints, codebook: Codebook) -> int | None:
    """A birth that puts every event, or else the first, in the age bucket told before it."""
    ages = np.flatnonzero(kinds == "age")
    events, _ = codebook.grammar.events(tokens)
    told = np.searchsorted(ages, events) - 1
    events, told = events[told >= 0], told[told >= 0]
    if not len(events):
        return None
    bucket = tokens[ages[told]].astype(np.int64) - codebook.first_id("age")
    width = age_width(codebook.options.age_years)
    latest = time[events] - bucket * width
    earliest = latest - width + 1
    low, high = int(earliest.max()), int(latest.min())
    if low > high:
        low, high = int(earliest[0]), int(latest[0])
    return (low + high) // 2
