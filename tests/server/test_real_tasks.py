"""Shipped tasks on real stores: somebody is asked, the dead are not, and each set finds its codes."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from model.cohort import Cohort, cohort
from model.task_files import shipped
from model.tasks import Task
from tests.data import DATA
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.events import MedsDataset
from tokenizer.prepare import records_of
from tokenizer.settings import agreed
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey

pytestmark = pytest.mark.slow
TASKS = {task.name: task for tasks in shipped().values() for task in tasks}


def _store(name: str, root: Path, least: int) -> tuple[TokenStore, Codebook]:
    if not (DATA / name).is_dir():
        pytest.skip(f"{name} is not in {DATA}")
    records = records_of(MedsDataset.open(DATA / name), agreed(None).preparation)
    codebook = Codebook.build(survey(records, SplitRule("real"), TokenizerOptions(values="fused", min_patients=least)))
    return build_store(records, codebook, SplitRule("real"), root / name), codebook


@pytest.fixture(scope="module")
def mimic(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenStore, Codebook]:
    return _store("mimic_iv_demo_meds", tmp_path_factory.mktemp("mimic"), 3)


def _asked(task: Task, made: tuple[TokenStore, Codebook]) -> Cohort:
    return cohort(task, made[0].split("train"), made[1])


def test_on_mimic_every_live_discharge_has_futures_and_every_stay_laboratory_tests(
    mimic: tuple[TokenStore, Codebook],
) -> None:
    events = pl.read_parquet(DATA / "mimic_iv_demo_meds/data/**/*.parquet")
    mine = events.filter(pl.col("subject_id").is_in(mimic[0].split("train").subject_ids.tolist()))
    codes = pl.col("code")
    alive = mine.filter(
        codes.str.starts_with("HOSPITAL_DISCHARGE") & ~codes.str.starts_with("HOSPITAL_DISCHARGE//DIED")
    )
    futures = _asked(TASKS["futures_90d"], mimic)
    # Discharges whose moment is that of a death are the only ones to leave out.
    assert len(futures) >= 0.95 * alive.select("subject_id", "time").n_unique()
    labs = _asked(TASKS["encounter_labs"], mimic)
    stays = mine.filter(codes.str.starts_with("HOSPITAL_ADMISSION")).select("subject_id", "time").n_unique()
    assert len(labs) > 0.8 * stays
    found = {code: int((labs.told["codes"][:, n] == 1).sum()) for n, code in enumerate(TASKS["encounter_labs"].outcome)}
    assert found["LAB//50912"] > 0.5 * len(labs)  # creatinine in MIMIC's numbers


def test_on_mimic_nobody_is_asked_about_a_stay_that_ended_in_death(mimic: tuple[TokenStore, Codebook]) -> None:
    events = pl.read_parquet(DATA / "mimic_iv_demo_meds/data/**/*.parquet")
    died = events.filter(pl.col("code").str.starts_with("HOSPITAL_DISCHARGE//DIED"))
    fatal = {(subject, time) for subject, time in died.select("subject_id", pl.col("time").to_physical()).iter_rows()}
    assert len(fatal) == 15
    for task in TASKS.values():
        if "HOSPITAL_DISCHARGE" in task.trigger and not task.after_hours:
            asked = _asked(task, mimic)
            pairs = zip(asked.subject_ids.tolist(), asked.prediction_us.tolist(), strict=True)
            assert not fatal & set(pairs), task.name


def test_the_icu_question_is_answered_on_physionet(tmp_path: Path) -> None:
    """Set A has 554 deaths in hospital; whoever leaves or dies within 48 hours is not asked about."""
    asked = _asked(TASKS["in_hospital_death"], _store("physionet2012_set-a_meds", tmp_path, 10))
    known = asked.labelled()
    assert len(known) > 0.9 * asked.patients
    assert 0.11 < np.mean(known.labels) < 0.15
