"""Bytes that are there a part at a time: an array, several places in memory, or a file."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tokenizer.errors import DataError

Bytes = NDArray[np.uint8]

_PART = 1 << 20


class Parts(Protocol):
    """What there is to ask of such bytes."""

    @property
    def size(self) -> int:
        """How many there are."""

    def __getitem__(self, part: slice, /) -> Bytes:
        """Give some of them."""


class Joined:
    """Bytes that lie in several places, one after the other; what lies in one place is not copied."""

    def __init__(self, places: Sequence[Any]) -> None:
        """Take buffers of bytes."""
        self._places = [np.frombuffer(place, np.uint8) for place in places]
        self.size = sum(place.size for place in self._places)

    def __len__(self) -> int:
        return self.size

    def __bytes__(self) -> bytes:
        return b"".join(place.data for place in self._places)

    def __getitem__(self, part: slice) -> Bytes:
        start, stop, _ = part.indices(self.size)
        found = []
        for place in self._places:
            if start < place.size and stop > 0:
                found.append(place[max(0, start) : stop])
            start, stop = start - place.size, stop - place.size
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.uint8), *found])


class FileBytes:
    """A file's bytes, read part by part: mapped into memory, all of them would stay there as long as it is used."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Take the bytes from an offset on."""
        self._path, self._offset, self.size = path, offset, path.stat().st_size - offset

    def __getitem__(self, part: slice) -> Bytes:
        start, stop, _ = part.indices(self.size)
        data = np.fromfile(self._path, np.uint8, stop - start, offset=self._offset + start)
        if data.size != stop - start:
            raise DataError(f"{self._path}: the file was cut short while it was read.")
        return data


def pieces(data: Parts) -> Iterator[Bytes]:
    """Walk through bytes, a part that stays in the processor's cache at a time."""
    for start in range(0, data.size, _PART):
        yield data[start : start + _PART]


def sha256(data: Parts) -> str:
    """Give the sha256 of bytes."""
    digest = hashlib.sha256()
    for piece in pieces(data):
        digest.update(piece.data)
    return digest.hexdigest()
