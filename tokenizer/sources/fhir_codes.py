"""FHIR's codings become code names: systems by URI, one coding of several by preference, fixed words for encounters.

Whatever a concept holds, the name depends on the concept alone (not on what was read before), so that two sites give
one name to one concept.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import msgspec
from msgspec import Struct

SYSTEMS: dict[str, str] = {
    "http://snomed.info/sct": "SNOMED",
    "urn:oid:2.16.840.1.113883.6.96": "SNOMED",
    "http://loinc.org": "LOINC",
    "https://loinc.org": "LOINC",
    "urn:oid:2.16.840.1.113883.6.1": "LOINC",
    "http://www.nlm.nih.gov/research/umls/rxnorm": "RxNorm",
    "urn:oid:2.16.840.1.113883.6.88": "RxNorm",
    "http://hl7.org/fhir/sid/icd-10-cm": "ICD10CM",
    "urn:oid:2.16.840.1.113883.6.90": "ICD10CM",
    "http://hl7.org/fhir/sid/icd-10": "ICD10",
    "urn:oid:2.16.840.1.113883.6.3": "ICD10",
    "http://fhir.de/CodeSystem/bfarm/icd-10-gm": "ICD10GM",
    "http://fhir.de/CodeSystem/dimdi/icd-10-gm": "ICD10GM",
    "http://hl7.org/fhir/sid/icd-9-cm": "ICD9CM",
    "http://hl7.org/fhir/sid/icd-9-cm/diagnosis": "ICD9CM",
    "http://terminology.hl7.org/CodeSystem/icd9": "ICD9CM",
    "urn:oid:2.16.840.1.113883.6.103": "ICD9CM",
    "http://hl7.org/fhir/sid/icd-9-cm/procedure": "ICD9Proc",
    "urn:oid:2.16.840.1.113883.6.104": "ICD9Proc",
    "http://www.cms.gov/Medicare/Coding/ICD10": "ICD10PCS",
    "http://hl7.org/fhir/sid/icd-10-pcs": "ICD10PCS",
    "urn:oid:2.16.840.1.113883.6.4": "ICD10PCS",
    "http://fhir.de/CodeSystem/bfarm/ops": "OPS",
    "http://fhir.de/CodeSystem/dimdi/ops": "OPS",
    "http://www.ama-assn.org/go/cpt": "CPT4",
    "urn:oid:2.16.840.1.113883.6.12": "CPT4",
    "https://www.cms.gov/Medicare/Coding/HCPCSReleaseCodeSets": "HCPCS",
    "http://www.cms.gov/Medicare/Coding/HCPCSReleaseCodeSets": "HCPCS",
    "http://terminology.hl7.org/CodeSystem/HCPCS-all-codes": "HCPCS",
    "urn:oid:2.16.840.1.113883.6.14": "HCPCS",
    "urn:oid:2.16.840.1.113883.6.285": "HCPCS",
    "http://hl7.org/fhir/sid/cvx": "CVX",
    "urn:oid:2.16.840.1.113883.12.292": "CVX",
    "http://hl7.org/fhir/sid/ndc": "NDC",
    "urn:oid:2.16.840.1.113883.6.69": "NDC",
    "http://www.whocc.no/atc": "ATC",
    "http://fhir.de/CodeSystem/bfarm/atc": "ATC",
    "http://fhir.de/CodeSystem/dimdi/atc": "ATC",
    "urn:oid:2.16.840.1.113883.6.73": "ATC",
    "http://unitsofmeasure.org": "UCUM",
    "urn:oid:2.16.840.1.113883.6.8": "UCUM",
}
"""Vocabularies by system URI, spelled as OMOP's `vocabulary_id`."""

