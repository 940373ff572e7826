"""The folder that a run writes its tokens to: one run at a time, all of it or nothing, and nothing of anybody else's.

Records, store and codebook belong together. A run builds them aside, inside of the folder, and then puts them in the
place of an earlier run's by renaming:

    .building   what a run writes; left behind by one that failed or was killed, it is swept by the next
    .ready      the same, complete and on the disk; from here on the new output counts
    .placing    an earlier run's have been moved into it, and what is new is being moved out of it

Whoever is killed before `.ready` is there leaves what was; whoever is killed afterwards leaves what the next command
that opens the folder, or what is in it, finishes (`settle`).
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from tokenizer import durable
from tokenizer.errors import ConfigError, DataError

RECORDS, STORE, CODEBOOK = "records", "store", "codebook.json"
_PARTS = (RECORDS, STORE, CODEBOOK)
# The file by which each folder is known as one that this program wrote.
_MARKS = {RECORDS: "metadata/fedcomet_flow.json", STORE: "manifest.json"}
_LOCK, _BUILDING, _READY, _PLACING, _OLD = ".lock", ".building", ".ready", ".placing", "old"


@contextmanager
def output(out: Path, reads: Path | None) -> Iterator[Path]:
    """Make the folder `out` and hold it for one run; a folder that is still empty afterwards is removed again.

    Gives the folder to write `RECORDS`, `STORE` and `CODEBOOK` into; when the block ends without an error, they replace
    those of an earlier run, all together (one that the run doesn't write is then gone).

    Args:
        out: The folder.
        reads: What is searched for records: a folder or file; None for a database.

    Raises:
        ConfigError: It isn't a folder, another run writes to it, something in it would be lost, or it would be read.
        OSError: It can't be made or written to.
    """
    _refuse_loss(out, reads)
    with _held(out, wait=False):
        _place(out)
        aside = out / _BUILDING
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
            durable.sync_directory(aside)
            if any(aside.iterdir()):
                aside.rename(out / _READY)
                _place(out)
        except OSError as problem:
            if isinstance(problem.filename, str):
                problem.filename = problem.filename.replace(str(aside), str(out))
            raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def settle(out: Path) -> None:
    """Finish what a run that was killed had begun to put in its place; to be called before anything in `out` is read.

    Raises:
        DataError: It has to be finished, but may not be written to.
    """
    if not _is_pending(out):
        return
    try:
        with _held(out, wait=True):
            _place(out)
    except OSError as problem:
        raise DataError(
            f"{out}: a run was interrupted while it put its output there, and what is left can't be finished"
            f" ({problem.strerror}). Run any command on it with the right to write there."
        ) from None


def _is_pending(out: Path) -> bool:
    return (out / _READY).is_dir() or (out / _PLACING).is_dir()


def _place(out: Path) -> None:
    """Put what is ready in its place; goes on from wherever an earlier call was killed."""
    ready, placing = out / _READY, out / _PLACING
    if ready.is_dir():
        durable.sync_directory(out)
        old = ready / _OLD
        old.mkdir(exist_ok=True)
        for name in _PARTS:
            if (out / name).exists():
                (out / name).rename(old / name)
        durable.sync_directory(out)
        ready.rename(placing)
    if placing.is_dir():
        for name in _PARTS:
            if (placing / name).exists():
                (placing / name).rename(out / name)
        durable.sync_directory(out)
        shutil.rmtree(placing)


@contextmanager
def _held(out: Path, *, wait: bool) -> Iterator[None]:
    """Hold the folder's lock, waiting for another holder or refusing; the file goes with the last holder."""
    file = out / _LOCK
    while True:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock = file.open("wb")
        except FileNotFoundError:  # whoever held it has just removed the folder
            continue
        with lock:
            try:
                # The system takes it back from a process that dies.
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise ConfigError(
                    f"{out}: another run is writing to it. Wait until that has ended, or choose another --out."
                ) from None
            if not _is_there(lock, file):
                continue
            try:
                yield
            finally:
                file.unlink(missing_ok=True)
                with suppress(OSError):
                    out.rmdir()
            return


def _is_there(lock: BinaryIO, file: Path) -> bool:
    """Whether an opened file is still the one of its name: it may have been removed, and another one made."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _refuse_loss(out: Path, reads: Path | None) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file. Choose a folder as --out; it is made if it doesn't exist.")
    source = None if reads is None else reads.resolve()
    for name in _PARTS:
        part = out / name
        if source is not None and source.is_relative_to(part.resolve()):
            raise ConfigError(f"{part} would be replaced, but the records are read from there. Choose another --out.")
        if part.exists() and part.is_dir() != (name in _MARKS):
            kinds = ("file", "folder") if part.is_file() else ("folder", "file")
            raise ConfigError(f"{part}: is a {kinds[0]}, where a {kinds[1]} is to be written. Choose another --out.")
    for name, mark in _MARKS.items():
        folder = out / name
        if folder.is_dir() and not (folder / mark).is_file() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder} would be replaced, but wasn't written by fedcomet (it has no {mark})."
                " Choose another --out, or move it away."
            )
    if source is not None and out.resolve().is_relative_to(source):
        raise ConfigError(
            f"{out}: {reads} is searched for records, so the next run would read what this one writes. Choose an --out"
            " outside of it."
        )
