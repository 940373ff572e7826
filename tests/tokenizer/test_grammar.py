"""The grammar accepts what `encode` writes, and what it lets through can be read and written again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.hospital import (
    NAMED,
    RARE,
    SPELLED,
    STATICS,
    UNSPELLED,
    codebook,
    frame,
    histories,
    spelling_codebook,
)
from tests.tokenizer.plain import encode_plainly
from tokenizer.codebook import Token
from tokenizer.encode import decode, encode
from tokenizer.events import canonical_order

BOOKS = {
    "separate": codebook("separate"),
    "fused": codebook("fused"),
    "spelled": spelling_codebook("separate"),
    "spelled, fused": spelling_codebook("fused", icd10cm_split=(3, 1), intervals="ethos19"),
    "axes": spelling_codebook("separate", icd10pcs_split=(1,) * 6, atc_split=()),
}
books = st.sampled_from(list(BOOKS))
rows = histories(codes=NAMED + RARE + SPELLED + UNSPELLED, statics=STATICS)


@st.composite
def walks(draw, book, most=60):
    """Tokens that the grammar allows, to the end of the timeline."""
    grammar, tokens = book.grammar, []
    state = np.array([grammar.start])
    for _ in range(draw(st.integers(0, most))):
        # Each kind alike, or else there would be codes only.
        allowed = np.flatnonzero(grammar.allowed(state)[0]).tolist()
        kinds = sorted({book.tokens[token].kind for token in allowed})
        kind = draw(st.sampled_from(kinds))
        tokens.append(draw(st.sampled_from([token for token in allowed if book.tokens[token].kind == kind])))
        state = grammar.step(state, np.array(tokens[-1:]))
        if tokens[-1] == book.eot:
            return tokens
    while not grammar.allowed(state)[0, book.eot]:
        # Close what is open: the last allowed token is a piece, an event or EOT, never time.
        events = [t for t in np.flatnonzero(grammar.allowed(state)[0]).tolist() if book.tokens[t].kind != "interval"]
        tokens.append(max(events, key=lambda t: book.tokens[t].kind in ("piece", "other")))
        state = grammar.step(state, np.array(tokens[-1:]))
    return [*tokens, book.eot]


walked = books.flatmap(lambda name: st.tuples(st.just(name), walks(BOOKS[name])))


@given(rows, books)
def test_every_encoded_timeline_is_accepted(rows, name):
    book = BOOKS[name]
    encoded = encode(canonical_order(frame(rows)), book)
    for begin, end in zip(encoded.offsets, encoded.offsets[1:], strict=False):
        assert book.grammar.accepts(encoded.tokens[begin:end])


@given(rows, books)
def test_the_fast_encoder_agrees_with_the_plain_one_on_spelled_codes(rows, name):
    encoded = encode(canonical_order(frame(rows)), BOOKS[name])
    pairs = list(zip(encoded.tokens.tolist(), encoded.times.tolist(), strict=True))
    spans = zip(encoded.subject_ids.tolist(), encoded.offsets, encoded.offsets[1:], strict=False)
    plain = encode_plainly(rows, BOOKS[name])
    assert {subject: pairs[begin:end] for subject, begin, end in spans} == plain


def moments(tokens, book):
    """Events, as tuples of tokens, between intervals; the sets that a decoded timeline keeps."""
    told, kinds = [[]], [book.tokens[token].kind for token in tokens]
    for token, kind in zip(np.asarray(tokens).tolist(), kinds, strict=True):
        if kind == "interval":
            told += [[token], []]
        elif kind in ("piece", "value"):
            told[-1][-1] += (token,)
        elif kind != "age":
            told[-1].append((token,))
    return [sorted(part) if part and isinstance(part[0], tuple) else part for part in told]


@given(walked)
def test_walks_through_the_grammar_are_events_that_encode_to_themselves(walk):
    name, tokens = walk
    book = BOOKS[name]
    assert book.grammar.accepts(np.array(tokens))
    events = decode(np.array(tokens, np.int32), book)
    if not len(events):
        assert tokens == [book.eot]
        return
    encoded = encode(events, book)
    assert moments(encoded.tokens, book) == moments(tokens, book)
    assert int(encoded.events.sum()) == len(book.grammar.events(np.array(tokens))[0]) + sum(
        book.tokens[token].kind == "static" for token in tokens
    )


@given(books.flatmap(lambda name: st.tuples(st.just(name), walks(BOOKS[name]), st.integers(0, 10**6))))
def test_asking_token_by_token_all_at_once_and_by_mask_is_the_same(case):
    name, tokens, spoiler = case
    book, grammar = BOOKS[name], BOOKS[name].grammar
    tokens = np.array([*tokens, *np.random.default_rng(spoiler).integers(0, len(book), 4)])
    state, states = np.array([grammar.start]), []
    for token in tokens:
        mask = grammar.allowed(state)[0]
        everything = np.arange(len(book))
        assert (grammar.permits(np.repeat(state, len(book)), everything) == mask).all()
        assert (grammar.allowed(grammar.same_mask(state))[0] == mask).all()
        state = grammar.step(state, token[None])
        states.append(int(state[0]))
        assert bool(grammar.is_dead(state)[0]) == (
            not mask[token] or (len(states) > 1 and grammar.is_dead(np.array(states[-2:-1]))[0])
        )
    assert grammar.states(tokens).tolist() == states


def ids(book, *words):
    return np.array([book.id(Token(*word)) for word in words])


SEX, AGE, OLDER = ("static", "SEX//F"), ("age", "40-45"), ("age", "45-50")
VISIT, LAB, EOT = ("code", "VISIT"), ("code", "LAB//B"), ("special", "eot")
DAY, LONG = ("interval", "1-3d"), ("interval", "6mo+")
E11, DEEP, STAR, I10 = ("code", "ICD10CM//E11"), ("piece", "ICD10CM//2//65"), ("piece", "*"), ("code", "ICD10CM//I10")
PIECE_OF_A_HIP = ("piece", "ICD10CM//2//001")


@pytest.mark.parametrize(
    "words",
    [
        (EOT,),
        (SEX, SEX, EOT),
        (SEX, AGE, VISIT, DAY, OLDER, VISIT, LAB, ("value", "Q3"), EOT),
        (VISIT, LONG, LONG, VISIT),
        (E11, DEEP, VISIT, E11, STAR, I10, I10, EOT),
        (("other", ""), ("other", "LAB")),
    ],
)
def test_what_the_grammar_accepts(words):
    book = BOOKS["spelled"]
    assert book.grammar.accepts(ids(book, *words))


@pytest.mark.parametrize(
    "words",
    [
        (DAY, VISIT),
        (VISIT, DAY, DAY),
        (VISIT, DAY, LONG),
        (VISIT, LONG, DAY),
        (VISIT, DAY, EOT),
        (VISIT, SEX),
        (VISIT, AGE, VISIT),
        (VISIT, DAY, AGE),
        (AGE, EOT),
        (AGE, DAY),
        (AGE, VISIT, DAY, AGE),
        (OLDER, VISIT, DAY, AGE),
        (SEX, ("value", "Q1")),
        (VISIT, ("value", "Q1")),
        (LAB, ("value", "Q4")),
        (LAB, ("value", "Q1"), ("value", "Q1")),
        (E11, VISIT),
        (E11, EOT),
        (E11, DAY),
        (E11, PIECE_OF_A_HIP),
        (E11, DEEP, STAR),
        (VISIT, DEEP),
        (DEEP,),
        (I10, STAR),
        (I10, DEEP),
        (EOT, EOT),
        (("special", "unk"),),
        (VISIT, ("special", "pad")),
    ],
)
def test_what_the_grammar_refuses(words):
    book = BOOKS["spelled"]
    tokens = ids(book, *words)
    wrong = not book.grammar.accepts(tokens)
    if words == (VISIT, DAY, AGE):
        assert wrong, "who told no age at first has none"
    assert wrong
    assert book.grammar.is_dead(book.grammar.states(np.append(tokens, book.id(Token(*VISIT)))))[-1]


def test_events_are_named_by_nodes():
    book = BOOKS["spelled"]
    tokens = ids(book, SEX, VISIT, E11, DEEP, DAY, E11, STAR, LAB, ("value", "Q2"), I10, EOT)
    places, nodes = book.grammar.events(tokens)
    assert places.tolist() == [1, 3, 6, 7, 9]
    assert [book.event(node) for node in nodes.tolist()] == [
        *("VISIT", "ICD10CM//E11.65", "ICD10CM//E11//*", "LAB//B", "ICD10CM//I10")
    ]


def test_a_class_is_known_as_soon_as_all_ways_on_share_it():
    book = BOOKS["spelled"]
    classes = np.where(book.matching(["ICD10CM//E11.6"]), 1, -1)
    known = book.grammar.decided(classes)
    category = book.id(Token(*E11))
    assert known[category] == -2
    assert book.grammar.decided(np.where(book.matching(["ICD10CM//E11"]), 1, -1))[category] == 1
    assert known[book.id(Token(*VISIT))] == -1
    deep = np.flatnonzero(book.matching(["ICD10CM//E11.65"]))
    assert (known[deep] == 1).all()
