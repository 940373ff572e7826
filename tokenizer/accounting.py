"""What preparing a site's events saw and did, as a value that sums over shards exactly."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from tokenizer import units
from tokenizer.cohort import Step

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Accounting:
    """What the step saw and did; the sum of the shards' accountings is the site's. It stays at the site.

    Attributes:
        flow: Steps in order, the first one what was read; then each filter that is on, then the maps.
        unmapped: Events per code that a map (or ICD-9 to ICD-10) was for and had no target.
        local: Events per code that is of no shared vocabulary, after mapping.
        units: Values per (code, unit as recorded or "", key that they went to).
        faults: Events or patients per kind of odd time.
    """

    flow: tuple[Step, ...] = ()
    unmapped: Mapping[str, int] = field(default_factory=dict)
    local: Mapping[str, int] = field(default_factory=dict)
    units: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    faults: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: "Accounting") -> "Accounting":
        flow = self.flow or other.flow
        if self.flow and other.flow:
            flow = tuple(mine + theirs for mine, theirs in zip(self.flow, other.flow, strict=True))
        return Accounting(
            flow,
            _sum(self.unmapped, other.unmapped),
            _sum(self.local, other.local),
            _sum(self.units, other.units),
            _sum(self.faults, other.faults),
        )

    @property
    def converted(self) -> dict[tuple[str, str, str], int]:
        """Values whose unit as recorded is spelled other than in their key."""
        return {place: n for place, n in self.units.items() if place[1] and not place[2].endswith(f"//{place[1]}")}

    @property
    def collisions(self) -> dict[str, dict[str, int]]:
        """Values per key, of codes whose values did not all go to one key."""
        keys: dict[str, dict[str, int]] = {}
        for (code, _, key), n in self.units.items():
            found = keys.setdefault(code, {})
            found[key] = found.get(key, 0) + n
        return {code: found for code, found in keys.items() if len(found) > 1}

    @property
    def unknown_units(self) -> dict[str, int]:
        """Values per unit text that is not understood."""
        found: dict[str, int] = {}
        for (_, text, _), n in self.units.items():
            if units.parse(text) is None:
                found[text] = found.get(text, 0) + n
        return found


def _sum(mine: Mapping[_Key, int], theirs: Mapping[_Key, int]) -> dict[_Key, int]:
    total = dict(mine)
    for key, n in theirs.items():
        total[key] = total.get(key, 0) + n
    return total
