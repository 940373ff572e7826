"""FHIR resources become events: chunk by chunk, member by member as whole columns.

Every resource has one fate: it gives events, a named filter drops it, or it is bad. Filters on what a resource says of
itself (cancelled, refuted) come first, then faults of subject and time, then filters on what it holds (no code, free
text, a panel whose parts are read).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
import polars as pl

from tokenizer.sources import fhir_index as index
from tokenizer.sources.fhir_batch import Batch, Events, Memo
from tokenizer.sources.fhir_codes import READ_ERRORS, Coded, Concept, Namer, all_bytes, clean, fault, given, raw_bytes
from tokenizer.sources.fhir_index import Index
from tokenizer.sources.fhir_kinds import Block, Chunk
from tokenizer.sources.fhir_refer import Resolver
from tokenizer.sources.fhir_resources import DECODERS, READ, TOLD_LATER
from tokenizer.sources.fhir_stays import Encounters, fill_patients
from tokenizer.sources.fhir_values import NO_VALUE, Values

PANEL = "panel, its parts are read"
"""The filter that drops an observation without a value of its own whose parts are read."""

_SLICE = 256 << 10
_SEARCHED = 4 << 10
_NEWLINE = ord("\n")
_REFUTED = frozenset({"refuted", "entered-in-error"})
_ID, _META, _STATUS = attrgetter("id"), attrgetter("meta"), attrgetter("status")
_SUBJECT, _ENCOUNTER = attrgetter("subject"), attrgetter("encounter")
_CODE, _COMPONENT, _LAST_UPDATED = attrgetter("code"), attrgetter("component"), attrgetter("last_updated")
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
        self._names = Memo(lambda raw: self._code_of("Observation", "Observation")[raw].code or "")
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
        columns.subjects += map(columns.subject_places.__getitem__, all_bytes(map(_SUBJECT, objects)))
        columns.stays += map(columns.stay_places.__getitem__, all_bytes(map(_ENCOUNTER, objects)))
        columns.ids += map(_ID, objects)
        metas = list(map(_META, objects))
        columns.updated += (
            map(_LAST_UPDATED, metas) if all(metas) else [meta.last_updated if meta else None for meta in metas]
        )
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
            found = list(map(codes.__getitem__, all_bytes(map(_CODE, objects))))
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
        found: list[Coded] = list(map(codes.__getitem__, all_bytes(map(_CODE, objects))))
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
        for at, column, why in self._valued(batch.events, objects, range(start, start + len(objects)), whole=True):
            if why.startswith("!"):
                batch.bads[at] = (column, why[1:], "")
            else:
                batch.drops[at] = why
        panels = [(at, parts) for at, parts in enumerate(map(_COMPONENT, objects), start) if parts]
        owners = [at for at, parts in panels for _ in parts]
        components = [each for _, parts in panels for each in parts]
        for at, _, why in self._valued(batch.parts, components, owners, whole=False):
            if why.startswith("!"):
                batch.part_bads.append((at, why[1:]))
            else:
                batch.part_drops.append((at, why))

    def _valued(
        self, events: Events, objects: list[Any], at: Sequence[int], *, whole: bool
    ) -> list[tuple[int, str, str]]:
        """Add the events of observations or of components, as whole columns.

        Args:
            events: to add to.
            objects: observations, or components.
            at: places of the resources in the batch.
            whole: they are observations, which need no value.

        Returns:
            Of those without an event: place, member, and a filter, or `!` and a fault.
        """
        raws = list(all_bytes(map(_CODE, objects)))
        names: list[str] = list(map(self._names.__getitem__, raws))
        numbers, units, others = self._values.columns(objects)
        failed: list[tuple[int, str, str]] = []
        for place, (suffix, numbers[place], units[place], why) in others:
            if not (name := names[place]):
                continue
            if why == NO_VALUE and whole and (objects[place].component or given(raw_bytes(objects[place].has_member))):
                failed.append((place, "value", PANEL))
            elif why is None or (why == NO_VALUE and whole):
                names[place] = name + suffix
            else:
                failed.append((place, "value", why))
        if not all(names):
            unnamed = [place for place, name in enumerate(names) if not name]
            found = [self._code_of("Observation", "Observation")[raws[place]] for place in unnamed]
            failed += [
                (place, "code", f"!{coded.fault}" if coded.fault else coded.drop or "")
                for place, coded in zip(unnamed, found, strict=True)
            ]
            failed.sort()
        if failed:
            keep = bytearray(b"\1") * len(objects)
            for place, _, _ in failed:
                keep[place] = 0
            events.extend(compress(at, keep), compress(names, keep), compress(numbers, keep), compress(units, keep))
        else:
            events.extend(at, names, numbers, units)
        return [(at[place], column, why) for place, column, why in failed]

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


def _slices(data: memoryview) -> Iterator[memoryview]:
    """Whole lines of about `_SLICE` bytes."""
    start = 0
    while start < len(data):
        end = min(start + _SLICE, len(data))
        while end < len(data) and data[end - 1] != _NEWLINE:
            found = data[end : end + _SEARCHED].tobytes().find(b"\n") + 1
            end = min(end + (found or _SEARCHED), len(data))
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
