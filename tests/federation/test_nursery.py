"""App processes that are forked: each is on its own, its end is noticed, and none outlives nursery or node."""

import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from client.supernode import APP_MODULES
from federation.nursery import Nursery, NurseryOptions
from federation.polls import Polls
from tests.superlink import REPOSITORY, gone

QUICK = ("tests.federation.app_process",)


def options(folder: Path, modules: tuple[str, ...] = QUICK) -> NurseryOptions:
    return NurseryOptions(modules, 1, {"PYTHONPATH": str(REPOSITORY)}, folder / "app.log")


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[Nursery]:
    made = Nursery(options(tmp_path))
    made.start()
    yield made
    made.stop()


def child(path: Path, patience_s: float = 120.0) -> dict[str, Any]:
    until = time.monotonic() + patience_s
    while not path.exists():
        assert time.monotonic() < until, "no child came"
        time.sleep(0.01)
    return json.loads(path.read_text())


def ended(nursery: Nursery, patience_s: float = 120.0) -> list[tuple[int, int]]:
    until = time.monotonic() + patience_s
    while not (found := list(nursery.ended())):
        assert time.monotonic() < until, "no end was told"
        time.sleep(0.01)
    return found


def test_each_task_has_a_process_of_its_own_and_its_end_is_told(nursery: Nursery, tmp_path: Path) -> None:
    drawn = []
    for number, code in ((1, 0), (2, 3)):
        nursery.launch(number, f"{tmp_path / str(number)}|{code}")
        told = child(tmp_path / str(number))
        assert (told["parent"], told["threads"], told["cuda"]) == (nursery.pid, 1, False)
        assert told["told"] == ["insecure", "parent_pid", "runtime_api_address", "runtime_dependency_install"]
        assert ended(nursery) == [(number, code)]
        drawn.append(told["drawn"])
    assert not set(drawn[0]) & set(drawn[1])  # no child repeats what another has drawn
    assert (tmp_path / "app.log").read_text() == "my last words\n"
    assert (tmp_path / "app.log").stat().st_mode & 0o077 == 0


def test_a_killed_child_is_noticed_within_a_second(nursery: Nursery, tmp_path: Path) -> None:
    nursery.launch(7, f"{tmp_path / 'a'}|wait")
    pid = child(tmp_path / "a")["pid"]
    os.kill(pid, signal.SIGKILL)
    assert ended(nursery, 1.0) == [(7, -signal.SIGKILL)]


def test_children_end_with_a_killed_nursery_and_the_next_task_has_a_new_one(nursery: Nursery, tmp_path: Path) -> None:
    nursery.launch(1, f"{tmp_path / 'a'}|wait")
    pid, first = child(tmp_path / "a")["pid"], nursery.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    assert ended(nursery) == [(1, -signal.SIGKILL)]
    assert gone(pid)
    nursery.launch(2, f"{tmp_path / 'b'}|0")
    assert child(tmp_path / "b")["parent"] == nursery.pid != first
    assert ended(nursery) == [(2, 0)]


def test_stopping_ends_children_and_nursery(tmp_path: Path) -> None:
    nursery = Nursery(options(tmp_path))
    nursery.start()
    nursery.launch(1, f"{tmp_path / 'a'}|wait")
    pid = child(tmp_path / "a")["pid"]
    nursery.stop()
    assert gone(pid)


def test_a_nursery_that_could_not_be_started_again_can_be_stopped(
    nursery: Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = nursery._process
    assert first is not None
    first.kill()
    first.wait()

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("no more processes")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(OSError, match="no more processes"):
        nursery.launch(1, "token")
    nursery.stop()


NODE = """
import sys, time
from pathlib import Path
from federation.nursery import Nursery
from tests.federation.test_nursery import options
folder = Path(sys.argv[1])
nursery = Nursery(options(folder))
nursery.start()
nursery.launch(1, f"{folder / 'a'}|wait")
time.sleep(600)
"""


def test_nursery_and_children_end_with_a_killed_node(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", NODE, str(tmp_path)], cwd=REPOSITORY) as node:
        told = child(tmp_path / "a")
        descriptors = [os.pidfd_open(told[name]) for name in ("pid", "parent")]
        node.kill()
        for descriptor in descriptors:
            with os.fdopen(descriptor):
                assert select.select([descriptor], [], [], 30)[0]


@pytest.mark.slow
def test_the_site_is_imported_with_one_thread_and_without_cuda(tmp_path: Path) -> None:
    nursery = Nursery(options(tmp_path, (*APP_MODULES, *QUICK)))
    nursery.start()
    try:
        nursery.launch(1, f"{tmp_path / 'a'}|0")
        told = child(tmp_path / "a")
        assert (told["product"], told["cuda"], told["threads"]) == (True, False, 1)
        assert ended(nursery) == [(1, 0)]
    finally:
        nursery.stop()


def test_a_look_comes_at_most_a_tenth_of_the_wait_too_late() -> None:
    polls = Polls(0.05, 1.0)
    now, looks = 0.0, [0.0]
    while now < 100:
        now += polls.after(now)
        looks.append(now)
    assert all(after - before <= max(0.05, 0.1 * after) + 1e-9 for before, after in itertools.pairwise(looks))
    assert len(looks) < 150
