"""Checkpoints that leave the dashboard: the file as it is, or as a zip of a Hugging Face folder.

No path comes from a visitor: a run and a round lead to the ledger's entry, and what that names must lie in the run's
own folder.
"""

import shutil
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from federation.messages import is_site_name
from federation.website import Missing
from server.ledger import Ledger

_PIECE = 1 << 20
_one_at_a_time = threading.Lock()


def checkpoint_file(ledger: Ledger, runs: Path, run: str, number: int) -> Path:
    """Give the file of a run's checkpoint after a round.

    Raises:
        LedgerRefusal: there is no such run.
        Missing: it has no checkpoint of this round, or its file was swept.
    """
    entry = next((each for each in ledger.checkpoints(run) if each.round == number), None)
    if entry is None or not is_site_name(run):
        raise Missing(f"Run {run} has no checkpoint of round {number}.")
    folder = (runs / run).resolve()
    path = (folder / entry.path).resolve()
    if not path.is_relative_to(folder) or not path.is_file():
        raise Missing(f"The file of round {number} was swept; the first, the best and the last ones are kept.")
    return path


def is_there(runs: Path, run: str, path: str) -> bool:
    """Tell whether the file of a checkpoint is still there."""
    return is_site_name(run) and (runs / run / path).is_file()


def exported(path: Path, codebook: Path, room: Path) -> IO[bytes]:
    """Give an open zip of the Hugging Face folder of a checkpoint; the file is gone once that is closed.

    Args:
        path: the checkpoint's file.
        codebook: goes with it, if it is there.
        room: a folder with room for the model twice.

    Raises:
        DataError: the checkpoint or codebook is damaged.
    """
    from model.checkpoint import load
    from model.interchange import export_folder
    from tokenizer.codebook import Codebook

    with _one_at_a_time, tempfile.TemporaryDirectory(prefix="export-", dir=room) as aside:
        folder = Path(aside) / path.stem
        export_folder(load(path), folder, Codebook.load(codebook) if codebook.exists() else None)
        file = tempfile.TemporaryFile(dir=room)  # noqa: SIM115  (whoever sends it closes it)
        try:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as packed:
                for each in sorted(folder.iterdir()):
                    packed.write(each, f"{folder.name}/{each.name}")
        except BaseException:
            file.close()
            raise
    return file


def pieces(file: IO[bytes]) -> Iterator[bytes]:
    """Give what is in a file, and close it."""
    with file:
        file.seek(0)
        while piece := file.read(_PIECE):
            yield piece


def sweep(room: Path) -> None:
    """Remove what an export left behind that was killed."""
    for left in room.glob("export-*"):
        shutil.rmtree(left, ignore_errors=True)
