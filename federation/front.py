"""The front of an HTTP service: named paths, asked by somebody who is known, with bodies of bounded size; nothing else.

An ASGI application around another one. A request passes if it is a POST to exactly one of the paths (the bytes on the
wire: no other spelling, no query), its headers are admitted *before* a byte of its body is read, and its body arrives
whole, in time, within the bound, and suits whoever sent it. Everything else is answered here: 404 to what is no path,
without a word on what there is; 401 to strangers; 408, 411 and 413 to bodies; 503 when
the disk inside is full, or its database busy. `/health` tells that the process lives.
"""

import asyncio
import logging
import sqlite3
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Hashable, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException  # the one that Flower passes on
from starlette.applications import Starlette
from starlette.middleware import Middleware

from tokenizer import durable

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Mapping[str, tuple[str, ...]]
"""Names in small letters, and all values of each."""

_HEALTH = b"/health"
_TOLD_PER_MINUTE = 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Door:
    """Who may ask one path, and what.

    Attributes:
        admit: gives whoever the headers prove, or None; called in a thread.
        suits: tells whether a body may come from whom `admit` gave; called in a thread.
        answer: gives media type and body of an answer that needs nothing of the application's own way, which costs
            several copies of every body; None if the application is to answer. Called in a thread.
        hold: waits before the application is asked with a body.
        told: is called when the application has answered.
    """

    admit: Callable[[Headers], Hashable | None]
    suits: Callable[[Any, bytes], bool] = lambda who, body: True
    answer: Callable[[Any, bytes], tuple[bytes, bytes] | None] | None = None
    hold: Callable[[Any, bytes], Awaitable[None]] | None = None
    told: Callable[[Any], None] | None = None


def telling_to_come_again(application: Starlette) -> Starlette:
    """Let one of Flower's applications answer 503, after which the same is asked again, to what may work later.

    That is where the disk is full, or SQLite's database locked for longer than it is waited for. Flower turns every
    other error into 500, which ends whoever asked, or its heartbeat; this one comes inside of that.
    """
    application.user_middleware.append(Middleware(_Later))
    return application


class _Later:
    def __init__(self, app: Application) -> None:
        self._inside = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._inside(scope, receive, send)
        except Exception as problem:
            if _may_pass(problem):
                raise HTTPException(503) from problem
            raise


def _may_pass(problem: Exception) -> bool:
    if durable.out_of_room(problem):
        return True
    cause: BaseException | None = problem
    while cause is not None and getattr(cause, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
        cause = cause.__cause__ or cause.__context__
    return cause is not None


class _Refused(Exception):
    def __init__(self, status: int) -> None:
        self.status = status


class Front:
    """See the top of this module."""

    def __init__(
        self,
        inside: Application,
        doors: Mapping[str, Door],
        *,
        most_bytes: int = 16 << 20,
        body_s: float = 120.0,
        at_once: int = 8,
        threads: int = 16,
    ) -> None:
        """Stand before an application.

        Args:
            inside: the application.
            doors: the paths that pass, and who may.
            most_bytes: bound of a body.
            body_s: how long it may take to arrive.
            at_once: requests of one visitor that are worked on at a time; more of them wait.
            threads: how many headers and bodies are looked at side by side.
        """
        self._inside, self._most_bytes, self._body_s = inside, most_bytes, body_s
        self._doors = {path.encode("ascii"): door for path, door in doors.items()}
        self._turns: defaultdict[Hashable, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(at_once))
        self._threads = ThreadPoolExecutor(threads, "front")
        self._told, self._since = 0, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI connection."""
        if scope["type"] == "lifespan":
            await self._inside(scope, receive, send)
        elif scope["type"] == "http":
            try:
                await self._http(scope, receive, send)
            except _Refused as refused:
                self._tell(scope, refused.status)
                await _answer(send, refused.status)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw = scope.get("raw_path") or b""
        if raw == _HEALTH and scope["method"] in ("GET", "HEAD") and not scope["query_string"]:
            await _answer(send, 200)
            return
        door = self._doors.get(raw)
        plain = scope["path"].encode("utf-8", "surrogatepass") == raw and not scope.get("root_path")
        if door is None or scope["method"] != "POST" or scope["query_string"] or not plain:
            raise _Refused(404)
        headers: defaultdict[str, tuple[str, ...]] = defaultdict(tuple)
        for name, value in scope["headers"]:
            headers[name.decode("latin-1").lower()] += (value.decode("latin-1"),)
        self._check_length(headers)
        loop = asyncio.get_running_loop()
        who = await loop.run_in_executor(self._threads, door.admit, headers)
        if who is None:
            raise _Refused(401)
        async with self._turns[who]:
            body = await self._body(receive)
            if not await loop.run_in_executor(self._threads, door.suits, who, body):
                raise _Refused(403)
            if door.answer is not None:
                made = await self._made(door.answer, who, body)
                if made is not None:
                    await _answer(send, 200, *made)
                    return
            if door.hold is not None:
                await door.hold(who, body)
            await self._inside(scope, _again(body, receive), send)
            if door.told is not None:
                door.told(who)

    async def _made(
        self, answer: Callable[[Any, bytes], tuple[bytes, bytes] | None], who: Any, body: bytes
    ) -> tuple[bytes, bytes] | None:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, answer, who, body)
        except Exception as problem:
            if _may_pass(problem):
                raise _Refused(503) from problem
            raise

    def _check_length(self, headers: Headers) -> None:
        lengths = headers.get("content-length", ())
        if lengths and not (len(lengths) == 1 and lengths[0].isascii() and lengths[0].isdigit()):
            raise _Refused(400)
        if lengths and (len(lengths[0]) > 15 or int(lengths[0]) > self._most_bytes):
            raise _Refused(413)
        if not lengths and "transfer-encoding" not in headers:
            raise _Refused(411)

    async def _body(self, receive: Receive) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise _Refused(400)
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._most_bytes:
                        raise _Refused(413)
        except TimeoutError:
            raise _Refused(408) from None
        return bytes(body)

    def _tell(self, scope: Scope, status: int) -> None:
        """Note who was refused what; not more often than a log can bear."""
        now = time.monotonic()
        if now - self._since > 60:
            if self._told > _TOLD_PER_MINUTE:
                _log.warning("refused %d more requests within a minute", self._told - _TOLD_PER_MINUTE)
            self._told, self._since = 0, now
        self._told += 1
        if self._told <= _TOLD_PER_MINUTE:
            client = (scope.get("client") or ("?",))[0]
            _log.warning("refused (%d) %s %.120r from %s", status, scope["method"], scope["path"], client)


def _again(body: bytes, receive: Receive) -> Receive:
    """Give a body that was read, and afterwards whatever comes."""
    left = [body]

    async def give() -> MutableMapping[str, Any]:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return give


async def _answer(send: Send, status: int, media: bytes = b"", body: bytes = b"") -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    if status != 200:  # a body that nobody reads may still be on its way, so the connection ends with the answer
        headers.append((b"connection", b"close"))
    if media:
        headers.append((b"content-type", media))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
