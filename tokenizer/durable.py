"""Files that are either there and whole, or not there.

Everything is written beside its destination, flushed to the disk, and renamed: a reader, or the same program after a
crash, never sees half a file. Left-overs of a killed writer carry `.partial` in their name and are swept by the next
process that writes in their folder, with its first file there: to look each time would cost more the more lies there.
"""

import errno
import os
import re
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEAST_FREE = 1 << 20
"""With fewer bytes free a disk is called full: databases and lists of what happens need a little at any time."""

OUT_OF_ROOM = "Out of room: "
"""How a process that leads a run begins its last words where a full disk ended it."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_ASIDE = re.compile(r".+\.(\d+)\.\d+\.partial")  # the destination, its writer's process and thread
_OF_RUST = re.compile(r"\(os error (\d+)\)$")  # what safetensors makes of an error of the system
_OPEN: set[Path] = set()  # of this process
_SWEPT: set[Path] = set()  # folders, by this process


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Replace `path` by `data` in one step that survives a crash at any moment."""
    with file(path) as aside:
        aside.write_bytes(data)


@contextmanager
def file(path: Path) -> Iterator[Path]:
    """Write to the path that is given here; it replaces `path` only when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _SWEPT:
        _SWEPT.add(path.parent)
        _sweep(path.parent)
    aside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
    _OPEN.add(aside)
    try:
        yield aside
        with aside.open("rb") as written:
            os.fsync(written.fileno())
        aside.replace(path)
    except Exception as problem:
        _named(problem, path)
        raise
    finally:
        aside.unlink(missing_ok=True)
        _OPEN.discard(aside)
    sync_directory(path.parent)


def _sweep(folder: Path) -> None:
    """Remove what writers that were killed left in a folder."""
    for left in folder.glob("*.partial"):
        found = _ASIDE.fullmatch(left.name)
        if found and left not in _OPEN and not _writes(int(found[1])):
            left.unlink(missing_ok=True)


def _writes(process: int) -> bool:
    """Tell whether a process other than this one lives."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


@contextmanager
def directory(path: Path) -> Iterator[Path]:
    """Build the directory `path` aside; it appears, whole, only when the block ends without an error.

    A directory that already stands there is replaced. Left-overs of killed writers of the same directory are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for stale in path.parent.glob(f"{path.name}.*.partial"):
        shutil.rmtree(stale, ignore_errors=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    aside.mkdir()
    try:
        yield aside
        for folder, _, names in os.walk(aside):
            for name in names:
                with Path(folder, name).open("rb") as file:
                    os.fsync(file.fileno())
            sync_directory(Path(folder))
        if path.exists():
            # A rename can't replace a directory with content: the old one steps aside first.
            old = path.with_name(f"{path.name}.old.partial")
            path.rename(old)
            aside.rename(path)
            shutil.rmtree(old)
        else:
            aside.rename(path)
    except Exception as problem:
        _named(problem, path)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_directory(path.parent)


def _named(problem: Exception, path: Path) -> None:
    """Say what was to be written where the system didn't: a full disk has no name.

    Raises:
        OSError: in the place of what safetensors makes of one.
    """
    if (found := _OF_RUST.search(str(problem))) is not None:
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from problem
    if isinstance(problem, OSError) and problem.filename is None and problem.errno is not None:
        problem.filename = str(path)


def sync_directory(path: Path) -> None:
    """Flush what a directory says about its files: names that came, went or changed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def out_of_room(problem: BaseException | None) -> bool:
    """Tell whether a full disk, or a used-up quota, stands behind an error, or behind what it came from."""
    return bool(lacking(problem))


def lacking(problem: BaseException | None) -> str:
    """Say what a full disk, or a used-up quota, behind an error made of it; empty if there is none."""
    while problem is not None:
        if isinstance(problem, OSError) and problem.errno in _NO_ROOM:
            return str(problem)
        if getattr(problem, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
            return str(problem)
        problem = problem.__cause__ or problem.__context__
    return ""


def free_bytes(path: Path) -> int:
    """Give how much room is left for this user on the disk of a folder, or of the first one above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def full(path: Path) -> str:
    """Say that the disk of a folder is full, and what to do."""
    return f"the disk of {path} is full ({free_bytes(path):,} bytes are left); make room, and all goes on by itself"
