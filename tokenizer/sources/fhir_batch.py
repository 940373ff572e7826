"""What a chunk of FHIR resources gives: its resources as columns, their events, and why some give none."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from tokenizer.sources.fhir_codes import Coded
from tokenizer.sources.fhir_kinds import Chunk

REMEMBERED = 200_000
"""Entries after which a memory forgets all: a few ten megabytes."""


class Memo(dict[Any, Any]):
    """Remembers what a function gave; forgets all where it would hold too much."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, raw: Any) -> Any:
        if len(self) >= REMEMBERED:
            self.clear()
        made = self[raw] = self._make(raw)
        return made


@dataclass
class Events:
    """Events of a table: parallel columns.

    Attributes:
        at: place of the resource in the batch.
        code, value, unit: as in `EVENTS`.
        moment: an event's own time, by place in these columns; others have the resource's.
    """

    at: list[int] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    value: list[float | None] = field(default_factory=list)
    unit: list[str | None] = field(default_factory=list)
    moment: dict[int, str] = field(default_factory=dict)

    def extend(
        self, at: Iterable[int], code: Iterable[str], value: Iterable[float | None], unit: Iterable[str | None]
    ) -> None:
        """Add events that have their resource's time."""
        self.at += at
        self.code += code
        self.value += value
        self.unit += unit

    def add(
        self, at: int, code: str, value: float | None = None, unit: str | None = None, moment: str | None = None
    ) -> None:
        """Add an event."""
        if moment is not None:
            self.moment[len(self.at)] = moment
        self.at.append(at)
        self.code.append(code)
        self.value.append(value)
        self.unit.append(unit)


@dataclass
class Batch:
    """The resources of a chunk, decoded.

    Attributes:
        chunk: where they come from.
        places: of each in the chunk; what couldn't be decoded is missing.
        ids, updated: identity and version.
        subjects: int64, see `Index.patients`; or one of the reasons why there is none.
        subject_texts, subject_at: distinct JSON of the references, and the place of each resource's in it.
        encounters: encounter ids.
        starts: int64 microseconds, of the encounters, `NO_TIME` where not known.
        times: the text of each resource's time.
        late: whether a time may lie before it was known.
        static: no time is needed (patients).
        early, drops: filters by place in the batch: before and after faults of subject and time.
        bads: column, reason and content by place in the batch.
        events: of the resources.
        parts: of their components, a table of its own; `part_drops` and `part_bads` are (place, reason).
    """

    chunk: Chunk
    places: Sequence[int]
    ids: list[str | None] = field(default_factory=list)
    updated: list[str | None] = field(default_factory=list)
    subjects: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    subject_texts: list[bytes] = field(default_factory=list)
    subject_at: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    encounters: pl.Series = field(default_factory=lambda: pl.Series(dtype=pl.String))
    starts: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    times: list[str | None] = field(default_factory=list)
    late: list[bool] | None = None
    static: bool = False
    early: dict[int, str] = field(default_factory=dict)
    drops: dict[int, str] = field(default_factory=dict)
    bads: dict[int, tuple[str, str, str]] = field(default_factory=dict)
    events: Events = field(default_factory=Events)
    parts: Events = field(default_factory=Events)
    part_drops: list[tuple[int, str]] = field(default_factory=list)
    part_bads: list[tuple[int, str]] = field(default_factory=list)
    deceased_undated: int = 0

    def take(self, at: int, coded: Coded, column: str) -> bool:
        """Whether a concept has a code; otherwise note what becomes of its resource."""
        if coded.fault:
            self.bads[at] = (column, coded.fault, "")
        elif coded.drop:
            self.drops[at] = coded.drop
        return coded.code is not None
