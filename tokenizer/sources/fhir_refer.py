"""From FHIR references to what they lead to; each distinct reference is followed once.

References stay JSON until they are followed: a file has few different ones, which are then found by their bytes.
"""

import msgspec

from tokenizer.sources import fhir_index as index
from tokenizer.sources.fhir_batch import REMEMBERED, Memo
from tokenizer.sources.fhir_codes import READ_ERRORS, Coded, clean, fault, given, raw_bytes
from tokenizer.sources.fhir_index import Index, Reference
from tokenizer.sources.fhir_times import NO_TIME

_MISSING = NO_TIME + 1
_REFERENCE = msgspec.json.Decoder(Reference)


class _Contained(msgspec.Struct, gc=False, rename="camel"):
    id: str | None = None
    code: msgspec.Raw = msgspec.Raw(b"")


_CONTAINED = msgspec.json.Decoder(list[_Contained])


class Resolver:
    """Follows references by the index; one per process.

    Attributes:
        index: what they lead to.
        subjects: subject ids by JSON, or the reasons why there is none; see `learn`.
        stays: id and start of encounters by JSON.
        places: names of locations and organizations by JSON.
        dangling_encounters: distinct references to encounters that aren't in the source.
    """

    def __init__(self, found: Index) -> None:
        self.index = found
        self.subjects: dict[bytes, int] = {}
        self.stays: dict[bytes, tuple[str | None, int]] = {}
        self.places = Memo(self._place)
        self.dangling_encounters = 0

    def learn(self, subjects: list[bytes], stays: list[bytes]) -> None:
        """Follow the references of a batch, so that `subjects` and `stays` have them."""
        for known, raws, follow in ((self.subjects, subjects, self._patients), (self.stays, stays, self._encounters)):
            if len(known) > REMEMBERED:
                known.clear()
            if new := [raw for raw in raws if raw not in known]:
                follow(new)

    def medications(self, references: list[tuple[bytes, bytes]]) -> list[Coded | bytes]:
        """Follow references to medications.

        Args:
            references: JSON of the reference, and of the resource's `contained`.

        Returns:
            Code names; JSON of the concept, for contained medications.
        """
        found: list[Coded | bytes] = [Coded(None, fault="reference to a medication that isn't contained")] * len(
            references
        )
        keys: dict[int, str | None] = {}
        for at, (raw, contained) in enumerate(references):
            try:
                if b'"#' not in raw:
                    keys[at] = self._key(raw, "Medication")
                elif given(contained):
                    name = (_REFERENCE.decode(raw).reference or "").removeprefix("#")
                    codes = [raw_bytes(inner.code) for inner in _CONTAINED.decode(contained) if inner.id == name]
                    found[at] = codes[0] if codes else found[at]
            except READ_ERRORS as problem:
                found[at] = Coded(None, fault=fault(problem))
        places = self.index.medications.find(list(keys.values()), -2).tolist()
        for at, place in zip(keys, places, strict=True):
            if place == -2:
                found[at] = Coded(None, fault="reference to a medication that isn't in the source")
            else:
                found[at] = Coded(self.index.codes[place]) if place >= 0 else Coded(None, drop="no code")
        return found

    def _patients(self, new: list[bytes]) -> None:
        keys: list[str | None] = []
        for raw in new:
            try:
                keys.append(self._key(raw, "Patient") if given(raw) else "")
            except READ_ERRORS:
                keys.append("#")
        subjects = self.index.patients.find(keys, index.UNKNOWN_PATIENT).tolist()
        for raw, name, subject in zip(new, keys, subjects, strict=True):
            if name in ("", "#"):
                self.subjects[raw] = index.BROKEN if name else index.NO_SUBJECT
            elif name and not name.startswith(("Patient/", "Patient?")):
                self.subjects[raw] = index.NOT_A_PATIENT
            else:
                self.subjects[raw] = subject

    def _encounters(self, new: list[bytes]) -> None:
        keys: list[str | None] = []
        for raw in new:
            try:
                keys.append(self._key(raw, "Encounter") if given(raw) else None)
            except READ_ERRORS:
                keys.append(None)
        starts = self.index.encounters.find(keys, _MISSING).tolist()
        for raw, name, start in zip(new, keys, starts, strict=True):
            stay = name[10:] if name and name.startswith("Encounter/") else None
            missing = start == _MISSING
            self.dangling_encounters += missing and given(raw)
            self.stays[raw] = stay, NO_TIME if missing else start

    def _key(self, raw: bytes, kind: str) -> str | None:
        if (plain := index.plain_key(raw, kind, self.index.aliases)) is not None:
            return plain
        reference = _REFERENCE.decode(raw)
        name = index.key(reference.reference, reference.type or kind, self.index.aliases)
        if name is None and (
            keys := index.identifier_keys(kind, [reference.identifier] if reference.identifier else [])
        ):
            name = keys[0] if reference.identifier and (reference.identifier.system or "").strip() else keys[1]
        return name

    def _place(self, raw: bytes) -> str | None:
        """The name of a location or organization that is referred to."""
        if not given(raw):
            return None
        reference = _REFERENCE.decode(raw)
        if words := clean(reference.display):
            return words.upper()
        for kind in ("Location", "Organization"):
            place = int(self.index.places.find([self._key(raw, kind)], -1)[0])
            if place >= 0:
                return self.index.names[place]
        return None
