"""What is known of a patient at a time: a timeline of tokens, codes dated honestly, and the prompt that it leaves.

Notable choices:
- Nothing dated at the prediction is in a prompt, unless a task says so; of that moment the trigger alone is known where
  the prediction is made at it. Tokens of time and age that lead to it come along: they say when, not what.
- Codes that are dated within a stay but become known at its end are moved there before anything is looked for. Tokens
  between moments are written anew, so a moved history reads as if `tokenizer.encode` had got the events at those times
  (ages change where a moment is left, as far as age tokens tell).
"""

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from model.rollout import Prompt
from model.tasks import Known
from tokenizer.codebook import STATIC, Codebook
from tokenizer.store import TokenSplit

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Timeline:
    """One patient's events, and the tokens that tell them.

    Attributes:
        subject_id: the patient.
        tokens: int32 [T], without the end of the timeline.
        times: int64 [T], microseconds since the epoch, `STATIC` for tokens without a time.
        end_us: when the record ends; `STATIC` for one without times.
        codebook: the one that wrote the tokens.
    """

    subject_id: int
    tokens: NDArray[np.int32]
    times: Ints
    end_us: int
    codebook: Codebook

    @cached_property
    def _events(self) -> tuple[Ints, Ints]:
        return self.codebook.grammar.events(self.tokens)

    @property
    def places(self) -> Ints:
        """Where the code of each event ends: int64 [K]."""
        return self._events[0]

    @property
    def nodes(self) -> Ints:
        """What each event is, a node of the grammar: int64 [K]."""
        return self._events[1]

    @property
    def at(self) -> Ints:
        """When each event was: int64 [K], ascending."""
        return self.times[self.places]

    def spans(self) -> tuple[Ints, Ints]:
        """First token of each event and the one behind its last, its value included: int64 [K] each."""
        stops = self.places + 1
        inside = np.minimum(stops, max(len(self.tokens) - 1, 0))
        valued = self.codebook.kinds[self.tokens[inside]] == "value" if len(self.tokens) else np.zeros(0, bool)
        stops = stops + (valued & (stops < len(self.tokens)))
        starts = self.places.copy()
        while (more := self.codebook.grammar.is_piece[self.tokens[starts]] & (starts > 0)).any():
            starts[more] -= 1
        return starts, stops


def timeline(split: TokenSplit, patient: int, codebook: Codebook) -> Timeline:
    """Read the patient at a place of a split (0 to len - 1)."""
    tokens, times = split.timeline(patient)
    end = int(times[-1]) if len(times) else STATIC
    if len(tokens) and tokens[-1] == codebook.eot:
        tokens, times = tokens[:-1], times[:-1]
    return Timeline(int(split.subject_ids[patient]), tokens, times, end, codebook)


def prompt_at(tokens: NDArray[np.int32], times: Ints, subject_id: int, at: int, *, through: bool = True) -> Prompt:
    """What is known of a patient at a time: the tokens up to it, and a key that follows from patient and time.

    Args:
        tokens: int32 [T], without the end of the timeline.
        times: int64, microseconds, of at least those tokens.
        subject_id: the patient.
        at: the prediction, microseconds since the epoch; an event with a time lies before it (or at it, if `through`).
        through: whether what is dated at the prediction is known.
    """
    length = int(np.searchsorted(times[: len(tokens)], at, side="right" if through else "left"))
    return Prompt(tokens=tokens[:length], elapsed_us=at - int(times[length - 1]), key=_key(subject_id, at))


def known_prompt(line: Timeline, at: int, known: Known, trigger: Bools) -> Prompt:
    """The prompt of a task's prediction.

    Args:
        line: the patient.
        at: the prediction; an event with a time is known by then.
        known: what of that moment is.
        trigger: bool [M], the events that are known with `trigger`.
    """
    if known != "trigger":
        return prompt_at(line.tokens, line.times, line.subject_id, at, through=known == "at")
    before = int(np.searchsorted(line.times, at, side="left"))
    starts, stops = line.spans()
    now = (line.at == at) & trigger[line.nodes]
    leading = np.flatnonzero((line.times == at) & np.isin(line.codebook.kinds[line.tokens], ("interval", "age")))
    kept = [line.tokens[:before], line.tokens[leading]]
    kept += [line.tokens[start:stop] for start, stop in zip(starts[now], stops[now], strict=True)]
    return Prompt(tokens=np.concatenate(kept), elapsed_us=0, key=_key(line.subject_id, at))


