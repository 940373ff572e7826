"""Finds the files of a table in a folder, and in archives as if they were folders; opens them, unpacked.

`labs/*.csv` means files in the folder, `export.zip/labs/*.csv` those inside an archive of it; and the folder may itself
be an archive. Nothing is unpacked to the disk.
"""

import bz2
import difflib
import gzip
import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from tokenizer.errors import DataError

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\0": ".xz"}
_STEP = 1 << 16
DAMAGED: tuple[type[Exception], ...] = (
    EOFError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    tarfile.TarError,
    zipfile.BadZipFile,
)


class _Unpacked(io.RawIOBase):
    """What is in a bz2 or xz file: packed streams one after the other, with zeros allowed behind them.

    Python's own readers take a second stream that is damaged for the end, and would lose it without a word.
    """

    def __init__(self, stream: BinaryIO, make: Callable[[], Any]) -> None:
        self._stream, self._make = stream, make
        self._inner: Any = None
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._next(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        while (self._inner is not None and not self._inner.eof) or self._begin():
            if self._inner.needs_input and not self._rest:
                self._rest = self._stream.read(_STEP)
                if not self._rest:
                    raise EOFError("its end is missing")
            packed, self._rest = self._rest, b""
            try:
                data = self._inner.decompress(packed, size)
            except OSError as problem:
                raise EOFError(str(problem)) from None
            if data:
                return data
        return b""

    def _begin(self) -> bool:
        """Go to the next stream, if there is one."""
        behind = self._inner is not None
        rest = self._inner.unused_data.lstrip(b"\0") if behind else b""
        while not rest and (read := self._stream.read(_STEP)):
            rest = read.lstrip(b"\0") if behind else read
        if not rest and not behind:
            raise EOFError("it is empty")
        self._inner, self._rest = (self._make(), rest) if rest else (self._inner, b"")
        return bool(rest)


_UNPACK: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".bz2": lambda stream: io.BufferedReader(_Unpacked(stream, bz2.BZ2Decompressor), _STEP),
    ".xz": lambda stream: io.BufferedReader(_Unpacked(stream, lzma.LZMADecompressor), _STEP),
}


