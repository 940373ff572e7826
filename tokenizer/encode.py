"""Events become tokens and tokens readable events; `tokenizer.codebook` tells the grammar.

Whole columns at a time: a shard of a million events takes a fraction of a second. The time of an
interval token is that of the event after it, so a history cut at `time <= t` never tells of a gap
that has not passed yet.
"""

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tokenizer.codebook import (
    BIRTH,
    INTERVALS,
    LONGEST,
    STATIC,
    Codebook,
    Token,
    age_bucket,
    age_width,
)
from tokenizer.events import canonical_order

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
        fallbacks: Events per code that was too rare to be named, and is told by its parent's token.
    """

    tokens: NDArray[np.int32]
    times: Ints
    offsets: Ints
    subject_ids: Ints
    events: Ints
    fallbacks: dict[str, int]


def encode(frame: pl.DataFrame, codebook: Codebook) -> Encoded:
    """Encode events in canonical order (as `MedsDataset.read` gives them).

    Every patient gets a timeline, if only of EOT. Numeric values of codes without value bins, of
    rare codes and of static codes leave no token.
    """
    subjects, births = _subjects(frame)
    events = frame.filter(pl.col("code") != BIRTH)
    subject = np.searchsorted(subjects, events["subject_id"].to_numpy())
    time = _times(events)
    code, fallbacks = _code_ids(events, time, codebook)
    bins = _bins(events, code, time, codebook)
    timed = time != STATIC
    # A row starts a moment if it is timed and the row before has another subject or time.
    follows = np.zeros(len(time), bool)
    follows[1:] = (subject[1:] == subject[:-1]) & timed[:-1]
    gap = np.zeros(len(time), np.int64)
    gap[1:] = np.where(follows[1:], time[1:] - time[:-1], 0)
    intervals, repeats = _intervals(gap, codebook)
    ages, aged = _ages(time, births[subject], timed, follows, codebook)

    separate = codebook.options.values == "separate"
    valued = (bins > 0) & separate
    widths = repeats + aged + 1 + valued
    # One more place after each patient's last row, for EOT.
    rows = np.bincount(subject, minlength=len(subjects))
    row_ends = np.cumsum(widths)
    token_ends = np.concatenate([[0], row_ends])[np.cumsum(rows)] + np.arange(1, len(subjects) + 1)
    offsets = np.concatenate([[0], token_ends])
    start = row_ends - widths + subject

    tokens = np.full(offsets[-1], codebook.eot, np.int32)
    times = np.full(offsets[-1], STATIC, np.int64)
    gaps = np.flatnonzero(repeats)
    tokens[_ranges(start[gaps], repeats[gaps])] = np.repeat(intervals[gaps], repeats[gaps])
    at = start + repeats
    tokens[at[aged]] = ages[aged]
    at += aged
    tokens[at] = code if separate else code + bins
    if separate:
        tokens[at[valued] + 1] = _first_id(codebook, "value") - 1 + bins[valued]
    times[_ranges(start, widths)] = np.repeat(time, widths)
    ended = rows > 0
    times[token_ends[ended] - 1] = time[np.cumsum(rows)[ended] - 1]
    return Encoded(tokens, times, offsets, subjects, rows, fallbacks)


def decode(tokens: NDArray[np.int32], codebook: Codebook, *, start_us: int = 0, subject_id: int = 0) -> pl.DataFrame:
    """Readable MEDS events of one patient's tokens: subject_id, time, code, numeric_value.

    Times count from `start_us` by the intervals' representative durations, values are the medians
    of their bins, a parent of rare codes reads `LAB//*`, and an age gives a MEDS_BIRTH that agrees
    with all ages of the timeline where that is possible. Tokens that no grammar holds together (a
    value after no code) are passed over.

    For a timeline that `encode` wrote, `encode(decode(tokens)) == tokens` if it names no parents of
    rare codes, its moments are at least a minute apart, and its ages change where the representative
    durations put them. Ages aside, and with the events between two intervals taken as a set, it
    holds for every timeline.
    """
    kinds = np.array([token.kind for token in codebook.tokens])[tokens]
    names = [codebook.tokens[token] for token in tokens]
    time = start_us + np.cumsum(codebook.advance_us[tokens])
    rows: list[tuple[int | None, str, float | None]] = []
    for place, (kind, token) in enumerate(zip(kinds, names, strict=True)):
        if kind == "static":
            rows.append((None, token.text, None))
        elif kind == "code":
            value_bin = token.bin
            if place + 1 < len(names) and kinds[place + 1] == "value":
                value_bin = int(names[place + 1].text[1:])
            value = codebook.value_of(token.text, value_bin)
            rows.append((int(time[place]), token.text, None if np.isnan(value) else value))
        elif kind == "other":
            rows.append((int(time[place]), f"{token.text}//*" if token.text else "*", None))
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


def _code_ids(events: pl.DataFrame, time: Ints, codebook: Codebook) -> tuple[Ints, dict[str, int]]:
    """Token id (bin 0) of each row's code; rows per code that is told by a parent."""
    names = events["code"].unique().sort().to_list()
    local = events["code"].cast(pl.Enum(names)).to_physical().to_numpy()
    # Each name has two places, for rows with and without a time.
    places = local.astype(np.int64) * 2 + (time == STATIC)
    rows = np.bincount(places, minlength=2 * len(names))
    table = np.zeros(2 * len(names), np.int64)
    fallbacks: dict[str, int] = {}
    for place in np.flatnonzero(rows).tolist():
        name = names[place // 2]
        table[place] = codebook.code_id(name, static=bool(place % 2))
        if codebook.tokens[table[place]].text != name:
            fallbacks[name] = fallbacks.get(name, 0) + int(rows[place])
    return table[places], fallbacks


def _bins(events: pl.DataFrame, code: Ints, time: Ints, codebook: Codebook) -> Ints:
    """Value bin of each row, from 1; 0 where there is no value or the code has no bins."""
    values = events["numeric_value"].cast(pl.Float64).fill_null(float("nan")).to_numpy()
    edges = np.full((codebook.options.value_bins - 1, len(codebook)), np.inf)
    has_bins = np.zeros(len(codebook), bool)
    for name, breaks in codebook.breaks.items():
        token = codebook.id(Token("code", name))
        edges[: len(breaks), token] = breaks
        has_bins[token] = True
    bins = np.zeros(len(code), np.int64)
    rows = np.flatnonzero(has_bins[code] & ~np.isnan(values) & (time != STATIC))
    measured, codes = values[rows], code[rows]
    inside = np.ones(len(rows), np.int64)
    for row in edges:
        inside += row[codes] < measured
    bins[rows] = inside
    return bins


def _intervals(gap: Ints, codebook: Codebook) -> tuple[Ints, Ints]:
    """Interval token for each gap, and how often it is written (0: the gap is below a minute)."""
    edges = np.array(list(INTERVALS.values()), np.int64)
    kind = np.searchsorted(edges, gap, side="right") - 1
    longest = INTERVALS[LONGEST]
    # Half-way rounds up, in integers.
    repeats = np.where(gap >= longest, (2 * gap + longest) // (2 * longest), kind >= 0)
    return _first_id(codebook, "interval") + kind, repeats.astype(np.int64)


def _ages(
    time: Ints, born: Ints, timed: NDArray[np.bool_], follows: NDArray[np.bool_], codebook: Codebook
) -> tuple[Ints, NDArray[np.bool_]]:
    """Age token at each row; whether it is written: at the first timed row and when it changed."""
    known = timed & (born != STATIC)
    bucket = np.full(len(time), -1, np.int64)
    bucket[known] = age_bucket(time[known] - born[known], codebook.options.age_years)
    changed = np.ones(len(time), bool)
    changed[1:] = ~follows[1:] | (bucket[1:] != bucket[:-1])
    return _first_id(codebook, "age") + bucket, known & changed


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """The integers of all ranges [start, start + length), one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)


def _birth(tokens: NDArray[np.int32], kinds: NDArray, time: Ints, codebook: Codebook) -> int | None:
    """A birth that puts every event, or else the first, in the age bucket told before it."""
    ages = np.flatnonzero(kinds == "age")
    events = np.flatnonzero((kinds == "code") | (kinds == "other"))
    told = np.searchsorted(ages, events) - 1
    events, told = events[told >= 0], told[told >= 0]
    if not len(events):
        return None
    bucket = tokens[ages[told]].astype(np.int64) - _first_id(codebook, "age")
    width = age_width(codebook.options.age_years)
    latest = time[events] - bucket * width
    earliest = latest - width + 1
    low, high = int(earliest.max()), int(latest.min())
    if low > high:
        low, high = int(earliest[0]), int(latest[0])
    return (low + high) // 2


def _first_id(codebook: Codebook, kind: str) -> int:
    return next(place for place, token in enumerate(codebook.tokens) if token.kind == kind)
