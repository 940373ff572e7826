"""What FHIR resources refer to: patients, encounters, medications and places, found in a first pass and then looked up.

The index holds 64-bit hashes of references and one number for each (a million patients with six identifiers: about
110 MB), so that a large export needs little memory. Of several versions of a resource the one that was updated last
counts.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import unquote

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl
from msgspec import Raw, Struct

from tokenizer.sources.fhir_codes import NAME_LIMIT, READ_ERRORS, Coded, clean, fault, given, raw_bytes
from tokenizer.sources.fhir_kinds import Chunk
from tokenizer.sources.fhir_times import times

INDEXED = frozenset({"Patient", "Encounter", "Medication", "Location", "Organization"})
"""Resource types that others refer to for what is read here."""

NO_SUBJECT, UNKNOWN_PATIENT, NOT_A_PATIENT, AMBIGUOUS, BROKEN = -1, -2, -3, -4, -5
"""What stands for a subject that isn't one."""

BadRow = tuple[str, str, int, str, str, str, str]
"""File, table, row (from 1 in a piece), column, reason, content, advice."""

_NOTHING = Raw(b"")
_TYPED = re.compile(r"(?:^|/)([A-Z][A-Za-z]{1,63})/([^/?#|]+)(?:/_history/[^/]*)?$")
_PLAIN = re.compile(
    rb'\{"reference": ?"(?:([A-Z][A-Za-z]{1,63})/([A-Za-z0-9.-]{1,64})"|urn:uuid:([A-Za-z0-9.-]{1,64})"\})'
)
_SEARCH = re.compile(r"(?:^|/)([A-Z][A-Za-z]{1,63})\?(?:.*&)?identifier(?::[a-z]+)?=([^&]+)")


class Meta(Struct, gc=False, rename="camel"):
    """When a version of a resource was written."""

    last_updated: str | None = None


class Identifier(Struct, gc=False, rename="camel"):
    """A business identifier."""

    system: str | None = None
    value: str | None = None


class Reference(Struct, gc=False, rename="camel"):
    """A reference to another resource."""

    reference: str | None = None
    type: str | None = None
    identifier: Identifier | None = None
    display: str | None = None


class Period(Struct, gc=False, rename="camel"):
    """A span of time."""

    start: str | None = None
    end: str | None = None


class _Link(Struct, gc=False, rename="camel"):
    other: Reference | None = None
    type: str | None = None


class _Indexed(Struct, gc=False, rename="camel"):
    """The members of all indexed resource types that the index needs."""

    id: str | None = None
    meta: Meta | None = None
    identifier: list[Identifier] | None = None
    link: list[_Link] | None = None
    period: Period | None = None
    code: Raw = _NOTHING
    name: Raw = _NOTHING


class _Plain(Struct, gc=False, rename="camel"):
    id: str | None = None
    meta: Meta | None = None
    period: Period | None = None


_INDEXED_JSON, _PLAIN_JSON = msgspec.json.Decoder(_Indexed), msgspec.json.Decoder(_Plain)
_REFERENCE, _NAME = msgspec.json.Decoder(Reference), msgspec.json.Decoder(str)


def hashed(texts: "Iterable[str | None]") -> npt.NDArray[np.uint64]:
    """Hash texts to 64 bits; equal in all processes of one import. Of 10^8 texts, two collide with chance 3 in 10^4."""
    return pl.Series(list(texts), dtype=pl.String).hash(20_210_807).to_numpy()


def key(reference: str | None, kind: str, aliases: dict[str, str]) -> str | None:
    """The one form of a reference: `Type/id`, or `Type?identifier=system|value`; None if it can't be told.

    Args:
        reference: relative or absolute, with or without a version, `urn:...`, or a conditional reference.
        kind: the type where the reference doesn't say it.
        aliases: keys by `fullUrl`, where they differ from what the URL itself tells.
    """
    text = (reference or "").strip()
    if not text or text.startswith("#"):
        return None
    if (alias := aliases.get(text)) is not None:
        return alias
    if text.startswith("urn:"):
        return f"{kind}/{text.rsplit(':', 1)[1]}"
    if match := _SEARCH.search(text):
        return f"{match[1]}?identifier={unquote(match[2])}"
    if match := _TYPED.search(text):
        return f"{match[1]}/{match[2]}"
    return None if "/" in text else f"{kind}/{text}"


def plain_key(raw: bytes, kind: str, aliases: dict[str, str]) -> str | None:
    """The key of a reference in one of its two usual forms, without decoding it; None: decode it."""
    if (match := _PLAIN.match(raw)) is None:
        return None
    if match[3] is not None:
        text = match[3].decode()
        return aliases.get(f"urn:uuid:{text}") or f"{kind}/{text}"
    text = f"{match[1].decode()}/{match[2].decode()}"
    return aliases.get(text, text)


