"""FHIR resources become events: chunk by chunk, member by member as whole columns.

Every resource has one fate: it gives events, a named filter drops it, or it is bad. Filters on what a resource says of
itself (cancelled, refuted) come first, then faults of subject and time, then filters on what it holds (no code, free
text, a panel whose parts are read).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
import polars as pl

from tokenizer.sources import fhir_index as index
from tokenizer.sources.fhir_batch import Batch, Memo
from tokenizer.sources.fhir_codes import READ_ERRORS, Coded, Concept, Namer, clean, fault, given, raw_bytes
from tokenizer.sources.fhir_index import Index
from tokenizer.sources.fhir_kinds import Block, Chunk
from tokenizer.sources.fhir_refer import Resolver
from tokenizer.sources.fhir_resources import DECODERS, READ, TOLD_LATER
from tokenizer.sources.fhir_stays import Encounters, fill_patients
from tokenizer.sources.fhir_values import LARGEST, Values

PANEL = "panel, its parts are read"
"""The filter that drops an observation without a value of its own whose parts are read."""

_SLICE = 256 << 10
_REFUTED = frozenset({"refuted", "entered-in-error"})
_ID, _META, _STATUS = attrgetter("id"), attrgetter("meta"), attrgetter("status")
_SUBJECT, _ENCOUNTER = attrgetter("subject"), attrgetter("encounter")
_CODE, _QUANTITY, _COMPONENT = attrgetter("code"), attrgetter("value_quantity"), attrgetter("component")
_UNIT = attrgetter("code", "unit", "system")
_CONCEPT = msgspec.json.Decoder(Concept)


class Reader:
    """Turns chunks into batches; one per process.

    Attributes:
        refer: follows references.
    """

    def __init__(self, found: Index, namer: Namer, *, told: bool) -> None:
        self.refer = Resolver(found)
        self._namer, self._told = namer, told
        self._encounters = Encounters(self.refer, namer)
        self._values = Values(namer)
        self._codes: dict[str, Memo] = {}
        self._refuted = Memo(_refuted)

    def read(self, chunk: Chunk) -> tuple[Batch, list[tuple[int, str, str]]]:
        """Decode a chunk and find its events; also rows that aren't what they should be: place, reason, content."""
        objects, places, broken = _decoded(chunk)
        batch, columns = Batch(chunk, places), _Columns()
        self._gather(batch, columns, objects)
        self._finish(batch, columns)
        if chunk.kind == "Patient":
            fill_patients(batch, objects, self.refer)
        elif chunk.kind == "Encounter":
            self._encounters.fill(batch, objects)
        return batch, broken

    def read_block(self, block: Block) -> Batch | None:
        """Decode the lines of a block; None if they aren't all right, or of other kinds.

        A slice at a time is decoded and emptied, so that few objects live at once.
        """
        rows = range(block.first_row, block.first_row + block.lines)
        batch, columns = Batch(Chunk(block.file, block.kind, rows=rows), range(block.lines)), _Columns()
        decode = DECODERS[block.kind].decode_lines
        try:
            for lines in _slices(block.data):
                self._gather(batch, columns, decode(lines))
        except READ_ERRORS:
            return None
        if len(columns.ids) != block.lines:
            return None
        self._finish(batch, columns)
        return batch

    def _gather(self, batch: Batch, columns: "_Columns", objects: list[Any]) -> None:
        """Take what is needed of some resources."""
        kind, start = batch.chunk.kind, len(columns.ids)
        columns.subjects += map(columns.subject_places.__getitem__, map(raw_bytes, map(_SUBJECT, objects)))
        columns.stays += map(columns.stay_places.__getitem__, map(raw_bytes, map(_ENCOUNTER, objects)))
        columns.ids += map(_ID, objects)
        columns.updated += [meta.last_updated if meta else None for meta in map(_META, objects)]
        usual = READ[kind].usual_time
        times = list(map(attrgetter(usual), objects)) if usual else [None] * len(objects)
        if not all(times):
            times = [time or each.event_time() for time, each in zip(times, objects, strict=True)]
        columns.times += times
        if kind in TOLD_LATER:
            columns.told += [each.told_time() for each in objects]
        if kind == "MedicationRequest" or READ[kind].unread.intersection(map(_STATUS, objects)):
            batch.early |= {at: why for at, each in enumerate(objects, start) if (why := each.dropped())}
        if kind == "Observation":
            self._observations(batch, objects, start)
        elif kind == "DiagnosticReport":
            self._reports(batch, objects, start)
        elif kind not in ("Patient", "Encounter"):
            self._coded(batch, objects, start)

    def _finish(self, batch: Batch, columns: "_Columns") -> None:
        """Follow the references, and choose among the times."""
        subjects, stays = list(columns.subject_places), list(columns.stay_places)
        self.refer.learn(subjects, stays)
        batch.ids = columns.ids
        if not all(batch.ids):
            rows = zip(batch.places, columns.ids, strict=True)
            batch.ids = [each or index.own_id(batch.chunk, place, None) for place, each in rows]
        batch.updated = columns.updated
        batch.subject_texts, batch.subject_at = subjects, np.array(columns.subjects, np.int64)
        batch.subjects = np.array([self.refer.subjects[raw] for raw in subjects], np.int64)[batch.subject_at]
        known, stay_at = [self.refer.stays[raw] for raw in stays], np.array(columns.stays, np.int64)
        batch.encounters = pl.Series([stay[0] for stay in known], dtype=pl.String).gather(stay_at)
        batch.starts = np.array([stay[1] for stay in known], np.int64)[stay_at]
        batch.times = columns.times
        if columns.told and self._told:
            batch.late = [not text for text in columns.told]
            batch.times = [text or time for text, time in zip(columns.told, columns.times, strict=True)]
        elif columns.told:
            batch.times = [time or text for text, time in zip(columns.told, columns.times, strict=True)]

    def _code_of(self, kind: str, table: str) -> Memo:
        if table not in self._codes:
            self._codes[table] = Memo(self._namer.concept(kind, table.upper()))
        return self._codes[table]

    def _coded(self, batch: Batch, objects: list[Any], start: int) -> None:
        """Resources that are one code at one time."""
        kind = batch.chunk.kind
        if kind.startswith("Medication"):
            found = self._medications(objects, self._code_of("Medication", kind))
        else:
            codes = self._code_of(kind, kind)
            found = [codes[raw_bytes(each.code)] for each in objects]
        prefix = "ALLERGY//" if kind == "AllergyIntolerance" else ""
        for at, (each, coded) in enumerate(zip(objects, found, strict=True), start):
            if kind in ("Condition", "AllergyIntolerance"):
                why, wrong = self._refuted[raw_bytes(each.verification_status)]
                if why:
                    batch.early.setdefault(at, why)
                if wrong:
                    batch.bads[at] = ("verificationStatus", wrong, "")
            if batch.take(at, coded, "code"):
                batch.events.add(at, f"{prefix}{coded.code}")

    def _medications(self, objects: list[Any], codes: Memo) -> list[Coded]:
        """The codes of medications: in place, contained, or elsewhere in the source."""
        found: list[Coded] = [codes[raw_bytes(each.code)] for each in objects]
        elsewhere = [
            at for at, coded in enumerate(found) if coded.drop and given(raw_bytes(objects[at].medication_reference))
        ]
        references = [
            (raw_bytes(objects[at].medication_reference), raw_bytes(objects[at].contained)) for at in elsewhere
        ]
        for at, coded in zip(elsewhere, self.refer.medications(references), strict=True):
            found[at] = codes[coded] if isinstance(coded, bytes) else coded
        return found

    def _observations(self, batch: Batch, objects: list[Any], start: int) -> None:
        codes, events = self._code_of("Observation", "Observation"), batch.events
        coded = list(map(codes.__getitem__, map(raw_bytes, map(_CODE, objects))))
        quantities = list(map(_QUANTITY, objects))
        numbers = [None if quantity is None else quantity.value for quantity in quantities]
        # Most are numbers: whole columns for them, and calls for the others only.
        plain = [
            place
            for place, (number, found) in enumerate(zip(numbers, coded, strict=True))
            if number is not None and -LARGEST <= number <= LARGEST and found[0] is not None
        ]
        events.at += [start + place for place in plain]
        events.code += [coded[place][0] for place in plain]
        events.value += [numbers[place] for place in plain]
        events.unit += map(self._values.units.__getitem__, map(_UNIT, map(quantities.__getitem__, plain)))
        if len(plain) < len(objects):
            done = set(plain)
            for place, each in enumerate(objects):
                if place not in done and batch.take(start + place, coded[place], "code"):
                    self._other_value(batch, start + place, each, coded[place])
        for place, parts in enumerate(map(_COMPONENT, objects)):
            if parts:
                self._components(batch, start + place, parts, codes)

    def _other_value(self, batch: Batch, at: int, each: Any, coded: Coded) -> None:
        """An observation whose value isn't a plain quantity."""
        suffix, value, unit, why = self._values.read(each)
        if why == "no value" and (each.component or given(raw_bytes(each.has_member))):
            batch.drops[at] = PANEL
        elif why in ("no value", None):
            batch.events.add(at, f"{coded.code}{suffix}", value, unit)
        elif why.startswith("!"):
            batch.bads[at] = ("value", why[1:], "")
        else:
            batch.drops[at] = why

    def _components(self, batch: Batch, at: int, components: Sequence[Any], codes: Memo) -> None:
        for each in components:
            coded = codes[raw_bytes(each.code)]
            suffix, value, unit, why = self._values.read(each)
            if coded.code is None:
                why = f"!{coded.fault}" if coded.fault else coded.drop
            if why is None:
                batch.parts.add(at, f"{coded.code}{suffix}", value, unit)
            elif why.startswith("!"):
                batch.part_bads.append((at, why[1:]))
            else:
                batch.part_drops.append((at, why))

    def _reports(self, batch: Batch, objects: list[Any], start: int) -> None:
        codes = self._code_of("DiagnosticReport", "DiagnosticReport")
        for at, each in enumerate(objects, start):
            coded = codes[raw_bytes(each.code)]
            if not batch.take(at, coded, "code"):
                continue
            answers = [self._values.answers[raw_bytes(raw)] for raw in each.conclusion_code or ()]
            wrong = next((found.fault for found in answers if found.fault), None)
            if wrong:
                batch.bads[at] = ("conclusionCode", wrong, "")
            words = [found.code for found in answers if found.code]
            for code in [f"{coded.code}//{word}" for word in words] or [coded.code]:
                batch.events.add(at, code or "")


