"""Says shortly why sites did not do what was asked: their reasons are long, and a failed run's text has an end."""

import re
import textwrap
from collections.abc import Iterable, Mapping

_SHA256 = re.compile(r"\b([0-9a-f]{8})[0-9a-f]{56}\b")
_WIDTHS = (320, 240, 160, 100, 60)
_NAMES = 3
"""How many sites of one reason are named where there is no room for all."""


def gathered(reasons: Mapping[str, str], most: int) -> str:
    """Give why each site is missing, in at most so many characters; sites with the same reason stand together.

    Hashes are told by their first digits. Where there is no room, reasons are shortened, and the last are only counted.
    What is given stands in brackets, so no reason ends with a full stop, nor does it begin with the site's name again.

    >>> gathered({"general": "general is full", "heart": "heart is full", "icu": "no answer"}, 300)
    'general, heart: the site is full; icu: no answer'
    """
    groups: dict[str, list[str]] = {}
    for site, reason in reasons.items():
        groups.setdefault(_of_any(site, reason), []).append(site)
    told = [(sites, _own(sites[0], reasons[sites[0]]) if len(sites) == 1 else key) for key, sites in groups.items()]
    told = [(sites, _SHA256.sub(r"\1", reason).removesuffix(".")) for sites, reason in told]
    whole = _joined(f"{', '.join(sites)}: {reason}" for sites, reason in told)
    if len(whole) <= most:
        return whole
    parts: list[str] = []
    for width in _WIDTHS:
        parts = [f"{_named(sites)}: {textwrap.shorten(reason, width, placeholder=' …')}" for sites, reason in told]
        if len(_joined(parts)) <= most:
            return _joined(parts)
    for kept in range(len(parts) - 1, 0, -1):
        left_out = sum(len(sites) for sites, _ in told[kept:])
        if len(text := f"{_joined(parts[:kept])}; … and {left_out:,} more") <= most:
            return text
    return textwrap.shorten(parts[0], most, placeholder=" …")


def _of_any(site: str, reason: str) -> str:
    """A site's reason in words that another site could have used."""
    return re.sub(rf"(?<![\w.-]){re.escape(site)}(?![\w-])", "the site", reason)


def _own(site: str, reason: str) -> str:
    """A site's reason to stand behind its name."""
    return reason.removeprefix(f"{site} ").removeprefix(f"{site}: ")


def _named(sites: list[str]) -> str:
    if len(sites) <= _NAMES:
        return ", ".join(sites)
    return f"{', '.join(sites[:_NAMES])} and {len(sites) - _NAMES:,} more"


def _joined(parts: Iterable[str]) -> str:
    return "; ".join(parts)
