"""The FHIR R4 resources that become events: only the members that are read, and what is left out by which filter.

Names are unified where FHIR has several for one thing (`patient` is `subject`, `vaccineCode` is `code`, `context` is
`encounter`). Concepts and references stay JSON: a hospital has few different ones, so they are decoded once and then
found by their bytes. What isn't listed here is skipped by the parser, unread.
"""

from typing import ClassVar

import msgspec
from msgspec import Raw, Struct, field

from tokenizer.sources.fhir_codes import Extension
from tokenizer.sources.fhir_index import Meta, Period

_NOTHING = Raw(b"")


class Resource(Struct, gc=False, tag_field="resourceType"):
    """What all resources have."""

    id: str | None = None
    meta: Meta | None = None
    status: str | None = None
    subject: Raw = _NOTHING
    encounter: Raw = _NOTHING
    code: Raw = _NOTHING

    unread: ClassVar[frozenset[str]] = frozenset()
    """Values of `status` that say that it didn't happen, or not yet."""

    usual_time: ClassVar[str | None] = None
    """The member that most have their time in; where it is empty, `event_time` looks further."""

    def event_time(self) -> str | None:
        """When it happened."""
        return None

    def told_time(self) -> str | None:
        """When it was written down, for resources that may tell of the past."""
        return None

    def dropped(self) -> str | None:
        """The filter that leaves it out."""
        return f"status {self.status}" if self.status in self.unread else None


class Patient(Resource, tag="Patient"):
    """A person's record."""

    gender: str | None = None
    birthDate: str | None = None
    birthDate_: Raw = field(default=_NOTHING, name="_birthDate")
    deceasedBoolean: bool | None = None
    deceasedDateTime: str | None = None
    extension: list[Extension] | None = None


class Place(Struct, gc=False):
    """Where a patient was during an encounter."""

    location: Raw = _NOTHING
    period: Period | None = None


class Hospitalization(Struct, gc=False):
    """Details of a stay."""

    dischargeDisposition: Raw = _NOTHING


class Encounter(Resource, tag="Encounter"):
    """A visit or stay."""

    unread = frozenset({"planned", "cancelled", "entered-in-error"})

    class_: Raw = field(default=_NOTHING, name="class")
    period: Period | None = None
    serviceType: Raw = _NOTHING
    reasonCode: list[Raw] | None = None
    hospitalization: Hospitalization | None = None
    location: list[Place] | None = None
    serviceProvider: Raw = _NOTHING

    def event_time(self) -> str | None:  # noqa: D102
        return self.period.start if self.period else None


class Condition(Resource, tag="Condition"):
    """A diagnosis or problem; its status is `verificationStatus`, looked at where concepts are."""

    verificationStatus: Raw = _NOTHING
    onsetDateTime: str | None = None
    onsetPeriod: Period | None = None
    recordedDate: str | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.onsetDateTime or (self.onsetPeriod.start if self.onsetPeriod else None)

    def told_time(self) -> str | None:  # noqa: D102
        return self.recordedDate


class AllergyIntolerance(Resource, tag="AllergyIntolerance"):
    """An allergy or intolerance."""

    subject: Raw = field(default=_NOTHING, name="patient")
    verificationStatus: Raw = _NOTHING
    onsetDateTime: str | None = None
    onsetPeriod: Period | None = None
    recordedDate: str | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.onsetDateTime or (self.onsetPeriod.start if self.onsetPeriod else None)

    def told_time(self) -> str | None:  # noqa: D102
        return self.recordedDate


class Quantity(Struct, gc=False):
    """A number with its unit."""

    value: float | None = None
    unit: str | None = None
    system: str | None = None
    code: str | None = None


class Span(Struct, gc=False):
    """A range of quantities."""

    low: Quantity | None = None
    high: Quantity | None = None


class Ratio(Struct, gc=False):
    """A ratio of quantities."""

    numerator: Quantity | None = None
    denominator: Quantity | None = None


class _Valued(Struct, gc=False):
    valueQuantity: Quantity | None = None
    valueCodeableConcept: Raw = _NOTHING
    valueString: str | None = None
    valueInteger: int | None = None
    valueBoolean: bool | None = None
    valueRange: Span | None = None
    valueRatio: Ratio | None = None
    valueTime: str | None = None
    valueDateTime: str | None = None
    valuePeriod: Raw = _NOTHING
    valueSampledData: Raw = _NOTHING
    dataAbsentReason: Raw = _NOTHING


class Component(_Valued):
    """A part of an observation."""

    code: Raw = _NOTHING


