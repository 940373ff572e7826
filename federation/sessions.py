"""Who has signed in to one of the house's pages, and who tried too often; no sockets and no cookies here.

A browser holds 32 random bytes, the visitor's mark; only their sha256 is kept, in memory, so that a restart signs
everybody out. Signing in gives a new mark. A form's token is an HMAC of the mark: a page elsewhere knows neither.
"""

import hashlib
import hmac
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

IDLE_S = 2 * 3600.0
"""A session ends so long after the last thing that a person did."""

LONGEST_S = 12 * 3600.0
"""A session ends so long after it began."""

_MOST = 1000
_WRONG, _WINDOW_S, _MOST_ADDRESSES = 5, 600.0, 4096


@dataclass(frozen=True)
class Person:
    """Who signs in: a name, a role, and a stamp of the secret that was right; another secret has another stamp."""

    name: str
    role: str
    stamp: str = ""


@dataclass
class _Session:
    person: Person
    began: float
    used: float


class Sessions:
    """The sessions of one page."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._key, self._lock = clock, secrets.token_bytes(32), threading.Lock()
        self._open: OrderedDict[str, _Session] = OrderedDict()

    def begin(self, person: Person) -> str:
        """Open a session and give its mark; of too many, the oldest end."""
        mark, now = secrets.token_urlsafe(32), self._clock()
        with self._lock:
            self._open[_digest(mark)] = _Session(person, now, now)
            while len(self._open) > _MOST:
                self._open.popitem(last=False)
        return mark

    def find(self, mark: str, *, by_hand: bool = True) -> Person | None:
        """Give who has this mark, if the session still holds.

        Args:
            mark: from a cookie.
            by_hand: a person did something, rather than a page that keeps itself up to date.
        """
        now = self._clock()
        with self._lock:
            session = self._open.get(_digest(mark))
            if session is None:
                return None
            if now - session.began >= LONGEST_S or now - session.used >= IDLE_S:
                del self._open[_digest(mark)]
                return None
            if by_hand:
                session.used = now
            return session.person

    def end(self, mark: str) -> None:
        """Close a session, if there is one."""
        with self._lock:
            self._open.pop(_digest(mark), None)

    def form_token(self, mark: str) -> str:
        """Give what forms carry that are shown to whoever has this mark, signed in or not."""
        return hmac.new(self._key, mark.encode(), hashlib.sha256).hexdigest()

    def is_form_token(self, mark: str, token: str) -> bool:
        """Tell whether a form was shown to whoever has this mark."""
        return hmac.compare_digest(self.form_token(mark).encode(), token.encode())


class Throttle:
    """Counts wrong secrets: after five from one address within ten minutes, none is looked at for a while."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """Give how many seconds an address has to wait; 0 if it may try."""
        with self._lock:
            recent = self._recent(address)
            return _WINDOW_S - (self._clock() - recent[-_WRONG]) if len(recent) >= _WRONG else 0.0

    def count(self, address: str) -> bool:
        """Count a try before the secret is looked at, so that many at once are as many; tell if it was the last."""
        with self._lock:
            tries = [*self._recent(address), self._clock()]
            self._wrong.pop(address, None)
            self._wrong[address] = tries
            while len(self._wrong) > _MOST_ADDRESSES:
                self._wrong.popitem(last=False)
            return len(tries) == _WRONG

    def forget(self, address: str) -> None:
        """Forget an address: its secret was right."""
        with self._lock:
            self._wrong.pop(address, None)

    def _recent(self, address: str) -> list[float]:
        now = self._clock()
        return [at for at in self._wrong.get(address, []) if now - at < _WINDOW_S]


def _digest(mark: str) -> str:
    return hashlib.sha256(mark.encode()).hexdigest()
