"""Cells of OMOP tables get their types: the fast way against Python's own."""

import datetime as dt
import math

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer.sources import omop_columns

# What the column code knows as text must equal what Python's own parsers say, cell by cell.
PARSE = omop_columns._PARSE


def parsed(kind: str, cells: list[str | None]) -> list[object]:
    return PARSE[kind](pl.Series("x", cells, dtype=pl.String)).to_list()  # type: ignore[index]


@given(
    st.lists(st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), max_size=20),
    st.sampled_from(["", ".0", ".", ".000"]),
)
def test_whole_numbers_keep_every_digit(numbers: list[int | None], end: str) -> None:
    assert parsed("id", [None if n is None else f"{n}{end}" for n in numbers]) == numbers


@given(st.lists(st.text(max_size=12), max_size=20))
def test_what_is_no_whole_number_is_none(texts: list[str]) -> None:
    for text, number in zip(texts, parsed("id", list(texts)), strict=True):
        if number is not None:
            assert math.isclose(float(text), float(str(number)))


@given(st.lists(st.one_of(st.none(), st.floats(width=32, allow_nan=False, allow_infinity=False)), max_size=20))
def test_numbers_are_what_python_reads(numbers: list[float | None]) -> None:
    assert parsed("number", [None if n is None else repr(n) for n in numbers]) == numbers


TIMES = st.datetimes(dt.datetime(1800, 1, 1), dt.datetime(2249, 12, 31))
FORMATS = st.sampled_from(["day", "seconds", "T", "minutes", "micro", "zone", "Z", "plain"])


def written(time: dt.datetime, how: str) -> tuple[str, dt.datetime]:
    second = time.replace(microsecond=0)
    return {
        "day": (time.strftime("%Y-%m-%d"), dt.datetime(time.year, time.month, time.day)),
        "plain": (time.strftime("%Y%m%d"), dt.datetime(time.year, time.month, time.day)),
        "minutes": (time.strftime("%Y-%m-%d %H:%M"), second.replace(second=0)),
        "seconds": (time.strftime("%Y-%m-%d %H:%M:%S"), second),
        "T": (time.strftime("%Y-%m-%dT%H:%M:%S"), second),
        "micro": (time.strftime("%Y-%m-%d %H:%M:%S.%f"), time),
        "zone": (time.strftime("%Y-%m-%dT%H:%M:%S+05:30"), second),
        "Z": (time.strftime("%Y-%m-%dT%H:%M:%SZ"), second),
    }[how]


@given(st.lists(st.tuples(TIMES, FORMATS), max_size=20))
def test_times_keep_the_wall_clock_in_every_spelling_mixed(times: list[tuple[dt.datetime, str]]) -> None:
    cells = [written(*time) for time in times]
    assert parsed("time", [text for text, _ in cells]) == [time for _, time in cells]


@pytest.mark.parametrize("how", ["day", "seconds", "T", "minutes", "micro", "zone", "Z", "plain"])
@given(times=st.lists(TIMES, min_size=1, max_size=5))
def test_times_in_one_spelling_are_read_alike(how: str, times: list[dt.datetime]) -> None:
    cells = [written(time, how) for time in times]
    assert parsed("time", [text for text, _ in cells]) == [time for _, time in cells]


@pytest.mark.parametrize(
    "text",
    ["31/12/2020", "2020-13-01", "2020-02-30", "2020-1-1", "20-01-01", "2020-01-01 25:00:00", "2020-01-01 10:00:00 x",
     "yesterday", "infinity", "2020", "10:00:00", "2020-01-01T10", "1577836800", "0044-03-15 BC", "2020-01-01 1"],
)  # fmt: skip
def test_what_is_no_date_is_none(text: str) -> None:
    assert parsed("time", [text]) == [None]
    assert parsed("time", [text, "2020-01-01", "2020-01-01 10:00:00"])[0] is None


@given(st.lists(st.text(max_size=20), max_size=10))
def test_texts_have_no_line_ends_and_blank_is_nothing(texts: list[str]) -> None:
    for text in parsed("text", list(texts)):
        assert text is None or str(text) == str(text).strip()
        assert text != ""
        assert not set(str(text)) & set("\n\r\t\x00")