def identifier_keys(kind: str, identifiers: list[Identifier] | None) -> list[str]:
    """The keys by which a resource can be found through its identifiers: with the system, and by the value alone."""
    keys = []
    for each in identifiers or ():
        if value := (each.value or "").strip():
            keys += [f"{kind}?identifier={(each.system or '').strip()}|{value}", f"{kind}?identifier={value}"]
    return keys


def own_id(chunk: Chunk, place: int, own: str | None) -> str | None:
    """A resource's id; the end of its `fullUrl` where it has none."""
    if own or not chunk.urls:
        return own or None
    return ((url := chunk.urls[place]) and re.split(r"[:/]", url)[-1]) or None


@dataclass
class Seen:
    """What a piece of the source adds to the index; frames of hashes, in the order of the source.

    Attributes:
        found: per kind: key u64, value (string: a patient's id, the code of a medication, the name of a place; int64
            microseconds: the start of an encounter), updated int64.
        others: per kind: key u64 by which a resource can also be found, own key u64.
        aliases: keys by `fullUrl`, where it tells another one.
        replaced: key of a patient record, reference to the one that replaces it.
        bad: resources that can't be found by what refers to them, in the order of the source.
    """

    found: dict[str, list[pl.DataFrame]] = field(default_factory=dict)
    others: dict[str, list[pl.DataFrame]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)
    bad: list[BadRow] = field(default_factory=list)


def note(seen: Seen, chunk: Chunk, code: Callable[[bytes], Coded]) -> None:
    """Add a chunk of an indexed type to what was seen."""
    kind = chunk.kind
    decode = (_PLAIN_JSON if kind == "Encounter" else _INDEXED_JSON).decode
    keys: list[str] = []
    values: list[str | None] = []
    updated: list[str | None] = []
    others: list[tuple[str, str]] = []
    for place, raw in enumerate(chunk.raws):
        try:
            resource: _Indexed | _Plain = decode(raw)
            value = _value(kind, resource, code)
        except READ_ERRORS as problem:
            seen.bad.append(_bad(chunk, place, "", fault(problem)))
            continue
        if (own := own_id(chunk, place, resource.id)) is None:
            if kind == "Patient":
                seen.bad.append(_bad(chunk, place, "id", "no subject"))
            continue
        name = f"{kind}/{own}"
        keys.append(name)
        values.append(own if kind == "Patient" else value)
        updated.append(resource.meta.last_updated if resource.meta else None)
        if isinstance(resource, _Indexed):
            others += [(other, name) for other in identifier_keys(kind, resource.identifier)]
            for link in resource.link or () if kind == "Patient" else ():
                if link.type == "replaced-by" and link.other and link.other.reference:
                    seen.replaced[name] = link.other.reference
        url = chunk.urls[place]
        if url and key(url, kind, {}) != name:
            seen.aliases[url] = name
    value_column = times(values) if kind == "Encounter" else pl.Series(values, dtype=pl.String)
    frame = {"key": hashed(keys), "value": value_column, "updated": times(updated, zoned=True)}
    seen.found.setdefault(kind, []).append(pl.DataFrame(frame))
    pairs = {"other": hashed([other for other, _ in others]), "key": hashed([own for _, own in others])}
    seen.others.setdefault(kind, []).append(pl.DataFrame(pairs))


def _bad(chunk: Chunk, place: int, column: str, reason: str) -> BadRow:
    content = "" if column else chunk.raws[place][:2000].decode(errors="replace")
    return chunk.file, chunk.kind, chunk.rows[place], column, reason, content, ""


def _value(kind: str, resource: "_Indexed | _Plain", code: Callable[[bytes], Coded]) -> str | None:
    if kind == "Encounter":
        return resource.period.start if resource.period else None
    if not isinstance(resource, _Indexed) or kind == "Patient":
        return None
    if kind == "Medication":
        named = code(raw_bytes(resource.code))
        if named.fault is not None:
            # As what couldn't be decoded at all is told.
            raise msgspec.ValidationError(named.fault.removeprefix("wrong type: "))
        return named.code
    words = clean(_NAME.decode(resource.name)).upper() if given(raw_bytes(resource.name)) else ""
    return words if words and len(words) <= NAME_LIMIT else None


class Lookup:
    """Numbers by key, in sorted arrays."""

    def __init__(self, hashes: npt.NDArray[np.uint64], values: npt.NDArray[np.int64]) -> None:
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._values = hashes[order], values[order]

    def __len__(self) -> int:
        return len(self._hashes)

    def find(self, keys: "list[str | None]", default: int) -> npt.NDArray[np.int64]:
        """The numbers of keys."""
        wanted = hashed(keys)
        if not len(self._hashes):
            return np.full(len(wanted), default, np.int64)
        places = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
        return np.where(self._hashes[places] == wanted, self._values[places], default)


