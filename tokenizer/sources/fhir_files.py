"""FHIR files to raw resources, in pieces: ndjson, bundles and single resources, gzipped or not, in folders or archives.

A resource stays the bytes it was; what kind it is comes from a look at its first member, so that kinds which nobody
reads are never parsed. Only a block of a file is in memory, or one document of at most `_WHOLE` bytes; larger bundles
are cut into their entries while they are read.
"""

import gzip
import re
import tarfile
import zlib
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec
from msgspec import Raw, Struct

from tokenizer.errors import DataError
from tokenizer.sources.fhir_codes import READ_ERRORS, fault
from tokenizer.sources.fhir_cut import cut

_LINES, _DOCUMENT, _ARCHIVES = (".ndjson", ".jsonl"), (".json",), (".tar", ".tar.gz", ".tgz")
_BLOCK = 8 << 20
_RANGE = 64 << 20
_WHOLE = 64 << 20
_LINE = 256 << 20

UNREADABLE = "unreadable"
"""The table that rows are counted in whose resource type can't be told."""

_NOTHING = Raw(b"")
_MEMBER = re.compile(rb'[\s\xef\xbb\xbf]*\{\s*"resourceType"\s*:\s*"([A-Za-z]{1,64})"')
_DAMAGE = (EOFError, OSError, zlib.error, tarfile.TarError)


class _Kind(Struct, gc=False):
    resourceType: str | None = None
    exportId: str | None = None
    eventId: str | None = None
    transactionTime: str | None = None
    output: Raw = _NOTHING


class _Request(Struct, gc=False):
    method: str | None = None


class _Entry(Struct, gc=False):
    fullUrl: str | None = None
    resource: Raw = _NOTHING
    request: _Request | None = None


class _Bundle(Struct, gc=False, tag="Bundle", tag_field="resourceType"):
    entry: list[_Entry] | None = None


_KIND, _BUNDLE = msgspec.json.Decoder(_Kind), msgspec.json.Decoder(_Bundle)
_ENTRY, _LIST = msgspec.json.Decoder(_Entry), msgspec.json.Decoder(list[Raw])


@dataclass(frozen=True)
class Piece:
    """A part of the source that is read by itself.

    Attributes:
        number: place in the order of the source.
        path: of the file.
        name: of the file, as people know it (relative to the source).
        start, end: the bytes in which its lines begin; end None: the whole file.
        kind: the resource type that the file's name tells, as bulk exports name them; None: mixed, or not told.
    """

    number: int
    path: Path
    name: str
    start: int = 0
    end: int | None = None
    kind: str | None = None


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
    rows: list[int] | range = field(default_factory=list)
    urls: list[str | None] = field(default_factory=list)


@dataclass
class Block:
    """Whole lines whose first is a resource of a kind that was asked for; the others most likely too.

    Attributes:
        file, kind: as in `Chunk`.
        data: the lines.
        first_row: number of the first one.
        lines: how many there are.
    """

    file: str
    kind: str
    data: bytes
    first_row: int
    lines: int

    def split(self) -> "Iterator[Chunk | Lost]":
        """The lines one by one, by kind."""
        lines = self.data.removesuffix(b"\n").split(b"\n")
        rows = range(self.first_row, self.first_row + len(lines))
        yield from _sorted(self.file, lines, rows, [None] * len(lines))


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


