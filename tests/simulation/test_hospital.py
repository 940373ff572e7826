from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sklearn.metrics import roc_auc_score

from model.cohort import cohort
from model.tasks import Task
from simulation.hospital import PROFILES, Records, generate, write_hospital
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.errors import ConfigError
from tokenizer.events import MedsDataset, canonical_order
from tokenizer.split import SplitRule
from tokenizer.store import build_store
from tokenizer.survey import survey

TASKS = ("death_90d", "readmission_30d")


@pytest.fixture(scope="module")
def everyone() -> dict[str, Records]:
    return {name: generate(profile, 6000, seed=3) for name, profile in PROFILES.items()}


def _asked(records: Records, task: str) -> pl.DataFrame:
    return records.truth.filter((pl.col("task") == task) & pl.col("complete"))


def _worst_gap(labels: np.ndarray, risks: np.ndarray) -> float:
    """Largest distance between observed and true risk over ten bins, in standard errors."""
    bins = np.array_split(np.argsort(risks), 10)
    errors = [np.sqrt((risks[rows] * (1 - risks[rows])).sum()) / len(rows) for rows in bins]
    gaps = [abs(labels[rows].mean() - risks[rows].mean()) for rows in bins]
    return float(np.max(np.array(gaps) / np.array(errors)))


@pytest.mark.parametrize("task", TASKS)
def test_outcomes_come_as_often_as_the_true_risk_says(everyone: dict[str, Records], task: str):
    asked = pl.concat([_asked(records, task).unique("subject_id", keep="first") for records in everyone.values()])
    labels, risks = asked["label"].to_numpy(), asked["risk"].to_numpy()
    assert _worst_gap(labels, risks) < 4.0
    # The same test must find wrong risks out: those of other patients, and the right ones a fifth too high.
    assert _worst_gap(labels, np.random.default_rng(0).permutation(risks)) > 10.0
    assert _worst_gap(labels, np.minimum(1.2 * risks, 0.999)) > 5.0


@pytest.mark.parametrize("task", TASKS)
def test_the_best_possible_ranking_is_good_but_not_perfect(everyone: dict[str, Records], task: str):
    asked = pl.concat([_asked(records, task) for records in everyone.values()])
    assert 0.80 < roc_auc_score(asked["label"], asked["risk"]) < 0.90


def test_hospitals_differ_in_who_comes(everyone: dict[str, Records]):
    rate = {name: float(_asked(records, "death_90d")["label"].mean()) for name, records in everyone.items()}
    assert rate["surgical"] < 0.5 * min(rate["heart"], rate["oncology"])

    def share(name: str, code: str) -> float:
        events = everyone[name].events
        return events.filter(pl.col("code") == code)["subject_id"].n_unique() / events["subject_id"].n_unique()

    assert share("oncology", "DIAGNOSIS//ICD10CM//C79.9") > 5 * share("heart", "DIAGNOSIS//ICD10CM//C79.9")
    assert share("heart", "DIAGNOSIS//ICD10CM//I50.9") > 3 * share("surgical", "DIAGNOSIS//ICD10CM//I50.9")


def test_equal_seeds_give_equal_records_and_other_seeds_others():
    first, again = (generate(PROFILES["general"], 50, seed=1) for _ in range(2))
    assert first.events.equals(again.events)
    assert first.truth.equals(again.truth)
    assert not generate(PROFILES["general"], 50, seed=2).events.equals(first.events)


def test_hospitals_share_no_subject_number(everyone: dict[str, Records]):
    numbers = pl.concat([records.events["subject_id"].unique() for records in everyone.values()])
    assert numbers.is_unique().all()


def test_every_patient_has_sex_birth_a_stay_and_an_end(everyone: dict[str, Records]):
    events = everyone["heart"].events
    per_patient = events.group_by("subject_id").agg(
        births=(pl.col("code") == "MEDS_BIRTH").sum(),
        static=pl.col("time").is_null().sum(),
        stays=pl.col("code").str.starts_with("HOSPITAL_ADMISSION//").sum(),
        ends=pl.col("code").is_in(["MEDS_DEATH", "FOLLOW_UP//END"]).sum(),
        last=(pl.col("code").is_in(["MEDS_DEATH", "FOLLOW_UP//END"]) & (pl.col("time") == pl.col("time").max())).sum(),
    )
    assert per_patient.height == 6000
    assert (per_patient.select("births", "static", "ends", "last") == 1).to_numpy().all()
    assert per_patient["stays"].min() == 1


