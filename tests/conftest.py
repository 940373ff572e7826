"""Fixtures of all rooms."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: tiny models gain nothing from threads, and lose a lot when cores are shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def ram_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where the system has such a place: flushing thousands of files costs nothing there."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="fedcomet-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path)
