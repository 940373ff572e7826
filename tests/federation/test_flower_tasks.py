"""A runtime that doesn't answer yet is no news; one that doesn't for long, or went away, is."""

import logging
import socket
import time
from pathlib import Path

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
