"""A federation that kills itself: `killable.py ROOT WORKERS KIND ROUND NTH WHOM`.

At the NTH event of that kind and round, SIGKILL goes to the whole process group (WHOM = group) or to this process only
(WHOM = parent). Without such an event it runs to its end and prints the outcome.
"""

import json
import os
import signal
import sys
from pathlib import Path

from server.rounds import Event
from simulation.engine import run_federation
from simulation.pool import Pool
from tests import tiny


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

    files = [tiny.SiteFiles(p.name, p, root / "state" / p.name) for p in sorted((root / "data").iterdir())]
    with Pool(workers) as pool:
        outcome = run_federation(tiny.plan(), files, root / "run", pool, watch)
    print(json.dumps(["outcome", outcome.ledger_fingerprint, str(outcome.checkpoint)]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6])
