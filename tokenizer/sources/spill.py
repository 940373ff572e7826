"""Events on their way to a dataset: spread over files by subject, given back shard by shard.

Whatever the order in which events come, all events of a subject are in one shard, and the same events make the same
shards. Memory is bounded by a shard, or by the longest timeline where that is more.
"""

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tokenizer.errors import DataError

_BUCKET_BITS = 6
_BUCKETS = 1 << _BUCKET_BITS
_LOCK = "lock"


@dataclass(frozen=True)
class _Part:
    file: Path
    rows: int


class Spill:
    """Events in files of a folder of its own.

    Args:
        folder: empty, and no one else's.
        spill_events: events held in memory before they are written.
        shard_events: events in a shard; a longer timeline has a shard to itself and its neighbours by hash.
    """

    def __init__(self, folder: Path, *, spill_events: int = 2_000_000, shard_events: int = 2_000_000) -> None:
        self._folder = folder
        self._spill_events = spill_events
        self._shard_events = shard_events
        self._waiting: list[pl.DataFrame] = []
        self._waiting_rows = 0
        self._buckets: list[list[_Part]] = [[] for _ in range(_BUCKETS)]

    def add(self, events: pl.DataFrame) -> None:
        """Take events: `subject_id` int64 without nulls, and whatever other columns, the same in each call."""
        self._waiting.append(events)
        self._waiting_rows += events.height
        if self._waiting_rows >= self._spill_events:
            self.flush()

    def flush(self) -> None:
        """Write what waits in memory."""
        if not self._waiting_rows:
            return
        events = pl.concat(self._waiting)
        self._waiting, self._waiting_rows = [], 0
        bucket = (_spread(events) >> np.uint64(64 - _BUCKET_BITS)).astype(np.uint8)
        ordered = events[np.argsort(bucket, kind="stable")]
        ends = np.cumsum(np.bincount(bucket, minlength=_BUCKETS)).tolist()
        for number, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            if end > start:
                file = self._folder / f"{number:02d}-{len(self._buckets[number]):06d}.arrow"
                self._write(ordered[start:end], file)
                self._buckets[number].append(_Part(file, end - start))

    def shards(self) -> Iterator[tuple[str, pl.DataFrame]]:
        """Give the shards in a fixed order, each with all events of its subjects."""
        if self._waiting_rows <= self._shard_events and not any(self._buckets):
            if self._waiting:
                yield "0000", pl.concat(self._waiting)
            return
        self.flush()
        number = 0
        group: list[_Part] = []
        for parts in [*self._buckets, None]:
            rows = sum(part.rows for part in parts or ())
            if group and (parts is None or _rows(group) + rows > self._shard_events):
                for events in self._read(group):
                    yield f"{number:04d}", events
                    number += 1
                group = []
            group += parts or []

    def _read(self, parts: list[_Part]) -> Iterator[pl.DataFrame]:
        """The events of some buckets, in pieces of a shard's size, cut between subjects."""
        pieces, bits = 1, 0
        while pieces * self._shard_events < _rows(parts) and bits < 10:
            pieces, bits = pieces * 2, bits + 1
        if pieces == 1:
            yield pl.concat([self._load(part) for part in parts])
            return
        shift, mask = np.uint64(64 - _BUCKET_BITS - bits), np.uint64(pieces - 1)
        for piece in range(pieces):
            mine = []
            for part in parts:
                events = self._load(part)
                chosen = ((_spread(events) >> shift) & mask) == piece
                mine.append(events.filter(pl.Series(chosen)))
            events = pl.concat(mine)
            if events.height:
                yield events

    def _write(self, events: pl.DataFrame, file: Path) -> None:
        try:
            events.write_ipc(file, compression="lz4")
        except (OSError, pl.exceptions.PolarsError) as problem:
            raise DataError(
                f"{file}: can't be written ({str(problem).splitlines()[0]}). Sorting needs room beside the dataset,"
                " about 40 bytes an event; free some, or write the dataset to another disk."
            ) from None

    def _load(self, part: _Part) -> pl.DataFrame:
        try:
            events = pl.read_ipc(part.file)
        except (OSError, pl.exceptions.PolarsError) as problem:
            raise DataError(f"{part.file}: {str(problem).splitlines()[0]}. Import the records again.") from None
        if events.height != part.rows:
            raise DataError(f"{part.file}: {events.height} events where {part.rows} were written. Import again.")
        return events


@contextmanager
def spill_folder(out: Path) -> Iterator[Path]:
    """A folder beside `out` for as long as the block runs.

    Folders that killed imports left behind are swept; those of imports that run now are told by the lock that they
    hold (the system takes it back from a process that dies), and left alone.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.spill-"
    for stale in sorted(out.parent.iterdir()):
        if stale.name.startswith(prefix) and stale.is_dir():
            _sweep(stale)
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    folder = out.with_name(f"{prefix}{unique}")
    # Under this name only once it is locked, so that an import that starts at this moment doesn't sweep it.
    unlocked = out.with_name(f".{out.name}.new-{unique}")
    unlocked.mkdir()
    try:
        with (unlocked / _LOCK).open("wb") as lock:
            _lock(lock)
            unlocked.rename(folder)
            yield folder
    finally:
        shutil.rmtree(unlocked, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(folder: Path) -> None:
    """Remove a folder that no one has locked."""
    try:
        with (folder / _LOCK).open("rb") as lock:
            _lock(lock)
    except FileNotFoundError:
        pass
    except BlockingIOError:
        return
    shutil.rmtree(folder, ignore_errors=True)


def _lock(file: BinaryIO) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _spread(events: pl.DataFrame) -> NDArray[np.uint64]:
    """Subject ids times 2^64 / golden ratio: the upper bits differ even where ids are consecutive."""
    ids = events["subject_id"].to_numpy()
    return ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def _rows(parts: list[_Part]) -> int:
    return sum(part.rows for part in parts)
