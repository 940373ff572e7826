"""Keeps runs going: every run that should run has one process that leads it, started again when it died.

The ledger says what should be; Flower says what is. A process that failed for good has written so into the ledger
(`server.app`); one that merely died left its run "running", and another takes it up at the first uncommitted round. If
that happens again and again without a round in between, the run has failed, with what Flower knows as its reason.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from server.flower_link import FlowerRun
from server.ledger_entries import RunEntry
from server.tables import RunState

_WAITS_S = (0.0, 2.0, 5.0, 10.0, 20.0, 30.0)
_MOST_STARTS = 6
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


class Keeper:
    """See the top of this module."""

    def __init__(
        self,
        ledger: Runs,
        control: Launcher,
        committed: Callable[[str], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up.

        Args:
            ledger, control: what should be, and what is.
            committed: gives the number of a run's last committed round.
            clock: gives seconds.
        """
        self._ledger, self._control, self._committed, self._clock = ledger, control, committed, clock
        self._attempts: dict[str, _Attempts] = {}

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
        flower = self._control.runs()
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
                continue
            last = next((one.details for one in flower if one.run == run.name), "")
            self._restart(run, bundle_sha256, last)

    def _restart(self, run: RunEntry, bundle_sha256: str, last: str) -> None:
        if run.state in _WISHES:
            self._ledger.abandon(run.name, "as was wished; the process that led it had ended")
            return
        committed, now = self._committed(run.name), self._clock()
        known = self._attempts.get(run.name)
        if known is None or known.committed < committed:
            known = self._attempts[run.name] = _Attempts(committed)
        if now < known.next_at:
            return
        if known.starts >= _MOST_STARTS:
            reason = f"its process ended {known.starts} times without a round in between; last: {last or 'no word'}"
            _log.error("run %s has failed: %s", run.name, reason)
            self._ledger.abandon(run.name, reason)
            return
        number = self._control.start(run.name, bundle_sha256)
        self._ledger.note_flower_run(run.name, str(number))
        known.next_at = now + _WAITS_S[min(known.starts + 1, len(_WAITS_S) - 1)]
        known.starts += 1
        how = "begins" if known.starts == 1 else f"is taken up again (process {known.starts} since its last round)"
        _log.info("run %s %s", run.name, how)
