"""How many rows of a table have a number that another row has, too: in bounded memory, whatever the number of rows."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_BUCKET_BITS = 6
_HELD = 4_000_000

Ints = NDArray[np.int64]


class Repeats:
    """Numbers of one table; most of them wait on the disk, in files by their hash.

    Args:
        folder: where the files may be; they are removed in the end.
        held: numbers held in memory before they are written.
    """

    def __init__(self, folder: Path, *, held: int = _HELD) -> None:
        self._folder = folder
        self._held = held
        self._waiting: list[Ints] = []
        self._size = 0
        self._files: set[Path] = set()

    def add(self, numbers: Ints) -> None:
        """Take the numbers (int64 [N]) of some rows."""
        self._waiting.append(numbers)
        self._size += len(numbers)
        if self._size >= self._held:
            self._flush()

    def count(self) -> int:
        """Rows whose number an earlier row has; to be asked once, in the end."""
        if not self._files:
            return _repeated(self._waiting)
        self._flush()
        repeated = 0
        for file in self._files:
            repeated += _repeated([np.fromfile(file, np.int64)])
            file.unlink()
        return repeated

    def _flush(self) -> None:
        if not self._size:
            return
        numbers = np.concatenate(self._waiting)
        self._waiting, self._size = [], 0
        spread = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bucket = (spread >> np.uint64(64 - _BUCKET_BITS)).astype(np.uint8)
        ordered = numbers[np.argsort(bucket, kind="stable")]
        ends = np.cumsum(np.bincount(bucket, minlength=1 << _BUCKET_BITS))
        for number, part in enumerate(np.split(ordered, ends[:-1])):
            file = self._folder / f"numbers-{number:02d}"
            with file.open("ab") as out:
                out.write(part.data)
            self._files.add(file)


def _repeated(pieces: list[Ints]) -> int:
    if not pieces:
        return 0
    numbers = np.sort(np.concatenate(pieces))
    return int((numbers[1:] == numbers[:-1]).sum())
