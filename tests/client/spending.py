"""A site that spends its budget and is killed at any of its steps, in a process of its own.

Steps are all SQL statements (before and after), every commit, and what the site does between them. What would leave the
site is appended to a file, and so is every draw of noise.
"""

import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Engine, event

from client.budget import Budget, Limit, Release, State
from federation.accountant import Gaussian, Mechanisms
from tokenizer.noise import Noise

LIMIT = Limit(3.0, 1e-6)
PLANNED = Release("a" * 64, 3, "training", Mechanisms((Gaussian(4.0, steps=4),)), "request")
RAN = replace(PLANNED, mechanisms=Mechanisms((Gaussian(4.0, steps=3),)))


class Place(NamedTuple):
    """A site's files, and what the world has seen of it."""

    ledger: Path
    draws: Path
    outbox: Path

    @classmethod
    def below(cls, root: Path) -> "Place":
        return cls(root / "budget.sqlite", root / "draws", root / "outbox")


def work(place: Place, step: Callable[[str], None]) -> None:
    """Answer a round, as a site does."""
    with Budget.open(place.ledger, LIMIT) as budget:
        charge = budget.reserve(PLANNED)
        step("reserved")
        if charge.state == State.RESERVED:
            answer = _draw(place, charge.key)
            step("drawn")
            charge = budget.charge(RAN, answer)
            step("charged")
        _append(place.outbox, charge.answer or b"")
        step("sent")
        budget.released(PLANNED)


def work_in_the_wrong_order(place: Place, step: Callable[[str], None]) -> None:
    """The negative control: answer first, and charge later, with noise that nobody has written down."""
    with Budget.open(place.ledger, LIMIT) as budget:
        budget.reserve(PLANNED)
        answer = _draw(place, os.urandom(32))
        _append(place.outbox, answer)
        step("sent")
        budget.charge(RAN, answer)
        budget.released(PLANNED)


def killed_at(place: Place, nth: int, how: Callable[[Place, Callable[[str], None]], None] = work) -> bool:
    """Work in a child process that kills itself at its nth step; true if it came so far."""
    child = os.fork()
    if child == 0:
        try:
            _work_until(place, nth, how)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the site failed; see above"
    return False


def _work_until(place: Place, nth: int, how: Callable[[Place, Callable[[str], None]], None]) -> None:
    seen = 0

    def step(*_: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == nth:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in ("before_cursor_execute", "after_cursor_execute", "begin", "commit"):
        event.listen(Engine, name, step)
    how(place, step)


def _draw(place: Place, key: bytes) -> bytes:
    answer = str([Noise(key).below(10**9) for _ in range(3)]).encode()
    _append(place.draws, answer)
    return answer


def _append(path: Path, line: bytes) -> None:
    with path.open("ab") as file:
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())


def lines(path: Path) -> list[bytes]:
    """What was appended."""
    return path.read_bytes().splitlines() if path.exists() else []
