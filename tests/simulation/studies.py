"""A tiny study for tests; as a script, `studies.py ROOT LABEL DONE` kills its whole process group at that step.

Without such a step it runs to its end.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from simulation.config import Study
from simulation.study import Result, run_study
from tests import tiny
from tokenizer.progress import Step


def study(sites: list[tiny.SiteFiles], **changes: Any) -> Study:
    raw: dict[str, Any] = {
        "name": "tiny",
        "arms": ["federated", "alone", "pooled", "ensemble"],
        "data": {"kind": "sites", "sites": {site.name: str(site.data) for site in sites}},
        "tokenizer": {"min_patients": 5},
        "model": {"preset": "0.3m", "context": 64},
        "training": {"rounds": 2, "local_epochs": 0.5, "batch_tokens": 512},
        "task": [
            {
                "name": "lab",
                "question": "Which laboratory test comes first?",
                "trigger": ["LAB//0"],
                "outcome": ["LAB//1"],
                "competing": ["LAB//2"],
            }
        ],
        "evaluation": {"trajectories": 4, "max_tokens": 16, "resamples": 100},
    }
    return Study.model_validate({**raw, **changes})


def main(root: Path, label: str, done: int) -> Result:
    def watch(step: Step) -> None:
        if (step.label, step.done) == (label, done):
            os.killpg(0, signal.SIGKILL)

    files = [tiny.SiteFiles(path.name, path, root) for path in sorted((root / "data").iterdir())]
    return run_study(study(files), root / "study", workers=2, watch=watch)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
