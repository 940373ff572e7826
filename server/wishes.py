"""Wishes that a run pauses or stops, as the ledger has them, and when whoever leads the run looks for them.

A pause comes true between rounds; a stop also while answers are awaited, which is as harmless as a crash there: what
was accepted stays, and the run goes on with it.
"""

import time
from collections.abc import Callable

from server.journal import Journal
from server.tables import RunState
from tokenizer.errors import FedcometError

_EVERY_S = 1.0  # a look at the ledger between answers


class RunHalted(FedcometError):
    """The run was paused or stopped as somebody wished; resumed, it goes on at the first uncommitted round."""

    def __init__(self, state: RunState, committed: int) -> None:
        super().__init__(
            f"The run is {state} after round {committed}, as was asked for. Resumed, it goes on with the next round."
        )
        self.state = state


class Wishes:
    """Looks for wishes of one run."""

    def __init__(self, journal: Journal, pause: Callable[[float], None]) -> None:
        self._journal, self._pause = journal, pause
        self._looked = 0.0

    def between_rounds(self) -> None:
        """Halt if that was wished, or if the run was to stay halted.

        Raises:
            RunHalted: it was.
        """
        state = self._journal.state()
        if state in (RunState.PAUSING, RunState.PAUSED):
            raise RunHalted(RunState.PAUSED, self._journal.committed())
        if state in (RunState.STOPPING, RunState.STOPPED):
            raise RunHalted(RunState.STOPPED, self._journal.committed())

    def between_answers(self) -> None:
        """Stop if that was wished.

        Raises:
            RunHalted: it was.
        """
        if time.monotonic() - self._looked < _EVERY_S:
            return
        self._looked = time.monotonic()
        if self._journal.state() is RunState.STOPPING:
            raise RunHalted(RunState.STOPPED, self._journal.committed())

    def pause(self, seconds: float) -> None:
        """Wait for answers, and stop if that was wished."""
        self._pause(seconds)
        self.between_answers()
