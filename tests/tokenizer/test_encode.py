"""Events become tokens by the grammar, and tokens readable events."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.hospital import DAY, MINUTE, NAMED, STATICS, codebook, frame, histories
from tests.tokenizer.plain import encode_plainly
from tokenizer.codebook import STATIC, Token
from tokenizer.encode import decode, encode
from tokenizer.events import canonical_order

BOOKS = {values: codebook(values) for values in ("separate", "fused")}
MODES = st.sampled_from(["separate", "fused"])


def told(tokens, book):
    return [f"{book.tokens[t].text}{book.tokens[t].bin or ''}" for t in tokens]


def timelines(rows, book):
    encoded = encode(canonical_order(frame(rows)), book)
    assert encoded.tokens.dtype == np.int32
    pairs = list(zip(encoded.tokens.tolist(), encoded.times.tolist(), strict=True))
    spans = zip(encoded.offsets, encoded.offsets[1:], strict=False)
    return {
        subject: pairs[begin:end] for subject, (begin, end) in zip(encoded.subject_ids.tolist(), spans, strict=True)
    }


def test_a_history_is_told_by_the_grammar():
    book = BOOKS["separate"]
    rows = [
        (1, None, "SEX//F", None),
        (1, None, "SEX//X", None),
        (1, -(40 * 366 * DAY), "MEDS_BIRTH", None),
        (1, 0, "VISIT", None),
        (1, 30_000_000, "LAB//B", 2.0),
        (1, 10 * MINUTE, "MEDS_DEATH", None),
        (1, 10 * MINUTE, "DX//I10//9", None),
        (1, 10 * MINUTE, "VISIT", None),
        (1, 10 * MINUTE + 365 * DAY, "LAB//A", -30.0),
        (2, 0, "LAB//A", None),
    ]
    encoded = encode(canonical_order(frame(rows)), book)
    assert told(encoded.tokens, book) == [
        *("SEX//F", "SEX//*"),
        *("40-45", "VISIT"),
        *("LAB//B", "Q3"),
        *("5-15min", "DX//I10", "VISIT", "MEDS_DEATH"),
        *("6mo+", "6mo+", "LAB//A", "Q1", "eot"),
        *("LAB//A", "eot"),
    ]
    assert encoded.times[:4].tolist() == [STATIC, STATIC, 0, 0]
    assert encoded.times[6] == 10 * MINUTE, "an interval carries the time of the event after it"
    assert encoded.times[-1] == 0
    assert encoded.fallbacks == {"ancestor": {"DX//I10//9": 1}, "unknown": {"SEX//X": 1}}
    assert encoded.events.tolist() == [8, 1]


def test_the_age_is_told_again_when_its_bucket_changes():
    book = BOOKS["separate"]
    rows = [(1, 0, "MEDS_BIRTH", None), *((1, year * 366 * DAY, "VISIT", None) for year in (4, 5, 6, 130))]
    ages = [text for text in told(encode(frame(rows), book).tokens, book) if "-" in text or "120" in text]
    assert [age for age in ages if not age.endswith(("mo", "d"))] == ["0-5", "5-10", "120+"]


def test_fused_tokens_hold_code_and_bin():
    book = BOOKS["fused"]
    rows = [(1, 0, "LAB//B", 0.0), (1, 0, "LAB//B", None), (1, 0, "LAB//B", 2.0), (1, 0, "VISIT", 7.0)]
    assert told(encode(canonical_order(frame(rows)), book).tokens, book) == [
        "LAB//B",
        "LAB//B1",
        "LAB//B3",
        "VISIT",
        "eot",
    ]


def test_a_patient_without_events_is_an_end_of_timeline():
    encoded = encode(frame([(3, 0, "MEDS_BIRTH", None)]), BOOKS["separate"])
    assert (encoded.tokens.tolist(), encoded.times.tolist()) == ([1], [STATIC])
    assert encoded.offsets.tolist() == [0, 1]


def test_no_patients_make_no_tokens():
    encoded = encode(frame([]), BOOKS["separate"])
    assert len(encoded.tokens) == len(encoded.times) == len(encoded.subject_ids) == 0
    assert encoded.offsets.tolist() == [0]


@given(histories(), MODES)
def test_the_fast_encoder_agrees_with_the_plain_one(rows, mode):
    assert timelines(rows, BOOKS[mode]) == encode_plainly(rows, BOOKS[mode])


@given(histories(), st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    assert timelines(rows, BOOKS["separate"]) == timelines(shuffled, BOOKS["separate"])


@given(histories(), st.integers(0, 20))
def test_a_history_cut_by_time_is_a_prefix_of_the_whole(rows, at):
    """What a model may see at time t doesn't depend on what came after t."""
    book = BOOKS["separate"]
    times = sorted(row[1] for row in rows if row[1] is not None)
    if not times:
        return
    cut = times[at % len(times)]
    early = timelines([row for row in rows if row[1] is None or row[1] <= cut], book)
    # A birth after the cut would be a birth told from the future: such a patient has no events yet.
    born_late = {row[0] for row in rows if row[2] == "MEDS_BIRTH" and row[1] > cut}
    whole = timelines(rows, book)
    for subject, timeline in early.items():
        if subject not in born_late:
            seen = [pair for pair in whole[subject] if pair[1] <= cut and pair[0] != book.eot]
            assert timeline[:-1] == seen