PREFER: dict[str, tuple[str, ...]] = {
    "AllergyIntolerance": ("RxNorm", "SNOMED", "ATC", "NDC"),
    "Condition": ("ICD10CM", "ICD10", "ICD10GM", "ICD9CM", "SNOMED"),
    "DiagnosticReport": ("LOINC", "SNOMED", "CPT4", "HCPCS"),
    "Encounter": ("SNOMED", "ICD10CM"),
    "Immunization": ("CVX", "SNOMED", "NDC"),
    "Medication": ("RxNorm", "ATC", "NDC", "SNOMED"),
    "Observation": ("LOINC", "SNOMED"),
    "Procedure": ("ICD10PCS", "CPT4", "HCPCS", "ICD9Proc", "OPS", "SNOMED"),
    "answer": ("SNOMED", "LOINC"),
}
"""Which coding is taken where a concept has several, per resource ("Medication": all four medication resources;
"answer": values of observations and conclusions of reports). Vocabularies that aren't listed come after those that
are, known before unknown; between equals the first in the record is taken."""

ANSWER_LIMIT, NAME_LIMIT = 40, 80
"""Most characters of a text answer, and of a text that names a concept; longer ones are free text."""

# v3-ActCode, HL7 v2 table 0004, and the words of earlier FHIR versions.
_TYPES = {
    "INPATIENT": "IMP ACUTE NONAC SS OBSENC I B INPATIENT",
    "EMERGENCY": "EMER E EMERGENCY",
    "OUTPATIENT": "AMB PRENC O P R OUTPATIENT AMBULATORY DAYTIME",
    "TELEHEALTH": "VR VIRTUAL",
    "HOME": "HH HOME",
    "LONG_TERM": "LTC SNF",
}
_TYPE = {code: name for name, codes in _TYPES.items() for code in codes.split()}

_RACE = {
    "2106-3": "WHITE",
    "2054-5": "BLACK",
    "2028-9": "ASIAN",
    "1002-5": "AMERICAN INDIAN OR ALASKA NATIVE",
    "2076-8": "NATIVE HAWAIIAN OR OTHER PACIFIC ISLANDER",
    "2131-1": "OTHER",
}
_ETHNICITY = {"2135-2": "HISPANIC", "2186-5": "NOT HISPANIC"}
_UNSAID = {"UNK", "ASKU", "NI", "NASK", "UNKNOWN", "ASKED BUT UNKNOWN"}
_RACE_URL = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-race"
_ETHNICITY_URL = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-ethnicity"
_BIRTHSEX_URL = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-birthsex"

_LOCAL_VOCABULARIES = re.compile(r"[^A-Za-z0-9._-]+")
_BLANKS = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")


class Coding(Struct, gc=False, rename="camel"):
    """A code of a system."""

    system: str | None = None
    code: str | None = None
    display: str | None = None


class Concept(Struct, gc=False, rename="camel"):
    """A CodeableConcept."""

    coding: list[Coding] | None = None
    text: str | None = None


class Extension(Struct, gc=False, rename="camel"):
    """An extension with the values that are read here."""

    url: str | None = None
    value_code: str | None = None
    value_coding: Coding | None = None
    value_string: str | None = None
    value_date_time: str | None = None
    extension: list["Extension"] | None = None


class Coded(NamedTuple):
    """A concept's code name, or why it has none: a named filter, or what is wrong with it."""

    code: str | None
    drop: str | None = None
    fault: str | None = None


_CONCEPT = msgspec.json.Decoder(Concept)
_ENCOUNTER_CLASS = msgspec.json.Decoder(Coding | list[Concept])
READ_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)
"""What decoding raises on bad JSON or wrong types (a UnicodeDecodeError is a ValueError)."""


def fault(problem: Exception) -> str:
    """What is wrong with a text that couldn't be decoded, in words that hold nothing of it."""
    if isinstance(problem, RecursionError):
        return "nested too deeply"
    if isinstance(problem, UnicodeError):
        return "not UTF-8"
    if isinstance(problem, msgspec.ValidationError):
        return f"wrong type: {_BLANKS.sub(' ', str(problem))}"
    return "not JSON"


