"""A tiny artificial language, learned end to end: what a trained model says obeys it, held to the grammar or not.

The language has rules that the codebook's grammar knows (a value follows its code, an interval stands between events)
and one of its own that only training can teach: a LOW value is followed by TREAT, a HIGH one by REST.
"""

import itertools

import numpy as np
import pytest

from model.decoder import Decoder
from model.rollout import Prompt, Rollouts, Stop, rollout
from model.settings import DecoderConfig, TrainOptions
from model.train import Trainer
from tokenizer import sketch
from tokenizer.codebook import Codebook, Survey, Token, TokenizerOptions
from tokenizer.windows import Batch

STEPS, LENGTH = 300, 42


@pytest.fixture(scope="module")
def book() -> Codebook:
    options = TokenizerOptions(min_patients=1, value_bins=2)
    values = {sketch.SHIFT: 50, sketch.SHIFT + 60: 50}
    return Codebook.build(
        Survey(options, patients=9, codes=dict.fromkeys(("LAB", "TREAT", "REST"), 100), values={"LAB": values})
    )


def sentence(book: Codebook, rng: np.random.Generator, events: int) -> list[int]:
    """LAB, its value, what the value asks for, an interval; again and again, and the end."""
    lab, treat, rest = (book.id(Token("code", code)) for code in ("LAB", "TREAT", "REST"))
    values = [place for place, token in enumerate(book.tokens) if token.kind == "value"][:2]
    gaps = [place for place, token in enumerate(book.tokens) if token.kind == "interval"][3:5]
    said: list[int] = []
    for _ in range(events):
        low = rng.random() < 0.5
        said += [lab, values[0] if low else values[1], treat if low else rest, int(rng.choice(gaps))]
    return [*said[:-1], book.eot]


@pytest.fixture(scope="module")
def decoder(book: Codebook) -> Decoder:
    rng = np.random.default_rng(0)
    decoder = Decoder.create(DecoderConfig(len(book), 2, 32, 2, 2, 64, context=64), 0)
    trainer = Trainer(decoder, TrainOptions(lr=1e-2, warmup_steps=10, total_steps=STEPS))
    for _ in range(STEPS):
        said = [sentence(book, rng, int(rng.integers(4, 10))) for _ in range(16)]
        tokens = np.concatenate([np.array(words, dtype=np.int64) for words in said])
        lengths = np.array([len(words) for words in said])
        targets = np.roll(tokens, -1)
        targets[np.cumsum(lengths) - 1] = -1
        trainer.step(Batch(tokens, targets, lengths, np.arange(len(lengths))))
    return decoder


def futures(decoder: Decoder, book: Codebook, *, grammar: bool) -> Rollouts:
    begun = Prompt(np.array(sentence(book, np.random.default_rng(1), 2)[:-1]))
    return rollout(
        decoder, book, [begun], trajectories=200, stop=Stop([], None, LENGTH), seed=0, keep_tokens=True,
        grammar=grammar,
    )  # fmt: skip


def valid(book: Codebook, found: Rollouts) -> float:
    """Share of trajectories that the codebook's grammar accepts behind the prompt."""
    before = sentence(book, np.random.default_rng(1), 2)[:-1]
    told = [found.trajectory(0, row) for row in range(200)]
    return float(np.mean([book.grammar.accepts(np.concatenate([before, tokens])) for tokens in told]))


def test_what_a_trained_model_says_is_valid_and_an_untrained_one_is_not(decoder: Decoder, book: Codebook) -> None:
    fresh = Decoder.create(decoder.config, 0)
    assert valid(book, futures(decoder, book, grammar=True)) == 1
    assert valid(book, futures(fresh, book, grammar=True)) == 1
    assert valid(book, futures(decoder, book, grammar=False)) > 0.97
    assert valid(book, futures(fresh, book, grammar=False)) < 0.05


def test_the_rule_that_only_training_can_teach_is_kept(decoder: Decoder, book: Codebook) -> None:
    found = futures(decoder, book, grammar=True)
    treat, rest = (book.id(Token("code", code)) for code in ("TREAT", "REST"))
    values = [place for place, token in enumerate(book.tokens) if token.kind == "value"][:2]
    kept = told = lows = 0
    for row in range(200):
        tokens = found.trajectory(0, row)
        for value, after in itertools.pairwise(tokens.tolist()):
            if value in values:
                told += 1
                lows += int(value == values[0])
                kept += int(after == (treat if value == values[0] else rest))
    assert told > 500
    assert kept / told > 0.98
    # Values are fair coins: within 5 standard errors and what training leaves unlearned.
    assert abs(lows / told - 0.5) < 5 * 0.5 / told**0.5 + 0.1
