"""Trajectories are valid timelines, and end at the events asked for though several tokens spell a code."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.decoder import Decoder
from model.guide import Guide
from model.rollout import Prompt, Reason, Rollouts, Stop, rollout
from model.settings import DecoderConfig
from tests.tokenizer.hospital import spelling_codebook
from tokenizer import sketch
from tokenizer.codebook import Codebook, Survey, Token, TokenizerOptions
from tokenizer.encode import decode
from tokenizer.errors import ConfigError, DataError

MANY = replace(
    Survey(TokenizerOptions()),
    codes=dict.fromkeys(("ICD10CM//E11", "ICD10CM//E11.6", "ICD10CM//E11.65", "ICD10CM//E11.9", "VISIT"), 90),
    values={"LAB": dict.fromkeys((sketch.SHIFT, sketch.SHIFT + 50), 20)},
)
BOOKS = [spelling_codebook(), spelling_codebook("fused", icd10cm_split=(3, 1)), Codebook.build(MANY)]


def wordy(book: Codebook) -> Decoder:
    decoder = Decoder.create(DecoderConfig(len(book), 1, 32, 2, 2, 32, context=48), 5)
    with torch.no_grad():
        decoder.embed_tokens.weight.mul_(4.0)
        kinds = np.array([token.kind for token in book.tokens])
        # Let there be more pieces than one draw in a hundred.
        decoder.embed_tokens.weight[np.flatnonzero(kinds == "piece")] *= 3.0
        decoder.embed_tokens.weight[book.eot] *= 0.1
    return decoder


def prompt(book: Codebook) -> Prompt:
    words = (("age", "40-45"), ("code", "VISIT"), ("interval", "1-3d"), ("code", "VISIT"))
    return Prompt(np.array([book.id(Token(*word)) for word in words], np.int64))


def futures(book: Codebook, stop: Stop, *, grammar: bool = True, elapsed_us: int = 0) -> Rollouts:
    asked = [replace(prompt(book), elapsed_us=elapsed_us, key=key) for key in range(3)]
    return rollout(
        wordy(book), book, asked, trajectories=60, stop=stop, seed=1, batch_rows=50, keep_tokens=True, grammar=grammar
    )


def each(found: Rollouts) -> list[np.ndarray]:
    return [found.trajectory(place // 60, place % 60) for place in range(180)]


@pytest.mark.parametrize("book", BOOKS)
def test_every_trajectory_is_a_valid_timeline(book: Codebook) -> None:
    before = prompt(book).tokens
    found = each(futures(book, Stop([], None, 30)))
    assert all(book.grammar.accepts(np.concatenate([before, tokens])) for tokens in found)
    assert any((book.grammar.is_piece[tokens]).any() for tokens in found)
    for tokens in found[:20]:
        known = {*book.spelled, *(token.text for token in book.tokens if token.kind == "code")}
        assert all(
            code in known or code.endswith("*")
            for code in decode(tokens, book)["code"].to_list()
            if code != "MEDS_BIRTH"
        )


def test_without_the_grammar_they_are_not() -> None:
    book = BOOKS[0]
    free = each(futures(book, Stop([], None, 30), grammar=False))
    assert not all(book.grammar.accepts(np.concatenate([prompt(book).tokens, tokens])) for tokens in free)


@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("ICD10CM//E11.6", "ICD10CM//E11"),
        ("ICD10CM//E11", "VISIT"),
        ("ICD10CM//E11.65", "ICD10CM//E11.9"),
    ],
)
def test_a_trajectory_ends_with_the_first_event_asked_for(book: Codebook, first: str, second: str) -> None:
    masks = [book.matching([first]), book.matching([second])]
    masks[1] &= ~masks[0]
    found = futures(book, Stop(masks, None, 40))
    for place, tokens in enumerate(each(found)):
        reason, event = found.reason.flat[place], int(found.event.flat[place])
        _, nodes = book.grammar.events(tokens)
        told = np.where(masks[0][nodes], 0, np.where(masks[1][nodes], 1, -1))
        if reason == Reason.EVENT:
            assert told[-1] == event
            # A code that the cap on tokens cut short is not known yet.
            assert (told[:-1] == -1).all()
        else:
            assert (told[: len(told) - 1] == -1).all()
            assert event == -1
    assert {0, 1} <= set(found.event.ravel().tolist())


def test_a_code_that_may_go_on_is_told_by_what_follows() -> None:
    book = BOOKS[2]
    masks = [book.matching(["ICD10CM//E11.6"]), book.matching(["ICD10CM//E11"])]
    masks[1] &= ~masks[0]
    found = futures(book, Stop(masks, None, 40))
    ended = [tokens for tokens, event in zip(each(found), found.event.flat, strict=True) if event == 1]
    category = book.id(Token("code", "ICD10CM//E11"))
    assert any(tokens[-1] == category for tokens in ended)
    assert any(tokens[-1] != category for tokens in ended)
    times = [found.passed(0, place).sum() for place in range(found.reason.size)]
    assert found.elapsed_us.ravel().tolist() == times


@pytest.mark.parametrize("book", BOOKS)
def test_summed_chances_agree_with_how_trajectories_end(book: Codebook) -> None:
    masks = [book.matching(["ICD10CM//E11.6"]), book.matching(["ICD10CM//E11"])]
    masks[1] &= ~masks[0]
    stop = Stop(masks, 40 * 86_400_000_000, 25)
    found = rollout(wordy(book), book, [prompt(book)], trajectories=3000, stop=stop, seed=2, batch_rows=1500)
    for column, ended in enumerate([found.event == 0, found.event == 1, found.reason == Reason.HORIZON]):
        difference = found.chances[0, :, column] - ended[0]
        # Both have the same mean: the difference is a sum of martingale steps.
        assert ended.any()
        assert abs(difference.mean()) < 4 * difference.std() / 3000**0.5


def test_a_begun_code_counts_as_what_may_come_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same trajectories: the same mean, a smaller variance, and a chance before any code is begun."""
    book = BOOKS[0]
    stop = Stop([book.matching(["ICD10CM//E11.65"])], 40 * 86_400_000_000, 25)
    decoder = wordy(book)
    with torch.no_grad():  # what comes next depends on the last token only
        decoder.layers[0].self_attn.o_proj.weight.zero_()
        decoder.layers[0].mlp.down_proj.weight.zero_()

    def chances() -> np.ndarray:
        found = rollout(decoder, book, [prompt(book)], trajectories=2000, stop=stop, seed=2, batch_rows=1000)
        return found.chances[0, :, 0]

    ahead = chances()
    monkeypatch.setattr(Guide, "look_ahead", lambda self, after: None)
    behind = chances()
    assert abs((ahead - behind).mean()) < 4 * (ahead - behind).std() / 2000**0.5
    assert ahead.var() < 0.9 * behind.var()
    assert (behind == 0).mean() > 0.5
    assert (ahead == 0).mean() < 0.1


