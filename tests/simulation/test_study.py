"""A study trains every arm, asks all of them the same, survives kills, and reports what it did."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from server.futures import Model
from server.journal import Journal, Status
from server.report import load, write_report
from server.rounds import TUNING
from simulation.config import Study
from simulation.findings import report_of
from simulation.pool import Pool
from simulation.questions import evaluate
from simulation.study import Result, run_study
from tests import tiny
from tests.simulation.studies import study
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError, DataError
from tokenizer.store import TokenStore

REPOSITORY = Path(__file__).parents[2]
ALONE = ["site-0 alone", "site-1 alone", "site-2 alone"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


@pytest.fixture(scope="module")
def settings(root: Path) -> Study:
    return study(tiny.sites(root))


@pytest.fixture(scope="module")
def result(root: Path, settings: Study) -> Result:
    return run_study(settings, root / "study", workers=2)


def tokens(folder: Path) -> int:
    with Journal(folder / "ledger.sqlite") as journal:
        replies = [reply for number in (1, 2) for reply in journal.replies(number)]
    assert all(reply.status is Status.ACCEPTED for reply in replies)
    return sum(reply.tokens for reply in replies)


def test_all_arms_answer_the_same_predictions(result: Result) -> None:
    (answers,) = result.answers
    assert list(answers.risks) == ["federated", *ALONE, "pooled", "ensemble"]
    assert {len(risk) for risk in answers.risks.values()} == {len(answers.cohort)}
    assert set(answers.cohort.labels.tolist()) == {0, 1}
    assert len(answers.sites) == len(answers.cohort)
    np.testing.assert_allclose(answers.risks["ensemble"], np.mean([answers.risks[arm] for arm in ALONE], axis=0))


def test_the_asked_patients_are_held_out_and_from_all_sites(result: Result, root: Path) -> None:
    (answers,) = result.answers
    rule = result.arms[0].outcome.manifest.split if result.arms[0].outcome else None
    assert rule is not None
    assert set(rule.assign(answers.cohort.subject_ids).tolist()) == {2}
    assert set((answers.cohort.subject_ids // 100_000).tolist()) == {1, 2, 3}


def test_pooled_and_federated_train_on_about_as_many_tokens_and_the_sites_alone_on_exactly_their_share(
    result: Result,
) -> None:
    folders = {arm.name: arm.folder for arm in result.arms}
    federated = tokens(folders["federated"])
    assert sum(tokens(folders[arm]) for arm in ALONE) == federated
    # One pass is one pass; how it falls into batches of 512 tokens differs.
    assert abs(tokens(folders["pooled"]) - federated) < 0.1 * federated


def test_arms_train_on_as_many_tokens_where_the_federation_draws_one_site_for_each_round(root: Path) -> None:
    drawn = {"rounds": 9, "sites_per_round": 1, "evaluate_every": 3, "local_epochs": 0.5, "batch_tokens": 512}
    chosen = study(tiny.sites(root), arms=["federated", "alone", "pooled"], training=drawn)
    arms = {arm.name: arm for arm in run_study(chosen, root / "drawn", workers=2, ask=False).arms}
    with Journal(arms["federated"].folder / "ledger.sqlite") as journal:
        asked = [[reply.site for reply in journal.replies(number)] for number in range(1, 10)]
        federated = sum(reply.tokens for number in range(1, 10) for reply in journal.replies(number))
    assert {len(sites) for sites in asked} == {1}
    assert len({sites[0] for sites in asked}) > 1
    for name in ("pooled", "site-1 alone"):
        outcome = arms[name].outcome
        assert outcome is not None
        assert outcome.manifest.rounds == 3
    with Journal(arms["pooled"].folder / "ledger.sqlite") as journal:
        pooled = sum(reply.tokens for number in range(1, 4) for reply in journal.replies(number))
        assert set(journal.losses(TUNING)) == {1, 2, 3}  # evaluated as often as the federation, for its tokens
    # Whose turn it is, is drawn; sites differ in size by less than a third.
    assert abs(pooled - federated) < 0.4 * federated


def test_all_arms_share_one_codebook(result: Result) -> None:
    hashes = {arm.outcome.manifest.codebook_hash for arm in result.arms if arm.outcome}
    assert len(hashes) == 1


def test_the_report_holds_every_arm_and_can_be_written_again_from_its_json(result: Result, tmp_path: Path) -> None:
    report = report_of(result, "fedcomet simulate tiny.toml")
    write_report(tmp_path / "report.html", report)
    page = (tmp_path / "report.html").read_bytes()
    for name in ("federated", *ALONE, "pooled", "ensemble", "site-0"):
        assert name.encode() in page
    write_report(tmp_path / "again.html", load(tmp_path / "report.json"))
    assert (tmp_path / "again.html").read_bytes() == page
    assert sum(sent.messages for sent in report.outbound) == 3 * (1 + 1 + 2 + 2)


def test_the_same_call_again_does_nothing_new(result: Result, root: Path, settings: Study) -> None:
    before = {path: path.stat().st_mtime_ns for path in (root / "study").rglob("*.safetensors")}
    again = run_study(settings, root / "study", workers=1)
    assert {path: path.stat().st_mtime_ns for path in (root / "study").rglob("*.safetensors")} == before
    np.testing.assert_array_equal(again.answers[0].risks["federated"], result.answers[0].risks["federated"])


@pytest.mark.slow
def test_a_study_killed_anywhere_ends_the_same(result: Result, tmp_path: Path) -> None:
    tiny.sites(tmp_path)
    command = [sys.executable, str(REPOSITORY / "tests/simulation/studies.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for moment in (["federated", "1"], ["pooled", "1"], ["rollouts", "0"]):
        done = subprocess.run([*command, *moment], env=environment, start_new_session=True, check=False)
        if moment != ["rollouts", "0"]:
            assert done.returncode == -signal.SIGKILL
    subprocess.run([*command, "never", "0"], env=environment, start_new_session=True, check=True)
    assert ends(tmp_path / "study") == ends(result.folder)


def ends(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in ("model/*", "answers/*.npz", "arms/*/checkpoints/*")
        for path in folder.glob(pattern)
    }


@pytest.mark.parametrize(("rate", "kept"), [(3e-3, "0001.safetensors"), (10.0, "initial.safetensors")])
def test_a_site_keeps_its_own_model_only_where_its_tuning_patients_gain_by_it(
    tmp_path: Path, rate: float, kept: str
) -> None:
    training = {"rounds": 1, "local_epochs": 0.5, "batch_tokens": 512, "personal_learning_rate": rate}
    settings = study(tiny.sites(tmp_path)[:2], arms=["federated", "personal"], training=training)
    found = run_study(settings, tmp_path / "study", workers=2, ask=False)
    federated, *own = found.arms
    assert [arm.name for arm in own] == ["site-0 personal", "site-1 personal"]
    for arm in own:
        assert arm.outcome is not None
        assert arm.outcome.best_checkpoint.name == kept
        if kept.startswith("initial"):
            assert federated.outcome is not None
            assert arm.outcome.best_checkpoint.read_bytes() == federated.outcome.best_checkpoint.read_bytes()
    told = next(training for training in report_of(found, "").training if training.arm == "site-0 personal")
    assert told.rounds == (0, 1)
    assert told.best == np.argmin(told.loss) == int(kept == "0001.safetensors")


def test_other_settings_in_the_same_folder_are_refused_by_name(result: Result, root: Path) -> None:
    other = study(tiny_sites(root), seed=5)
    with pytest.raises(ConfigError, match=r"other settings \(seed\); take another --out"):
        run_study(other, root / "study")


def tiny_sites(root: Path) -> list[tiny.SiteFiles]:
    return [tiny.SiteFiles(path.name, path, root) for path in sorted((root / "data").iterdir())]


def test_supervised_arms_without_scikit_learn_are_refused_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    settings = study(tiny.sites(tmp_path), arms=["federated", "supervised"])
    with pytest.raises(ConfigError, match=r"fedcomet\[baselines\]"):
        run_study(settings, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path, settings: Study) -> None:
    (tmp_path / "study").mkdir()
    with (tmp_path / "study" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is working here"):
            run_study(settings, tmp_path / "study")


def test_a_site_without_patients_is_named_and_the_others_go_on(tmp_path: Path) -> None:
    files = [*tiny.sites(tmp_path, 2), tiny.site(tmp_path, "empty", seed=9, patients=0)]
    found = run_study(study(files), tmp_path / "study", workers=2)
    failed = {arm.name: arm.failure for arm in found.arms if arm.failure}
    assert list(failed) == ["empty alone"]
    assert "empty: has no patients" in failed["empty alone"]
    report = report_of(found, "")
    empty = next(site for site in report.sites if site.name == "empty")
    assert "no patients" in empty.note
    assert {row.round: row.accepted for row in report.rounds} == {1: 2, 2: 2}


def test_a_corrupt_shard_is_named_at_its_own_site_and_the_others_go_on(tmp_path: Path) -> None:
    files = tiny.sites(tmp_path, 3)
    shard = next(files[1].data.rglob("data/**/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:100])
    found = run_study(study(files, arms=["federated"]), tmp_path / "study", workers=2)
    report = report_of(found, "")
    assert {site.name: bool(site.note) for site in report.sites} == {"site-0": False, "site-1": True, "site-2": False}
    told = (tmp_path / "study" / "state" / "site-1" / "site.log").read_text()
    assert str(shard) in told


def test_a_trained_model_answers_alone_as_it_did_in_the_study(result: Result, settings: Study) -> None:
    model = Model.at(result.folder / "model")
    store = next((result.folder / "state" / "site-0" / "stores").glob("*/manifest.json")).parent
    with Pool(1) as pool:
        (answers,) = evaluate(model, TokenStore.open(store), settings, "held_out", pool, lambda step: None)
    here = result.answers[0].sites == 0
    np.testing.assert_array_equal(answers.cohort.subject_ids, result.answers[0].cohort.subject_ids[here])
    np.testing.assert_allclose(answers.risks["model"], result.answers[0].risks["federated"][here])


def test_a_store_of_another_codebook_is_refused_with_both_hashes(result: Result, settings: Study, root: Path) -> None:
    other = run_study(
        study(tiny_sites(root), arms=["federated"], tokenizer={"min_patients": 5, "value_bins": 4}),
        root / "other",
        workers=2,
    )
    store = next((other.folder / "state" / "site-0" / "stores").glob("*/manifest.json")).parent
    model = Model.at(result.folder / "model")
    ours, theirs = Codebook.load(model.codebook).hash, TokenStore.open(store).codebook_hash
    with Pool(1) as pool, pytest.raises(DataError) as caught:
        evaluate(model, TokenStore.open(store), settings, "held_out", pool, lambda step: None)
    assert ours in str(caught.value)
    assert theirs in str(caught.value)