class Namer:
    """Names concepts; made once per import.

    Attributes:
        locals: short names that were given to systems without a known vocabulary, and their URIs.
    """

    def __init__(self, systems: Mapping[str, str], prefer: Mapping[str, Sequence[str]]) -> None:
        self._systems = {**SYSTEMS, **systems}
        self._known = set(self._systems.values())
        self._prefer = {kind: {name: place for place, name in enumerate(prefer[kind])} for kind in prefer}
        self.locals: dict[str, str] = {}

    def concept(self, kind: str, table: str) -> Callable[[bytes], Coded]:
        """A function from a concept's JSON to its name.

        Args:
            kind: whose preference counts (a key of `PREFER`).
            table: the prefix of codes without a system.
        """
        return lambda raw: self._named(raw, kind, table)

    def code(self, concept: Concept, kind: str, table: str) -> Coded:
        """Name a concept: by its best coding, else by its text."""
        best = self._best(concept, kind)
        if best is not None:
            return Coded(f"{self.vocabulary(best.system, table)}//{self._code(best)}")
        text = clean(concept.text)
        if not text:
            return Coded(None, drop="no code")
        if len(text) > NAME_LIMIT:
            return Coded(None, drop="free text")
        return Coded(f"{table}//{text.upper()}")

    def answer(self, raw: bytes) -> Coded:
        """Name a coded answer; one that is only text is its text in capitals."""
        if not given(raw):
            return Coded(None, drop="no value")
        try:
            concept = _CONCEPT.decode(raw)
        except READ_ERRORS as problem:
            return Coded(None, fault=fault(problem))
        best = self._best(concept, "answer")
        if best is None:
            return answer(concept.text)
        if not (best.system or "").strip():
            return answer(best.code)
        return Coded(f"{self.vocabulary(best.system, '')}//{self._code(best)}")

    def label(self, raw: bytes) -> str | None:
        """A concept's words in capitals: its text, else the display of its first coding, else the code."""
        if not given(raw):
            return None
        concept = _CONCEPT.decode(raw)
        words = [clean(concept.text)]
        for coding in concept.coding or ():
            words += [clean(coding.display), clean(coding.code)]
        return next((word.upper() for word in words if word and len(word) <= NAME_LIMIT), None)

    def vocabulary(self, system: str | None, table: str) -> str:
        """The vocabulary's name of a system URI; unknown ones get a short name that depends on the URI alone."""
        uri = (system or "").strip()
        if not uri:
            return table
        known = self._systems.get(uri) or self._systems.get(uri.rstrip("/"))
        if known is None and uri.startswith("http://snomed.info/sct/"):
            known = "SNOMED"  # editions and versions of one system
        if known is not None:
            return known
        tail = _LOCAL_VOCABULARIES.sub("-", re.split(r"[/:]", uri.rstrip("/"))[-1]).strip("-.")[:32]
        name = f"{tail or 'system'}-{hashlib.sha256(uri.encode(errors='replace')).hexdigest()[:4]}"
        self.locals[name] = uri
        return name

    def _named(self, raw: bytes, kind: str, table: str) -> Coded:
        if not given(raw):
            return Coded(None, drop="no code")
        try:
            return self.code(_CONCEPT.decode(raw), kind, table)
        except READ_ERRORS as problem:
            return Coded(None, fault=fault(problem))

    def _best(self, concept: Concept, kind: str) -> Coding | None:
        ranks = self._prefer.get(kind, {})
        best, best_rank = None, 1 << 30
        for coding in concept.coding or ():
            if not clean(coding.code):
                continue
            name = self.vocabulary(coding.system, "")
            rank = ranks.get(name, len(ranks) + (name not in self._known))
            if rank < best_rank:
                best, best_rank = coding, rank
        return best

    def _code(self, coding: Coding) -> str:
        return _spelled(self.vocabulary(coding.system, ""), clean(coding.code))


