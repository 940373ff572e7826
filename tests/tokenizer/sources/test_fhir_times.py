"""FHIR times are read many at once; a slow reader that takes them one by one says what they are."""

import re
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenizer.sources.fhir_times import NO_TIME, times

_FORM = re.compile(
    r"(\d{4})(?:-(\d\d)(?:-(\d\d)(?:T(\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:Z|([+-])(\d\d):(\d\d))?)?)?)?", re.ASCII
)


def one(text: str | None, *, zoned: bool) -> int:
    match = _FORM.fullmatch(text or "")
    if match is None:
        return NO_TIME
    year, month, day, hour, minute, second, fraction, sign, east_hours, east_minutes = match.groups()
    micros = int((fraction or "0")[:6].ljust(6, "0"))
    try:
        clock = [int(each or 0) for each in (hour, minute, second)]
        moment = datetime(int(year), int(month or 1), int(day or 1), *clock, micros)
    except ValueError:
        return NO_TIME
    if zoned and sign:
        moment -= timedelta(hours=int(east_hours), minutes=int(east_minutes)) * (-1 if sign == "-" else 1)
    return (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)


_PART = st.integers(0, 61).map("{:02}".format)
_RIGHT = st.builds(
    lambda year, parts, size, fraction, zone: (
        f"{year:04}-{'-'.join(parts[:2])}"[: max(size, 4)]
        + (f"T{':'.join(parts[2:])}{fraction}{zone}" if size == 10 else "")
    ),
    st.integers(2, 9998),
    st.tuples(st.integers(0, 13).map("{:02}".format), st.integers(0, 32).map("{:02}".format), _PART, _PART, _PART),
    st.sampled_from([4, 7, 10, 10, 10]),
    st.sampled_from(["", "."]).flatmap(lambda point: st.text("0123456789", max_size=9).map(lambda d: point + d)),
    st.sampled_from(["", "Z", "+01:00", "-05:30", "+1:00", "z", "+0100"]),
)
_BROKEN = st.builds(
    lambda text, place, sign: text[: place % len(text)] + sign + text[place % len(text) + 1 :],
    _RIGHT,
    st.integers(0, 40),
    st.sampled_from([*"0-:TZ.+/ \n\0é٣", ""]),
)


@given(st.lists(st.one_of(st.none(), st.just(""), _RIGHT, _BROKEN)), st.booleans())
def test_times_read_at_once_are_those_read_one_by_one(texts: list[str | None], zoned: bool) -> None:
    assert times(texts, zoned=zoned).tolist() == [one(text, zoned=zoned) for text in texts]


@pytest.mark.parametrize(
    "text", ["2020-01-01T10:00:00+0٣:00", "202٣", "2020-02-30", "2020-01-01T24:00:00", "2020-01-01T10"]
)
def test_what_is_no_time_is_told(text: str) -> None:
    assert times([text, "2020"]).tolist() == [NO_TIME, one("2020", zoned=False)]
