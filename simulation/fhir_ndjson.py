"""A synthetic hospital's extract as a FHIR R4 bulk export: one ndjson file per kind of resource.

Written from the R4 specification (https://hl7.org/fhir/R4) and the US Core extensions for race and ethnicity, as an
electronic health record exports it: references between files, a medication that is coded in place or referenced, blood
pressure as a component of its panel, wall-clock times with the hospital's zone. Every resource carries the security
label HTEST ("test health data"), as the specification wants of invented records.

Lines are put together by whole columns; every text comes from a fixed list without quotes or backslashes.
"""

import json
from pathlib import Path
from typing import Any, TypeAlias

import polars as pl

from simulation import coding
from simulation.extract import EMERGENCY, INPATIENT, OUTPATIENT, Extract

_Json: TypeAlias = "dict[str, Any] | list[Any] | str | bool | pl.Expr"

_ZONE = "-05:00"
_TERMINOLOGY = "http://terminology.hl7.org/CodeSystem"
_ICD10CM, _ICD10PCS = "http://hl7.org/fhir/sid/icd-10-cm", "http://www.cms.gov/Medicare/Coding/ICD10"
_RXNORM, _CVX = "http://www.nlm.nih.gov/research/umls/rxnorm", "http://hl7.org/fhir/sid/cvx"
_LOINC, _UCUM = "http://loinc.org", "http://unitsofmeasure.org"
_US_CORE = "http://hl7.org/fhir/us/core/StructureDefinition"
_CDC_RACE = "urn:oid:2.16.840.1.113883.6.238"

_META = {"security": [{"system": f"{_TERMINOLOGY}/v3-ActReason", "code": "HTEST", "display": "test health data"}]}
_SEX = {"M": "male", "F": "female"}
_RACE = {"WHITE": ("2106-3", "White"), "BLACK": ("2054-5", "Black or African American"), "ASIAN": ("2028-9", "Asian")}
_ETHNICITY = {
    "HISPANIC": ("2135-2", "Hispanic or Latino"),
    "NOT HISPANIC": ("2186-5", "Not Hispanic or Latino"),
}
_CLASS = {INPATIENT: "IMP", OUTPATIENT: "AMB", EMERGENCY: "EMER"}
_DISPOSITION = {"HOME": "home", "SKILLED NURSING FACILITY": "snf", "HOSPICE": "hosp", coding.EXPIRED: "exp"}
_VITAL_SIGNS = ("8867-4", coding.SYSTOLIC, "59408-5")
_RESOURCES = (
    "Patient",
    "Location",
    "Encounter",
    "Condition",
    "Medication",
    "MedicationRequest",
    "MedicationAdministration",
    "Procedure",
    "Immunization",
    "Observation",
)


class FhirWriter:
    """Writes an extract piece by piece; ids are unique within the export."""

    def __init__(self, folder: Path, title: str) -> None:
        self._folder = folder
        self._rows = dict.fromkeys(_RESOURCES, 0)
        for kind in _RESOURCES:
            (folder / f"{kind}.ndjson").touch()
        places = pl.DataFrame({"name": coding.PLACES})
        self._append("Location", places, _place(pl.col("name")), {"description": title, "name": _quoted("name")})
        drugs = pl.DataFrame({"code": list(coding.RXNORM.values()), "name": list(coding.RXNORM)})
        self._append("Medication", drugs, pl.format("rxnorm-{}", "code"), {"code": _drug()})

    def add(self, piece: Extract) -> None:
        """Write some patients."""
        self._append("Patient", piece.patients, pl.col("subject_id").cast(pl.String), _patient())
        self._append("Encounter", piece.encounters, pl.col("encounter_id").cast(pl.String), _encounter())
        self._numbered("Condition", piece.diagnoses, _condition())
        self._numbered("MedicationRequest", piece.drugs.filter(~pl.col("administered")), _prescription())
        self._numbered("MedicationAdministration", piece.drugs.filter("administered"), _administration())
        self._numbered("Procedure", piece.procedures, _procedure())
        self._numbered("Immunization", piece.vaccinations, _immunization())
        self._numbered("Observation", piece.results, _observation())

    def _numbered(self, kind: str, frame: pl.DataFrame, content: dict[str, _Json]) -> None:
        start = self._rows[kind] + 1
        number = pl.int_range(start, start + pl.len(), dtype=pl.Int64)
        self._append(kind, frame, pl.format("{}-{}", pl.lit(kind.lower()), number), content)

    def _append(self, kind: str, frame: pl.DataFrame, name: pl.Expr, content: dict[str, _Json]) -> None:
        """Write one resource per row."""
        line = _line({"resourceType": kind, "id": _quoted(name), "meta": _META, **content})
        with (self._folder / f"{kind}.ndjson").open("ab") as file:
            # Without separator and quotes, csv is the column's lines.
            frame.select(line.alias("line")).write_csv(file, include_header=False, quote_style="never")
        self._rows[kind] += frame.height


