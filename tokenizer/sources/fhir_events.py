"""FHIR resources become events: chunk by chunk, member by member as whole columns.

Every resource has one fate: it gives events, a named filter drops it, or it is bad. Filters on what a resource says of
itself (cancelled, refuted) come first, then faults of subject and time, then filters on what it holds (no code, free
text, a panel whose parts are read).
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl

from tokenizer.sources import fhir_index as index
from tokenizer.sources.fhir_codes import (
    READ_ERRORS,
    Coded,
    Concept,
    Extension,
    Namer,
    answer,
    clean,
    demographics,
    encounter_type,
    fault,
    given,
)
from tokenizer.sources.fhir_files import Block, Chunk
from tokenizer.sources.fhir_index import Index, Reference
from tokenizer.sources.fhir_resources import DECODERS, READ, TOLD_LATER, Encounter, Patient, Quantity

PANEL = "panel, its parts are read"
_UCUM = frozenset({None, "", "http://unitsofmeasure.org", "urn:oid:2.16.840.1.113883.6.8"})
_LARGEST = 3.4028234e38
_MISSING = index.NO_TIME + 1
_REMEMBERED = 200_000
_NUMBER = re.compile(r"[-+]?\d{1,30}(\.\d{1,30})?")
_BIRTH_TIME = "http://hl7.org/fhir/StructureDefinition/patient-birthTime"
_REFUTED = frozenset({"refuted", "entered-in-error"})

_ID, _META, _STATUS = attrgetter("id"), attrgetter("meta"), attrgetter("status")
_SUBJECT, _ENCOUNTER = attrgetter("subject"), attrgetter("encounter")

_REFERENCE = msgspec.json.Decoder(Reference)
_CONCEPT = msgspec.json.Decoder(Concept)


class _Contained(msgspec.Struct, gc=False):
    id: str | None = None
    code: msgspec.Raw = msgspec.Raw(b"")


class _Extended(msgspec.Struct, gc=False):
    extension: list[Extension] | None = None


_EXTENDED = msgspec.json.Decoder(_Extended)
_CONTAINED = msgspec.json.Decoder(list[_Contained])


class Memo(dict[Any, Any]):
    """Remembers what a function gave; forgets all where it would hold too much."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, raw: Any) -> Any:
        if len(self) >= _REMEMBERED:
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
    ids: list[str | None]
    updated: list[str | None]
    subjects: npt.NDArray[np.int64]
    subject_texts: list[bytes]
    subject_at: npt.NDArray[np.int64]
    encounters: pl.Series
    starts: npt.NDArray[np.int64]
    times: list[str | None]
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


