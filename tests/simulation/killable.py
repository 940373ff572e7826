"""A federation that kills itself: `killable.py ROOT WORKERS KIND ROUND NTH WHOM`.

At the NTH event of that kind and round, SIGKILL goes to the whole process group (WHOM = group) or to this process only
(WHOM = parent). Without such an event it runs to its end and prints the outcome. Where ROOT holds records of the server
(`held`), it asks about them after every round; the NTH sign of life of these rollouts counts as an event `rollouts`.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from model.tasks import Task
from server.central import CentralPlan
from server.central_cohort import Central
from server.plan import FederationPlan
from server.rounds import Event
from simulation.engine import run_federation
from simulation.pool import Pool
from tests import tiny

TASK = Task("lab", "Which lab comes first?", ("LAB//0", "LAB//2"), ("LAB//1",), ("LAB//3",), 0.0, 30.0, "each")


def plan_of(root: Path) -> FederationPlan:
    """The plan of a folder, which asks by itself where it holds records for that."""
    if not (root / "held").exists():
        return tiny.plan()
    own = CentralPlan("../held", (TASK,), trajectories=2, max_tokens=16, metric="brier", foreign=True, most=20)
    return tiny.plan(central=own)


def main(root: Path, workers: int, kind: str, number: int, nth: int, whom: str) -> None:
    seen = 0

    def watch(event: Event) -> None:
        nonlocal seen
        print(json.dumps([event.kind, event.round, event.site]), flush=True)
        if (event.kind, event.round) == (kind, number):
            seen += 1
            if seen == nth:
                print(json.dumps(["workers", *pool.pids()]), flush=True)
                os.killpg(0, signal.SIGKILL) if whom == "group" else os.kill(os.getpid(), signal.SIGKILL)

    figures = Central.figures

    def watched(self: Central, path: Path, alive: Callable[[], None] = lambda: None) -> dict[str, float]:
        def sign() -> None:
            watch(Event("rollouts", int(path.stem)))
            alive()

        return figures(self, path, sign)

    Central.figures = watched  # type: ignore[method-assign]
    files = [tiny.SiteFiles(p.name, p, root / "state" / p.name) for p in sorted((root / "data").iterdir())]
    with Pool(workers) as pool:
        outcome = run_federation(plan_of(root), files, root / "run", pool, watch)
    print(json.dumps(["outcome", outcome.ledger_fingerprint, str(outcome.checkpoint)]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
