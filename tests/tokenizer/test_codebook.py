"""Surveys merge exactly, and the codebook is a pure function of what they say."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.hospital import DAY, MINUTE, codebook
from tokenizer import sketch
from tokenizer.codebook import INTERVALS, Codebook, Survey, Token, TokenizerOptions, merge, parents
from tokenizer.errors import ConfigError, DataError

OPTIONS = TokenizerOptions(min_patients=5)
counts = st.integers(5, 2**40)
names = st.text("AB/é", min_size=1, max_size=6)
buckets = st.sampled_from(
    [sign * (sketch.SHIFT + key) for sign in (-1, 0, 1) for key in (-9, 0, 5000) if sign or not key]
)
cells = st.dictionaries(buckets, counts, min_size=1)
surveys = st.builds(
    Survey,
    st.just(OPTIONS),
    patients=st.just(0) | counts,
    codes=st.dictionaries(names, counts),
    prefixes=st.dictionaries(names, counts),
    statics=st.dictionaries(names, counts),
    static_prefixes=st.dictionaries(names, counts),
    values=st.dictionaries(names, cells),
    gaps=st.dictionaries(st.sampled_from(list(INTERVALS)[:-1]), cells),
)


@given(st.lists(surveys, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_merging_gives_the_same_bytes_in_any_order_and_grouping(sites, random):
    whole = merge(sites).to_bytes()
    assert merge(random.sample(sites, len(sites))).to_bytes() == whole
    cut = random.randint(1, len(sites))
    grouped = [merge(sites[:cut]), *([merge(sites[cut:])] if sites[cut:] else [])]
    assert merge(grouped).to_bytes() == whole


@given(surveys)
def test_a_survey_survives_the_wire(survey):
    assert Survey.from_bytes(survey.to_bytes()) == survey
    assert merge([survey]) == survey


@given(surveys)
def test_a_codebook_survives_the_wire_and_depends_on_the_survey_only(survey):
    book = Codebook.build(survey)
    again = Codebook.from_bytes(book.to_bytes())
    assert again.to_bytes() == book.to_bytes() == Codebook.build(survey).to_bytes()
    assert again.hash == book.hash == hashlib.sha256(book.to_bytes()).hexdigest()
    assert again.tokens == book.tokens
    assert len(set(book.tokens)) == len(book)
    for place, token in enumerate(book.tokens):
        assert book.id(token) == place


@pytest.mark.parametrize("tampered", [{"codes": {"A": 4}}, {"patients": 3}, {"values": {"A": {"7": 4}}}])
def test_a_survey_below_its_own_floor_is_refused(tampered):
    content = json.loads(Survey(OPTIONS, patients=9).to_bytes()) | tampered
    with pytest.raises(DataError, match="below the floor of 5"):
        Survey.from_bytes(json.dumps(content).encode())


def test_a_count_beyond_belief_is_refused():
    with pytest.raises(DataError, match="above"):
        Survey.from_bytes(Survey(OPTIONS, codes={"A": 2**62}).to_bytes())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"format":"fedcomet-survey/0"}',
        Survey(OPTIONS).to_bytes().replace(b'"codes":{}', b'"codes":{"A":7.5}'),
        Survey(OPTIONS).to_bytes().replace(b'"codes":{}', b'"codes":[]'),
        Survey(OPTIONS).to_bytes().replace(b'"codes":{}', b'"kodes":{}'),
        Survey(OPTIONS).to_bytes().replace(b'"gaps":{}', b'"gaps":{"1 year":{"1":9}}'),
        Survey(OPTIONS).to_bytes().replace(b'"values":{}', b'"values":{"A":{}}'),
        Survey(OPTIONS).to_bytes().replace(b'"values":{}', b'"values":{"A":{"9999999999":9}}'),
        Survey(OPTIONS).to_bytes().replace(b'"min_patients":5', b'"min_patients":0'),
    ],
)
def test_what_is_no_survey_is_refused(data):
    with pytest.raises(DataError, match="survey can't be used"):
        Survey.from_bytes(data)


def test_surveys_under_different_options_do_not_merge():
    with pytest.raises(ConfigError, match="different tokenizer options"):
        merge([Survey(OPTIONS), Survey(replace(OPTIONS, value_bins=4))])
    with pytest.raises(ConfigError, match="no survey"):
        merge([])


@pytest.mark.parametrize(
    "wrong",
    [{"values": "both"}, {"value_bins": 1}, {"min_patients": 0}, {"sketch_accuracy": 0.5}, {"age_years": 0}],
)
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        TokenizerOptions(**wrong)


def test_ids_stand_in_the_documented_order():
    book = codebook()
    kinds = list(dict.fromkeys(token.kind for token in book.tokens))
    assert kinds == ["special", "static", "age", "interval", "value", "code", "other"]
    assert (book.pad, book.eot, book.unk) == (0, 1, 2)
    for kind in ("static", "code", "other"):
        texts = [token.text for token in book.tokens if token.kind == kind]
        assert texts == sorted(texts)
    assert sum(token.kind == "interval" for token in book.tokens) == 13


def test_an_empty_survey_still_tells_deaths_ages_and_gaps():
    book = Codebook.build(Survey(TokenizerOptions()))
    assert Token("code", "MEDS_DEATH") in book.tokens
    assert book.tokens[book.code_id("anything//at//all")] == Token("other", "")
    assert book.tokens[book.code_id("sex", static=True)] == Token("static", "*")
    assert (book.advance_us > 0).sum() == 13


def test_fused_codes_have_one_token_a_bin():
    book = codebook("fused")
    bins = [token.bin for token in book.tokens if token.text == "LAB//B"]
    assert bins == [0, 1, 2, 3]
    assert not any(token.kind == "value" for token in book.tokens)


def test_a_rare_code_goes_to_its_longest_parent():
    book = codebook()
    assert book.tokens[book.code_id("DX//I10//9//x")] == Token("other", "DX//I10")
    assert book.tokens[book.code_id("DX//J")] == Token("other", "")
    assert book.tokens[book.code_id("LAB//Z")] == Token("other", "LAB")
    assert book.tokens[book.code_id("LAB")] == Token("other", ""), "a code is not its own parent"
    assert book.tokens[book.code_id("SEX//X", static=True)] == Token("static", "SEX//*")
    assert parents("A") == []


def test_a_code_that_is_asked_for_has_a_token_however_rare_it_is():
    options = replace(OPTIONS, named=("DISCHARGE//DIED", "DEATH"))
    book = Codebook.build(Survey(options, codes={"DISCHARGE": 9}))
    assert Token("code", "DISCHARGE//DIED") in book.tokens
    assert book.tokens[book.code_id("DISCHARGE//DIED")].text == "DISCHARGE//DIED"
    assert Token("code", "DISCHARGE//DIED") not in Codebook.build(Survey(OPTIONS, codes={"DISCHARGE": 9})).tokens
    assert replace(OPTIONS, named=["DEATH", "DISCHARGE//DIED", "DEATH"]) == options
    assert Codebook.from_bytes(book.to_bytes()).options == options


def test_matching_respects_the_grammar_of_codes():
    survey = Survey(OPTIONS, codes={"DX//I1": 9, "DX//I1//0": 9, "DX//I10": 9}, prefixes={"DX": 9, "DX//I1": 9})
    for mode in ("separate", "fused"):
        values = {"DX//I1": {sketch.SHIFT: 9, sketch.SHIFT + 99: 9}}
        book = Codebook.build(replace(survey, options=TokenizerOptions(mode, min_patients=5), values=values))
        hit = {(t.kind, t.text) for t, m in zip(book.tokens, book.matching(["DX//I1"]), strict=True) if m}
        assert hit == {("code", "DX//I1"), ("code", "DX//I1//0"), ("other", "DX//I1")}
        bins = [t for t, m in zip(book.tokens, book.matching(["DX//I1//"]), strict=True) if m]
        assert len(bins) == (3 if mode == "separate" else 5)
        assert not book.matching([]).any()
        assert not book.matching(["AGE", "40-45", "1-5min", "Q1"]).any()


def test_headers_are_static_and_age_tokens():
    book = codebook()
    assert {token.kind for token, header in zip(book.tokens, book.is_header, strict=True) if header} == {
        "static",
        "age",
    }
    assert book.is_header.dtype == bool


def test_gaps_stand_for_their_mean_inside_their_class():
    hours = sketch.bucket_of(np.array([2.0, 4.0]) * 3600, 0.01).tolist()
    survey = Survey(OPTIONS, gaps={"2-6h": {hours[0]: 30, hours[1]: 10}, "1-2h": {hours[0] - 70: 9}})
    book = Codebook.build(survey)
    advance = {t.text: int(book.advance_us[n]) for n, t in enumerate(book.tokens) if t.kind == "interval"}
    assert advance["2-6h"] == pytest.approx(2.5 * 60 * MINUTE, rel=0.01)
    assert advance["6mo+"] == 180 * DAY
    edges = [*INTERVALS.values(), 2**62]
    for text, low, high in zip(INTERVALS, edges, edges[1:], strict=False):
        assert low <= advance[text] < high
    assert book.advance_us.dtype == np.int64


def test_values_of_bins_rise_and_bin_zero_has_none():
    book = codebook()
    values = [book.value_of("LAB//A", n) for n in range(12)]
    assert np.isnan(values[0])
    assert np.isnan(values[11])
    assert values[1:11] == sorted(values[1:11])
    assert np.isnan(book.value_of("VISIT", 1))
    assert len(book.breaks["LAB//A"]) == 9
    assert book.breaks["LAB//A"].dtype == np.float64


def test_a_code_of_one_value_has_no_bins():
    book = Codebook.build(Survey(OPTIONS, codes={"ON": 9}, values={"ON": {sketch.SHIFT: 99}}))
    assert "ON" not in book.breaks


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-2],
        lambda data: b" " + data,
        lambda data: data.replace(b'"eot"', b'"end"', 1),
        lambda data: data.replace(b'["code","VISIT",0]', b'["code","LAB//A",0]'),
        lambda data: data.replace(
            b'["other","",0]', b'["other","216cc13c431a3589ad238916a91eef7b33c107e73b40d0f00c29e9681a055e84",0]'
        ),
        lambda data: data.replace(b'"medians":{', b'"medians":{"Z":[1.0],'),
        lambda data: data.replace(b"fedcomet-codebook/1", b"fedcomet-codebook/9"),
    ],
)
def test_a_damaged_codebook_is_refused(damage):
    data = codebook().to_bytes()
    assert damage(data) != data
    with pytest.raises(DataError, match="codebook can't be used"):
        Codebook.from_bytes(damage(data))


def test_a_codebook_file_is_read_back_or_named_in_the_error(tmp_path):
    file = tmp_path / "book.json"
    with pytest.raises(DataError, match=r"book\.json"):
        Codebook.load(file)
    codebook().save(file)
    assert Codebook.load(file).hash == codebook().hash
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"book\.json: The codebook can't be used"):
        Codebook.load(file)


def test_an_unknown_token_is_an_error():
    with pytest.raises(DataError, match="nothing//like//this"):
        codebook().id(Token("code", "nothing//like//this"))


def test_the_codebook_stays_what_it_was():
    """Golden: another hash for the same survey would orphan every store and checkpoint made before."""
    places = [-sketch.SHIFT - 30, 0, sketch.SHIFT, sketch.SHIFT + 50, sketch.SHIFT + 90]
    survey = Survey(OPTIONS, codes={"A//é": 9}, values={"A//é": dict.fromkeys(places, 7)}, gaps={"1-2h": {1049019: 8}})
    assert Codebook.build(survey).hash == GOLDEN
    assert hashlib.sha256(survey.to_bytes()).hexdigest()[:16] == GOLDEN_SURVEY


GOLDEN = "216cc13c431a3589ad238916a91eef7b33c107e73b40d0f00c29e9681a055e84"
GOLDEN_SURVEY = "d30db83ea7af95dc"
