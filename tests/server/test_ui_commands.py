"""The commands of both dashboards as people type them, as real processes."""

import re
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.ledger import Ledger
from tests.watched import coordinator_home, site_home

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]


def fedcomet(*words: object, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "fedcomet.py"), *map(str, words)]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False)


@contextmanager
def serving(*words: object) -> Iterator[list[str]]:
    """A command that serves: gives its first lines; it has to end well when it is told to."""
    command = [sys.executable, str(REPOSITORY / "fedcomet.py"), *map(str, words), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline()]
        if "site" in words:
            lines.append(process.stdout.readline())
        yield lines
    finally:
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0]
    assert (process.returncode, rest) == (0, "")


def test_a_coordinator_s_dashboard_is_served_by_tls_once_somebody_can_sign_in(tmp_path: Path) -> None:
    home = coordinator_home(tmp_path / "home")
    Ledger.open(home.ledger_url).close()
    (home.path / "passwords.json").unlink()
    done = fedcomet("coordinator", "ui", home.path)
    assert done.returncode == 1
    assert "Nobody could sign in" in done.stderr
    assert fedcomet("coordinator", "password", home.path, "anna", given="too short\n").returncode == 1
    done = fedcomet("coordinator", "password", home.path, "anna", given="correct horse battery\n")
    assert (done.returncode, done.stdout) == (0, "anna signs in as coordinator\n"), done.stderr
    with serving("coordinator", "ui", home.path) as lines:
        found = re.fullmatch(r"the dashboard is at (https://127\.0\.0\.1:\d+/)\n", lines[0])
        assert found is not None, lines
        trusted = ssl.create_default_context(cafile=str(home.authority))
        with urllib.request.urlopen(f"{found[1]}sign-in", context=trusted) as answer:
            assert b"Password" in answer.read()
            assert answer.headers["server"] is None
    done = fedcomet("coordinator", "password", home.path, "anna", "--remove")
    assert done.stdout == "anna can no longer sign in\n"
    with Ledger.open(home.ledger_url) as ledger:
        assert [event.what for event in ledger.events()] == ["dashboard.password", "dashboard.removed"]


def test_a_site_s_page_is_served_on_loopback_with_a_token(tmp_path: Path) -> None:
    home = site_home(tmp_path / "site")
    with serving("site", "ui", home.path) as lines:
        found = re.fullmatch(r"the page of bergen is at (http://127\.0\.0\.1:\d+/)\n", lines[0])
        assert found is not None, lines
        assert re.fullmatch(r"token: [\w-]{32}\n", lines[1])
        with urllib.request.urlopen(f"{found[1]}sign-in") as answer:
            assert b"Token" in answer.read()
