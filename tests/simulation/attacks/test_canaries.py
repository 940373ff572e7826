"""Canaries are drawn as they should be, and those left out are nobody."""

import numpy as np
import pytest
from scipy import stats

from model.private import Secret
from simulation.attacks.canaries import alone, chosen, finished, nobody, plant, scattered, walks
from tests.simulation.attacks import small
from tokenizer.errors import ConfigError
from tokenizer.windows import Windows

# Probability that a right sampler fails a test.
FALSE_ALARM = 1e-6
NOTHING = np.empty(0, np.int64)


def windows_of(split: object) -> Windows:
    return Windows(split, small.words(), context=64, batch_tokens=64, seed=0)  # type: ignore[arg-type]


def test_scattered_tokens_are_uniform_over_events() -> None:
    words = small.words()
    drawn = scattered(words, 400, 8, np.random.default_rng(1))
    assert all(len(row) == 9 and row[-1] == words.eot for row in drawn)
    tokens, counts = np.unique(np.concatenate([row[:-1] for row in drawn]), return_counts=True)
    kinds = {words.tokens[token].kind for token in tokens}
    assert not kinds & {"static", "age"}
    assert words.eot not in tokens
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_walks_follow_the_grammar_and_choose_uniformly() -> None:
    words, rng = small.words(), np.random.default_rng(2)
    for walk in walks(words, NOTHING, 200, 12, rng):
        assert words.grammar.accepts(walk)
        whole = finished(words, walk)
        assert words.grammar.accepts(whole)
        assert whole[-1] == words.eot
        assert (whole[:-1] == walk[: len(whole) - 1]).all()
    allowed = np.flatnonzero(words.grammar.allowed(np.array([words.grammar.start]))[0])
    allowed = allowed[allowed != words.eot]
    first = np.concatenate(walks(words, NOTHING, 3000, 1, rng))
    tokens, counts = np.unique(first, return_counts=True)
    assert tokens.tolist() == allowed.tolist()
    assert stats.chisquare(counts).pvalue > FALSE_ALARM


def test_walks_go_on_from_where_a_timeline_stands() -> None:
    words = small.words()
    start = small.patients(1, 30).timeline(3)[0][:5].astype(np.int64)
    for walk in walks(words, start, 50, 6, np.random.default_rng(0)):
        assert words.grammar.accepts(np.concatenate([start, walk]))
    with pytest.raises(ConfigError, match="breaks the codebook's grammar"):
        walks(words, np.array([words.eot, words.eot]), 1, 3, np.random.default_rng(0))


def test_planted_patients_stand_behind_the_others() -> None:
    words, split = small.words(), small.patients(1, 30)
    canaries = scattered(words, 3, 5, np.random.default_rng(0))
    both = plant(split, canaries)
    assert len(both) == len(split) + 3
    for place in range(len(split)):
        np.testing.assert_array_equal(both.timeline(place)[0], split.timeline(place)[0])
    for place, canary in enumerate(canaries):
        np.testing.assert_array_equal(both.timeline(len(split) + place)[0], canary)
    assert (both.subject_ids[len(split) :] < 0).all()
    np.testing.assert_array_equal(chosen(split, np.array([4, 2])).timeline(1)[0], split.timeline(2)[0])
    assert len(alone([])) == 0


def test_who_is_left_out_is_counted_and_never_trained_on() -> None:
    words = small.words()
    split = plant(
        small.patients(1, 30), [nobody(words), *scattered(words, 1, 5, np.random.default_rng(0)), nobody(words)]
    )
    absent, present = {30, 32}, 31
    windows = windows_of(split)
    seen = {int(patient) for batch in windows.epoch(0) for patient in batch.patients}
    assert present in seen
    assert not absent & seen
    secret = Secret(small.KEY, "draw")
    everybody = secret.chosen(len(split), 1.0)
    batch = windows.draw(everybody, secret.uniform(2 * len(everybody)).reshape(-1, 2))
    assert present in batch.patients
    assert not absent & set(batch.patients.tolist())
