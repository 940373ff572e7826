"""Patients that nobody is: timelines made to be recognised in what a training learned from them.

Two kinds:
- `scattered`: tokens of events drawn uniformly, one after the other, without regard for the grammar. A privacy claim
  holds for every record that a site could hold, also for one that no hospital writes; what is least like all others is
  learned from it alone, so it is the strongest test of the claim.
- `walks`: timelines that the grammar allows, each next token uniform among those that may follow. Rollouts are held to
  the grammar, so only such ones could ever be told by one. They look like a very rare patient.

A canary that a coin leaves out stands in the split all the same, as a timeline without anything to predict: how many
patients a site has counts as known, and a private step draws and divides by that number.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError
from tokenizer.store import TokenSplit

Ints = NDArray[np.int64]
_EVENTS = ("code", "piece", "other", "value", "interval")


def scattered(codebook: Codebook, count: int, length: int, rng: np.random.Generator) -> list[Ints]:
    """Timelines of `length` uniform event tokens and the end of the timeline: `count` times int64 [length + 1].

    Raises:
        ConfigError: the codebook has no tokens of events.
    """
    tokens = np.flatnonzero([token.kind in _EVENTS for token in codebook.tokens])
    if not len(tokens):
        raise ConfigError("canaries: the codebook names no events to draw them from")
    drawn = tokens[rng.integers(len(tokens), size=(count, length))]
    return [np.append(row, codebook.eot) for row in drawn]


def walks(codebook: Codebook, start: Ints, count: int, length: int, rng: np.random.Generator) -> list[Ints]:
    """Ways to go on that the grammar allows, each next token uniform among the allowed ones but the end.

    Args:
        codebook: of the tokens.
        start: int64 [T], what comes before; may be empty.
        count: how many.
        length: tokens of each.
        rng: where the draws come from.

    Returns:
        `count` times int64 [length], without `start`.

    Raises:
        ConfigError: `start` breaks the grammar, or nothing may follow.
    """
    grammar = codebook.grammar
    if not grammar.accepts(start):
        raise ConfigError("canaries: what a timeline should start with breaks the codebook's grammar")
    first = grammar.states(start)[-1] if len(start) else grammar.start
    state = np.full(count, first, np.int64)
    told = np.empty((count, length), np.int64)
    never = np.isin(np.arange(len(codebook.tokens)), (codebook.pad, codebook.eot, codebook.unk))
    for place in range(length):
        allowed = grammar.allowed(state) & ~never
        if not allowed.any(1).all():
            raise ConfigError("canaries: the codebook has too few events for timelines of that length")
        # The largest of independent uniform numbers is uniform among the allowed ones.
        told[:, place] = np.where(allowed, rng.random(allowed.shape), -1.0).argmax(1)
        state = grammar.follow(state, told[:, place])
    return list(told)


def finished(codebook: Codebook, timeline: Ints) -> Ints:
    """The timeline up to its last whole event, and its end: what the grammar accepts as a patient; int64."""
    grammar = codebook.grammar
    states = grammar.states(timeline)
    may_end = np.flatnonzero(grammar.permits(states, np.full(len(states), codebook.eot)))
    kept = int(may_end[-1]) + 1 if len(may_end) else 0
    return np.append(timeline[:kept], codebook.eot)


def nobody(codebook: Codebook) -> Ints:
    """The timeline of a patient who was left out: nothing to predict."""
    return np.array([codebook.eot], np.int64)


def plant(split: TokenSplit, timelines: Sequence[NDArray[np.integer]]) -> TokenSplit:
    """A split with further patients behind its own, in memory; their subject ids are negative, their times unknown."""
    lengths = np.array([len(timeline) for timeline in timelines], np.int64)
    tokens = np.concatenate([np.asarray(split.tokens), *(t.astype(np.int32) for t in timelines)])
    offsets = np.asarray(split.offsets)
    return TokenSplit(
        tokens=tokens.astype(np.int32),
        times=np.concatenate([np.asarray(split.times), np.zeros(int(lengths.sum()), np.int64)]),
        offsets=np.concatenate([offsets, offsets[-1] + np.cumsum(lengths)]).astype(np.int64),
        subject_ids=np.concatenate([np.asarray(split.subject_ids), -1 - np.arange(len(lengths))]).astype(np.int64),
    )


def alone(timelines: Sequence[NDArray[np.integer]]) -> TokenSplit:
    """A split of these timelines only."""
    nothing = TokenSplit(np.empty(0, np.int32), np.empty(0, np.int64), np.zeros(1, np.int64), np.empty(0, np.int64))
    return plant(nothing, timelines)


def chosen(split: TokenSplit, patients: Ints) -> TokenSplit:
    """Some patients of a split, int64 places, in memory; as `plant` names them."""
    return alone([split.timeline(int(patient))[0] for patient in patients])
