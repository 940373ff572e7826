"""Codes have one way of writing, parents on one line, and pieces that put them together again."""

import doctest
import gzip
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data import DATA
from tokenizer import spelling
from tokenizer.spelling import LONGEST, ancestors, canonical, fit, pieces, read

ALL = DATA / "icd10cm-order-Jan-2021.csv.gz"
WIDTHS = {"ICD10CM": (3, 3), "ATC": (3, 1), "ICD10PCS": (1,) * 6}

icd = st.from_regex(r"[A-Z][0-9][0-9A-Z](\.[0-9A-Z]{1,4})?", fullmatch=True)
atc = st.from_regex(r"[A-Z][0-9]{2}([A-Z]([A-Z]([0-9]{2})?)?)?", fullmatch=True)
pcs = st.from_regex(r"[0-9A-HJ-NP-Z]{7}", fullmatch=True)
nine = st.from_regex(r"([0-9]{3}|V[0-9]{2}|E[0-9]{3})(\.[0-9]{1,2})?", fullmatch=True)
codes = st.one_of(
    icd.map("ICD10CM//{}".format),
    icd.map("DIAGNOSIS//ICD10CM//{}".format),
    icd.map(lambda code: "DIAGNOSIS//ICD//10//" + code.replace(".", "")),
    atc.map("ATC//{}".format),
    pcs.map("ICD10PCS//{}".format),
    nine.map("ICD9CM//{}".format),
    st.text("AB/.1é", max_size=12),
)


@given(codes)
def test_writing_a_code_canonically_twice_changes_nothing(code):
    assert canonical(canonical(code)) == canonical(code)


@given(st.text(st.sampled_from("A*/ \n\x00\x9f\u2028\xa0"), max_size=12) | st.text(min_size=195, max_size=210))
def test_codes_that_fit_are_one_short_line_without_stars_of_their_own(code):
    fitting = fit(code)
    assert fit(fitting) == fitting
    assert len(fitting) <= LONGEST
    assert fitting.splitlines() == [fitting] or not code
    assert "*" not in fitting.split("//")
    assert not any(unicodedata.category(letter) == "Cc" for letter in fitting)


def test_codes_that_are_too_long_stay_apart():
    long = {fit("NOTE//" + "x" * 100_000 + end) for end in "abc"}
    assert {len(code) for code in long} == {LONGEST}
    assert len(long) == 3
    assert fit("x" * LONGEST) == "x" * LONGEST
    assert all(code.startswith("NOTE//xxx") for code in long)


@given(codes)
def test_the_ancestors_of_an_ancestor_are_the_rest(code):
    above = ancestors(code)
    for place, text in enumerate(above):
        assert ancestors(text) == above[place + 1 :]
        assert len(text) < len(code)
    assert code not in above


@given(codes)
def test_pieces_spell_the_code(code):
    code = canonical(code)
    told = pieces(code, WIDTHS)
    if told:
        known = read(code)
        letters = told[0][0].removeprefix(known.head).replace(".", "")
        assert letters + "".join(token.rpartition("//")[2] for token, _ in told[1:]) == known.letters
        assert told[-1][1] == code
        assert len({token for token, _ in told}) == len(told)


@pytest.mark.parametrize(
    "text",
    [
        *("", "//", "ICD10CM", "ICD10CM//", "ICD10CM//E1", "ICD10CM//E11.", "ICD10CM//E1.165", "ICD10CM//e11.65"),
        *("ICD10CM//E11.65.1", "ICD10CM//E11.65789", "ATC//A1", "ATC//A10B.A", "ICD//10//E11", "ICD10PCS//0DTO4ZZ"),
        *("LAB//ICD//10//E119", "ICD10CM//E11.65//x", "RxNorm//860975"),
    ],
)
def test_what_does_not_look_like_a_code_is_a_name(text):
    assert read(text) is None
    assert canonical(text) == text


def test_mimic_writes_codes_without_a_dot():
    assert read("DIAGNOSIS//ICD//9//25000").system == "ICD9CM"
    assert read("PROCEDURE//ICD//10//0DTJ4ZZ").system == "ICD10PCS"
    assert ancestors("DIAGNOSIS//ICD//10//E1165")[:3] == [
        *("DIAGNOSIS//ICD//10//E116", "DIAGNOSIS//ICD//10//E11", "DIAGNOSIS//ICD//10")
    ]
    assert ancestors("ICD9CM//E888.1")[0] == "ICD9CM//E888"


def test_the_examples_hold():
    assert doctest.testmod(spelling).failed == 0


@pytest.mark.skipif(not ALL.exists(), reason="the CMS table of ICD-10-CM is not on this machine")
def test_every_code_of_the_official_table_is_read():
    with gzip.open(ALL, "rt") as lines:
        table = [line.split(",", 1)[0] for line in lines][1:]
    told = [pieces(canonical(f"ICD10CM//{code}"), WIDTHS) for code in table]
    assert all(told)
    assert len({tuple(token for token, _ in way) for way in told}) == len(table)