class Reader:
    """Turns chunks into batches; one per process."""

    def __init__(self, found: Index, namer: Namer, *, told: bool) -> None:
        self._index, self._namer, self._told = found, namer, told
        self._subjects: dict[bytes, int] = {}
        self._stays: dict[bytes, tuple[str | None, int]] = {}
        self._codes: dict[str, Memo] = {}
        self._answers = Memo(namer.answer)
        self._labels = Memo(namer.label)
        self._refuted = Memo(_refuted)
        self._types = Memo(encounter_type)
        self._places = Memo(self._place)
        self._units = Memo(_unit)
        self.dangling_encounters = 0

    def read(self, chunk: Chunk) -> tuple[Batch, list[tuple[int, str, str]]]:
        """Decode a chunk and find its events; also rows that aren't what they should be: place, reason, content."""
        objects, places, broken = _decoded(chunk)
        return self._filled(chunk, objects, places), broken

    def read_block(self, block: Block) -> Batch | None:
        """Decode the lines of a block at once; None if they aren't all right, or of other kinds."""
        try:
            objects = DECODERS[block.kind].decode_lines(block.data)
        except READ_ERRORS:
            return None
        if len(objects) != block.lines:
            return None
        rows = range(block.first_row, block.first_row + block.lines)
        return self._filled(Chunk(block.file, block.kind, rows=rows), objects, range(block.lines))

    def _filled(self, chunk: Chunk, objects: list[Any], places: Sequence[int]) -> Batch:
        batch = self._batch(chunk, objects, places)
        if chunk.kind == "MedicationRequest" or READ[chunk.kind].unread.intersection(map(_STATUS, objects)):
            batch.early = {at: why for at, each in enumerate(objects) if (why := each.dropped())}
        fill = {
            "Observation": self._observations,
            "Encounter": self._visits,
            "Patient": self._patients,
            "DiagnosticReport": self._reports,
        }.get(chunk.kind, self._coded)
        fill(batch, objects)
        return batch

    def _batch(self, chunk: Chunk, objects: list[Any], places: Sequence[int]) -> Batch:
        subjects, subject_at = _distinct(map(bytes, map(_SUBJECT, objects)))
        stays, stay_at = _distinct(map(bytes, map(_ENCOUNTER, objects)))
        self._learn_subjects(subjects)
        self._learn_encounters(stays)
        ids = list(map(_ID, objects))
        if not all(ids):
            ids = [each or index.own_id(chunk, place, None) for place, each in zip(places, ids, strict=True)]
        usual = READ[chunk.kind].usual_time
        times = list(map(attrgetter(usual), objects)) if usual else [None] * len(objects)
        if not all(times):
            times = [time or each.event_time() for time, each in zip(times, objects, strict=True)]
        late = None
        if chunk.kind in TOLD_LATER:
            told = [each.told_time() for each in objects]
            if self._told:
                late = [not text for text in told]
                times = [text or time for text, time in zip(told, times, strict=True)]
            else:
                times = [time or text for text, time in zip(told, times, strict=True)]
        known = [self._stays[raw] for raw in stays]
        return Batch(
            chunk=chunk,
            places=places,
            ids=ids,
            updated=[meta.lastUpdated if meta else None for meta in map(_META, objects)],
            subjects=np.array([self._subjects[raw] for raw in subjects], np.int64)[subject_at],
            subject_texts=subjects,
            subject_at=subject_at,
            encounters=pl.Series([stay[0] for stay in known], dtype=pl.String).gather(stay_at),
            starts=np.array([stay[1] for stay in known], np.int64)[stay_at],
            times=times,
            late=late,
        )

    def _learn_subjects(self, raws: list[bytes]) -> None:
        if len(self._subjects) > _REMEMBERED:
            self._subjects.clear()
        new = list(set(raws) - self._subjects.keys())
        if not new:
            return
        keys: list[str | None] = []
        for raw in new:
            try:
                keys.append(self._key(raw, "Patient") if given(raw) else "")
            except READ_ERRORS:
                keys.append("#")
        subjects = self._index.patients.find(keys, index.UNKNOWN_PATIENT).tolist()
        for raw, name, subject in zip(new, keys, subjects, strict=True):
            if name in ("", "#"):
                subject = index.NO_SUBJECT if name == "" else index.BROKEN
            elif name and not name.startswith(("Patient/", "Patient?")):
                subject = index.NOT_A_PATIENT
            self._subjects[raw] = subject

    def _learn_encounters(self, raws: list[bytes]) -> None:
        if len(self._stays) > _REMEMBERED:
            self._stays.clear()
        new = list(set(raws) - self._stays.keys())
        keys: list[str | None] = []
        for raw in new:
            try:
                keys.append(self._key(raw, "Encounter") if given(raw) else None)
            except READ_ERRORS:
                keys.append(None)
        starts = self._index.encounters.find(keys, _MISSING).tolist()
        for raw, name, start in zip(new, keys, starts, strict=True):
            stay = name.removeprefix("Encounter/") if name and name.startswith("Encounter/") else None
            missing = start == _MISSING
            self.dangling_encounters += missing and given(raw)
            self._stays[raw] = stay, index.NO_TIME if missing else start

    def _key(self, raw: bytes, kind: str) -> str | None:
        if (plain := index.plain_key(raw, kind, self._index.aliases)) is not None:
            return plain
        reference = _REFERENCE.decode(raw)
        name = index.key(reference.reference, reference.type or kind, self._index.aliases)
        if name is None and (
            keys := index.identifier_keys(kind, [reference.identifier] if reference.identifier else [])
        ):
            name = keys[0] if reference.identifier and (reference.identifier.system or "").strip() else keys[1]
        return name

    def _code_of(self, kind: str, table: str) -> Memo:
        if table not in self._codes:
            self._codes[table] = Memo(self._namer.concept(kind, table.upper()))
        return self._codes[table]

    def _coded(self, batch: Batch, objects: list[Any]) -> None:
        """Resources that are one code at one time."""
        kind = batch.chunk.kind
        medicated = kind.startswith("Medication")
        codes = self._code_of("Medication" if medicated else kind, kind)
        for at, each in enumerate(objects):
            coded = codes[bytes(each.code)]
            if medicated and coded.drop and given(bytes(each.medicationReference)):
                coded = self._medication(each, codes)
            if kind in ("Condition", "AllergyIntolerance"):
                why, wrong = self._refuted[bytes(each.verificationStatus)]
                if why:
                    batch.early.setdefault(at, why)
                if wrong:
                    batch.bads[at] = ("verificationStatus", wrong, "")
            if self._take(batch, at, coded, "code"):
                batch.events.add(at, f"ALLERGY//{coded.code}" if kind == "AllergyIntolerance" else coded.code or "")

    def _take(self, batch: Batch, at: int, coded: Coded, column: str) -> bool:
        """Whether there is a code; otherwise what becomes of the row."""
        if coded.fault:
            batch.bads[at] = (column, coded.fault, "")
        elif coded.drop:
            batch.drops[at] = coded.drop
        return coded.code is not None

    def _medication(self, each: Any, codes: Memo) -> Coded:
        """The code of a medication that is referred to."""
        try:
            reference = _REFERENCE.decode(bytes(each.medicationReference))
            if (reference.reference or "").startswith("#"):
                contained = _CONTAINED.decode(bytes(each.contained)) if given(bytes(each.contained)) else []
                raws = [bytes(inner.code) for inner in contained if f"#{inner.id}" == reference.reference]
                return codes[raws[0]] if raws else Coded(None, fault="reference to a medication that isn't contained")
            name = self._key(bytes(each.medicationReference), "Medication")
        except READ_ERRORS as problem:
            return Coded(None, fault=fault(problem))
        place = int(self._index.medications.find([name], -2)[0])
        if place == -2:
            return Coded(None, fault="reference to a medication that isn't in the source")
        return Coded(self._index.codes[place]) if place >= 0 else Coded(None, drop="no code")

    def _observations(self, batch: Batch, objects: list[Any]) -> None:
        codes, units, events = self._code_of("Observation", "Observation"), self._units, batch.events
        add_at, add_code, add_value, add_unit = (
            column.append for column in (events.at, events.code, events.value, events.unit)
        )
        for at, each in enumerate(objects):
            coded = codes[bytes(each.code)]
            quantity = each.valueQuantity
            # Most are numbers: no call for them but those that remember.
            if quantity is not None and (value := quantity.value) is not None and -_LARGEST <= value <= _LARGEST:
                if (name := coded[0]) is not None:
                    add_at(at)
                    add_code(name)
                    add_value(value)
                    add_unit(units[quantity.code, quantity.unit, quantity.system])
                else:
                    self._take(batch, at, coded, "code")
            elif self._take(batch, at, coded, "code"):
                self._other_value(batch, at, each, coded)
            if each.component:
                self._components(batch, at, each.component, codes)

    def _other_value(self, batch: Batch, at: int, each: Any, coded: Coded) -> None:
        """An observation whose value isn't a plain quantity."""
        suffix, value, unit, why = self._value(each)
        if why == "no value" and (each.component or given(bytes(each.hasMember))):
            batch.drops[at] = PANEL
        elif why in ("no value", None):
            batch.events.add(at, f"{coded.code}{suffix}", value, unit)
        elif why.startswith("!"):
            batch.bads[at] = ("value", why[1:], "")
        else:
            batch.drops[at] = why

    def _components(self, batch: Batch, at: int, components: Sequence[Any], codes: Memo) -> None:
        for each in components:
            coded = codes[bytes(each.code)]
            suffix, value, unit, why = self._value(each)
            if coded.code is None:
                why = f"!{coded.fault}" if coded.fault else coded.drop
            if why is None:
                batch.parts.add(at, f"{coded.code}{suffix}", value, unit)
            elif why.startswith("!"):
                batch.part_bads.append((at, why[1:]))
            else:
                batch.part_drops.append((at, why))

    def _value(self, each: Any) -> tuple[str, float | None, str | None, str | None]:
        """The value of an observation: suffix of its code, number, unit; or a filter, or `!` and a fault."""
        coded: Coded | None = None
        if each.valueQuantity is not None and each.valueQuantity.value is not None:
            return _number(each.valueQuantity.value, self._unit(each.valueQuantity))
        if each.valueInteger is not None:
            return _number(each.valueInteger, None)
        if each.valueRatio is not None:
            return self._ratio(each.valueRatio)
        if given(bytes(each.valueCodeableConcept)):
            coded = self._answers[bytes(each.valueCodeableConcept)]
        elif each.valueBoolean is not None:
            coded = Coded(str(each.valueBoolean).upper())
        elif each.valueString is not None:
            word = clean(each.valueString)
            if _NUMBER.fullmatch(word):
                return _number(float(word), None)
            coded = answer(word)
        elif each.valueRange is not None:
            coded = answer(self._range(each.valueRange))
        if coded is not None and coded.code:
            return f"//{coded.code}", None, None, None
        if coded is not None and (coded.fault or coded.drop != "no value"):
            return "", None, None, f"!{coded.fault}" if coded.fault else coded.drop
        others = (each.valueTime, each.valueDateTime, bytes(each.valuePeriod), bytes(each.valueSampledData))
        if any(others):
            return "", None, None, "value of a type that isn't read"
        return "", None, None, "data absent" if given(bytes(each.dataAbsentReason)) else "no value"

    def _unit(self, quantity: Quantity) -> str | None:
        return self._units[quantity.code, quantity.unit, quantity.system]

    def _ratio(self, ratio: Any) -> tuple[str, float | None, str | None, str | None]:
        over, under = ratio.numerator, ratio.denominator
        if over is None or under is None or over.value is None or not under.value:
            return "", None, None, "ratio without a number"
        units = [self._unit(over), self._unit(under)]
        return _number(over.value / under.value, f"{units[0] or '1'}/{units[1] or '1'}" if any(units) else None)

    def _range(self, span: Any) -> str:
        ends = [f"{end.value:g}" if end is not None and end.value is not None else "" for end in (span.low, span.high)]
        units = [self._unit(end) for end in (span.low, span.high) if end is not None]
        unit = next((each for each in units if each), None)
        return f"{'-'.join(ends)} {unit or ''}" if any(ends) else ""

    def _reports(self, batch: Batch, objects: list[Any]) -> None:
        codes = self._code_of("DiagnosticReport", "DiagnosticReport")
        for at, each in enumerate(objects):
            coded = codes[bytes(each.code)]
            if not self._take(batch, at, coded, "code"):
                continue
            answers = [self._answers[bytes(raw)] for raw in each.conclusionCode or ()]
            wrong = next((found.fault for found in answers if found.fault), None)
            if wrong:
                batch.bads[at] = ("conclusionCode", wrong, "")
            words = [found.code for found in answers if found.code]
            for code in [f"{coded.code}//{word}" for word in words] or [coded.code]:
                batch.events.add(at, code or "")

    def _visits(self, batch: Batch, objects: list[Encounter]) -> None:
        batch.encounters = pl.Series(batch.ids, dtype=pl.String)
        ends = [each.period.end if each.period else None for each in objects]
        begun, ended = index.times(batch.times), index.times(ends)
        instants = index.times(batch.times, zoned=True), index.times(ends, zoned=True)
        for at, each in enumerate(objects):
            end = ends[at]
            if end is not None:
                if ended[at] == index.NO_TIME:
                    batch.bads[at] = ("period.end", "not a date or time", end)
                elif ended[at] < begun[at]:
                    whole_day = len(end) == 10 and (batch.times[at] or "")[:10] == end
                    if whole_day or instants[1][at] >= instants[0][at]:
                        end = batch.times[at]  # at some time of that day, or the clocks were set back meanwhile
                    else:
                        batch.bads[at] = ("period.end", "ends before it starts", end)
            try:
                self._encounter(batch.events, at, each, end)
            except READ_ERRORS as problem:
                batch.bads[at] = ("", fault(problem), "")

    def _encounter(self, events: Events, at: int, each: Encounter, end: str | None) -> None:
        kind = self._types[bytes(each.class_)]
        events.add(at, f"ENCOUNTER_START//{kind}")
        places = each.location or []
        wards = [
            (self._places[bytes(place.location)], place.period.start if place.period else None) for place in places
        ]
        department = self._labels[bytes(each.serviceType)] or (wards and wards[0][0])
        department = department or self._places[bytes(each.serviceProvider)]
        if department:
            events.add(at, f"DEPARTMENT//{department}")
        for ward, since in wards[1:]:
            if ward and since and since > (self_start := each.event_time() or "") and self_start:
                events.add(at, f"DEPARTMENT//{ward}", moment=since)
        for raw in each.reasonCode or ():
            if reason := self._labels[bytes(raw)]:
                events.add(at, f"CHIEF_COMPLAINT//{reason}")
        if end is not None:
            events.add(at, f"ENCOUNTER_END//{kind}", moment=end)
            left = self._labels[bytes(each.hospitalization.dischargeDisposition)] if each.hospitalization else None
            if left:
                events.add(at, f"DISCHARGE_TO//{left}", moment=end)

    def _place(self, raw: bytes) -> str | None:
        """The name of a location or organization that is referred to."""
        if not given(raw):
            return None
        reference = _REFERENCE.decode(raw)
        if words := clean(reference.display):
            return words.upper()
        for kind in ("Location", "Organization"):
            place = int(self._index.places.find([self._key(raw, kind)], -1)[0])
            if place >= 0:
                return self._index.names[place]
        return None

    def _patients(self, batch: Batch, objects: list[Patient]) -> None:
        batch.static = True
        keys = [f"Patient/{each}" if each else None for each in batch.ids]
        batch.subjects = self._index.patients.find(keys, index.NO_SUBJECT)
        births = [_birth(each) for each in objects]
        deaths = [_day_of_death(each.deceasedDateTime) for each in objects]
        born, died = index.times(births), index.times(deaths)
        for at, each in enumerate(objects):
            if keys[at] in self._index.replaced:
                batch.early[at] = "replaced by another record"
                continue
            for code in demographics(each.gender, each.extension):
                batch.events.add(at, code)
            for column, text, moment, code in (
                ("birthDate", births[at], born[at], "MEDS_BIRTH"),
                ("deceasedDateTime", deaths[at], died[at], "MEDS_DEATH"),
            ):
                if text is not None and moment == index.NO_TIME:
                    batch.bads[at] = (column, "not a date or time", text)
                elif text is not None:
                    batch.events.add(at, code, moment=text)
            if index.NO_TIME < died[at] < born[at] and len(deaths[at] or "") >= 10:
                batch.bads[at] = ("deceasedDateTime", "died before birth", deaths[at] or "")
            batch.deceased_undated += bool(each.deceasedBoolean) and deaths[at] is None
        for at in set(range(len(objects))) - set(batch.events.at) - batch.early.keys() - batch.bads.keys():
            batch.drops[at] = "nothing known of the patient"