@dataclass(frozen=True)
class Found:
    """A file, packed or not.

    Attributes:
        name: path from the folder, through archives.
        stream: its content as it is stored; of a file in an archive, only until the next one is asked for.
    """

    name: str
    stream: Callable[[], BinaryIO]

    @property
    def unpacked_name(self) -> str:
        """The name without the ending of a compression."""
        ending = Path(self.name).suffix.lower()
        return self.name[: -len(ending)] if ending in _UNPACK else self.name

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Read its content, unpacked.

        Raises:
            DataError: the file can't be opened, or, while it is read, turns out to be damaged or cut off.
        """
        unpack = _UNPACK.get(Path(self.name).suffix.lower())
        with readable(self.name):
            try:
                stream = self.stream()
            except RuntimeError as problem:
                # The zip module's way to say that there is a password.
                raise DataError(f"{self.name}: can't be opened ({problem}). Unpack the archive.") from None
            with stream:
                yield unpack(stream) if unpack else stream


@contextmanager
def readable(name: str) -> Iterator[None]:
    """Say of the file `name` what went wrong while it was read."""
    try:
        yield
    except DAMAGED as problem:
        raise damaged(name, problem) from None
    except OSError as problem:
        raise DataError(f"{name}: can't be read ({problem.strerror or problem}).") from None


def damaged(name: str, problem: Exception, *, after_row: int = 0) -> DataError:
    """The error for a file of which a part is missing."""
    place = f" somewhere after row {after_row}" if after_row else ""
    reason = str(problem) or type(problem).__name__
    return DataError(f"{name}: damaged or cut off{place} ({reason}). Copy or export the file again.")


def find(folder: Path, patterns: Sequence[str], table: str) -> Iterator[Found]:
    """Give the files of a table, one after the other; a file of an archive must be read before the next is asked for.

    Args:
        folder: or an archive.
        patterns: with `*`, `?`, `[...]` and `**`.
        table: for the message.

    Raises:
        DataError: no file fits, a file is there twice, or an archive is damaged.
    """
    if not folder.exists():
        raise DataError(f"{folder}: there is no such folder. Give the one that the mapping's paths start from.")
    seen: dict[str, str] = {}
    for pattern in patterns:
        earlier = set(seen.values())
        for found in _find(folder, pattern):
            if found.name in earlier:
                continue
            if twin := seen.get(found.unpacked_name):
                raise DataError(
                    f"{folder}: {twin} is there twice{'' if twin == found.name else f', also as {found.name}'}."
                    " Its rows would count twice; remove one, or name but one in the mapping's files."
                )
            seen[found.unpacked_name] = found.name
            yield found
    if not seen:
        raise DataError(f"{folder}: no file for table {table} ({', '.join(patterns)}).{_hint(folder, patterns)}")


def exists(folder: Path, patterns: Sequence[str]) -> bool:
    """Whether any file fits one of the patterns."""
    return any(True for pattern in patterns for _ in _find(folder, pattern))


def _find(folder: Path, pattern: str) -> Iterator[Found]:
    if folder.is_file():
        if not _is_archive(folder):
            raise DataError(f"{folder}: neither a folder nor a tar or zip archive.")
        yield from _members(folder, "", pattern)
        return
    for path in sorted(folder.glob(pattern)):
        if not (path.is_file() or path.is_dir()):
            raise DataError(f"{path}: not a file, or a link that leads nowhere. Mend or remove it.")
        if path.is_file():
            yield Found(path.relative_to(folder).as_posix(), lambda path=path: path.open("rb"))  # type: ignore[misc]
    steps = pattern.split("/")
    for depth in range(1, len(steps)):
        for path in sorted(folder.glob("/".join(steps[:depth]))):
            if path.is_file() and _is_archive(path):
                yield from _members(path, f"{path.relative_to(folder).as_posix()}/", "/".join(steps[depth:]))


def _is_archive(path: Path) -> bool:
    return path.name.lower().endswith((".zip", *_TARS))


def _members(archive: Path, prefix: str, pattern: str) -> Iterator[Found]:
    fits = _regex(pattern)
    for name, stream in _walk(archive):
        if fits.fullmatch(name):
            yield Found(prefix + name, stream)


def _walk(archive: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Name and content of the files in an archive; a tar's can only be read in passing."""
    with readable(str(archive)):
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as zipped:
                for info in sorted(zipped.infolist(), key=lambda info: info.filename):
                    if not info.is_dir():
                        yield (
                            info.filename.removeprefix("./"),
                            lambda info=info: cast(BinaryIO, zipped.open(info)),  # type: ignore[misc]
                        )
            return
        yield from walk_tar(archive)


def walk_tar(archive: Path) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    """Name and content of the files in a tar, packed or not; each must be read before the next is asked for.

    Raises:
        OSError, or one of DAMAGED: it can't be read, or is cut off, be it between two files.
    """
    with archive.open("rb") as file:
        start = file.read(6)
        file.seek(0)
        ending = next((ending for magic, ending in _MAGIC.items() if start.startswith(magic)), None)
        watched = _Watched(_UNPACK[ending](file) if ending else file)
        with tarfile.open(fileobj=cast(BinaryIO, watched), mode="r|") as packed:
            for member in packed:
                if member.isfile():
                    yield (
                        member.name.removeprefix("./"),
                        lambda member=member: cast(BinaryIO, packed.extractfile(member) or io.BytesIO()),  # type: ignore[misc]
                    )
        # The tar module takes an archive that is cut off between two files for a whole one.
        while watched.read(1 << 20):
            pass
        if watched.tail.strip(b"\0") or not watched.tail:
            raise tarfile.ReadError("the end of the archive is missing")


class _Watched:
    """A stream that remembers the last 512 bytes that were read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.tail = b""

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes."""
        data = self._stream.read(count)
        self.tail = (self.tail + data)[-512:]
        return data


def _regex(pattern: str) -> re.Pattern[str]:
    """The shell pattern as a regular expression for whole paths: only `**` goes through folders."""
    tokens = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile(
        "".join(
            meaning.get(token)
            or (token.replace("[!", "[^") if token[:1] == "[" and token[-1:] == "]" else re.escape(token))
            for token in tokens
        )
    )


def _hint(folder: Path, patterns: Sequence[str]) -> str:
    """What is there instead."""
    if folder.is_file():
        names = [name for name, _ in _walk(folder)]
    else:
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    if not names:
        return " It is empty."
    close = difflib.get_close_matches(patterns[0], names, n=1, cutoff=0.5)
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f" There are {shown}." + (f" Did you mean {close[0]}?" if close else "")
