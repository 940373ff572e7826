"""Two coordinators on one ledger: the second waits or is refused, and nobody writes after another has taken over."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy.exc

from server import lease
from server.lease import LeaseTaken
from server.ledger import Ledger
from server.transactions import LeaseLost

Open = Callable[[], Ledger]
REPOSITORY = Path(__file__).parents[2]


def asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let holders forget to renew, as a process that hangs does."""
    monkeypatch.setattr(lease, "_renew", lambda *_: None)


def test_a_second_coordinator_is_refused_until_the_first_has_ended(opened: Open) -> None:
    first, second = opened(), opened()
    with first.lead() as token:
        with pytest.raises(LeaseTaken, match=rf"process {os.getpid()}\) leads .*--wait"), second.lead():
            pass
        first.note("coordinator", "mine")
        holder = second.holder()
        assert holder is not None
        assert (holder.token, holder.pid) == (token, os.getpid())
    assert second.holder() is None
    with second.lead() as later:
        assert later > token
    assert [e.what for e in first.events(what="lease.")] == ["lease.taken", "lease.given_back"] * 2


def test_a_second_coordinator_can_wait(opened: Open) -> None:
    first, second = opened(), opened()
    told, waits = [], threading.Event()

    def tell(text: str) -> None:
        told.append(text)
        waits.set()

    def follow() -> int:
        with second.lead(wait=True, tell=tell) as token:
            return token

    with ThreadPoolExecutor(1) as threads:
        with first.lead() as token:
            follower = threads.submit(follow)
            assert waits.wait(60)
        assert follower.result(60) == token + 1
    assert len(told) == 1
    assert f"process {os.getpid()}" in told[0]


def test_a_lease_is_renewed_while_its_holder_lives(opened: Open) -> None:
    ledger = opened()
    with ledger.lead(ttl_s=1.5):
        begin = ledger.holder()
        until = time.monotonic() + 60
        while (holder := ledger.holder()) is None or begin is None or holder.until <= begin.until:
            assert time.monotonic() < until
            begin = begin or holder
            time.sleep(0.05)


def test_whoever_lost_the_lease_writes_nothing_more(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    asleep(monkeypatch)
    first, helper, second = opened(), opened(), opened()
    with first.lead(ttl_s=0.05) as token:
        helper.join(token)
        helper.note("helper", "early")
        time.sleep(0.1)
        first.note("first", "early")  # run out, but nobody else leads
        with second.lead() as later:
            assert later == token + 1
            for old in (first, helper):
                with pytest.raises(
                    LeaseLost, match=rf"Another coordinator .*process {os.getpid()}.*writes nothing more"
                ):
                    old.note("old", "late")
                with pytest.raises(LeaseLost):
                    old.journal("icu").start("icu")
            second.note("second", "mine")
            assert first.events(what="late") == []  # reading is free
        with pytest.raises(LeaseLost):
            opened().join(token)
    assert [event.who for event in second.events() if "lease" not in event.what] == ["helper", "first", "second"]
    assert second.runs() == []


def test_a_holder_that_finds_it_has_lost_says_so(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, lost, taken = opened(), opened(), threading.Event(), threading.Event()
    renew = lease._renew

    def late(ledger: object, *given: object) -> None:
        if ledger is first.transactions:
            taken.wait(60)
            renew(ledger, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(lease, "_renew", late)
    with first.lead(ttl_s=0.1, lost=lost):
        time.sleep(0.2)
        with second.lead():
            taken.set()
            assert lost.wait(60)


def test_a_holder_renews_again_after_an_error_of_the_database(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one that is not away, but only reads: a standby that a failover has not yet made the first."""
    ledger, lost = opened(), threading.Event()
    reads_only = sqlalchemy.exc.InternalError("UPDATE lease", {}, Exception("cannot execute UPDATE"))
    with ledger.lead(ttl_s=1.5, lost=lost) as token:
        before, tried = ledger.holder(), failing_writes(monkeypatch, ledger, reads_only)
        assert before is not None
        assert tried.wait(60)
        monkeypatch.undo()
        until = time.monotonic() + 60
        while (holder := ledger.holder()) is None or holder.until <= before.until:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert holder.token == token
    assert not lost.is_set()
    assert "The lease could not be renewed (cannot execute UPDATE); trying again." in caplog.text


def test_a_holder_that_can_not_renew_for_another_reason_leads_no_more(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, lost = opened(), threading.Event()
    with ledger.lead(ttl_s=0.1, lost=lost):
        failing_writes(monkeypatch, ledger, RuntimeError("a thread too many"))
        assert lost.wait(60)
        monkeypatch.undo()
    assert "The lease can't be renewed any more." in caplog.text
    assert "a thread too many" in caplog.text


def failing_writes(monkeypatch: pytest.MonkeyPatch, ledger: Ledger, problem: Exception) -> threading.Event:
    """Let every write end with a problem; gives what is set when one did."""
    tried = threading.Event()

    def write(work: object) -> None:
        tried.set()
        raise problem

    monkeypatch.setattr(ledger.transactions, "write", write)
    return tried


def test_a_holder_whose_process_is_gone_is_followed_at_once(place: str) -> None:
    """And all that it was told to be noted is there."""
    leader = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests/server/leader.py"), place, "3600"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert leader.stdout is not None
    token = int(leader.stdout.readline())
    lines = [leader.stdout.readline() for _ in range(10)]
    with Ledger.open(place) as ledger:
        with pytest.raises(LeaseTaken), ledger.lead():
            pass
        leader.send_signal(signal.SIGKILL)
        lines += leader.stdout.readlines()
        leader.stdout.close()
        assert leader.wait() == -signal.SIGKILL
        with ledger.lead() as later:
            assert later == token + 1
        noted = [int(event.text) for event in ledger.events(what="step")]
        told = [int(line) for line in lines if line.endswith("\n")]
        assert noted[: len(told)] == told == list(range(len(told)))
        assert len(noted) <= len(told) + 1
        (taken,) = ledger.events(after=ledger.events(what="step")[-1].id, what="lease.taken")
        assert f"after {os.uname().nodename}, process {leader.pid}, which ended without" in taken.text


def test_there_is_no_moment_with_two_leaders(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that run out all the time: once a later holder has written, no earlier one does."""
    asleep(monkeypatch)

    def compete(ledger: Ledger) -> int:
        written = 0
        for _ in range(3):
            try:
                with ledger.lead(wait=True, ttl_s=0.01) as token:
                    for _ in range(3):
                        ledger.note("leader", "write", told=str(token))
                        written += 1
            except LeaseLost:
                ledger.transactions.token = None
        return written

    ledgers = [opened() for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        written = sum(threads.map(compete, ledgers))
    tokens = [int(event.text) for event in ledgers[0].events(what="write")]
    assert len(tokens) == written
    assert tokens == sorted(tokens)