class Observation(_Valued, tag="Observation", tag_field="resourceType"):
    """A measurement, finding or answer."""

    id: str | None = None
    meta: Meta | None = None
    status: str | None = None
    subject: Raw = _NOTHING
    encounter: Raw = _NOTHING
    code: Raw = _NOTHING
    effectiveDateTime: str | None = None
    effectiveInstant: str | None = None
    effectivePeriod: Period | None = None
    issued: str | None = None
    component: list[Component] | None = None
    hasMember: Raw = _NOTHING

    unread: ClassVar[frozenset[str]] = frozenset({"registered", "cancelled", "entered-in-error"})
    usual_time: ClassVar[str | None] = "effectiveDateTime"

    def event_time(self) -> str | None:
        """When it was true; when it was issued, where that isn't said."""
        return (
            self.effectiveDateTime
            or self.effectiveInstant
            or (self.effectivePeriod.start if self.effectivePeriod else None)
            or self.issued
        )

    def told_time(self) -> str | None:
        """Observations aren't told later."""
        return None

    def dropped(self) -> str | None:
        """The filter that leaves it out."""
        return f"status {self.status}" if self.status in self.unread else None


class DiagnosticReport(Resource, tag="DiagnosticReport"):
    """A report; its results are observations of their own."""

    unread = frozenset({"registered", "cancelled", "entered-in-error"})
    usual_time = "effectiveDateTime"

    effectiveDateTime: str | None = None
    effectivePeriod: Period | None = None
    issued: str | None = None
    conclusionCode: list[Raw] | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.effectiveDateTime or (self.effectivePeriod.start if self.effectivePeriod else None) or self.issued


class Procedure(Resource, tag="Procedure"):
    """Something done to a patient."""

    unread = frozenset({"preparation", "not-done", "entered-in-error"})
    usual_time = "performedDateTime"

    performedDateTime: str | None = None
    performedPeriod: Period | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.performedDateTime or (self.performedPeriod.start if self.performedPeriod else None)


class Immunization(Resource, tag="Immunization"):
    """A vaccination."""

    unread = frozenset({"not-done", "entered-in-error"})
    usual_time = "occurrenceDateTime"

    subject: Raw = field(default=_NOTHING, name="patient")
    code: Raw = field(default=_NOTHING, name="vaccineCode")
    occurrenceDateTime: str | None = None
    recorded: str | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.occurrenceDateTime or self.recorded


class _Medicated(Resource):
    code: Raw = field(default=_NOTHING, name="medicationCodeableConcept")
    medicationReference: Raw = _NOTHING
    contained: Raw = _NOTHING


class MedicationRequest(_Medicated, tag="MedicationRequest"):
    """An order."""

    unread = frozenset({"draft", "cancelled", "entered-in-error"})
    usual_time = "authoredOn"

    intent: str | None = None
    doNotPerform: bool | None = None
    authoredOn: str | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.authoredOn

    def dropped(self) -> str | None:  # noqa: D102
        if self.status in self.unread:
            return f"status {self.status}"
        if self.intent in ("proposal", "plan", "option"):
            return f"intent {self.intent}"
        return "order not to give" if self.doNotPerform else None


class MedicationAdministration(_Medicated, tag="MedicationAdministration"):
    """A dose given."""

    unread = frozenset({"not-done", "entered-in-error"})
    usual_time = "effectiveDateTime"

    encounter: Raw = field(default=_NOTHING, name="context")
    effectiveDateTime: str | None = None
    effectivePeriod: Period | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.effectiveDateTime or (self.effectivePeriod.start if self.effectivePeriod else None)


class MedicationStatement(_Medicated, tag="MedicationStatement"):
    """What a patient is said to take."""

    unread = frozenset({"intended", "not-taken", "entered-in-error"})

    encounter: Raw = field(default=_NOTHING, name="context")
    effectiveDateTime: str | None = None
    effectivePeriod: Period | None = None
    dateAsserted: str | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.effectiveDateTime or (self.effectivePeriod.start if self.effectivePeriod else None)

    def told_time(self) -> str | None:  # noqa: D102
        return self.dateAsserted


READ: dict[str, type[Resource] | type[Observation]] = {
    each.__name__: each
    for each in (
        AllergyIntolerance,
        Condition,
        DiagnosticReport,
        Encounter,
        Immunization,
        MedicationAdministration,
        MedicationRequest,
        MedicationStatement,
        Observation,
        Patient,
        Procedure,
    )
}
"""The resource types that become events."""

DECODERS = {name: msgspec.json.Decoder(kind) for name, kind in READ.items()}
TOLD_LATER = frozenset({"AllergyIntolerance", "Condition", "MedicationStatement"})
"""Those that may tell of the past: without the time of telling they can't be known before their encounter began."""