@dataclass(frozen=True)
class Index:
    """What references lead to.

    Attributes:
        patients: subject ids; `AMBIGUOUS` for an identifier that several patients have.
        encounters: their starts, int64 microseconds or `NO_TIME`.
        medications, places: places in `codes` and `names`.
        codes, names: code names of medications, names of locations and organizations.
        aliases: keys by `fullUrl`.
        replaced: keys of patient records that another one replaces.
    """

    patients: Lookup
    encounters: Lookup
    medications: Lookup
    places: Lookup
    codes: list[str]
    names: list[str]
    aliases: dict[str, str]
    replaced: frozenset[str]


def build(parts: Iterable[Seen], subject_ids: Callable[[pl.Series], pl.Series]) -> Index:
    """Make the index from what all pieces have shown.

    Args:
        parts: in the order of the source.
        subject_ids: numbers for patients' ids.
    """
    whole = Seen()
    for part in parts:
        for kind in part.found:
            whole.found.setdefault(kind, []).extend(part.found[kind])
            whole.others.setdefault(kind, []).extend(part.others[kind])
        whole.aliases.update(part.aliases)
        whole.replaced.update(part.replaced)
    patients = _latest(whole, "Patient")
    patients = patients.with_columns(value=subject_ids(patients["value"]))
    patients = _merged(patients, whole)
    codes, medications = _numbered(_with_others(_latest(whole, "Medication"), whole, "Medication"))
    places = pl.concat([_with_others(_latest(whole, kind), whole, kind) for kind in ("Location", "Organization")])
    names, numbers = _numbered(places)
    return Index(
        patients=_lookup(_with_others(patients, whole, "Patient", several=AMBIGUOUS)),
        encounters=_lookup(_latest(whole, "Encounter")),
        medications=_lookup(medications),
        places=_lookup(numbers),
        codes=codes,
        names=names,
        aliases=whole.aliases,
        replaced=frozenset(whole.replaced),
    )


def _latest(whole: Seen, kind: str) -> pl.DataFrame:
    """The last version of each resource of a kind: key, value."""
    value = pl.Int64 if kind == "Encounter" else pl.String
    empty = pl.DataFrame(schema={"key": pl.UInt64, "value": value, "updated": pl.Int64})
    frame = pl.concat([empty, *whole.found.get(kind, [])])
    return frame.sort("updated", maintain_order=True).unique("key", keep="last", maintain_order=True).drop("updated")


def _with_others(frame: pl.DataFrame, whole: Seen, kind: str, *, several: int | None = None) -> pl.DataFrame:
    """Add the further keys; one that leads to several values gives `several`."""
    empty = pl.DataFrame(schema={"other": pl.UInt64, "key": pl.UInt64})
    pairs = pl.concat([empty, *whole.others.get(kind, [])]).unique()
    led = pairs.join(frame, on="key").group_by("other").agg(pl.col("value").first(), count=pl.col("value").n_unique())
    value = pl.when(pl.col("count") == 1).then("value").otherwise(pl.lit(several))
    more = led.select(key="other", value=value.cast(frame["value"].dtype))
    return pl.concat([frame, more.join(frame, on="key", how="anti")])


def _merged(patients: pl.DataFrame, whole: Seen) -> pl.DataFrame:
    """Give records that were replaced the subject of the record that replaces them, however long the chain."""
    if not whole.replaced:
        return patients
    next_key = {old: key(new, "Patient", whole.aliases) for old, new in whole.replaced.items()}
    lookup = _lookup(patients)
    old_keys, ends = list(next_key), []
    for old in old_keys:
        at: str | None = old
        passed = set()
        while at in next_key and at not in passed:
            passed.add(at)
            at = next_key[at]
        ends.append(at)
    subjects = lookup.find(ends, UNKNOWN_PATIENT)
    changed = pl.DataFrame({"key": hashed(old_keys), "new": subjects}).filter(pl.col("new") >= 0)
    joined = patients.join(changed, on="key", how="left", maintain_order="left")
    return joined.select("key", value=pl.coalesce("new", "value"))


def _numbered(frame: pl.DataFrame) -> tuple[list[str], pl.DataFrame]:
    """The distinct texts of a frame, and the frame with their places; keys without a text get -1."""
    texts = frame["value"].drop_nulls().unique(maintain_order=True)
    places = pl.DataFrame({"value": texts, "place": pl.Series(range(len(texts)), dtype=pl.Int64)})
    joined = frame.join(places, on="value", how="left")
    return texts.to_list(), joined.select("key", value=pl.col("place").fill_null(-1))


def _lookup(frame: pl.DataFrame) -> Lookup:
    return Lookup(frame["key"].to_numpy(), frame["value"].to_numpy())
