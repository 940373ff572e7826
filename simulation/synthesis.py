"""One-shot timeline synthesis: each site trains a model of its own and makes timelines up; a server learns from these.

The arm "synthesis" of studies, after Federated Timeline Synthesis (arXiv 2506.23358), with one exchange instead of
rounds. There the sites' models travel and the server generates; here timelines travel, which are what a model tells of
its patients, and the models stay.

What leaves a site are made-up timelines, whole ones, and this is not private by itself: a model that has learnt a rare
course by heart may tell it, so a made-up timeline can be a real patient's (`fedcomet audit` measures such memory). With
[privacy] in the study the sites' models are differentially private, and so, for each patient and with the same
(epsilon, delta), is all that is drawn from them, however much (post-processing) - but for how timelines begin: fixed
facts and the first age are those of real patients, in the shares that they have at the site, of which only such as
`least_patients` have in common. That is a threshold, not a proof; `least_patients` is to be chosen as a floor of
counts is.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from model import checkpoint
from model.rollout import Prompt, Stop, rollout
from tokenizer.codebook import Codebook
from tokenizer.encode import decode
from tokenizer.errors import DataError
from tokenizer.events import write_meds
from tokenizer.store import TokenSplit, TokenStore

_FIRST_DAY_US = 1_420_070_400_000_000
"""2015-01-01, where all made-up timelines begin: tokens know no dates."""


@dataclass(frozen=True)
class Wanted:
    """What to make up.

    Attributes:
        timelines: how many; None makes as many as there are train patients.
        max_tokens: of one, behind its beginning; a timeline that is longer ends there.
        least_patients: train patients that a beginning stands for.
        seed: equal seeds give equal timelines.
        first_id: subject ids count from here.
    """

    timelines: int | None
    max_tokens: int
    least_patients: int
    seed: int
    first_id: int


def make_up(model: Path, codebook: Path, store: Path, wanted: Wanted, out: Path) -> int:
    """Let a site's model make timelines up, and write them as a MEDS dataset, which appears whole or not at all.

    Args:
        model: the checkpoint of the site's own model.
        codebook: of its tokens.
        store: the site's; only how train patients' timelines begin is read.
        wanted: how many, and how long.
        out: the dataset's folder.

    Returns:
        How many timelines there are.

    Raises:
        DataError: no beginning is shared by so many patients.
    """
    words = Codebook.load(codebook)
    decoder = checkpoint.load(model, words.hash).decoder
    train = TokenStore.open(store, words.hash).split("train")
    count = len(train) if wanted.timelines is None else wanted.timelines
    begun = _drawn(beginnings(train, words, wanted.least_patients), count, wanted.seed)
    prompts = [Prompt(tokens, key=number) for number, tokens in enumerate(begun)]
    stop = Stop((), None, wanted.max_tokens)
    told = rollout(decoder, words, prompts, trajectories=1, stop=stop, seed=wanted.seed, keep_tokens=True)
    timelines = (np.concatenate([tokens, told.trajectory(n, 0)]).astype(np.int32) for n, tokens in enumerate(begun))
    frames = [
        decode(tokens, words, start_us=_FIRST_DAY_US, subject_id=wanted.first_id + number)
        for number, tokens in enumerate(timelines)
    ]
    write_meds(out, [("0", pl.concat(frames))], name="made-up timelines")
    return count


def beginnings(split: TokenSplit, codebook: Codebook, least: int) -> dict[tuple[int, ...], int]:
    """Count how timelines begin: their static tokens and first age, of those that `least` patients or more share.

    Raises:
        DataError: there is none.
    """
    kinds = np.array([token.kind for token in codebook.tokens])
    counts: Counter[tuple[int, ...]] = Counter()
    for patient in range(len(split)):
        tokens = split.timeline(patient)[0]
        header = int(np.argmin(kinds[tokens] == "static"))
        header += int(kinds[tokens[header]] == "age")
        if header:
            counts[tuple(tokens[:header].tolist())] += 1
    shared = {begun: count for begun, count in sorted(counts.items()) if count >= least}
    if not shared:
        most = max(counts.values(), default=0)
        raise DataError(
            f"synthesis: no fixed facts and first age are shared by {least} train patients, at most by {most}; "
            "lower synthesis.least_patients, or take a site with more patients"
        )
    return shared


def _drawn(shared: dict[tuple[int, ...], int], count: int, seed: int) -> list[NDArray[np.int64]]:
    """Draw beginnings in the shares that they have."""
    every = [np.array(begun, np.int64) for begun in shared]
    weights = np.array(list(shared.values()), np.float64)
    chosen = np.random.default_rng([seed, 5]).choice(len(every), count, p=weights / weights.sum())
    return [every[place] for place in chosen]
