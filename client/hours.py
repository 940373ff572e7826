"""When a site works: a week's opening hours, as `policy.toml` writes them.

Times are the site's local ones. A span may go over midnight ("Mon-Fri 20:00-06:00" is open until Saturday at six).
"""

import re
from collections.abc import Iterable
from datetime import datetime, timedelta

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY, _WEEK = 24 * 60, 7 * 24 * 60
_SPAN = re.compile(r"(?:(\w{3})(?:-(\w{3}))? )?(\d\d):(\d\d)-(\d\d):(\d\d)")


class Hours:
    """A set of spans of the week, in minutes since Monday at midnight."""

    def __init__(self, spans: Iterable[str]) -> None:
        """Read spans such as "Mon-Fri 20:00-06:00", "Sun 00:00-24:00" or, for every day, "22:00-05:30".

        Raises:
            ValueError: naming the span that is none.
        """
        self._told = tuple(spans)
        self._spans = [minutes for text in self._told for minutes in _minutes(text)]

    def __str__(self) -> str:
        return ", ".join(self._told)

    def open_at(self, moment: datetime) -> bool:
        """Tell whether a local time lies in one of the spans; the end of a span is not part of it."""
        minute = moment.weekday() * _DAY + moment.hour * 60 + moment.minute
        return any((minute - begin) % _WEEK < length for begin, length in self._spans)

    def opens_after(self, moment: datetime) -> datetime:
        """Give the next full minute, from now on, at which work may begin."""
        minute = moment.replace(second=0, microsecond=0)
        while not self.open_at(minute):
            minute += timedelta(minutes=1)
        return minute


def _minutes(text: str) -> list[tuple[int, int]]:
    """The beginnings and lengths of a span on each of its days."""
    found = _SPAN.fullmatch(text.strip())
    if found is None:
        raise ValueError(f'{text!r} is not a span of hours; write "Mon-Fri 20:00-06:00" or "22:00-06:00"')
    first, last, *digits = found.groups()
    from_hour, from_minute, to_hour, to_minute = map(int, digits)
    begin, end = from_hour * 60 + from_minute, to_hour * 60 + to_minute
    if begin >= _DAY or end > _DAY or max(from_minute, to_minute) > 59 or begin == end:
        raise ValueError(f"{text!r} is not a span of hours; times go from 00:00 to 24:00, and the end is another one")
    length = (end - begin) % _DAY or _DAY
    return [(day * _DAY + begin, length) for day in _days(text, first, last)]


def _days(text: str, first: str | None, last: str | None) -> list[int]:
    if first is None:
        return list(range(7))
    names = [first.lower(), (last or first).lower()]
    if not set(names) <= set(_DAYS):
        raise ValueError(f"{text!r} names a day that is none; write Mon, Tue, Wed, Thu, Fri, Sat or Sun")
    start, stop = (_DAYS.index(name) for name in names)
    return [(start + offset) % 7 for offset in range((stop - start) % 7 + 1)]
