"""FHIR files to raw resources, in pieces: ndjson, bundles, single resources, with gzip or not, in folders or archives.

Only a block of a file is in memory, or one document of at most `_WHOLE` bytes; larger bundles are cut into their
entries while they are read.
"""

import gzip
import io
import mmap
import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import msgspec
import numpy as np
from msgspec import Raw

from tokenizer.errors import DataError
from tokenizer.sources.fhir_codes import READ_ERRORS, fault
from tokenizer.sources.fhir_cut import cut
from tokenizer.sources.fhir_kinds import Block, Chunk, Lost, by_kind, entries, first_kind, is_object
from tokenizer.sources.folders import DAMAGED, walk_tar
from tokenizer.wording import several

_LINES, _DOCUMENT, _ARCHIVES = (".ndjson", ".jsonl"), (".json",), (".tar", ".tar.gz", ".tgz")
_BLOCK = 8 << 20
_COUNTED = 128 << 10
_RANGE = 64 << 20
_WHOLE = 64 << 20
_LINE = 256 << 20
_AGAIN = "Copy or export the file again"
_SHOWN = 1000
_NEWLINE = ord("\n")

_RAWS = msgspec.json.Decoder(list[Raw])
_DAMAGE: tuple[type[Exception], ...] = (*DAMAGED, OSError)


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


def pieces(source: Path) -> tuple[list[Piece], list[str]]:
    """Find the files of a source and cut large ndjson files into ranges; also what to tell people.

    Raises:
        DataError: there is no such file or folder, or nothing in it that can be FHIR.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; give a FHIR file, an archive, or a folder of them.")
    root = source if source.is_dir() else source.parent
    there = sorted(source.rglob("*")) if source.is_dir() else [source]
    found = [p for p in there if p.is_file()]
    for p in there:
        if not (p.is_file() or p.is_dir()) and _form(p.name) and not _hidden(p.relative_to(root)):
            raise DataError(f"{p}: not a file, or a link that leads nowhere. Mend or remove it.")
    wanted = [p for p in found if _form(p.name) and not _hidden(p.relative_to(root))]
    if not wanted:
        raise DataError(
            f"{source}: no FHIR files among {several(len(found), 'file')}. Wanted are .ndjson, .jsonl or .json, also"
            " with .gz, and archives of them as .tar, .tar.gz or .tgz."
        )
    cut_up: list[Piece] = []
    linked = [p.relative_to(root).as_posix() for p in there if p.is_symlink() and p.is_dir()]
    notes = [f"{name} is a link to a folder, which isn't followed." for name in linked]
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
        notes.append(f"{several(other, 'file of another kind was', 'files of other kinds were')} not read.")
    return cut_up, notes


def read(piece: Piece, *, whole: Container[str] = ()) -> Iterator[Chunk | Block | Lost]:
    """Give the resources of a piece, block by block.

    Args:
        piece: of `pieces`.
        whole: kinds whose lines are wanted unsplit.

    Yields:
        Chunks of one kind each, blocks, and what couldn't be read. Lines are numbered from 1 in the piece; a block's
        data is overwritten by what comes next.
    """
    form = _form(piece.path.name)
    if form == "archive":
        yield from _archive(piece, whole)
        return
    with piece.path.open("rb") as plain:
        yield from _file(plain, piece.name, form, piece, whole)


def lines_of(piece: Piece) -> int:
    """Lines that begin in a piece's range; 0 for whole files."""
    if piece.end is None:
        return 0
    total, last = 0, b"\n"
    with piece.path.open("rb") as file, memoryview(bytearray(_COUNTED)) as buffer:
        part = _Range(file, piece.start, piece.end)
        while filled := part.readinto(buffer):
            total, last = total + _newlines(buffer[:filled]), buffer[filled - 1 : filled].tobytes()
    return total + (last != b"\n")


def _newlines(data: memoryview) -> int:
    # Four times faster than bytes.count on lines of this length, as long as what is compared stays in the cache.
    text, total = np.frombuffer(data, np.uint8), 0
    for start in range(0, len(text), _COUNTED):
        total += int(np.count_nonzero(text[start : start + _COUNTED] == ord("\n")))
    return total


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
        for name, stream in walk_tar(piece.path):
            form = _form(name)
            if form in (None, "archive") or _hidden(Path(name)):
                continue
            members += 1
            yield from _file(stream(), f"{piece.name}!{name}", form, piece, whole)
    except _DAMAGE as problem:
        yield Lost(
            piece.name, members + 1, "archive is cut off or damaged", str(problem), advice="Copy it again", whole=True
        )


def _file(
    file: IO[bytes], name: str, form: str | None, piece: Piece, whole: Container[str]
) -> Iterator[Chunk | Block | Lost]:
    opened = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if name.lower().endswith(".gz") else file
    if form == "document":
        yield from _document(opened, name)
    else:
        within = _Range(opened, piece.start, piece.end) if piece.end is not None else opened
        yield from _lines(within, name, whole, begun=piece.start > 0)