_JOINED = cast(Callable[[tuple[msgspec.Raw]], bytes], b"".join)  # takes all that has a buffer
raw_bytes = b"".__add__
"""The bytes of a `msgspec.Raw`; more than twice as fast as `bytes(raw)`."""


def all_bytes(raws: Iterable[msgspec.Raw]) -> Iterator[bytes]:
    """The bytes of many; more than twice as fast as `raw_bytes` of each, as `zip` makes one tuple for all."""
    return map(_JOINED, zip(raws))


def given(raw: bytes) -> bool:
    """Whether a member of a resource is there."""
    return raw not in (b"", b"null")


def clean(text: str | None) -> str:
    """A text on one line, without control characters and without the separator of code parts."""
    return _BLANKS.sub(" ", text).replace("//", "/").strip() if text else ""


def answer(text: str | None) -> Coded:
    """A text answer in capitals."""
    word = clean(text)
    if not word:
        return Coded(None, drop="no value")
    return Coded(word.upper()) if len(word) <= ANSWER_LIMIT else Coded(None, drop="free text")


def encounter_type(raw: bytes) -> str:
    """The type of an encounter's class; OTHER where it has none that is known.

    Raises:
        msgspec.MsgspecError: not a coding (R4), nor a list of concepts (R5).
    """
    if not given(raw):
        return "OTHER"
    decoded = _ENCOUNTER_CLASS.decode(raw)
    codings = [decoded] if isinstance(decoded, Coding) else [c for each in decoded for c in each.coding or ()]
    names = [_TYPE.get(clean(coding.code).upper()) for coding in codings]
    return next((name for name in names if name), "OTHER")


def demographics(gender: str | None, extensions: list[Extension] | None) -> list[str]:
    """Static codes of a patient: gender (sex at birth where the gender isn't said), race, ethnicity (US Core)."""
    by_url = {extension.url: extension for extension in extensions or ()}
    codes = []
    sex = {"male": "M", "female": "F", "other": "OTHER"}.get(gender or "")
    if sex is None and (birthsex := by_url.get(_BIRTHSEX_URL)) is not None:
        sex = {"M": "M", "F": "F"}.get(birthsex.value_code or "")
    if sex:
        codes.append(f"GENDER//{sex}")
    for prefix, url, names in (("RACE", _RACE_URL, _RACE), ("ETHNICITY", _ETHNICITY_URL, _ETHNICITY)):
        if (extension := by_url.get(url)) is not None and (name := _us_core(extension, names)):
            codes.append(f"{prefix}//{name}")
    return codes


def _us_core(extension: Extension, names: dict[str, str]) -> str | None:
    """The category of a US Core race or ethnicity; MULTIPLE for several, the text where there is none."""
    parts = extension.extension or []
    categories = {
        clean(part.value_coding.code) for part in parts if part.url == "ombCategory" and part.value_coding is not None
    } - _UNSAID
    if len(categories) > 1:
        return "MULTIPLE"
    if categories:
        return names.get(next(iter(categories)), "OTHER")
    words = [clean(part.value_string).upper() for part in parts if part.url == "text"]
    return next((word for word in words if word and word not in _UNSAID and len(word) <= ANSWER_LIMIT), None)


def _spelled(vocabulary: str, code: str) -> str:
    """A code as its vocabulary spells it: ICD in capitals and with its dot."""
    if not vocabulary.startswith("ICD"):
        return code
    code = code.upper()
    head = {"ICD10CM": 3, "ICD10": 3, "ICD10GM": 3, "ICD9CM": 4 if code[:1] == "E" else 3, "ICD9Proc": 2}.get(
        vocabulary
    )
    dotless = head is None or "." in code or len(code) <= head or not code.isalnum()
    return code if dotless else f"{code[:head]}.{code[head:]}"
