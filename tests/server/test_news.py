"""A node that has asked waits for news, and nobody else waits."""

import asyncio

from server import news
from server.news import News


def test_who_has_asked_waits_until_something_comes() -> None:
    async def lead() -> list[str]:
        came, said = News(), list[str]()

        async def ask(who: str) -> None:
            await came.hold(who)
            said.append(who)

        await ask("a")  # nobody has asked before
        again = asyncio.create_task(ask("a"))
        await asyncio.sleep(0.05)
        await ask("b")
        assert not again.done()
        came.tell()
        await asyncio.wait_for(again, 5)
        await ask("b")  # something has come since it asked
        return said

    assert asyncio.run(lead()) == ["a", "b", "a", "b"]


def test_it_may_be_told_from_a_thread_and_many_words_wake_once() -> None:
    async def lead() -> int:
        came = News()
        await asyncio.to_thread(came.tell_from_thread)  # nobody has asked: there is nobody to tell
        await came.hold("a")
        waiting = asyncio.create_task(came.hold("a"))
        for _ in range(5):
            await asyncio.to_thread(came.tell_from_thread)
        await asyncio.wait_for(waiting, 5)
        return came._came

    assert asyncio.run(lead()) == 1


def test_who_asked_long_ago_is_forgotten(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(news, "_MOST", 3)

    async def lead() -> None:
        came = News()
        for who in range(10):
            await came.hold(who)
        assert list(came._seen) == [7, 8, 9]

    asyncio.run(lead())


def test_nobody_waits_for_long(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(news, "HOLD_S", 0.05)

    async def lead() -> None:
        came = News()
        for _ in range(3):
            await asyncio.wait_for(came.hold("a"), 5)
        assert not came._waiting

    asyncio.run(lead())


def test_who_goes_away_while_it_waits_is_forgotten() -> None:
    async def lead() -> None:
        came = News()
        await came.hold("a")
        waiting = asyncio.create_task(came.hold("a"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert not came._waiting
        came.tell()
        await asyncio.sleep(0.15)

    asyncio.run(lead())
