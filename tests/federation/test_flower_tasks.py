"""A runtime that doesn't answer yet is no news; one that doesn't for long, or went away, is. No error ends the loop."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from federation import flower_tasks
from federation.flower_tasks import TaskOptions, Tasks


def told(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    with socket.socket() as taken:  # bound, but it doesn't listen: nobody answers there
        taken.bind(("127.0.0.1", 0))
        tasks = Tasks(TaskOptions("coordinator", taken.getsockname()[1], b"secret", folder))
        with caplog.at_level(logging.INFO, "federation.flower_tasks"):
            tasks.start()
            time.sleep(0.5)
            tasks.stop()
    return [record.message for record in caplog.records if "does not answer" in record.message]


def test_a_runtime_that_is_late_at_the_start_is_told_once_and_only_after_a_while(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_tasks, "_AWAY_S", 0.05)
    assert told(tmp_path, caplog) == []
    monkeypatch.setattr(flower_tasks, "_BEGIN_S", 0.2)
    assert len(told(tmp_path, caplog)) == 1


class Launcher:
    """Processes that die at once."""

    def __init__(self, *numbers: int) -> None:
        self.died = [(number, -9) for number in numbers]

    def start(self) -> None:
        pass

    def launch(self, number: int, token: str) -> None:
        raise RuntimeError("no process today")

    def ended(self) -> Iterator[tuple[int, int]]:
        while self.died:
            yield self.died.pop(0)

    def stop(self) -> None:
        pass


def test_processes_that_died_are_answered_for_in_the_end_whatever_goes_wrong_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that ends, or forgets a run, would leave its node waiting for an answer for ever."""
    calls: list[int] = []
    done = threading.Event()

    def crashed(run: int) -> None:
        calls.append(run)
        if len(calls) < 4:
            raise RuntimeError("the store is not there")
        if set(calls[3:]) == {1, 2, 3}:
            done.set()

    monkeypatch.setattr(flower_tasks, "_AWAY_S", 0.05)
    tasks: Any = Tasks(TaskOptions("coordinator", 1, b"secret", tmp_path), crashed)
    tasks._launcher = Launcher(1, 2)
    tasks._running.update({1: (1, "one"), 2: (2, "two")})
    tasks._try(3, 3, "three")
    tasks.start()
    try:
        assert done.wait(20)
        assert tasks.alive
    finally:
        tasks.stop()
    assert not tasks.alive
    assert tasks.busy == 0
    assert "an app process can't be started (no process today)" in caplog.messages
    trouble = "an app process that died can't be answered for (the store is not there); trying again"
    assert caplog.messages.count(trouble) == 1


@pytest.mark.parametrize(("status", "heard"), [(200, True), (401, True), (503, False)])
def test_a_runtime_that_says_come_again_has_not_heard_of_a_dead_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, heard: bool
) -> None:
    def push(_: object) -> None:
        httpx.Response(status, request=httpx.Request("POST", "http://runtime")).raise_for_status()

    client = SimpleNamespace(PushTaskOutput=push, close=lambda: None)
    tasks = Tasks(TaskOptions("coordinator", 1, b"secret", tmp_path))
    monkeypatch.setattr(tasks, "_client", lambda *_: client)
    assert tasks._said("token", -9) is heard
