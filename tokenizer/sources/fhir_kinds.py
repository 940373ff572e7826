"""FHIR resources by their type: a look at the first member of each, so that types nobody reads are never parsed.

A resource stays the bytes it was. Bundles are opened; what isn't a resource is lost, with the reason, or left out by
name where it belongs to a bulk export (its log, its manifest).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
from msgspec import Raw, Struct

from tokenizer.sources.fhir_codes import READ_ERRORS, fault, raw_bytes

UNREADABLE = "unreadable"
"""The table that rows are counted in whose resource type can't be told."""

_NOTHING = Raw(b"")
_MEMBER = re.compile(rb'[\s\xef\xbb\xbf]*\{\s*"resourceType"\s*:\s*"([A-Za-z]{1,64})"')


class _Kind(Struct, gc=False, rename="camel"):
    resource_type: str | None = None
    export_id: str | None = None
    event_id: str | None = None
    transaction_time: str | None = None
    output: Raw = _NOTHING


class _Request(Struct, gc=False, rename="camel"):
    method: str | None = None


class _Entry(Struct, gc=False, rename="camel"):
    full_url: str | None = None
    resource: Raw = _NOTHING
    request: _Request | None = None


class _Bundle(Struct, gc=False, rename="camel", tag="Bundle", tag_field="resourceType"):
    entry: list[_Entry] | None = None


_KIND, _BUNDLE = msgspec.json.Decoder(_Kind), msgspec.json.Decoder(_Bundle)
_ENTRY = msgspec.json.Decoder(_Entry)


@dataclass
class Chunk:
    """Some resources of one file and kind.

    Attributes:
        file: as people know it; an archive's member behind "!".
        kind: resource type, or `UNREADABLE`.
        raws: their JSON.
        rows: line in an ndjson file, or entry in a bundle, from 1.
        urls: `fullUrl` of each, where they come from a bundle; empty for whole blocks.
    """

    file: str
    kind: str
    raws: list[bytes] = field(default_factory=list)
    rows: Sequence[int] = field(default_factory=list)
    urls: list[str | None] = field(default_factory=list)


@dataclass
class Block:
    """Whole lines whose first is a resource of a kind that was asked for; the others most likely too.

    Attributes:
        file, kind: as in `Chunk`.
        data: the lines; overwritten when the next block is read.
        first_row: number of the first one.
        lines: how many there are.
    """

    file: str
    kind: str
    data: memoryview
    first_row: int
    lines: int

    def split(self) -> Iterator["Chunk | Lost"]:
        """The lines one by one, by kind."""
        lines = bytes(self.data).removesuffix(b"\n").split(b"\n")
        rows = range(self.first_row, self.first_row + len(lines))
        yield from by_kind(self.file, lines, rows, [None] * len(lines))


@dataclass
class Lost:
    """Something that can't be read, or is named as not to be read.

    Attributes:
        file, row: where it is.
        reason: what is wrong; or, if `dropped`, the filter's name.
        content: what stands there, for the quarantine file.
        dropped: it is left out by a filter.
        table: it is counted in.
        advice: what to do.
    """

    file: str
    row: int
    reason: str
    content: str = ""
    dropped: bool = False
    table: str = UNREADABLE
    advice: str = ""


