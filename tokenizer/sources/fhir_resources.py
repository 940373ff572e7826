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


class Resource(Struct, gc=False, rename="camel", tag_field="resourceType"):
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
    birth_date: str | None = None
    birth_date_: Raw = field(default=_NOTHING, name="_birthDate")
    deceased_boolean: bool | None = None
    deceased_date_time: str | None = None
    extension: list[Extension] | None = None


class Place(Struct, gc=False, rename="camel"):
    """Where a patient was during an encounter."""

    location: Raw = _NOTHING
    period: Period | None = None


class Hospitalization(Struct, gc=False, rename="camel"):
    """Details of a stay."""

    discharge_disposition: Raw = _NOTHING


class Encounter(Resource, tag="Encounter"):
    """A visit or stay."""

    unread = frozenset({"planned", "cancelled", "entered-in-error"})

    class_: Raw = field(default=_NOTHING, name="class")
    period: Period | None = None
    service_type: Raw = _NOTHING
    reason_code: list[Raw] | None = None
    hospitalization: Hospitalization | None = None
    location: list[Place] | None = None
    service_provider: Raw = _NOTHING

    def event_time(self) -> str | None:  # noqa: D102
        return self.period.start if self.period else None


class Condition(Resource, tag="Condition"):
    """A diagnosis or problem; its status is `verificationStatus`, looked at where concepts are."""

    verification_status: Raw = _NOTHING
    onset_date_time: str | None = None
    onset_period: Period | None = None
    recorded_date: str | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.onset_date_time or (self.onset_period.start if self.onset_period else None)

    def told_time(self) -> str | None:  # noqa: D102
        return self.recorded_date


class AllergyIntolerance(Resource, tag="AllergyIntolerance"):
    """An allergy or intolerance."""

    subject: Raw = field(default=_NOTHING, name="patient")
    verification_status: Raw = _NOTHING
    onset_date_time: str | None = None
    onset_period: Period | None = None
    recorded_date: str | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.onset_date_time or (self.onset_period.start if self.onset_period else None)

    def told_time(self) -> str | None:  # noqa: D102
        return self.recorded_date


class Quantity(Struct, gc=False, frozen=True, rename="camel"):
    """A number with its unit."""

    value: float | None = None
    unit: str | None = None
    system: str | None = None
    code: str | None = None


NO_QUANTITY = Quantity()
"""Stands where there is none, so that the members of all can be taken alike."""


class Span(Struct, gc=False, rename="camel"):
    """A range of quantities."""

    low: Quantity | None = None
    high: Quantity | None = None


class Ratio(Struct, gc=False, rename="camel"):
    """A ratio of quantities."""

    numerator: Quantity | None = None
    denominator: Quantity | None = None


class _Valued(Struct, gc=False, rename="camel"):
    value_quantity: Quantity | None = NO_QUANTITY
    value_codeable_concept: Raw = _NOTHING
    value_string: str | None = None
    value_integer: int | None = None
    value_boolean: bool | None = None
    value_range: Span | None = None
    value_ratio: Ratio | None = None
    value_time: str | None = None
    value_date_time: str | None = None
    value_period: Raw = _NOTHING
    value_sampled_data: Raw = _NOTHING
    data_absent_reason: Raw = _NOTHING


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
    effective_date_time: str | None = None
    effective_instant: str | None = None
    effective_period: Period | None = None
    issued: str | None = None
    component: list[Component] | None = None
    has_member: Raw = _NOTHING

    unread: ClassVar[frozenset[str]] = frozenset({"registered", "cancelled", "entered-in-error"})
    usual_time: ClassVar[str | None] = "effective_date_time"

    def event_time(self) -> str | None:
        """When it was true; when it was issued, where that isn't said."""
        return (
            self.effective_date_time
            or self.effective_instant
            or (self.effective_period.start if self.effective_period else None)
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
    usual_time = "effective_date_time"

    effective_date_time: str | None = None
    effective_period: Period | None = None
    issued: str | None = None
    conclusion_code: list[Raw] | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return (
            self.effective_date_time or (self.effective_period.start if self.effective_period else None) or self.issued
        )


class Procedure(Resource, tag="Procedure"):
    """Something done to a patient."""

    unread = frozenset({"preparation", "not-done", "entered-in-error"})
    usual_time = "performed_date_time"

    performed_date_time: str | None = None
    performed_period: Period | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.performed_date_time or (self.performed_period.start if self.performed_period else None)


class Immunization(Resource, tag="Immunization"):
    """A vaccination."""

    unread = frozenset({"not-done", "entered-in-error"})
    usual_time = "occurrence_date_time"

    subject: Raw = field(default=_NOTHING, name="patient")
    code: Raw = field(default=_NOTHING, name="vaccineCode")
    occurrence_date_time: str | None = None
    recorded: str | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.occurrence_date_time or self.recorded


class _Medicated(Resource):
    code: Raw = field(default=_NOTHING, name="medicationCodeableConcept")
    medication_reference: Raw = _NOTHING
    contained: Raw = _NOTHING


class MedicationRequest(_Medicated, tag="MedicationRequest"):
    """An order."""

    unread = frozenset({"draft", "cancelled", "entered-in-error"})
    usual_time = "authored_on"

    intent: str | None = None
    do_not_perform: bool | None = None
    authored_on: str | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.authored_on

    def dropped(self) -> str | None:  # noqa: D102
        if self.status in self.unread:
            return f"status {self.status}"
        if self.intent in ("proposal", "plan", "option"):
            return f"intent {self.intent}"
        return "order not to give" if self.do_not_perform else None


class MedicationAdministration(_Medicated, tag="MedicationAdministration"):
    """A dose given."""

    unread = frozenset({"not-done", "entered-in-error"})
    usual_time = "effective_date_time"

    encounter: Raw = field(default=_NOTHING, name="context")
    effective_date_time: str | None = None
    effective_period: Period | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.effective_date_time or (self.effective_period.start if self.effective_period else None)


class MedicationStatement(_Medicated, tag="MedicationStatement"):
    """What a patient is said to take."""

    unread = frozenset({"intended", "not-taken", "entered-in-error"})

    encounter: Raw = field(default=_NOTHING, name="context")
    effective_date_time: str | None = None
    effective_period: Period | None = None
    date_asserted: str | None = None

    def event_time(self) -> str | None:  # noqa: D102
        return self.effective_date_time or (self.effective_period.start if self.effective_period else None)

    def told_time(self) -> str | None:  # noqa: D102
        return self.date_asserted


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
