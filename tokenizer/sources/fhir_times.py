"""FHIR's dates and times as int64 microseconds, many at once: texts of one length are one table of characters."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

NO_TIME = int(np.iinfo(np.int64).min)
"""Stands for a missing time in int64 microseconds."""

_SECOND = 1_000_000
_WHOLE = "0000-01-01T00:00:00"  # what a shortened text lacks stands here
_SIGNS = {4: "-", 7: "-", 10: "T", 13: ":", 16: ":"}
_DIGITS = [place for place in range(len(_WHOLE)) if place not in _SIGNS]
_ZONES = (0, 1, 6)  # none, Z, +01:00

_Characters = npt.NDArray[np.uint8]


def times(texts: Iterable[str | None], *, zoned: bool = False) -> npt.NDArray[np.int64]:
    """Read FHIR dates and times as int64 microseconds of the wall clock; `NO_TIME` where there is none or it isn't one.

    A year or month is its first day, a day its first second; digits beyond microseconds are cut off.

    Args:
        texts: of FHIR's types date, dateTime and instant.
        zoned: give the time at Greenwich instead, for comparing.

    Returns:
        As many as texts.

    >>> times(["2019-05", "2019-05-01T10:00:00.5+02:00", "2019-02-30", None]).astype("datetime64[us]").tolist()[1]
    datetime.datetime(2019, 5, 1, 10, 0, 0, 500000)
    """
    column = list(texts)
    # Many resources share a time, and a column may be empty: each text is read once.
    moments: dict[str | None, int] = dict.fromkeys(column, NO_TIME)
    by_length: defaultdict[int, list[str]] = defaultdict(list)
    for text in moments:
        if text:
            by_length[len(text)].append(text)
    if not by_length:
        return np.full(len(column), NO_TIME)
    for length, alike in by_length.items():
        moments.update(zip(alike, _read(alike, length, zoned=zoned).tolist(), strict=True))
    return np.fromiter(map(moments.__getitem__, column), np.int64, len(column))


def _read(texts: list[str], length: int, *, zoned: bool) -> npt.NDArray[np.int64]:
    """Times of one length, [n]."""
    rest = _WHOLE[length:] if length in (4, 7, 10) else ""
    if length < len(_WHOLE) and not rest:
        return np.full(len(texts), NO_TIME)
    # What isn't ASCII becomes "?", so that each character stays one byte.
    joined = (rest.join(texts) + rest).encode("ascii", errors="replace")
    text_NL = np.frombuffer(joined, np.uint8).reshape(len(texts), -1)
    moments, right = _wall_clock(text_NL)
    ending = length - len(_WHOLE) if not rest else 0
    found = np.full(len(texts), NO_TIME)
    for zone in _ZONES:
        fraction = ending - zone
        if fraction == 0 or fraction >= 2:
            middle, last = text_NL[:, len(_WHOLE) : length - zone], text_NL[:, length - zone :]
            micros, good = _fraction(middle)
            offset, known = _offset(last) if zone else (np.zeros(len(texts), np.int64), True)
            good &= right & known
            found = np.where(good, moments + micros - (offset * 60 * _SECOND if zoned else 0), found)
    return found


def _wall_clock(text_NL: _Characters) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Microseconds of the first 19 characters, and whether they are a time that exists."""
    right = _all_digits(text_NL[:, _DIGITS])
    for place, sign in _SIGNS.items():
        right &= text_NL[:, place] == ord(sign)
    year, month, day = _number(text_NL, 0, 4), _number(text_NL, 5, 7), _number(text_NL, 8, 10)
    hour, minute, second = (_number(text_NL, place, place + 2) for place in (11, 14, 17))
    months = (year - 1970) * 12 + month - 1
    first, after = (
        each.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64) for each in (months, months + 1)
    )
    right &= (month >= 1) & (month <= 12) & (day >= 1) & (day <= after - first)
    right &= (hour < 24) & (minute < 60) & (second < 60)
    return ((((first + day - 1) * 24 + hour) * 60 + minute) * 60 + second) * _SECOND, right


def _fraction(text_NL: _Characters) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Microseconds of a point and digits, or of nothing."""
    size, length = text_NL.shape
    if not length:
        return np.zeros(size, np.int64), np.ones(size, np.bool_)
    right = _all_digits(text_NL[:, 1:]) & (text_NL[:, 0] == ord("."))
    digits = min(length - 1, 6)
    return _number(text_NL, 1, 1 + digits) * 10 ** (6 - digits), right


def _offset(text_NL: _Characters) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Minutes east of Greenwich of `Z` or `+01:00`."""
    sign = text_NL[:, 0]
    if text_NL.shape[1] == 1:
        return np.zeros(len(sign), np.int64), sign == ord("Z")
    right = _all_digits(text_NL[:, [1, 2, 4, 5]]) & (text_NL[:, 3] == ord(":"))
    west = sign == ord("-")
    minutes = _number(text_NL, 1, 3) * 60 + _number(text_NL, 4, 6)
    return np.where(west, -minutes, minutes), right & (west | (sign == ord("+")))


def _all_digits(text_NL: _Characters) -> npt.NDArray[np.bool_]:
    # Below "0" the difference wraps around to a large number.
    return np.all(text_NL - np.uint8(ord("0")) <= 9, axis=1)


def _number(text_NL: _Characters, start: int, end: int) -> npt.NDArray[np.int64]:
    total = np.zeros(len(text_NL), np.int64)
    for place in range(start, end):
        total = total * 10 + (text_NL[:, place].astype(np.int64) - ord("0"))
    return total
