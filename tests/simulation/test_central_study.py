"""A study's server asks the federated arm about a cohort of its own, which may end the arm early."""

from pathlib import Path

import polars as pl
import pytest

from server.journal import Journal
from simulation.arms import SERVER, _central
from simulation.config import Study
from simulation.findings import report_of
from simulation.study import run_study
from tests import tiny
from tests.simulation.studies import study
from tokenizer.events import MedsDataset, write_meds

TRAINING = {"rounds": 3, "local_epochs": 0.25, "batch_tokens": 512}


@pytest.mark.slow
def test_a_study_s_server_asks_about_its_own_cohort_and_ends_the_arm(tmp_path: Path) -> None:
    write_meds(tmp_path / "held", [("train/0", tiny.records(9, 20))], name="held")
    evaluation = {"trajectories": 2, "max_tokens": 8, "resamples": 100}
    central = {"data": str(tmp_path / "held"), "metric": "brier", "trajectories": 2, "patience": 1, "most": 10}
    settings = study(
        tiny.sites(tmp_path, 2), arms=["federated"], training=TRAINING, evaluation={**evaluation, "central": central}
    )
    result = run_study(settings, tmp_path / "study", workers=1)
    outcome = result.arms[0].outcome
    assert outcome is not None
    with Journal(result.arms[0].folder / "ledger.sqlite") as journal:
        values, done = journal.figures("central.brier"), journal.committed()
    best = min(values, key=lambda number: (values[number], number))
    assert set(values) == set(range(1, done + 1))
    assert outcome.best_checkpoint.stem == f"{best:04d}"
    assert done == 3 or done == best + 1
    told = dict(report_of(result, "").settings)["The server's own questions"]
    assert f"{values[best]:.3f} after round {best}" in told
    assert ("ended early" in told) == (done < 3)


def test_a_synthetic_study_s_server_has_a_hospital_of_its_own(tmp_path: Path) -> None:
    raw = study([tiny.SiteFiles("a", tmp_path, tmp_path)]).model_dump(mode="json")
    raw |= {"data": {"kind": "synthetic", "hospitals": ["heart"], "patients": 30}}
    raw["evaluation"] |= {"central": {"patients": 20, "patience": 2}}
    raw["training"]["evaluate_every"] = 2
    settings = Study.model_validate(raw)
    plan = _central(settings, tmp_path / "arms" / "federated")
    assert plan is not None
    assert (plan.every, plan.patience, plan.foreign, plan.tasks) == (2, 2, True, settings.task)
    assert plan.records == str(tmp_path / "records" / SERVER / "records")
    data = MedsDataset.open(Path(plan.records))
    assert pl.concat([data.read(shard) for shard in data.shards])["subject_id"].n_unique() == 20
    raw["data"] = {"kind": "sites", "sites": {"a": "there"}}
    with pytest.raises(ValueError, match=r"evaluation\.central\.data is missing"):
        Study.model_validate(raw)