apart = st.integers(MINUTE, 5 * 365 * DAY)


@given(histories(codes=NAMED, statics=STATICS[:1], gaps=apart), MODES, st.integers(-(10**15), 10**15))
def test_decoded_tokens_encode_to_themselves(rows, mode, start):
    book = BOOKS[mode]
    encoded = encode(canonical_order(frame(rows)), book)
    for begin, end in zip(encoded.offsets, encoded.offsets[1:], strict=False):
        tokens = encoded.tokens[begin:end]
        events = decode(tokens, book, start_us=start)
        again = encode(events, book).tokens
        if len(events):
            aged = np.array([token.kind == "age" for token in book.tokens])
            assert again[~aged[again]].tolist() == tokens[~aged[tokens]].tolist()
            # Once the gaps are the representative ones, ages fall where they are told.
            assert encode(decode(again, book, start_us=start), book).tokens.tolist() == again.tolist()


@given(histories(), MODES)
def test_decoding_loses_no_event_of_any_timeline(rows, mode):
    book = BOOKS[mode]
    encoded = encode(canonical_order(frame(rows)), book)
    age = np.array([token.kind == "age" for token in book.tokens])
    for begin, end in zip(encoded.offsets, encoded.offsets[1:], strict=False):
        tokens = encoded.tokens[begin:end]
        events = decode(tokens, book, subject_id=9)
        again = encode(events, book).tokens if len(events) else tokens
        assert sorted(again[~age[again]]) == sorted(tokens[~age[tokens]])


def test_decoded_events_are_readable():
    book = BOOKS["separate"]
    texts = [("static", "SEX//F"), ("age", "40-45"), ("code", "VISIT"), ("interval", "1-3d")]
    texts += [("code", "LAB//B"), ("value", "Q3"), ("other", "LAB"), ("other", ""), ("special", "eot")]
    tokens = np.array([book.id(Token(*text)) for text in texts], np.int32)
    events = decode(tokens, book, subject_id=7)
    assert events["code"].to_list() == ["SEX//F", "MEDS_BIRTH", "VISIT", "*", "LAB//*", "LAB//B"]
    assert events["subject_id"].unique().to_list() == [7]
    assert events["numeric_value"].to_list()[-1] == pytest.approx(2.0, rel=0.01)
    gap = int(book.advance_us[tokens[3]])
    assert events["time"].cast(pl.Int64).to_list()[2:] == [0, gap, gap, gap]
    assert events["time"].dtype == pl.Datetime("us")


@given(st.lists(st.integers(0, len(BOOKS["separate"]) - 1), max_size=30), MODES)
def test_any_sampled_tokens_can_be_read(tokens, mode):
    events = decode(np.array(tokens, np.int32) % len(BOOKS[mode]), BOOKS[mode])
    encode(events, BOOKS[mode])