class _Places(dict[bytes, int]):
    """Numbers texts in the order in which they come."""

    def __missing__(self, text: bytes) -> int:
        place = self[text] = len(self)
        return place


@dataclass
class _Columns:
    """What is taken of resources one by one: JSON of references by their numbers, and texts."""

    subject_places: _Places = field(default_factory=_Places)
    stay_places: _Places = field(default_factory=_Places)
    subjects: list[int] = field(default_factory=list)
    stays: list[int] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    updated: list[str | None] = field(default_factory=list)
    times: list[str | None] = field(default_factory=list)
    told: list[str | None] = field(default_factory=list)


def _slices(data: bytes) -> Iterator[bytes]:
    """Whole lines of about `_SLICE` bytes."""
    start = 0
    while start < len(data):
        end = data.find(b"\n", start + _SLICE) + 1 or len(data)
        yield data[start:end]
        start = end


def _decoded(chunk: Chunk) -> tuple[list[Any], list[int], list[tuple[int, str, str]]]:
    """The resources of a chunk; those that can't be decoded apart."""
    decode = DECODERS[chunk.kind].decode
    try:
        return [decode(raw) for raw in chunk.raws], list(range(len(chunk.raws))), []
    except READ_ERRORS:
        pass
    objects, places, broken = [], [], []
    for place, raw in enumerate(chunk.raws):
        try:
            objects.append(decode(raw))
            places.append(place)
        except READ_ERRORS as problem:
            broken.append((place, fault(problem), raw[:2000].decode(errors="replace")))
    return objects, places, broken


def _refuted(raw: bytes) -> tuple[str | None, str | None]:
    """Whether a verification status says that it wasn't so; or what is wrong with it."""
    if not given(raw):
        return None, None
    try:
        codes = [clean(coding.code) for coding in _CONCEPT.decode(raw).coding or ()]
    except READ_ERRORS as problem:
        return None, fault(problem)
    return next((f"verification {code}" for code in codes if code in _REFUTED), None), None
