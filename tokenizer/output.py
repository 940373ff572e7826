"""The folder that a run writes its tokens to: one run at a time, and nothing of anybody else's is replaced.

Records and store are replaced as whole folders. So a folder of such a name that this program didn't write, or that
holds the very records to be read, is refused before anything is read.
"""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokenizer.errors import ConfigError

RECORDS, STORE, CODEBOOK = "records", "store", "codebook.json"
# The file by which each folder is known as one that this program wrote.
_MARKS = {RECORDS: "metadata/fedcomet_flow.json", STORE: "manifest.json"}
_LOCK = ".lock"


@contextmanager
def output(out: Path, source: str) -> Iterator[None]:
    """Make the folder `out` and hold it for one run; a folder that is still empty afterwards is removed again.

    Args:
        out: The folder.
        source: Where the records are; a path or a URL.

    Raises:
        ConfigError: It isn't a folder, another run writes to it, or something in it would be lost.
        OSError: It can't be made or written to.
    """
    _refuse_loss(out, source)
    out.mkdir(parents=True, exist_ok=True)
    with (out / _LOCK).open("wb") as lock:
        try:
            # The system takes it back from a process that dies.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{out}: another run is writing to it. Wait until that has ended, or choose another --out."
            ) from None
        try:
            yield
        finally:
            (out / _LOCK).unlink(missing_ok=True)
            with suppress(OSError):
                out.rmdir()


def _refuse_loss(out: Path, source: str) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file. Choose a folder as --out; it is made if it doesn't exist.")
    read = None if "://" in source else Path(source).resolve()
    for name, mark in _MARKS.items():
        folder = out / name
        if read is not None and read.is_relative_to(folder.resolve()):
            raise ConfigError(f"{folder} would be replaced, but the records are read from there. Choose another --out.")
        if folder.is_dir() and not (folder / mark).is_file() and any(folder.iterdir()):
            raise ConfigError(
                f"{folder} would be replaced, but wasn't written by fedcomet (it has no {mark})."
                " Choose another --out, or move it away."
            )
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder}: is a file, where a folder is to be written. Choose another --out.")
