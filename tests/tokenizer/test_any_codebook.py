"""Whatever codes a survey holds, its codebook, grammar, encoder and decoder agree."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.hospital import NAMED, RARE, SPELLED, STATICS, UNSPELLED, frame, histories
from tests.tokenizer.plain import encode_plainly
from tests.tokenizer.test_grammar import moments, walks
from tokenizer import sketch, spelling
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.encode import decode, encode
from tokenizer.events import canonical_order

CODES = (*SPELLED, *UNSPELLED, *NAMED, *RARE, "ATC//C", "ATC//C03", "ICD10PCS//0DT", "ICD9CM//250.00", "ICD9CM//V10")
ABOVE = sorted({parent for code in CODES for parent in spelling.ancestors(spelling.canonical(code))})


@st.composite
def options(draw):
    return TokenizerOptions(
        values=draw(st.sampled_from(["separate", "fused"])),
        intervals=draw(st.sampled_from(["comet13", "ethos19"])),
        icd10cm_split=draw(st.sampled_from([(3,), (3, 1), (3, 3), ()])),
        icd10pcs_split=draw(st.sampled_from([(), (3,), (1,) * 6])),
        atc_split=draw(st.sampled_from([(), (1,), (1, 2, 1, 1)])),
        named=tuple(draw(st.lists(st.sampled_from(CODES), max_size=2, unique=True))),
    )


@st.composite
def surveys(draw, options):
    codes = [spelling.canonical(code) for code in draw(st.lists(st.sampled_from(CODES), max_size=6, unique=True))]
    scores = sketch.bucket_of(np.array([0.0, 1.0, 2.0]), options.sketch_accuracy).tolist()
    valued = draw(st.lists(st.sampled_from(codes), max_size=3, unique=True)) if codes else []
    return Survey(
        options,
        patients=100,
        codes=dict.fromkeys(codes, 50),
        prefixes=dict.fromkeys(draw(st.lists(st.sampled_from(ABOVE), max_size=4, unique=True)), 20),
        statics=dict.fromkeys(draw(st.lists(st.sampled_from(STATICS), max_size=2, unique=True)), 50),
        values={code: dict.fromkeys(scores, 40) for code in valued},
    )


books = options().flatmap(surveys).map(Codebook.build)
pairs_of_surveys = options().flatmap(lambda options: st.tuples(surveys(options), surveys(options)))


def check(book, rows):
    assert Codebook.from_bytes(book.to_bytes()).hash == book.hash
    encoded = encode(canonical_order(frame(rows)), book)
    pairs = list(zip(encoded.tokens.tolist(), encoded.times.tolist(), strict=True))
    spans = list(zip(encoded.subject_ids.tolist(), encoded.offsets, encoded.offsets[1:], strict=False))
    assert {subject: pairs[begin:end] for subject, begin, end in spans} == encode_plainly(rows, book)
    for _, begin, end in spans:
        assert book.grammar.accepts(encoded.tokens[begin:end])


@given(books, histories(codes=CODES, statics=STATICS))
def test_histories(book, rows):
    check(book, rows)


@given(pairs_of_surveys, histories(codes=CODES, statics=STATICS))
def test_a_later_version_keeps_every_token(surveys, rows):
    book = Codebook.build(surveys[0])
    later = book.extend(surveys[1])
    assert later.tokens[: len(book)] == book.tokens
    assert book.extend(surveys[0]).tokens == book.tokens
    check(later, rows)


@given(books.flatmap(lambda book: st.tuples(st.just(book), walks(book, most=30))))
def test_walks(walk):
    book, tokens = walk
    events = decode(np.array(tokens, np.int32), book)
    if len(events):
        assert moments(encode(events, book).tokens, book) == moments(tokens, book)
    else:
        assert tokens == [book.eot]
    texts = [book.event(node) for node in book.grammar.events(np.array(tokens))[1]]
    assert all(book.matching([text.removesuffix("//*")]).any() for text in texts if text != "*")