class _Range:
    """The lines of a file that begin in a range of its bytes, as a file to read from."""

    def __init__(self, file: IO[bytes], start: int, end: int) -> None:
        self._file, self._left = file, end - start
        self._tail = b""
        if start:
            # The line that is under way at `start` belongs to the range before.
            file.seek(start - 1)
            self._left -= len(file.readline()) - 1

    def readinto(self, buffer: memoryview) -> int:
        if self._left <= 0:
            filled = min(len(self._tail), len(buffer))
            buffer[:filled], self._tail = self._tail[:filled], self._tail[filled:]
            return filled
        filled = _readinto(self._file, buffer[: self._left])
        self._left -= filled or self._left
        if filled and self._left <= 0 and buffer[filled - 1] != _NEWLINE:
            self._tail = self._file.readline(_LINE + 1)
        return filled


def _readinto(file: "IO[bytes] | _Range | _Chained", buffer: memoryview) -> int:
    """Fill a buffer from the start; gives the number of bytes."""
    return cast(io.BufferedIOBase, file).readinto(buffer)


def _blocks(file: "IO[bytes] | _Range | _Chained") -> Iterator[tuple[memoryview, str | None]]:
    """Whole lines, a block at a time; a line too long to hold comes as its beginning and a complaint.

    All blocks are in one buffer: what was given is overwritten by the next.
    """
    pages = mmap.mmap(-1, _BLOCK)  # unlike a bytearray it takes no time until it is written to
    buffer, held, complaint = memoryview(pages), 0, f"line of more than {_LINE >> 20} MiB"
    skipping = False
    while filled := _readinto(file, buffer[held:]):
        filled += held
        start = 0
        if skipping:
            if not (start := pages.find(b"\n", held, filled) + 1):
                continue
            yield buffer[:_SHOWN], complaint
            skipping = False
        end = pages.rfind(b"\n", max(start, held), filled) + 1
        if end > start:
            yield buffer[start:end], None
            start = end
        held = filled - start
        buffer[:held] = buffer[start:filled]
        if held > _LINE:
            skipping, held = True, _SHOWN
        elif held == len(buffer):
            larger = mmap.mmap(-1, 2 * held)
            larger[:held] = buffer
            pages, buffer = larger, memoryview(larger)
    if skipping:
        yield buffer[:_SHOWN], complaint
    elif held:
        yield buffer[:held], None


def _lines(
    file: "IO[bytes] | _Range | _Chained", name: str, whole: Container[str] = (), *, begun: bool = False
) -> Iterator[Chunk | Block | Lost]:
    row = 1
    try:
        for data, complaint in _blocks(file):
            if complaint:
                yield Lost(name, row, complaint, bytes(data).decode(errors="replace"))
                row += 1
                continue
            lines = _newlines(data) + (data[-1] != _NEWLINE)
            block = Block(
                name,
                "",
                data[3:] if row == 1 and not begun and bytes(data[:3]) == b"\xef\xbb\xbf" else data,
                row,
                lines,
            )
            kind = first_kind(block.data)
            if kind and kind in whole:
                block.kind = kind
                yield block
            else:
                yield from block.split()
            row += lines
    except _DAMAGE as problem:
        yield Lost(name, row, "file is cut off or damaged", str(problem), advice=_AGAIN, whole=True)


def _document(file: IO[bytes], name: str) -> Iterator[Chunk | Block | Lost]:
    """A bundle or a resource, a list of resources, or ndjson under a name that doesn't tell."""
    try:
        start = file.read(_WHOLE + 1)
        large = len(start) > _WHOLE
        start = start.removeprefix(b"\xef\xbb\xbf")
        if _whole_first_line(start):
            yield from _lines(_Chained(start, file), name)
        elif large:
            yield from _large(_Chained(start, file), name, bare=start.lstrip()[:1] == b"[")
        elif not start.strip():
            yield Lost(name, 1, "file is empty", advice="Export the file again")
        elif start.lstrip()[:1] == b"[":
            raws = [bytes(raw) for raw in _RAWS.decode(start)]
            yield from by_kind(name, raws, range(1, len(raws) + 1), [None] * len(raws))
        else:
            yield from by_kind(name, [start], [1], [None], top=True)
    except _DAMAGE as problem:
        yield Lost(name, 1, "file is cut off or damaged", str(problem), advice=_AGAIN, whole=True)
    except READ_ERRORS as problem:
        yield Lost(name, 1, fault(problem), start[:2000].decode(errors="replace"), advice=_AGAIN, whole=True)


class _Chained:
    """What was read ahead, and the rest of the file."""

    def __init__(self, start: bytes, file: IO[bytes]) -> None:
        self._start, self._file = start, file

    def read(self, size: int) -> bytes:
        data, self._start = self._start[:size], self._start[size:]
        return data or self._file.read(size)

    def readinto(self, buffer: memoryview) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _whole_first_line(start: bytes) -> bool:
    line, newline, rest = start.partition(b"\n")
    if not newline or not rest.strip() or line.strip()[-1:] != b"}":
        return False
    return is_object(line)


def _large(file: "_Chained", name: str, *, bare: bool) -> Iterator[Chunk | Lost]:
    """A bundle, or a bare list of resources, that is cut into its entries."""
    row = 1
    for found in cut(file, _LINE):
        if isinstance(found, str):
            yield Lost(name, row, found, advice=_AGAIN, whole=True)
            return
        rows = range(row, row + len(found))
        yield from by_kind(name, found, rows, [None] * len(rows)) if bare else entries(name, found, rows)
        row += len(found)
    if row == 1:
        yield Lost(name, 1, f"document of more than {_WHOLE >> 20} MiB without entries", advice="Leave it out")
