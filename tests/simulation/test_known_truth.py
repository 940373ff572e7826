"""On hospitals whose true risks are known, a federation's estimates come near the best that any model could do."""

import tomllib
from pathlib import Path

import numpy as np
import pytest

from model.metrics import auroc, recalibration
from simulation.config import Study
from simulation.questions import TRUTH
from simulation.study import run_study

DEMO = Path(__file__).parents[2] / "examples" / "demo.toml"
_DRAWS = 50


@pytest.mark.slow
def test_estimates_reach_the_known_best_and_are_calibrated(tmp_path: Path) -> None:
    """AUROC within 0.03 of the true risk's and a recalibration slope of 0.9 to 1.1, for both questions of the demo."""
    settings = tomllib.loads(DEMO.read_text(encoding="utf-8"))
    settings["arms"] = ["federated"]
    # Muon and short rounds: what helps a federation of small hospitals (docs/results.md).
    # Enough patients that the model doesn't learn them by heart, and that it seldom leaves out what must follow; and
    # enough futures that risks aren't noisy, above all of readmissions, which differ less between patients.
    settings["data"]["patients"] = 3000
    settings["split"] = {"held_out": 0.05}
    settings["evaluation"]["trajectories"] = 96
    settings["task"][1]["trajectories"] = 256
    settings["training"] |= {"optimizer": "muon", "learning_rate": 8e-3, "rounds": 50, "local_epochs": 0.1}
    found = run_study(Study.model_validate(settings), tmp_path / "study", workers=2)
    for answers in found.answers:
        truth, risk = answers.risks[TRUTH], answers.risks["federated"]
        # Labels drawn many times from the true risks: what is left is the model's error, not the luck of one draw.
        draws = np.random.default_rng(0).random((_DRAWS, len(truth))) < truth
        labels = draws.ravel().astype(int)
        best, reached = (auroc(labels, np.tile(scores, _DRAWS)) for scores in (truth, risk))
        slope, _ = recalibration(labels, np.tile(risk, _DRAWS))
        print(f"{answers.task.name}: AUROC {reached:.3f} of {best:.3f}, slope {slope:.3f}, {len(truth)} predictions")
        assert reached > best - 0.03
        assert 0.9 < slope < 1.1
