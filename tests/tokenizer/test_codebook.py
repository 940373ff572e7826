"""Surveys merge exactly, and the codebook is a pure function of what they say."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.hospital import DAY, MINUTE, SPELLED, codebook, spelling_codebook
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
    assert told(book, "anything//at//all") == [Token("other", "")]
    assert told(book, "sex", static=True) == [Token("static", "*")]
    assert (book.advance_us > 0).sum() == 13


def test_fused_codes_have_one_token_a_bin():
    book = codebook("fused")
    bins = [token.bin for token in book.tokens if token.text == "LAB//B"]
    assert bins == [0, 1, 2, 3]
    assert not any(token.kind == "value" for token in book.tokens)


def told(book, code, *, static=False):
    return [book.tokens[token] for token in book.tell(code, static=static).tokens]


def test_a_rare_code_goes_to_its_longest_parent():
    book = codebook()
    assert told(book, "DX//I10//9//x") == [Token("other", "DX//I10")]
    assert told(book, "DX//J") == [Token("other", "DX")], "a system that has codes has a token for unknown ones"
    assert told(book, "PX//J") == [Token("other", "")]
    assert told(book, "LAB//Z") == [Token("other", "LAB")]
    assert told(book, "LAB") == [Token("other", "")], "a code is not its own parent"
    assert told(book, "SEX//X", static=True) == [Token("static", "SEX//*")]
    assert [book.tell(code).level for code in ("LAB//A", "DX//I10//9//x", "DX//J", "PX//J")] == [
        *("itself", "ancestor", "unknown", "unknown")
    ]
    assert parents("A") == []


def test_a_code_below_a_known_code_is_told_as_that_without_a_value():
    book = codebook()
    for code, above in (("VISIT//ER", "VISIT"), ("LAB//A//mmol/L", "LAB//A")):
        assert told(book, code) == [Token("code", above)]
        assert book.tell(code).level == "ancestor"


@pytest.mark.parametrize(
    ("code", "tokens", "level"),
    [
        ("ICD10CM//E11.65", ["ICD10CM//E11", "ICD10CM//2//65"], "itself"),
        ("ICD10CM//E1165", ["ICD10CM//E11", "ICD10CM//2//65"], "itself"),
        ("ICD10CM//I10", ["ICD10CM//I10"], "itself"),
        ("ICD10CM//S72.001A", ["ICD10CM//S72", "ICD10CM//2//001", "ICD10CM//3//A"], "itself"),
        ("ICD10CM//S72.001D", ["ICD10CM//S72", "ICD10CM//2//001", "*"], "ancestor"),
        ("ICD10CM//S72.001", ["ICD10CM//S72", "*"], "ancestor"),
        ("ICD10CM//E11.62", ["ICD10CM//E11", "ICD10CM//2//6", "*"], "ancestor"),
        ("ICD10CM//E11", ["ICD10CM"], "unknown"),
        ("ICD10CM//Q87.1", ["ICD10CM//Q87", "*"], "ancestor"),
        ("ICD10CM//J45", ["ICD10CM"], "unknown"),
        ("ICD10CM//I10.9", ["ICD10CM//I10"], "ancestor"),
        ("DIAGNOSIS//ICD//10//E119", ["DIAGNOSIS//ICD//10//E11", "ICD10CM//2//9"], "itself"),
        ("DIAGNOSIS//ICD//10//I10", ["DIAGNOSIS//ICD//10"], "unknown"),
        ("ATC//A10BA02", ["ATC//A10", "ATC//2//B", "ATC//3//A02"], "itself"),
        ("ATC//A10BB01", ["ATC//A10", "ATC//2//B", "*"], "ancestor"),
        ("ICD10PCS//0DTJ4ZZ", ["ICD10PCS//0DTJ4ZZ"], "itself"),
        ("ICD10PCS//0DTJ4ZY", ["ICD10PCS"], "unknown"),
        ("ICD10CM//E11.65//x", ["ICD10CM//E11", "ICD10CM//2//65"], "ancestor"),
        ("ICD10CM//no code", ["ICD10CM"], "unknown"),
    ],
)
def test_codes_are_spelled_and_fall_back_along_their_hierarchy(code, tokens, level):
    book = spelling_codebook()
    assert [token.text for token in told(book, code)] == tokens
    assert book.tell(code).level == level
    assert Codebook.from_bytes(book.to_bytes()).tell(code) == book.tell(code)


def test_a_code_can_also_stand_for_rarer_ones_below_it():
    names = {"codes": {"ICD10CM//E11": 20}, "prefixes": {"ICD10CM//E11": 20}}
    book = Codebook.build(Survey(OPTIONS, **names))
    assert [t.text for t in told(book, "ICD10CM//E11")] == ["ICD10CM//E11"]
    assert [t.text for t in told(book, "ICD10CM//E11.9")] == ["ICD10CM//E11", "*"]
    alone = Codebook.build(Survey(OPTIONS, codes=names["codes"]))
    assert alone.tell("ICD10CM//E11.9").tokens == alone.tell("ICD10CM//E11").tokens
    assert alone.tell("ICD10CM//E11.9").level == "ancestor"


def test_splits_are_settings():
    book = spelling_codebook(icd10cm_split=(3, 1), atc_split=(), icd10pcs_split=(1,) * 6)
    assert [t.text for t in told(book, "ICD10CM//E11.65")] == ["ICD10CM//E11", "ICD10CM//2//6", "ICD10CM//3//5"]
    assert told(book, "ATC//A10BA02") == [Token("code", "ATC//A10BA02")]
    assert [t.text for t in told(book, "ICD10PCS//0DTJ4ZZ")] == [
        "ICD10PCS//0",
        *(f"ICD10PCS//{place}//{letter}" for place, letter in enumerate("DTJ4ZZ", 2)),
    ]
    with pytest.raises(ConfigError, match="icd10cm_split"):
        TokenizerOptions(icd10cm_split=(0,))


def test_matching_finds_the_codes_below_a_prefix_and_no_others():
    book = spelling_codebook()

    def found(*prefixes):
        return {book.event(node) for node in np.flatnonzero(book.matching(prefixes)).tolist()}

    below = {"ICD10CM//E11.6//*", "ICD10CM//E11.65"}
    assert found("ICD10CM//E11.6") == below
    assert found("ICD10CM//E11") == {*below, "ICD10CM//E11.9", "ICD10CM//E11//*"}
    assert found("ICD10CM//E1") == set(), "no level of the hierarchy"
    assert found("ICD10CM//E116") == below
    assert found("ATC//A10BA") == {"ATC//A10BA", "ATC//A10BA02"}


def test_an_extended_codebook_keeps_what_there_is_and_adds_what_is_new():
    old = spelling_codebook("fused")
    scores = dict.fromkeys(sketch.bucket_of(np.array([5.0, 6.0, 7.0]), 0.01).tolist(), 40)
    later = Survey(
        old.options,
        codes=dict.fromkeys(("ICD10CM//E11", "ICD10CM//E11.62", "LAB//B", "LAB//C", "VISIT", "ICD10CM//I10"), 70),
        prefixes={"LAB": 30, "DX": 30},
        values={"LAB//B": scores, "LAB//C": scores, "VISIT": scores},
        gaps={"1-2h": {sketch.SHIFT + 410: 50}},
        prepared=("abc",),
    )
    new = old.extend(later)
    assert new.tokens[: len(old)] == old.tokens
    assert new.parent == old.hash
    assert (new.advance_us[: len(old)] == old.advance_us).all()
    assert {token.text for token in new.tokens[len(old) :]} == {"LAB//C", "ICD10CM//2//62", "DX"}
    assert new.breaks["LAB//B"].tolist() == old.breaks["LAB//B"].tolist()
    assert "VISIT" not in new.breaks, "its tokens are what they were"
    assert new.breaks["LAB//C"].tolist() == Codebook.build(later).breaks["LAB//C"].tolist()
    for code in (*SPELLED, "LAB//B", "VISIT", "ICD10CM//E11.69"):
        assert new.tell(code) == old.tell(code)
    assert new.tell("ICD10CM//E11.62").level == new.tell("ICD10CM//E11").level == "itself"
    assert Codebook.from_bytes(new.to_bytes()).hash == new.hash
    assert new.prepared == ("abc",)
    with pytest.raises(ConfigError, match="only named and min_patients"):
        old.extend(replace(later, options=replace(later.options, value_bins=4)))


def test_surveys_keep_what_their_records_went_through():
    both = merge([Survey(OPTIONS, prepared=("b",)), Survey(OPTIONS, prepared=("a", "b"))])
    assert both.prepared == Survey.from_bytes(both.to_bytes()).prepared == ("a", "b")
    assert Codebook.build(both).prepared == ("a", "b")
    assert Codebook.build(both).hash != Codebook.build(Survey(OPTIONS)).hash


def test_nineteen_classes_of_gaps_are_to_choose():
    book = Codebook.build(Survey(TokenizerOptions(intervals="ethos19")))
    assert len(book.intervals) == (book.advance_us > 0).sum() == 19
    assert next(iter(book.intervals.items())) == ("5-15min", 5 * MINUTE)
    edges = [*book.intervals.values(), 2**62]
    for text, low, high in zip(book.intervals, edges, edges[1:], strict=False):
        assert low <= book.advance_us[book.id(Token("interval", text))] < high
    with pytest.raises(ConfigError, match="intervals"):
        TokenizerOptions(intervals="weeks")


def test_a_code_that_is_asked_for_has_a_token_however_rare_it_is():
    options = replace(OPTIONS, named=("DISCHARGE//DIED", "DEATH"))
    book = Codebook.build(Survey(options, codes={"DISCHARGE": 9}))
    assert Token("code", "DISCHARGE//DIED") in book.tokens
    assert told(book, "DISCHARGE//DIED") == [Token("code", "DISCHARGE//DIED")]
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


def test_gaps_have_equally_likely_times_inside_their_class():
    hours = np.concatenate([np.full(24, 3.0), np.linspace(3.0, 5.0, 8)]) * 3600
    buckets, counts = np.unique(sketch.bucket_of(hours, 0.01), return_counts=True)
    book = Codebook.build(Survey(OPTIONS, gaps={"2-6h": dict(zip(buckets.tolist(), counts.tolist(), strict=True))}))
    told = dict(zip(INTERVALS, book.waits_us, strict=True))
    np.testing.assert_allclose(told["2-6h"] / 3.6e9, hours / 3600, rtol=0.011)  # 32 gaps, 32 times
    assert (told["6mo+"] == 180 * DAY).all()
    # Nobody told of this one: its logarithms are even.
    low, high = INTERVALS["3-6mo"], INTERVALS["6mo+"]
    np.testing.assert_allclose(told["3-6mo"], low * (high / low) ** ((np.arange(32) + 0.5) / 32), atol=1e6)
    assert (np.diff(book.waits_us.ravel()) >= 0).all()


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
        lambda data: data.replace(b'["other","",0]', b'["other","*",0]'),
        lambda data: data.replace(b'"medians":{', b'"medians":{"Z":[1.0],'),
        lambda data: data.replace(b"fedcomet-codebook/3", b"fedcomet-codebook/9"),
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


GOLDEN = "31be9644530224319b130cddb7e6b7abb6c0fa04d75b69ee5695b869017d5612"
GOLDEN_SURVEY = "3b03d9a52e3a8ac2"