def pieces(source: Path) -> tuple[list[Piece], list[str]]:
    """Find the files of a source and cut large ndjson files into ranges; also what to tell people.

    Raises:
        DataError: there is no such file or folder, or nothing in it that can be FHIR.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; give a FHIR file, an archive, or a folder of them.")
    root = source if source.is_dir() else source.parent
    found = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    wanted = [p for p in found if _form(p.name) and not _hidden(p.relative_to(root))]
    if not wanted:
        raise DataError(
            f"{source}: no FHIR files among {len(found)} files; wanted are .ndjson, .jsonl or .json, each also with .gz,"
            " and .tar, .tar.gz or .tgz archives of them."
        )
    cut_up: list[Piece] = []
    notes = []
    for path in wanted:
        name = path.relative_to(root).as_posix()
        if not path.stat().st_size:
            notes.append(f"{name} is empty.")
            continue
        kind = (m := re.match(r"([A-Z][A-Za-z]+)[._-]", path.name)) and m[1]
        form = _form(path.name)
        size = path.stat().st_size
        ranged = form == "lines" and not path.name.lower().endswith(".gz") and size > _RANGE
        for start in range(0, size, _RANGE) if ranged else [0]:
            end = min(start + _RANGE, size) if ranged else None
            cut_up.append(Piece(len(cut_up), path, name, start, end, kind if form == "lines" else None))
    if other := len(found) - len(wanted):
        notes.append(f"{other} files of other kinds were not read.")
    return cut_up, notes


def read(piece: Piece, first_row: int = 1, *, whole: Container[str] = ()) -> Iterator[Chunk | Block | Lost]:
    """Give the resources of a piece, block by block.

    Args:
        piece: of `pieces`.
        first_row: number of its first line in the file.
        whole: kinds whose lines are wanted unsplit.

    Yields:
        Chunks of one kind each, blocks, and what couldn't be read.
    """
    form = _form(piece.path.name)
    if form == "archive":
        yield from _archive(piece, whole)
        return
    with piece.path.open("rb") as plain:
        yield from _file(plain, piece.name, form, piece, first_row, whole)


def lines_of(piece: Piece) -> int:
    """Lines that begin in a piece's range; 0 for whole files."""
    if piece.end is None:
        return 0
    total, last = 0, b""
    with piece.path.open("rb") as file:
        part = _Range(file, piece.start, piece.end)
        while data := part.read(_BLOCK):
            total, last = total + data.count(b"\n"), data[-1:]
    return total + (last not in (b"", b"\n"))


def _form(name: str) -> str | None:
    lower = name.lower()
    if lower.endswith(_ARCHIVES):
        return "archive"
    lower = lower.removesuffix(".gz")
    return "lines" if lower.endswith(_LINES) else "document" if lower.endswith(_DOCUMENT) else None


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def _archive(piece: Piece, whole: Container[str]) -> Iterator[Chunk | Block | Lost]:
    members = 0
    try:
        with tarfile.open(piece.path, "r|*") as archive:
            for member in archive:
                form = _form(member.name)
                if not member.isfile() or form in (None, "archive") or _hidden(Path(member.name)):
                    continue
                members += 1
                file = archive.extractfile(member)
                if file is not None:
                    yield from _file(file, f"{piece.name}!{member.name}", form, piece, 1, whole)
    except _DAMAGE as problem:
        yield Lost(piece.name, members + 1, "archive is cut off or damaged", str(problem), advice="Copy it again")


def _file(
    file: IO[bytes], name: str, form: str | None, piece: Piece, first_row: int, whole: Container[str]
) -> Iterator[Chunk | Block | Lost]:
    opened: IO[bytes] = gzip.open(file) if name.lower().endswith(".gz") else file  # type: ignore[assignment]
    if form == "document":
        yield from _document(opened, name)
    else:
        within = _Range(opened, piece.start, piece.end) if piece.end is not None else opened
        yield from _lines(within, name, first_row, whole)


class _Range:
    """The lines of a file that begin in a range of its bytes, as a file to read from."""

    def __init__(self, file: IO[bytes], start: int, end: int) -> None:
        self._file, self._left = file, end - start
        if start:
            # The line that is under way at `start` belongs to the range before.
            file.seek(start - 1)
            self._left -= len(file.readline()) - 1
        self._done = self._left <= 0

    def read(self, size: int) -> bytes:
        if self._done:
            return b""
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        if self._left <= 0 or not data:
            self._done = True
            if data and not data.endswith(b"\n"):
                data += self._file.readline(_LINE + 1)
        return data


def _blocks(file: "IO[bytes] | _Range | _Chained") -> Iterator[tuple[bytes, str | None]]:
    """Whole lines, a block at a time; a line too long to hold comes as its beginning and a complaint."""
    rest: list[bytes] = []
    skipping = False
    while data := file.read(_BLOCK):
        end = data.rfind(b"\n") + 1
        if not end:
            if not skipping:
                rest.append(data)
                skipping = sum(map(len, rest)) > _LINE
            continue
        start = 0
        if skipping:
            start = data.find(b"\n") + 1
            yield rest[0][:1000], f"line of more than {_LINE >> 20} MiB"
            rest, skipping = [], False
        if end > start:
            yield b"".join((*rest, memoryview(data)[start:end])), None
        rest = [data[end:]] if end < len(data) else []
    if skipping:
        yield rest[0][:1000], f"line of more than {_LINE >> 20} MiB"
    elif rest:
        yield b"".join(rest), None


