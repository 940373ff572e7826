"""Lets sites that ask for messages wait until there are some, so that they ask seldom and hear at once.

Flower's nodes ask again and again, and every question costs the SuperLink some milliseconds of its one processor. Here
a question of a node that has asked since the last message came is held back until the next one comes, or for seconds.
"""

import asyncio
from collections.abc import Hashable

HOLD_S = 2.0
_SETTLE_S = 0.1


class News:
    """Of messages for sites. All methods are called in one event loop."""

    def __init__(self) -> None:
        self._came = 0
        self._seen: dict[Hashable, int] = {}
        self._waiting: set[asyncio.Future[None]] = set()

    def tell(self, who: Hashable = None) -> None:
        """Note that a message, or the rest of one, has come; whoever waits asks when what follows it has come, too."""
        asyncio.get_running_loop().call_later(_SETTLE_S, self._wake)

    def _wake(self) -> None:
        self._came += 1
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    async def hold(self, who: Hashable) -> None:
        """Wait until something has come since `who` was last let through, but not for long."""
        if self._seen.get(who) == self._came:
            waiting = asyncio.get_running_loop().create_future()
            self._waiting.add(waiting)
            try:
                async with asyncio.timeout(HOLD_S):
                    await waiting
            except TimeoutError:
                pass
            finally:
                self._waiting.discard(waiting)
        self._seen[who] = self._came