def _line(part: _Json) -> pl.Expr:
    """JSON text of a template; its leaves are constants, or columns that hold JSON text.

    A null in a column makes everything around it null, up to the member whose name ends in `?`: that one is left out.
    """
    return pl.concat_str(_pieces(part))


def _pieces(part: _Json) -> list[pl.Expr]:
    if isinstance(part, pl.Expr):
        return [part]
    if isinstance(part, dict):
        pieces = [pl.lit("{")]
        for place, (name, value) in enumerate(part.items()):
            member = [pl.lit(f'{"," if place else ""}"{name.removesuffix("?")}":'), *_pieces(value)]
            pieces += [pl.concat_str(member).fill_null("")] if name.endswith("?") else member
        return [*pieces, pl.lit("}")]
    if isinstance(part, list):
        inner = [[pl.lit("," if place else ""), *_pieces(value)] for place, value in enumerate(part)]
        return [pl.lit("["), *(piece for item in inner for piece in item), pl.lit("]")]
    return [pl.lit(json.dumps(part))]


def _quoted(text: str | pl.Expr) -> pl.Expr:
    """A JSON string of a column; no text here has a character that JSON escapes."""
    return pl.format('"{}"', pl.col(text) if isinstance(text, str) else text)


def _time(column: str = "time") -> pl.Expr:
    return _quoted(pl.col(column).dt.strftime(f"%Y-%m-%dT%H:%M:%S{_ZONE}"))


def _place(name: pl.Expr) -> pl.Expr:
    return pl.format("location-{}", name.str.to_lowercase().str.replace_all(" ", "-", literal=True))


def _mapped(column: str, names: dict[str, str]) -> pl.Expr:
    return _quoted(pl.col(column).replace_strict(names, default=None, return_dtype=pl.String))


def _refer(kind: str, name: pl.Expr) -> dict[str, _Json]:
    return {"reference": _quoted(pl.format("{}/{}", pl.lit(kind), name))}


def _whose() -> dict[str, _Json]:
    """The patient and the encounter of a resource."""
    return {"subject": _refer("Patient", pl.col("subject_id")), "encounter": _stay()}


def _stay() -> dict[str, _Json]:
    return _refer("Encounter", pl.col("encounter_id"))


def _coded(system: str, code: str | pl.Expr = "code", **more: _Json) -> dict[str, _Json]:
    return {"coding": [{"system": system, "code": _quoted(code), **more}]}


def _status(system: str, code: str) -> dict[str, _Json]:
    return {"coding": [{"system": f"{_TERMINOLOGY}/{system}", "code": code}]}


def _drug() -> dict[str, _Json]:
    return _coded(_RXNORM, display=_quoted(pl.col("name").str.to_lowercase()))


def _patient() -> dict[str, _Json]:
    def extension(name: str, column: str, codes: dict[str, tuple[str, str]]) -> dict[str, _Json]:
        display = _mapped(column, {word: text for word, (_, text) in codes.items()})
        code = _mapped(column, {word: code for word, (code, _) in codes.items()})
        category = {"system": _CDC_RACE, "code": code, "display": display}
        parts = [{"url": "ombCategory", "valueCoding": category}, {"url": "text", "valueString": display}]
        return {"url": f"{_US_CORE}/{name}", "extension": parts}

    return {
        "extension": [
            extension("us-core-race", "race", _RACE),
            extension("us-core-ethnicity", "ethnicity", _ETHNICITY),
        ],
        "gender": _mapped("sex", _SEX),
        "birthDate": _quoted(pl.col("birth").dt.strftime("%Y-%m-%d")),
        "deceasedDateTime?": _time("death"),
    }


