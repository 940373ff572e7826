"""What a model has memorised: does it tell a rare course, token by token, that it can only know from single patients?

With planted courses (made-up timelines of which a stated number of patients had the same): exposure and extraction by
how often each was repeated, against courses that nobody had. With a finished model: extraction of courses that one
patient alone had, from those it was trained on and from others; only the difference is memory, the rest is what can be
foretold of anybody.

Source: exposure, Carlini et al., "The Secret Sharer", USENIX Security 2019, section 4; extraction by the prefix:
Carlini et al., "Quantifying memorization", ICLR 2023.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from model.decoder import Decoder
from model.losses import target_losses
from model.rollout import Prompt, Stop, rollout
from server.results import Figure
from simulation.attacks import canaries
from simulation.attacks.membership import share_interval
from tokenizer.codebook import Codebook
from tokenizer.store import TokenSplit
from tokenizer.windows import NO_TARGET, Batch

Ints: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]

# So little of the probability leaves the likeliest token alone: a greedy future.
_GREEDY = 1e-6
_LEVEL = 0.05
_RESAMPLES = 1000


@dataclass(frozen=True)
class Course:
    """A secret: a known beginning, int64 [T], and how it goes on, int64 [L]."""

    beginning: Ints
    secret: Ints


@dataclass(frozen=True)
class Extraction:
    """How many secrets come out, given their beginnings.

    Attributes:
        courses: how many were asked for.
        greedy: share that the likeliest future tells exactly.
        sampled: share that at least one of `tries` sampled futures tells exactly.
        tries: sampled futures of each.
    """

    courses: int
    greedy: Figure
    sampled: Figure
    tries: int


@dataclass(frozen=True)
class Repetition:
    """What became of planted courses that as many patients had.

    Attributes:
        patients: who had each of them; 0: nobody, for comparison.
        exposure: mean in bits with its interval over courses; 1.44 for what is not known at all.
        highest: the most bits that can be measured: the logarithm of the number of courses that are ranked.
        extraction: how many come out.
    """

    patients: int
    exposure: Figure
    highest: float
    extraction: Extraction


@dataclass(frozen=True)
class Rare:
    """What comes out of a finished model.

    Attributes:
        length: tokens of a secret.
        members: courses that one patient of the training alone had.
        others: courses that one patient alone had who was not in the training.
    """

    length: int
    members: Extraction
    others: Extraction


def invent(codebook: Codebook, count: int, length: int, rng: np.random.Generator) -> list[tuple[Course, Ints]]:
    """Make up courses, half of each known, and the patients' timelines: what the grammar allows, uniform otherwise."""
    made: list[tuple[Course, Ints]] = []
    while len(made) < count:
        # Some more tokens than needed, so that the timeline ends with a whole event behind the secret.
        drawn = canaries.walks(codebook, np.empty(0, np.int64), count, length + 8, rng)
        whole = [canaries.finished(codebook, walk) for walk in drawn]
        made += [(Course(t[: length // 2], t[length // 2 : length]), t) for t in whole if len(t) > length]
    return made[:count]


def planted(
    decoder: Decoder,
    codebook: Codebook,
    courses: Mapping[int, Sequence[Course]],
    *,
    rivals: int,
    tries: int,
    seed: int,
) -> tuple[Repetition, ...]:
    """Measure what a model knows of planted courses.

    Args:
        decoder: the model.
        codebook: of the tokens.
        courses: by how many patients had each.
        rivals: courses drawn like the secret, which it is ranked among.
        tries: sampled futures of each.
        seed: of rivals and futures.
    """
    rng = np.random.default_rng(seed)
    found = []
    for patients, some in sorted(courses.items()):
        bits = np.array([exposure(decoder, codebook, course, rivals, rng) for course in some])
        means = rng.choice(bits, (_RESAMPLES, len(bits))).mean(1)
        low, high = np.quantile(means, [_LEVEL / 2, 1 - _LEVEL / 2]).tolist()
        extraction = extract(decoder, codebook, some, tries=tries, seed=seed)
        found.append(
            Repetition(patients, Figure(float(bits.mean()), low, high), float(np.log2(rivals + 1)), extraction)
        )
    return tuple(found)


def exposure(decoder: Decoder, codebook: Codebook, course: Course, rivals: int, rng: np.random.Generator) -> float:
    """Bits by which a secret stands out: log2 of the number of courses less log2 of its rank among them by probability.

    The rivals are drawn as the secret was, so for a model that doesn't know it every rank is as likely: 1 / ln 2 = 1.44
    bits in the mean. Ties take half of the ranks they span.
    """
    others = canaries.walks(codebook, course.beginning, rivals, len(course.secret), rng)
    nll = _nll(decoder, course.beginning, [course.secret, *others])
    rank = 1 + (nll[1:] < nll[0]).sum() + 0.5 * (nll[1:] == nll[0]).sum()
    return float(np.log2(rivals + 1) - np.log2(rank))


def extract(decoder: Decoder, codebook: Codebook, courses: Sequence[Course], *, tries: int, seed: int) -> Extraction:
    """Roll out from the beginnings, and count the secrets that come out exactly."""
    if not courses:
        nothing = share_interval(0, 0)
        return Extraction(0, nothing, nothing, tries)
    prompts = [Prompt(course.beginning) for course in courses]
    told = []
    for trajectories, top_p in ((1, _GREEDY), (tries, 1.0)):
        # Longer secrets are cut to the shortest by whoever made them: all have one length.
        stop = Stop([], None, len(courses[0].secret))
        futures = rollout(
            *(decoder, codebook, prompts),
            trajectories=trajectories,
            stop=stop,
            seed=seed,
            top_p=top_p,
            keep_tokens=True,
        )
        hits = [
            any(np.array_equal(futures.trajectory(place, n), course.secret) for n in range(trajectories))
            for place, course in enumerate(courses)
        ]
        told.append(share_interval(sum(hits), len(hits)))
    return Extraction(len(courses), told[0], told[1], tries)


def rare(
    decoder: Decoder,
    codebook: Codebook,
    members: TokenSplit,
    others: TokenSplit,
    *,
    length: int,
    most: int,
    tries: int,
    seed: int,
) -> Rare:
    """Try to get out of a finished model what single patients alone had.

    Args:
        decoder: the model.
        codebook: of the tokens.
        members: patients it was trained on.
        others: patients it was not trained on.
        length: tokens of a secret; so many are known before it.
        most: patients of each kind who are asked about, one course of each.
        tries: sampled futures of each.
        seed: of choices and futures.
    """
    rng = np.random.default_rng(seed)
    mine, theirs = _unique(members, others, length, rng)
    rates = [
        extract(decoder, codebook, [each[n] for n in rng.permutation(len(each))[:most]], tries=tries, seed=seed)
        for each in (mine, theirs)
    ]
    return Rare(length, *rates)


def _unique(
    members: TokenSplit, others: TokenSplit, length: int, rng: np.random.Generator
) -> tuple[list[Course], list[Course]]:
    """One course of each patient that no other patient of either split has, if there is one."""
    both = canaries.plant(members, [others.timeline(n)[0] for n in range(len(others))])
    tokens, offsets = both.tokens.astype(np.uint64), both.offsets
    if len(tokens) < length:
        return [], []
    runs = np.lib.stride_tricks.sliding_window_view(tokens, length)
    # A random linear form modulo 2^64: two runs that differ agree with a probability of about 2^-63.
    weights = rng.integers(1, 2**63, length).astype(np.uint64) * np.uint64(2) + np.uint64(1)
    name = runs @ weights
    owner = np.repeat(np.arange(len(both)), np.diff(offsets))[: len(name)]
    inside = np.arange(len(name)) + length <= offsets[owner + 1]
    # So many tokens are known before the secret.
    asked = inside & (np.arange(len(name)) - offsets[owner] >= length)
    pairs = np.unique(np.stack([name[inside], owner[inside].astype(np.uint64)], 1), axis=0)
    names, counts = np.unique(pairs[:, 0], return_counts=True)
    places = np.flatnonzero(asked)
    places = rng.permutation(places[counts[np.searchsorted(names, name[places])] == 1])
    _, first = np.unique(owner[places], return_index=True)
    courses: tuple[list[Course], list[Course]] = ([], [])
    for place in places[first]:
        begin = int(offsets[owner[place]])
        told = both.tokens[begin : place + length].astype(np.int64)
        courses[int(owner[place] >= len(members))].append(Course(told[:-length], told[-length:]))
    return courses


def _nll(decoder: Decoder, beginning: Ints, goings: Sequence[Ints]) -> Floats:
    """Negative log-likelihood of each way to go on behind one beginning, float64 [K] in nats."""
    start = beginning[-max(1, decoder.config.context - len(goings[0])) :]
    width, length = len(start) + len(goings[0]), len(goings[0])
    told = np.stack([np.concatenate([start, going]) for going in goings])
    targets = np.full_like(told, NO_TARGET)
    targets[:, len(start) - 1 : -1] = told[:, len(start) :]
    found = []
    for part in np.array_split(np.arange(len(told)), -(-told.size // 8192)):
        lengths = np.full(len(part), width)
        batch = Batch(told[part].ravel(), targets[part].ravel(), lengths, part)
        with torch.no_grad():
            found.append(target_losses(decoder, batch)[0].reshape(len(part), length).sum(1))
    return np.concatenate(found)
