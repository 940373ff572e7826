"""Hundreds of short rounds in one process: memory doesn't grow with them, for the coordinator or for the sites."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.app import coordinate
from server.journal import Journal
from tests import tiny

pytestmark = pytest.mark.slow

_ROUNDS, _SETTLED = 300, 60
_MOST_BYTES_A_ROUND = 20_000
"""Half an update of this model is more: whoever keeps one a round, or the text of a message, is found."""


def test_memory_does_not_grow_with_the_rounds(ram_path: Path) -> None:
    held: list[int] = []

    def watch(event: Any) -> None:
        if event.kind == "round.committed":
            gc.collect()
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)

    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, tiny.sites(ram_path, 2)), 1)))
    plan = tiny.plan(rounds=_ROUNDS, min_sites=2, evaluate_every=0)
    coordinate(grid, ram_path / "run", plan, listen=watch)
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        assert journal.committed() == _ROUNDS
    settled = np.array(held[_SETTLED:], float)
    slope = np.polyfit(np.arange(len(settled)), settled, 1)[0]
    assert slope < _MOST_BYTES_A_ROUND, f"{slope:,.0f} bytes a round"
    print(f"{slope:,.0f} bytes a round")
