"""Fixtures of all rooms."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

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
