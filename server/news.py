"""Lets those who ask for messages wait until there are some, so that they ask seldom and hear at once.

Flower's nodes, and the process that leads a run, ask again and again, and every question costs the SuperLink some ten
milliseconds of its one processor. Here a question of somebody who has asked since the last message came is held back
until the next one comes, or for seconds.
"""

import asyncio
from collections.abc import Hashable

HOLD_S = 2.0
_SETTLE_S = 0.1
_MOST = 4096


class News:
    """Of messages for some kind of asker. All methods but `tell_from_thread` are called in one event loop."""

    def __init__(self) -> None:
        self._came, self._settling = 0, False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._seen: dict[Hashable, int] = {}
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self, who: Hashable = None) -> None:
        """Note that a message, or the rest of one, has come; whoever waits asks when what follows it has come, too."""
        if not self._settling:
            self._settling = True
            asyncio.get_running_loop().call_later(_SETTLE_S, self._wake)

    def tell_from_thread(self) -> None:
        """Do the same from any thread."""
        if self._loop is not None:  # else nobody has ever asked
            self._loop.call_soon_threadsafe(self.tell)

    def _wake(self) -> None:
        self._came, self._settling = self._came + 1, False
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def hold(self, who: Hashable) -> None:
        """Wait until something has come since `who` was last let through, but not for long."""
        self._loop = asyncio.get_running_loop()
        if self._seen.pop(who, None) == self._came:
            waiting = self._loop.create_future()
            self._waiting.add(waiting)
            try:
                async with asyncio.timeout(HOLD_S):
                    await waiting
            except TimeoutError:
                pass
            finally:
                self._waiting.discard(waiting)
        self._seen[who] = self._came
        if len(self._seen) > _MOST:
            del self._seen[next(iter(self._seen))]