def _key(subject_id: int, at: int) -> int:
    # The draws follow from patient and time: the same in every arm, and whoever else is in the cohort.
    digest = hashlib.blake2b(f"{subject_id} {at}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def moved_to(at: Ints, late: Bools, begins: Bools, ends: Bools) -> Ints:
    """When late events become known: int64 [K], `STATIC` for those of a stay whose end isn't recorded.

    Args:
        at: int64 [K], dates, ascending.
        late, begins, ends: bool [K], events of late codes, and those that begin and end a stay.
    """
    starts, stops = at[begins], at[ends]
    moved = at.copy()
    for event in np.flatnonzero(late):
        begun = int(np.searchsorted(starts, at[event], side="right"))
        ended = int(np.searchsorted(stops, at[event], side="left"))
        if not begun or (ended and stops[ended - 1] > starts[begun - 1]):
            continue  # in no stay
        moved[event] = stops[ended] if ended < len(stops) else STATIC
    return moved


def retimed(line: Timeline, moved: Ints) -> Timeline:
    """Write a timeline anew with its events at other times.

    Args:
        line: the patient.
        moved: int64 [K], later or equal times of the events, each the time of some event; `STATIC` leaves one out.

    Returns:
        The timeline; within a moment, moved events stand before those that were there.
    """
    if (moved == line.at).all():
        return line
    book = line.codebook
    starts, stops = line.spans()
    headers = book.kinds[line.tokens] == "age"
    told_at, told = line.times[headers], line.tokens[headers]
    first = int(starts[0])
    static = np.flatnonzero(line.times[:first] == STATIC)
    tokens, times = [line.tokens[static]], [line.times[static]]
    kept = np.flatnonzero(moved != STATIC)
    order = kept[np.lexsort((kept, moved[kept] == line.at[kept], moved[kept]))]
    last, age = STATIC, -1
    for event in order:
        time, before = int(moved[event]), []
        if time != last:
            if last != STATIC:
                before += _interval(time - last, book)
            # An age is told at the first event, and where time passes and it has changed.
            now = told[np.searchsorted(told_at, time, side="right") - 1] if len(told) and told_at[0] <= time else -1
            if now != age and (before or last == STATIC):
                before.append(int(now))
                age = now
            last = time
        words = np.concatenate([np.array(before, np.int32), line.tokens[starts[event] : stops[event]]])
        tokens.append(words)
        times.append(np.full(len(words), time))
    return replace(line, tokens=np.concatenate(tokens).astype(np.int32), times=np.concatenate(times))


def _interval(gap: int, book: Codebook) -> list[int]:
    """The interval tokens of a gap, as `tokenizer.encode` writes them."""
    edges = list(book.intervals.values())
    kind = int(np.searchsorted(edges, gap, side="right")) - 1
    if kind < 0:
        return []
    longest = edges[-1]
    repeats = (2 * gap + longest) // (2 * longest) if gap >= longest else 1
    return [book.first_id("interval") + kind] * repeats


def age_at(line: Timeline, at: int) -> tuple[float, float] | None:
    """The patient's age at a time, as the last age token before it tells: completed years, at least and at most."""
    ages = (line.codebook.kinds[line.tokens] == "age") & (line.times <= at)
    if not ages.any():
        return None
    text = line.codebook.tokens[int(line.tokens[np.flatnonzero(ages)[-1]])].text
    if text.endswith("+"):
        return float(text[:-1]), float("inf")
    low, high = text.split("-")
    return float(low), float(high) - 1


def when(time_us: int) -> str:
    """A time for people, UTC to the minute."""
    return str(np.datetime64(time_us, "us").astype("datetime64[m]")).replace("T", " ")
