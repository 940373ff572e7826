"""A run into a folder, killed before each of its changes of the disk; and what finishes it, killed likewise.

    python -m tests.tokenizer.killed_output FOLDER WHAT

Prints, for each moment at which the run was killed, whose output was found: a list with a word for each moment at which
what finishes it was killed, too. Light on imports, as it forks for each of them.
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tokenizer.output import output, settle

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
_left: list[int] = []


def write(folder: Path, what: str) -> None:
    """Write a run's output, by which one can tell whose it is; "meds" has no records."""
    for name, mark in (("records", "metadata/fedcomet_flow.json"), ("store", "manifest.json")):
        if what != "meds" or name == "store":
            (folder / name / mark).parent.mkdir(parents=True)
            (folder / name / mark).write_text(what)
    (folder / "codebook.json").write_text(what)


def found(folder: Path) -> list[str]:
    """Whose output is in a folder, as a word for each that is there; what is still being built isn't."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != ".lock"]
    return sorted({file.read_text() for file in files if ".building" not in file.parts})


def _count(event: str, _: object) -> None:
    if _left and event in _CHANGES:
        _left[0] -= 1
        if _left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _is_killed(act: Callable[[], object], step: int) -> bool:
    """Let a child act, and kill it before its change of this number; whether it came so far."""
    child = os.fork()
    if not child:
        _left.append(step)
        act()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _run(folder: Path, what: str) -> None:
    with output(folder, None) as aside:
        write(aside, what)


def _main(root: Path, what: str) -> None:
    sys.addaudithook(_count)
    states: list[list[list[str]]] = []
    going = True
    while going:
        folder, copy = root / str(len(states)), root / "copy"
        folder.mkdir()
        write(folder, "old")
        going = _is_killed(lambda folder=folder: _run(folder, what), len(states))
        seen: list[list[str]] = []
        again = True
        while again:
            shutil.copytree(folder, copy)
            again = _is_killed(lambda copy=copy: settle(copy), len(seen))
            settle(copy)
            seen.append(found(copy))
            shutil.rmtree(copy)
        states.append(seen)
    print(json.dumps(states))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2])
