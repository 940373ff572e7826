"""FHIR patients and encounters: resources that give several events at times of their own."""

import re

import msgspec
import numpy as np
import polars as pl

from tokenizer.sources import fhir_index as index
from tokenizer.sources.fhir_batch import Batch, Memo
from tokenizer.sources.fhir_codes import (
    READ_ERRORS,
    Extension,
    Namer,
    demographics,
    encounter_type,
    fault,
    given,
    raw_bytes,
)
from tokenizer.sources.fhir_refer import Resolver
from tokenizer.sources.fhir_resources import Encounter, Patient
from tokenizer.sources.fhir_times import NO_TIME, times

_BIRTH_TIME = "http://hl7.org/fhir/StructureDefinition/patient-birthTime"


class _Extended(msgspec.Struct, gc=False, rename="camel"):
    extension: list[Extension] | None = None


_EXTENDED = msgspec.json.Decoder(_Extended)


class Encounters:
    """Adds what encounters give: start, department, complaints, changes of ward, end and destination."""

    def __init__(self, refer: Resolver, namer: Namer) -> None:
        self._refer = refer
        self._labels = Memo(namer.label)
        self._types = Memo(encounter_type)

    def fill(self, batch: Batch, objects: list[Encounter]) -> None:
        """Add the events of a batch of encounters."""
        batch.encounters = pl.Series(batch.ids, dtype=pl.String)
        ends = [each.period.end if each.period else None for each in objects]
        begun, ended = times(batch.times), times(ends)
        instants = times(batch.times, zoned=True), times(ends, zoned=True)
        for at, each in enumerate(objects):
            end = ends[at]
            if end is not None:
                if ended[at] == NO_TIME:
                    batch.bads[at] = ("period.end", "not a date or time", end)
                elif ended[at] < begun[at]:
                    whole_day = len(end) == 10 and (batch.times[at] or "")[:10] == end
                    if whole_day or instants[1][at] >= instants[0][at]:
                        end = batch.times[at]  # at some time of that day, or the clocks were set back meanwhile
                    else:
                        batch.bads[at] = ("period.end", "ends before it starts", end)
            try:
                self._add(batch, at, each, end)
            except READ_ERRORS as problem:
                batch.bads[at] = ("", fault(problem), "")

    def _add(self, batch: Batch, at: int, each: Encounter, end: str | None) -> None:
        events, start = batch.events, batch.times[at] or ""
        kind = self._types[raw_bytes(each.class_)]
        events.add(at, f"ENCOUNTER_START//{kind}")
        places = each.location or []
        wards = [
            (self._refer.places[raw_bytes(place.location)], place.period.start if place.period else None)
            for place in places
        ]
        department = self._labels[raw_bytes(each.service_type)] or (wards and wards[0][0])
        department = department or self._refer.places[raw_bytes(each.service_provider)]
        if department:
            events.add(at, f"DEPARTMENT//{department}")
        for ward, since in wards[1:]:
            if ward and since and since > start:
                events.add(at, f"DEPARTMENT//{ward}", moment=since)
        for raw in each.reason_code or ():
            if reason := self._labels[raw_bytes(raw)]:
                events.add(at, f"CHIEF_COMPLAINT//{reason}")
        if end is not None:
            events.add(at, f"ENCOUNTER_END//{kind}", moment=end)
            left = self._labels[raw_bytes(each.hospitalization.discharge_disposition)] if each.hospitalization else None
            if left:
                events.add(at, f"DISCHARGE_TO//{left}", moment=end)


def fill_patients(batch: Batch, objects: list[Patient], refer: Resolver) -> None:
    """Add the static facts, the birth and the death of a batch of patients."""
    batch.static = True
    keys = [f"Patient/{each}" if each else None for each in batch.ids]
    batch.subjects = refer.index.patients.find(keys, index.NO_SUBJECT)
    births = [_birth(each) for each in objects]
    deaths = [_day_of_death(each.deceased_date_time) for each in objects]
    born, died = times(births), times(deaths)
    for at, each in enumerate(objects):
        if keys[at] in refer.index.replaced:
            batch.early[at] = "replaced by another record"
            continue
        for code in demographics(each.gender, each.extension):
            batch.events.add(at, code)
        for column, text, moment, code in (
            ("birthDate", births[at], born[at], "MEDS_BIRTH"),
            ("deceasedDateTime", deaths[at], died[at], "MEDS_DEATH"),
        ):
            if text is not None and moment == NO_TIME:
                batch.bads[at] = (column, "not a date or time", text)
            elif text is not None:
                batch.events.add(at, code, moment=text)
        if NO_TIME < died[at] < born[at] and len(deaths[at] or "") >= 10:
            batch.bads[at] = ("deceasedDateTime", "died before birth", deaths[at] or "")
        batch.deceased_undated += bool(each.deceased_boolean) and deaths[at] is None
    for at in set(range(len(objects))) - set(batch.events.at) - batch.early.keys() - batch.bads.keys():
        batch.drops[at] = "nothing known of the patient"


def _birth(patient: Patient) -> str | None:
    """The time of birth where the extension gives it, else the date."""
    raw = raw_bytes(patient.birth_date_)
    if given(raw):
        try:
            extensions = _EXTENDED.decode(raw).extension or []
            times = [each.value_date_time for each in extensions if each.url == _BIRTH_TIME]
            return next((time for time in times if time), patient.birth_date)
        except READ_ERRORS:
            return patient.birth_date
    return patient.birth_date


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
