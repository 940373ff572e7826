"""Claims about the front: what passes is exactly what is named, from whom is known, whole and in time."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from federation.front import Door, Front, Headers

PATH = "/v1/fleet/pull-messages"


class Inside:
    """The application behind; it notes the bodies that reach it."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        assert message["more_body"] is False
        self.bodies.append(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"inside"})


def admit(headers: Headers) -> str | None:
    return "site" if headers.get("who") == ("site",) else None


async def ask(
    front: Front,
    path: str = PATH,
    method: str = "POST",
    parts: tuple[bytes, ...] = (b"body",),
    raw: bytes | None = None,
    headers: tuple[tuple[str, str], ...] = (("who", "site"), ("content-length", "4")),
    **more: Any,
) -> int:
    scope: MutableMapping[str, Any] = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode() if raw is None else raw,
        "query_string": b"",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in headers],
        "client": ("10.0.0.1", 1),
        **more,
    }
    left = [
        {"type": "http.request", "body": part, "more_body": number + 1 < len(parts)}
        for number, part in enumerate(parts)
    ]
    status: list[int] = []

    async def receive() -> MutableMapping[str, Any]:
        if left:
            return left.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    await front(scope, receive, send)
    (only,) = status
    return only


def front(inside: Inside, **options: Any) -> Front:
    return Front(inside, {PATH: Door(admit, lambda who, body: body != b"evil")}, threads=1, **options)


def test_what_is_named_passes_with_its_whole_body() -> None:
    inside = Inside()
    assert asyncio.run(ask(front(inside), parts=(b"bo", b"d", b"", b"y"))) == 200
    assert inside.bodies == [b"body"]


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        PATH + "/",
        "/" + PATH,
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/./pull-messages",
        "/V1/fleet/pull-messages",
        PATH + "\x00",
        PATH + " ",
        PATH + ";x",
    ],
)
def test_no_other_path_reaches_what_is_inside(path: str) -> None:
    inside = Inside()
    assert asyncio.run(ask(front(inside), path=path)) == 404
    assert not inside.bodies


@given(
    method=st.sampled_from(["GET", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "CONNECT", "TRACE", "post", "PRI"]),
)
def test_no_other_method_passes(method: str) -> None:
    inside = Inside()
    assert asyncio.run(ask(front(inside), method=method)) == 404
    assert not inside.bodies


@given(at=st.integers(0, len(PATH) - 1))
def test_another_spelling_of_the_path_is_another_path(at: int) -> None:
    """Servers decode the path for applications; Flower would take what the front would not."""
    inside = Inside()
    spelled = PATH[:at] + f"%{ord(PATH[at]):02x}" + PATH[at + 1 :]
    assert asyncio.run(ask(front(inside), raw=spelled.encode())) == 404
    assert asyncio.run(ask(front(inside), path="/v1/control/start-run", raw=PATH.encode())) == 404
    assert not inside.bodies


def test_queries_prefixes_and_websockets_do_not_pass() -> None:
    inside = Inside()
    assert asyncio.run(ask(front(inside), query_string=b"x=1")) == 404
    assert asyncio.run(ask(front(inside), root_path="/v1")) == 404
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    asyncio.run(front(inside)({"type": "websocket", "path": PATH}, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert not inside.bodies


def test_a_stranger_is_refused_before_a_byte_of_the_body_is_read() -> None:
    inside = Inside()
    for headers in (
        (("content-length", "4"),),
        (("who", "somebody"), ("content-length", "4")),
        (("who", "site"), ("who", "site"), ("content-length", "4")),
    ):
        assert asyncio.run(ask(front(inside), headers=headers, parts=())) == 401
    assert not inside.bodies


def test_bodies_are_bounded_by_what_they_claim_and_by_what_comes() -> None:
    inside = Inside()
    small = front(inside, most_bytes=8)

    def status(length: str | None, *parts: bytes, **more: str) -> int:
        given_ = (("who", "site"), *(() if length is None else (("content-length", length),)), *more.items())
        return asyncio.run(ask(small, headers=given_, parts=parts))

    assert status("9", b"") == 413
    assert status("9" * 400, b"") == 413
    assert status("-1", b"") == 400
    assert status("4_0", b"") == 400
    assert status("٤", b"") == 400
    assert status(None, b"") == 411
    assert status(None, b"12345", b"6789", **{"transfer-encoding": "chunked"}) == 413
    assert not inside.bodies
    assert status(None, b"1234", b"5678", **{"transfer-encoding": "chunked"}) == 200


def test_a_body_that_never_ends_is_given_up() -> None:
    inside = Inside()
    headers = (("who", "site"), ("content-length", "4"))
    assert asyncio.run(ask(front(inside, body_s=0.05), headers=headers, parts=())) == 408
    assert not inside.bodies


def test_a_body_must_suit_its_sender() -> None:
    inside = Inside()
    assert asyncio.run(ask(front(inside), parts=(b"evil",))) == 403
    assert not inside.bodies


def test_health_is_for_everybody_and_tells_nothing() -> None:
    inside = Inside()
    assert asyncio.run(ask(front(inside), path="/health", method="GET", headers=(), parts=())) == 200
    assert asyncio.run(ask(front(inside), path="/health", method="POST", headers=(), parts=())) == 404
    assert not inside.bodies


def test_refusals_are_logged_but_cannot_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    one = front(Inside())

    async def many() -> None:
        for _ in range(100):
            await ask(one, path="/docs")

    asyncio.run(many())
    assert len(caplog.records) == 20
    assert "refused (404) POST '/docs' from 10.0.0.1" in caplog.records[0].getMessage()
