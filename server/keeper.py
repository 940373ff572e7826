"""Keeps runs going: every run that should run has one process that leads it, started again when it died.

The ledger says what should be; Flower says what is. A process that failed for good has written so into the ledger
(`server.app`); one that merely died left its run "running", and another takes it up at the first uncommitted round. If
that happens again and again without a round in between, the run has failed, with what Flower knows as its reason.

One that ended for want of room has not failed. It is taken up again when the disk has more room than at its end, and
now and then, as not every quota shows in what is free; `trouble` says so until its next round is done.
"""

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from server.flower_link import FlowerRun
from server.ledger_entries import RunEntry
from server.tables import RunState
from tokenizer import durable

_WAITS_S = (0.0, 2.0, 5.0, 10.0, 20.0, 30.0)
_MOST_STARTS = 6
_NO_ROOM_S = 30.0, 600.0  # after the first end for want of room since a round: there may be room by now; and later
_LAST_WORDS = f"ServerApp failed with exception: {durable.OUT_OF_ROOM}"  # as Flower puts them
_WISHES = (RunState.PAUSING, RunState.STOPPING)
_GOING = (RunState.READY, RunState.RUNNING, *_WISHES)

_log = logging.getLogger(__name__)


class Runs(Protocol):
    """What is needed of `server.ledger.Ledger`."""

    def runs(self) -> list[RunEntry]: ...  # noqa: D102
    def note_flower_run(self, run: str, flower_run: str) -> None: ...  # noqa: D102
    def abandon(self, run: str, reason: str) -> RunEntry: ...  # noqa: D102


class Launcher(Protocol):
    """What is needed of `server.flower_link.Control`."""

    def runs(self) -> list[FlowerRun]: ...  # noqa: D102
    def start(self, run: str, bundle_sha256: str) -> int: ...  # noqa: D102
    def stop(self, number: int) -> None: ...  # noqa: D102


@dataclass
class _Attempts:
    committed: int
    starts: int = 0
    next_at: float = 0.0
    number: int = 0  # Flower's, of the process that was started last
    no_room: str = ""  # what was to be written when a process ended for want of room
    free: int = 0  # how much there was when that was seen
    lacks: int = 0  # how often that was so
    until: float = 0.0  # when another is started though there is no more


class Keeper:
    """See the top of this module."""

    def __init__(
        self,
        ledger: Runs,
        control: Launcher,
        committed: Callable[[str], int],
        folder: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up.

        Args:
            ledger, control: what should be, and what is.
            committed: gives the number of a run's last committed round.
            folder: of all runs' folders.
            clock: gives seconds.
        """
        self._ledger, self._control, self._committed, self._clock = ledger, control, committed, clock
        self._folder = folder
        self._attempts: dict[str, _Attempts] = {}
        self.trouble = ""
        """Which run has too little room, and what to do; empty if none has."""

    def begin(self) -> None:
        """End what Flower still takes for going: the processes of an earlier coordinator ended with it.

        Raises:
            LinkError: the SuperLink can't be reached.
        """
        for run in self._control.runs():
            if run.going:
                self._control.stop(run.number)

    def look(self, bundle_sha256: str) -> None:
        """Start what should run and doesn't, and end what runs twice.

        Raises:
            LinkError: the SuperLink can't be reached.
        """
        flower, trouble = self._control.runs(), list[str]()
        for run in self._ledger.runs():
            if run.state not in _GOING:
                self._attempts.pop(run.name, None)
                continue
            going = [one for one in flower if one.run == run.name and one.going]
            for surplus in going[1:]:
                self._control.stop(surplus.number)
            if going:
                if run.flower_run != str(going[0].number):  # started just before a crash
                    self._ledger.note_flower_run(run.name, str(going[0].number))
                trouble.append(self._wanting(run.name))
                continue
            last = next((one for one in flower if one.run == run.name), None)
            self._restart(run, bundle_sha256, last)
            trouble.append(self._wanting(run.name))
        self.trouble = next(filter(None, trouble), "")

    def _known(self, run: str) -> _Attempts:
        """What was tried since the run's last committed round."""
        committed, known = self._committed(run), self._attempts.get(run)
        if known is None or known.committed < committed:
            known = self._attempts[run] = _Attempts(committed, number=known.number if known else 0)
        return known

    def _free(self, run: str) -> int:
        return durable.free_bytes(self._folder / run / "checkpoints")

    def _needs(self, run: str, free: int) -> int:
        """Give the bytes of the run's next checkpoint, as far as the last one tells, if fewer are free; else 0."""
        sizes = dict[int, int]()
        for path in (self._folder / run / "checkpoints").glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):
                sizes[int(path.stem)] = path.stat().st_size
        newest = max(sizes, default=0)
        # One that is not committed yet is to be committed only, which drops an older one.
        return 0 if not newest or free >= sizes[newest] or self._committed(run) < newest else sizes[newest]

    def _wanting(self, run: str) -> str:
        """Say what a run has too little room for, and what to do."""
        free, known = self._free(run), self._attempts.get(run)
        if needs := self._needs(run, free):
            return (
                f"run {run} needs {needs:,} bytes for its next checkpoint, and the disk of {self._folder / run} has "
                f"{free:,}; make room, and all goes on by itself"
            )
        if known is None or not known.no_room or not self._known(run).no_room:
            return ""
        return (
            f"run {run} had too little room ({known.no_room}), and {free:,} bytes are free now; make room, and all "
            "goes on by itself: this is told until the run's next round is done"
        )

    def _waits_for_room(self, run: str, known: _Attempts, ended: FlowerRun | None) -> bool:
        """Tell whether another process would only end for want of room again."""
        free, now = self._free(run), self._clock()
        if ended is not None and ended.number == known.number and ended.details.startswith(_LAST_WORDS):
            known.no_room, known.free, known.number = ended.details.removeprefix(_LAST_WORDS), free, 0
            known.starts, known.until = max(known.starts - 1, 0), now + _NO_ROOM_S[min(known.lacks, 1)]
            known.lacks += 1
            _log.warning("run %s ended for want of room: %s", run, known.no_room)
        if not self._needs(run, free) and (not known.no_room or free >= known.free + durable.LEAST_FREE):
            return False
        if not known.until:
            known.until = now + _NO_ROOM_S[-1]
            _log.warning("%s", self._wanting(run))
        return now < known.until

    def _restart(self, run: RunEntry, bundle_sha256: str, ended: FlowerRun | None) -> None:
        if run.state in _WISHES:
            self._ledger.abandon(run.name, "as was wished; the process that led it had ended")
            return
        known, now = self._known(run.name), self._clock()
        if self._waits_for_room(run.name, known, ended) or now < known.next_at:
            return
        if known.starts >= _MOST_STARTS:
            last = ended.details if ended else ""
            reason = f"its process ended {known.starts} times without a round in between; last: {last or 'no word'}"
            _log.error("run %s has failed: %s", run.name, reason)
            self._ledger.abandon(run.name, reason)
            return
        number = self._control.start(run.name, bundle_sha256)
        self._ledger.note_flower_run(run.name, str(number))
        known.number, known.until = number, 0.0
        known.next_at = now + _WAITS_S[min(known.starts + 1, len(_WAITS_S) - 1)]
        known.starts += 1
        how = "begins" if known.starts == 1 else f"is taken up again (process {known.starts} since its last round)"
        _log.info("run %s %s", run.name, how)
