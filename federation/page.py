"""How the house's pages look: one style sheet, and how they write numbers; for the reports of a site and of a study.

A page is one file that needs no network; its colours follow the reader's light or dark setting.
"""

from datetime import UTC, datetime
from pathlib import Path

import jinja2

_THIN_SPACE = "\u202f"


def environment(folder: Path) -> jinja2.Environment:
    """Give what renders the templates of a folder; they may include `page.css`, and have the filters below.

    Args:
        folder: of the templates.
    """
    loader = jinja2.FileSystemLoader([folder, Path(__file__).parent / "templates"])
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters.update(
        bytes=show_bytes, count=show_count, share=show_share, duration=show_duration, moment=show_moment
    )
    return made


def show_bytes(size: int) -> str:
    """Write a size: `1.3 MB`."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError


def show_count(number: int) -> str:
    """Write a count with thin spaces between thousands."""
    return f"{number:,}".replace(",", _THIN_SPACE)


def show_share(share: float | None) -> str:
    """Write a share in per cent: `12.3 %`; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f} %"


def show_duration(seconds: float) -> str:
    """Write a duration in two digits of the unit that fits.

    >>> [show_duration(seconds) for seconds in (0.24, 89, 100, 7300, 200_000, 4_000_000)]
    ['0.2 s', '89 s', '1.7 min', '2.0 h', '2.3 days', '46 days']
    """
    for unit, size in (("days", 86_400.0), ("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size * (1.5 if unit != "s" else 0):
            amount = seconds / size
            return f"{amount:.0f} {unit}" if amount >= 10 else f"{amount:.1f} {unit}"
    return "0 s"


def show_moment(seconds: float | None) -> str:
    """Write a time, in seconds since the epoch; a dash for None.

    >>> show_moment(0)
    '1970-01-01 00:00 UTC'
    """
    return "–" if seconds is None else f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
