"""Fixtures of all rooms."""

import os
import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests import services

# Before torch is imported: tiny models gain nothing from threads, and lose a lot when cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels for GPUs run in Triton's interpreter where there is none; read when Triton is imported, which torch does, too.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Machines are shared: how long an example takes says nothing about the code.
hypothesis.settings.register_profile(
    "shared machines", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared machines")


@pytest.fixture
def ram_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where the system has such a place: flushing thousands of files costs nothing there."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="fedcomet-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where all services must be there, a test that is skipped for want of one has failed."""
    report = yield
    if os.environ.get("FEDCOMET_TEST_SERVICES") == "required" and report.skipped and _service_of(report):
        report.outcome, report.longrepr = "failed", f"{_service_of(report)} (FEDCOMET_TEST_SERVICES=required)"
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say in the last lines which tests were not run for want of a service."""
    found = [_service_of(report) for report in terminalreporter.stats.get("skipped", [])]
    for reason in sorted({*filter(None, found)}):
        terminalreporter.write_line(f"tests not run, {found.count(reason)}: {reason}", yellow=True)


def _service_of(report: Any) -> str:
    """Why a test was skipped, if it was for want of a service."""
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else "").removeprefix("Skipped: ")
    return reason if reason.endswith(services.INSTALL) else ""