@pytest.mark.parametrize("days", [1, 200, 900])
def test_known_silence_is_kept_and_so_is_the_grammar(days: int) -> None:
    book, waited = BOOKS[0], days * 86_400_000_000
    found = futures(book, Stop([], None, 20), elapsed_us=waited)
    for place, tokens in enumerate(each(found)):
        assert book.grammar.accepts(np.concatenate([prompt(book).tokens, tokens]))
        kinds = [book.tokens[token].kind for token in tokens]
        first = next((n for n, kind in enumerate(kinds) if kind in ("code", "other")), len(kinds))
        assert kinds[0] != "interval" or found.passed(0, place)[:first].sum() >= waited


def test_draws_do_not_depend_on_the_batch() -> None:
    book = BOOKS[0]
    asked = [replace(prompt(book), key=key) for key in range(3)]
    many, few = (
        rollout(
            wordy(book), book, asked, trajectories=30, stop=Stop([], None, 20), seed=1, batch_rows=rows,
            keep_tokens=True,
        )
        for rows in (90, 7)
    )  # fmt: skip
    assert (many.tokens_sampled == few.tokens_sampled).mean() > 0.97


def test_the_nucleus_is_taken_from_what_the_grammar_allows() -> None:
    """Few kept of all tokens would often be none that may follow; every trajectory must be valid and none stuck."""
    book = BOOKS[0]
    found = rollout(
        wordy(book), book, [prompt(book)], trajectories=60, stop=Stop([], None, 30), seed=1, keep_tokens=True,
        top_p=0.3,
    )  # fmt: skip
    for place in range(60):
        assert book.grammar.accepts(np.concatenate([prompt(book).tokens, found.trajectory(0, place)]))
    everything = futures(book, Stop([], None, 30))
    assert len(set(found.tokens.tolist())) < len(set(everything.tokens.tolist())) / 2


def test_an_encounter_ends_with_its_end_or_with_a_death() -> None:
    survey = Survey(TokenizerOptions(min_patients=1), patients=9)
    survey = replace(survey, codes=dict.fromkeys(("ENCOUNTER_END//INPATIENT", "VISIT", "MEDS_DEATH"), 9))
    book = Codebook.build(survey)
    stop = Stop.at_encounter_end(book, max_tokens=50)
    found = rollout(wordy(book), book, [prompt(book)], trajectories=100, stop=stop, seed=1, keep_tokens=True)
    assert not (stop.outcomes[0] & stop.outcomes[1]).any()
    for place in np.flatnonzero(found.reason[0] == Reason.EVENT):
        _, nodes = book.grammar.events(found.trajectory(0, place))
        assert stop.outcomes[found.event[0, place]][nodes[-1]]
        assert not (stop.outcomes[0] | stop.outcomes[1])[nodes[:-1]].any()
    assert set(found.event[0]) >= {0, 1}
    with pytest.raises(ConfigError, match="no end of an encounter"):
        Stop.at_encounter_end(BOOKS[0], max_tokens=5)


def test_a_prompt_that_breaks_the_grammar_is_refused_by_name() -> None:
    book = BOOKS[0]
    wrong = Prompt(np.array([book.id(Token("interval", "1-3d")), book.id(Token("code", "VISIT"))]))
    with pytest.raises(DataError, match=r"prompt 1: token 0 .* grammar=False"):
        rollout(wordy(book), book, [prompt(book), wrong], trajectories=1, stop=Stop([], None, 2), seed=0)