def _distinct(texts: Iterable[bytes]) -> tuple[list[bytes], npt.NDArray[np.int64]]:
    """The distinct texts in their order, and the place of each text among them."""
    column = list(texts)
    places = {text: place for place, text in enumerate(dict.fromkeys(column))}
    return list(places), np.array([places[text] for text in column], np.int64)


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


def _unit(parts: tuple[str | None, str | None, str | None]) -> str | None:
    """A quantity's unit: its code where that is UCUM, else its unit in words, else the code."""
    code, unit, system = parts
    return (clean(code) if system in _UCUM else "") or clean(unit) or clean(code) or None


def _number(value: float, unit: str | None) -> tuple[str, float | None, str | None, str | None]:
    if not math.isfinite(value) or abs(value) > _LARGEST:
        return "", None, None, "!value out of range"
    return "", float(value), unit, None


def _birth(patient: Patient) -> str | None:
    """The time of birth where the extension gives it, else the date."""
    raw = bytes(patient.birthDate_)
    if given(raw):
        try:
            extensions = _EXTENDED.decode(raw).extension or []
            times = [each.valueDateTime for each in extensions if each.url == _BIRTH_TIME]
            return next((time for time in times if time), patient.birthDate)
        except READ_ERRORS:
            return patient.birthDate
    return patient.birthDate


def _day_of_death(text: str | None) -> str | None:
    """A death of which only year or month is known is put at their last day: nothing was recorded after it."""
    if text is None:
        return None
    if re.fullmatch(r"\d{4}", text):
        return f"{text}-12-31"
    if re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])", text):
        last = np.datetime64(text, "M") + np.timedelta64(1, "M") - np.timedelta64(1, "D")
        return str(last.astype("datetime64[D]"))
    return text
