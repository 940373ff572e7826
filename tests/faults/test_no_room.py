"""A full disk in small: what is written, told and asked again, without a whole federation."""

import asyncio
import errno
import os
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.supercore.error.http import http_error_translator
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from client.approval import site_key
from client.audit import audit
from client.budget import Budget, Release
from client.outbound import Leaving, Outbound
from client.supernode import NodeFolder
from federation.accountant import Gaussian, Mechanisms
from federation.front import Door, Front, telling_to_come_again
from federation.identity import Identity
from server.app import coordinate
from server.journal import Journal, Status
from tests import tiny
from tests.field import fill, small_disk
from tokenizer import durable
from tokenizer.errors import DataError

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")


@as_root
@pytest.mark.slow
def test_a_site_on_a_full_disk_refuses_keeps_its_list_whole_and_goes_on_when_there_is_space(tmp_path: Path) -> None:
    """Filled to the last byte between two rounds; the state is none of the worse for it."""
    files = tiny.sites(tmp_path)
    with small_disk(files[0].state, 8) as disk:
        ballast: list[Path] = []

        def watch(event: Any) -> None:
            if event.kind == "round.committed" and event.round == 1:
                ballast.append(fill(disk))
            if event.kind == "round.committed" and event.round == 3:
                ballast.pop().unlink()

        plan = tiny.plan(rounds=5, min_sites=2)
        grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, files), 1)))
        coordinate(grid, tmp_path / "run", plan, listen=watch)
        with Journal(tmp_path / "run/ledger.sqlite") as journal:
            assert journal.committed() == 5
            own = {n: next(e for e in journal.replies(n) if e.site == "site-0") for n in range(1, 6)}
        assert [own[n].status == Status.ACCEPTED for n in range(1, 6)] == [True, False, False, True, True]
        for number in (2, 3):
            assert "disk is full" in own[number].reason or "no room left on its disk" in own[number].reason
        found = audit(files[0].state)
        assert found.broken is None


@as_root
def test_a_list_is_whole_whatever_room_is_left_when_the_disk_fills_up(tmp_path: Path) -> None:
    """With 0 to 5,000 bytes free: an entry is there with its end noted, or it is refused and gone with the next one."""
    with small_disk(tmp_path / "disk", 1) as disk:
        outbound, now = Outbound(disk / "outbound", Identity.at(site_key(disk))), datetime.now(UTC)
        noted = 0
        for free_pages in (0, 1, 0, 2, 0, 3, 0):
            ballast = fill(disk)
            os.truncate(ballast, max(0, ballast.stat().st_size - 4096 * free_pages))
            with pytest.raises(DataError, match="No space left on device") as refused:  # noqa: PT012
                while True:
                    outbound.note(Leaving("train_reply", 1, "a" * 64, "train", content={"x": "y" * 700}), now)
                    noted += 1
                    assert noted < 500
            assert durable.out_of_room(refused.value)
            ballast.unlink()
            outbound.note(Leaving("train_reply", 1, "b" * 64, "train"), now)
            noted += 1
        found = audit(disk)
        assert (found.broken, found.entries) == (None, noted)


@as_root
def test_a_budget_on_a_full_disk_reserves_nothing_and_is_right_afterwards(tmp_path: Path) -> None:
    def release(number: int) -> Release:
        return Release("5a" * 32, number, "training", Mechanisms((Gaussian(1.1, 0.01, 20),)), f"{number:064d}")

    with small_disk(tmp_path / "disk", 1) as disk, Budget.open(disk / "budget.sqlite") as budget:
        budget.reserve(release(1))
        ballast = fill(disk)
        with pytest.raises(DataError, match=r"disk is full.*nothing private leaves.*Make room"):  # noqa: PT012
            for number in range(2, 200):
                budget.reserve(release(number))
        there = len(budget.charges())
        ballast.unlink()
        assert len(budget.charges()) == there
        budget.reserve(release(500))
        budget.charge(release(1), b"answer")
        assert len(budget.charges()) == there + 1


@as_root
def test_a_budget_that_begins_on_a_full_disk_says_so_and_asks_for_no_copy(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "budget.sqlite").touch()
        ballast = fill(disk)
        with pytest.raises(DataError, match=r"disk is full.*nothing private leaves\. Make room"):
            Budget.open(disk / "budget.sqlite")
        ballast.unlink()
        Budget.open(disk / "budget.sqlite").close()


@as_root
def test_a_node_on_a_full_disk_lives_and_its_daemon_says_what_is_wrong(tmp_path: Path) -> None:
    with small_disk(tmp_path / "home", 1) as disk:
        folder = NodeFolder(disk)
        folder.write("waiting")
        ballast = fill(disk)
        folder.write("working")
        assert durable.free_bytes(disk) < durable.LEAST_FREE
        assert "is full" in durable.full(disk / "state/not/there")
        ballast.unlink()
        folder.write("working")
        assert folder.read().state == "working"


def test_a_request_that_meets_a_full_disk_or_a_busy_database_is_to_be_asked_again_and_no_other_one() -> None:
    """503 is what Flower's processes ask again after; 500 ends them."""

    def status(problem: Exception | None) -> int:
        async def asked(request: Request) -> Response:
            if problem is not None:
                raise problem
            return Response()

        inside = Starlette(routes=[Route("/p", asked, methods=["POST"])])
        inside.add_middleware(BaseHTTPMiddleware, dispatch=http_error_translator)  # what Flower makes of errors
        front = Front(telling_to_come_again(inside), {"/p": Door(admit=lambda headers: "me")})

        async def run() -> int:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://here") as client:
                return (await client.post("/p", content=b"x")).status_code

        return asyncio.run(run())

    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    behind = RuntimeError("of the full disk")
    behind.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    busy = RuntimeError("of the locked database")
    busy.__cause__ = sqlite3.OperationalError("database is locked")
    busy.__cause__.sqlite_errorcode = sqlite3.SQLITE_BUSY | 2 << 8  # SQLITE_BUSY_SNAPSHOT
    found = [status(each) for each in (None, full, behind, busy, ValueError("a mistake"))]
    assert found == [200, 503, 503, 503, 500]