def _lines(
    file: "IO[bytes] | _Range | _Chained", name: str, first_row: int, whole: Container[str] = ()
) -> Iterator[Chunk | Block | Lost]:
    row = first_row
    try:
        for data, complaint in _blocks(file):
            if complaint:
                yield Lost(name, row, complaint, data.decode(errors="replace"))
                row += 1
                continue
            lines = data.count(b"\n") + (not data.endswith(b"\n"))
            block = Block(name, "", data.removeprefix(b"\xef\xbb\xbf") if row == 1 else data, row, lines)
            match = _MEMBER.match(block.data)
            if match and (kind := match[1].decode()) in whole:
                block.kind = kind
                yield block
            else:
                yield from block.split()
            row += lines
    except _DAMAGE as problem:
        yield Lost(name, row, "file is cut off or damaged", str(problem), advice="Copy or export the file again")


def _document(file: IO[bytes], name: str) -> Iterator[Chunk | Lost]:
    """A bundle or a resource, a list of resources, or ndjson under a name that doesn't tell."""
    try:
        start = file.read(_WHOLE + 1)
        large = len(start) > _WHOLE
        start = start.removeprefix(b"\xef\xbb\xbf")
        if _whole_first_line(start):
            yield from _lines(_Chained(start, file), name, 1)
        elif large:
            yield from _large(_Chained(start, file), name, bare=start.lstrip()[:1] == b"[")
        elif not start.strip():
            yield Lost(name, 1, "file is empty", advice="Export the file again")
        elif start.lstrip()[:1] == b"[":
            raws = [bytes(raw) for raw in _LIST.decode(start)]
            yield from _sorted(name, raws, range(1, len(raws) + 1), [None] * len(raws))
        else:
            yield from _sorted(name, [start], [1], [None], top=True)
    except _DAMAGE as problem:
        yield Lost(name, 1, "file is cut off or damaged", str(problem), advice="Copy or export the file again")
    except READ_ERRORS as problem:
        yield Lost(name, 1, fault(problem), start[:2000].decode(errors="replace"), advice="Export the file again")


class _Chained:
    """What was read ahead, and the rest of the file."""

    def __init__(self, start: bytes, file: IO[bytes]) -> None:
        self._start, self._file = start, file

    def read(self, size: int) -> bytes:
        data, self._start = self._start[:size], self._start[size:]
        return data or self._file.read(size)


def _whole_first_line(start: bytes) -> bool:
    line, newline, rest = start.partition(b"\n")
    if not newline or not rest.strip() or line.strip()[-1:] != b"}":
        return False
    try:
        _KIND.decode(line)
    except READ_ERRORS:
        return False
    return True


def _large(file: "_Chained", name: str, *, bare: bool) -> Iterator[Chunk | Lost]:
    """A bundle, or a bare list of resources, that is cut into its entries."""
    row = 1
    for entries in cut(file, _LINE):
        if isinstance(entries, str):
            yield Lost(name, row, entries, advice="Export the file again")
            return
        rows = range(row, row + len(entries))
        yield from _sorted(name, entries, rows, [None] * len(rows)) if bare else _entries(name, entries, rows)
        row += len(entries)
    if row == 1:
        yield Lost(name, 1, f"document of more than {_WHOLE >> 20} MiB without entries", advice="Leave it out")


def _sorted(
    name: str, raws: "list[bytes]", rows: "range | list[int]", urls: list[str | None], *, top: bool = False
) -> Iterator[Chunk | Lost]:
    """Resources by kind; bundles are opened, other JSON is lost."""
    if raws and (match := _MEMBER.match(raws[0])) and match[1] != b"Bundle":
        begin = match[0]
        if all([raw.startswith(begin) for raw in raws]):
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
    if seen.resourceType and re.fullmatch("[A-Za-z]{1,64}", seen.resourceType):
        return seen.resourceType
    if seen.exportId and seen.eventId:
        return Lost(name, row, "log of a bulk export", dropped=True, table="export log")
    if seen.transactionTime and seen.output:
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


def _entries(name: str, raws: list[bytes], rows: range) -> Iterator[Chunk | Lost]:
    """The resources of a large bundle's entries."""
    good, numbers = [], []
    for raw, row in zip(raws, rows, strict=True):
        try:
            good.append(_ENTRY.decode(raw))
            numbers.append(row)
        except READ_ERRORS as problem:
            yield Lost(name, row, fault(problem), raw[:2000].decode(errors="replace"), table="Bundle")
    yield from _resources(name, good, numbers)


def _resources(name: str, entries: list[_Entry], rows: "range | list[int]") -> Iterator[Chunk | Lost]:
    raws, numbers, urls = [], [], []
    for entry, row in zip(entries, rows, strict=True):
        raw = bytes(entry.resource)
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
            urls.append(entry.fullUrl)
    yield from _sorted(name, raws, numbers, urls)
