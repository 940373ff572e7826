"""Claims about programs that are kept running; real processes, real kills."""

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from federation.supervisor import Program, Supervisor, meaning, relay

REPOSITORY = Path(__file__).parents[2]


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def program(code: str, stop_s: float = 30) -> Program:
    return Program("child", (sys.executable, "-u", "-c", code), {"PYTHONPATH": str(REPOSITORY)}, stop_s)


def test_a_killed_program_is_started_again_and_its_lines_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kept = Supervisor([program("import time; print('WARNING: low on tea'); time.sleep(600)")], waits_s=(0.0,))
    kept.start()
    try:
        until(lambda: kept.conditions()["child"].running)
        first = kept.conditions()["child"].pid
        assert first is not None
        until(lambda: "low on tea" in caplog.text)
        os.kill(first, signal.SIGKILL)
        until(lambda: kept.conditions()["child"].pid not in (first, None))
        now = kept.conditions()["child"]
        assert (now.ends, now.code) == (1, -signal.SIGKILL)
    finally:
        kept.stop()
    assert not kept.conditions()["child"].running
    assert ("program.child", logging.WARNING, "low on tea") in caplog.record_tuples
    assert "killed by SIGKILL; starting again" in caplog.text.replace("(", "").replace(")", "")


def test_a_program_that_ends_at_once_is_not_started_in_a_frenzy() -> None:
    kept = Supervisor([program("raise SystemExit(3)")], waits_s=(0.0, 600.0))
    kept.start()
    try:
        until(lambda: kept.conditions()["child"].ends == 2)
        assert kept.conditions()["child"].code == 3
        time.sleep(0.5)
        assert kept.conditions()["child"].ends == 2
    finally:
        began = time.monotonic()
        kept.stop()
    assert time.monotonic() - began < 20


def test_a_program_may_finish_before_it_ends_but_not_for_ever() -> None:
    polite = "import signal,sys,time; signal.signal(15, lambda *_: sys.exit(0)); print('up'); time.sleep(600)"
    deaf = "import signal,time; signal.signal(15, signal.SIG_IGN); print('up'); time.sleep(600)"
    for code, stop_s in ((polite, 60.0), (deaf, 0.5)):
        kept = Supervisor([program(code, stop_s)])
        seen = threading.Event()
        logging.getLogger("program.child").addFilter(lambda record, seen=seen: bool(seen.set()) or True)
        logging.getLogger("program.child").setLevel(logging.INFO)
        kept.start()
        assert seen.wait(60)
        began = time.monotonic()
        kept.stop()
        assert time.monotonic() - began < 30
        assert not kept.conditions()["child"].running


@pytest.mark.skipif(sys.platform != "linux", reason="the system's signal at a parent's end is Linux'")
def test_what_was_started_ends_with_who_started_it(tmp_path: Path) -> None:
    child = (
        "from federation.supervisor import end_with_parent; end_with_parent(); import os, time; "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    parent = (
        "import sys, time; from federation.supervisor import Program, Supervisor; "
        f"Supervisor([Program('child', (sys.executable, '-c', {child!r}))]).start(); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": "."})
    try:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", 120)
        descriptor = os.pidfd_open(int((tmp_path / "pid").read_text()))
    finally:
        process.kill()
        process.wait()
    with os.fdopen(descriptor):
        assert select.select([descriptor], [], [], 60)[0]


def test_lines_are_logged_without_colours_at_their_level(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("program.x")
    caplog.set_level(logging.DEBUG)
    for line in ("\x1b[91mERROR \x1b[0m:     it broke\n", "plain\n", "\n", "WARN: ok\n", "INFO:      \n"):
        relay(log, line)
    told = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert told == [(logging.ERROR, "it broke"), (logging.INFO, "plain"), (logging.WARNING, "ok")]


def test_exit_codes_are_told_in_words() -> None:
    assert [meaning(code) for code in (0, -9, 77, 78, 5)] == [
        "done",
        "killed by SIGKILL",
        "refused by the other side",
        "wrong configuration",
        "exit code 5",
    ]
