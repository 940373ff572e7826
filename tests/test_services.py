"""Tests that want a service that isn't there: said in the last lines, or failed where none may be left out."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import services

WANTING = """
import pytest
from tests import services

@pytest.mark.skipif(True, reason=services.CHROMIUM_MISSING)
def test_marked():
    pass

def test_while_it_runs():
    pytest.skip(services.POSTGRES_MISSING)

def test_another_reason():
    pytest.skip("needs a GPU")
"""


@pytest.mark.parametrize(
    ("mode", "code", "outcome"), [("", 0, "3 skipped"), ("required", 1, "1 failed, 1 skipped, 1 error")]
)
def test_what_was_not_run_is_said_or_fails(tmp_path: Path, mode: str, code: int, outcome: str) -> None:
    (tmp_path / "test_wanting.py").write_text(WANTING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", "-n", "0", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(root), "FEDCOMET_TEST_SERVICES": mode}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert outcome in done.stdout
    for reason in (services.POSTGRES_MISSING, services.CHROMIUM_MISSING):
        assert (f"tests not run, 1: {reason}" in done.stdout) == (not mode)
        assert reason in done.stdout