def by_kind(
    name: str, raws: list[bytes], rows: Sequence[int], urls: list[str | None], *, top: bool = False
) -> Iterator[Chunk | Lost]:
    """Resources by kind; bundles are opened, other JSON is lost.

    Args:
        name: of the file.
        raws: JSON texts; blank ones are left out.
        rows: of each.
        urls: `fullUrl` of each.
        top: the text is all that the file holds; entries of a bundle are numbered then.
    """
    if raws and (match := _MEMBER.match(raws[0])) and match[1] != b"Bundle":
        begin = match[0]
        if all(raw.startswith(begin) for raw in raws):
            yield Chunk(name, match[1].decode(), raws, rows, urls)
            return
    chunks: dict[str, Chunk] = {}
    numbers: dict[str, list[int]] = {}
    prefix, chunk, rows_of = b"\n", Chunk(name, ""), [0]
    for raw, row, url in zip(raws, rows, urls, strict=True):
        # Most lines begin as the one before: a comparison instead of a search.
        if not raw.startswith(prefix):
            if match := _MEMBER.match(raw):
                prefix, kind = match[0], match[1].decode()
            elif not raw or raw.isspace():
                continue
            else:
                found = _kind(name, row, raw)
                if isinstance(found, Lost):
                    yield found
                    continue
                prefix, kind = b"\n", found
            if kind == "Bundle":
                prefix = b"\n"
                yield from _opened(name, raw, row, top)
                continue
            chunk = chunks.setdefault(kind, Chunk(name, kind))
            rows_of = numbers.setdefault(kind, [])
        chunk.raws.append(raw)
        chunk.urls.append(url)
        rows_of.append(row)
    for kind, chunk in chunks.items():
        chunk.rows = numbers[kind]
        yield chunk


def _kind(name: str, row: int, raw: bytes) -> "str | Lost":
    content = raw[:2000].decode(errors="replace")
    try:
        seen = _KIND.decode(raw)
    except READ_ERRORS as problem:
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            return Lost(name, row, "UTF-16 text", content, advice="Convert the file to UTF-8")
        return Lost(name, row, fault(problem), content)
    if seen.resource_type and re.fullmatch("[A-Za-z]{1,64}", seen.resource_type):
        return seen.resource_type
    if seen.export_id and seen.event_id:
        return Lost(name, row, "log of a bulk export", dropped=True, table="export log")
    if seen.transaction_time and seen.output:
        return Lost(name, row, "manifest of a bulk export", dropped=True, table="export manifest")
    return Lost(name, row, "no resourceType", content)


def _opened(name: str, raw: bytes, row: int, top: bool) -> Iterator[Chunk | Lost]:
    """The resources of a bundle; entries of a file's only bundle are numbered, others have the bundle's row."""
    try:
        entries = _BUNDLE.decode(raw).entry or []
    except READ_ERRORS as problem:
        yield Lost(name, row, fault(problem), raw[:2000].decode(errors="replace"), table="Bundle")
        return
    yield from _resources(name, entries, range(1, len(entries) + 1) if top else [row] * len(entries))


def is_object(text: bytes) -> bool:
    """Whether a text is a JSON object, whole."""
    try:
        _KIND.decode(text)
    except READ_ERRORS:
        return False
    return True


def first_kind(text: memoryview) -> str | None:
    """The resource type that a text begins with."""
    match = _MEMBER.match(text)
    return match[1].decode() if match else None


def entries(name: str, raws: list[bytes], rows: range) -> Iterator[Chunk | Lost]:
    """The resources of a large bundle's entries."""
    good, numbers = [], []
    for raw, row in zip(raws, rows, strict=True):
        try:
            good.append(_ENTRY.decode(raw))
            numbers.append(row)
        except READ_ERRORS as problem:
            yield Lost(name, row, fault(problem), raw[:2000].decode(errors="replace"), table="Bundle")
    yield from _resources(name, good, numbers)


def _resources(name: str, entries: list[_Entry], rows: Sequence[int]) -> Iterator[Chunk | Lost]:
    raws, numbers, urls = [], [], []
    for entry, row in zip(entries, rows, strict=True):
        raw = raw_bytes(entry.resource)
        if raw in (b"", b"null"):
            method = entry.request.method if entry.request else None
            why = (
                f"entry without resource ({method})"
                if method in ("DELETE", "GET", "HEAD")
                else "entry without resource"
            )
            yield Lost(name, row, why, dropped=True, table="Bundle")
        else:
            raws.append(raw)
            numbers.append(row)
            urls.append(entry.full_url)
    yield from by_kind(name, raws, numbers, urls)