def test_timelines_are_short_enough_for_a_demonstration(everyone: dict[str, Records]):
    for records in everyone.values():
        counts = records.events.group_by("subject_id").agg(
            pl.len() + pl.col("numeric_value").is_not_null().sum() + pl.col("time").n_unique()
        )
        assert 60 < counts["len"].median() < 150


def test_lactate_shows_the_acuity_of_a_stay(everyone: dict[str, Records]):
    values = everyone["general"].events.filter(pl.col("code").str.starts_with("LAB//LACTATE"))["numeric_value"]
    inside = [values.is_between(low, high) for low, high in ((0.5, 1.8), (2.2, 3.8), (4.2, 9.0))]
    assert (inside[0] | inside[1] | inside[2]).all()
    assert all(0.02 < part.mean() < 0.9 for part in inside)


def test_the_truth_asks_at_live_discharges_only(everyone: dict[str, Records]):
    records = everyone["general"]
    alive = records.events.filter(
        pl.col("code").str.starts_with("HOSPITAL_DISCHARGE//") & ~pl.col("code").str.ends_with("DIED")
    )
    for task in TASKS:
        asked = records.truth.filter(pl.col("task") == task)
        pairs = asked.select("subject_id", pl.col("prediction_time").alias("time")).sort("subject_id", "time")
        assert pairs.equals(alive.select("subject_id", "time").sort("subject_id", "time"))
    assert records.truth.filter(pl.col("complete"))["label"].min() == 0


def test_a_written_hospital_is_a_meds_dataset_with_its_truth_beside_it(tmp_path: Path):
    files = write_hospital(tmp_path / "site", PROFILES["surgical"], 40, seed=5)
    dataset = MedsDataset.open(files.records)
    made = generate(PROFILES["surgical"], 40, seed=5)
    assert dataset.subjects == files.patients == 40
    assert dataset.notes == []
    assert dataset.read(dataset.shards[0]).equals(canonical_order(made.events))
    assert pl.read_parquet(files.truth).equals(made.truth)
    assert not any("truth" in str(path) for path in files.records.rglob("*"))


def test_an_empty_hospital_is_possible(tmp_path: Path):
    files = write_hospital(tmp_path / "site", PROFILES["heart"], 0, seed=0)
    assert MedsDataset.open(files.records).subjects == 0
    assert pl.read_parquet(files.truth).height == 0


def test_wrong_profiles_are_named():
    with pytest.raises(ConfigError, match=r"'heart'.*prevalence needs 8 numbers"):
        replace(PROFILES["heart"], prevalence=(0.5,))
    with pytest.raises(ConfigError, match=r"'heart'.*reasons needs 10 weights"):
        replace(PROFILES["heart"], practice=replace(PROFILES["heart"].practice, reasons=(0.0,) * 10))
    with pytest.raises(ConfigError, match="patients must be 0 or more, not -1"):
        generate(PROFILES["heart"], -1, seed=0)


def test_questions_asked_of_tokens_find_the_same_answers_as_the_truth(tmp_path: Path):
    profile = PROFILES["general"]
    write_hospital(tmp_path, profile, 300, seed=3)
    dataset = MedsDataset.open(tmp_path / "records")
    rule = SplitRule("key", tuning=0.0, held_out=0.0)
    codebook = Codebook.build(survey(dataset, rule, TokenizerOptions(min_patients=2)))
    split = build_store(dataset, codebook, rule, tmp_path / "store").split("train")
    truth = pl.read_parquet(tmp_path / "truth.parquet")
    for task in (
        Task("death_90d", "?", ("HOSPITAL_DISCHARGE",), ("MEDS_DEATH",), (), 0.0, 90, "each"),
        Task(
            "readmission_30d", "?", ("HOSPITAL_DISCHARGE",), ("HOSPITAL_ADMISSION",), ("MEDS_DEATH",), 0.0, 30, "each"
        ),
    ):
        found = cohort(task, split, codebook)
        rows = truth.filter(pl.col("task") == task.name).sort("subject_id", "prediction_time")
        # Who dies in hospital is discharged and dead at one moment: decided, not asked.
        assert found.subject_ids.tolist() == rows["subject_id"].to_list()
        assert found.prediction_us.tolist() == rows["prediction_time"].to_physical().to_list()
        assert found.labels.tolist() == rows["label"].to_list()
        assert found.notes == ()