def _encounter() -> dict[str, _Json]:
    ended = pl.col("end").is_not_null()
    disposition = {"system": f"{_TERMINOLOGY}/discharge-disposition", "code": _mapped("discharge_to", _DISPOSITION)}
    ward: _Json = {"location": _refer("Location", _place(pl.col("department")))}
    intensive: _Json = {
        "location": _refer("Location", _place(pl.lit(coding.INTENSIVE_CARE))),
        "period": {"start": _time("intensive")},
    }
    return {
        "status": _quoted(pl.when(ended).then(pl.lit("finished")).otherwise(pl.lit("in-progress"))),
        "class": {"system": f"{_TERMINOLOGY}/v3-ActCode", "code": _mapped("kind", _CLASS)},
        "subject": _refer("Patient", pl.col("subject_id")),
        "period": {"start": _time("start"), "end?": _time("end")},
        "reasonCode?": [{"text": _quoted("complaint")}],
        "hospitalization?": {
            "dischargeDisposition": {"text": _quoted("discharge_to"), "coding?": [disposition]},
        },
        "location": pl.coalesce(_line([ward, intensive]), _line([ward])),
    }


def _condition() -> dict[str, _Json]:
    return {
        "clinicalStatus": _status("condition-clinical", "active"),
        "verificationStatus": _status("condition-ver-status", "confirmed"),
        "category": [_status("condition-category", "encounter-diagnosis")],
        "code": _coded(_ICD10CM),
        **_whose(),
        "onsetDateTime": _time(),
        "recordedDate": _time(),
    }


def _prescription() -> dict[str, _Json]:
    return {
        "status": "active",
        "intent": "order",
        "medicationReference": _refer("Medication", pl.format("rxnorm-{}", "code")),
        **_whose(),
        "authoredOn": _time(),
    }


def _administration() -> dict[str, _Json]:
    return {
        "status": "completed",
        "medicationCodeableConcept": _drug(),
        "subject": _refer("Patient", pl.col("subject_id")),
        "context": _stay(),
        "effectiveDateTime": _time(),
    }


def _procedure() -> dict[str, _Json]:
    return {"status": "completed", "code": _coded(_ICD10PCS), **_whose(), "performedDateTime": _time()}


def _immunization() -> dict[str, _Json]:
    return {
        "status": "completed",
        "vaccineCode": _coded(_CVX),
        "patient": _refer("Patient", pl.col("subject_id")),
        "encounter": _stay(),
        "occurrenceDateTime": _time(),
    }


def _observation() -> dict[str, _Json]:
    """A result: a quantity, a coded answer or a text; the systolic pressure is a component of its panel."""
    vital = pl.col("code").is_in(_VITAL_SIGNS)
    kind = pl.when(vital).then(pl.lit("vital-signs")).otherwise(pl.lit("laboratory"))
    unit = _quoted("unit")
    quantity = {"value": pl.col("value").cast(pl.String), "unit": unit, "system": _UCUM, "code": unit}
    systolic = pl.col("code") == coding.SYSTOLIC
    component = {"code": _coded(_LOINC), "valueQuantity": pl.when(systolic).then(_line(quantity))}
    panel = pl.when(systolic).then(pl.lit(coding.BLOOD_PRESSURE)).otherwise(pl.col("code"))
    return {
        "status": "final",
        "category": [_coded(f"{_TERMINOLOGY}/observation-category", kind)],
        "code": _coded(_LOINC, panel),
        **_whose(),
        "effectiveDateTime": _time(),
        "valueQuantity?": pl.when(~systolic).then(_line(quantity)),
        "valueCodeableConcept?": _coded(_LOINC, "answer"),
        "valueString?": _quoted("text"),
        "component?": [component],
    }
