"""The command line: what a person types, sees, and gets back as exit codes."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import polars as pl
import pytest

from client.budget import Budget, Release
from federation.accountant import Approximate, Mechanisms
from model.task_files import shipped
from server.app import coordinate
from server.post import TooFewSites
from tests import tiny
from tests.typed import commands, fedcomet
from tokenizer.codebook import Codebook
from tokenizer.events import write_meds
from tokenizer.labels import read_labels
from tokenizer.store import TokenStore

REPOSITORY = Path(__file__).parents[1]
HELP = Path(__file__).parent / "golden" / "help.txt"
STUDY = """
name = "tiny"
arms = ["federated", "alone", "pooled", "ensemble"]
[data]
kind = "synthetic"
hospitals = ["heart", "general"]
patients = 120
[tokenizer]
values = "fused"
[model]
context = 128
[training]
rounds = 1
local_epochs = 0.2
batch_tokens = 1024
[[task]]
name = "readmission_30d"
question = "Will the patient be admitted again within 30 days?"
trigger = ["HOSPITAL_DISCHARGE"]
occurrence = "each"
outcome = ["HOSPITAL_ADMISSION"]
competing = ["MEDS_DEATH"]
horizon_days = 30
[evaluation]
trajectories = 2
max_tokens = 16
resamples = 100
"""


def process(*arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """As a process of its own, which takes seconds; for what starts others, and to see that the script itself works."""
    environment = {**os.environ, "COLUMNS": "100", "TERM": "dumb", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, str(REPOSITORY / "fedcomet.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def finished(root: Path) -> Path:
    """A finished study's folder."""
    (root / "study.toml").write_text(STUDY)
    done = process("simulate", "study.toml", "--workers", 2, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "0 yes" not in done.stdout
    for name in ("federated", "heart alone", "general alone", "pooled", "ensemble", "true risk"):
        assert name in done.stdout
    return root / "runs" / "tiny"


@pytest.fixture(scope="module")
def tokens(root: Path, finished: Path) -> Path:
    """Another hospital's records as tokens of the study's codebook."""
    records = finished / "records" / "heart" / "records"
    done = fedcomet("tokenize", records, "--out", root / "tokens", "--codebook", finished / "model" / "codebook.json")
    assert done.returncode == 0, done.stderr
    return root / "tokens" / "store"


def test_the_help_of_every_command_is_the_golden_one() -> None:
    """`python -m tests.test_cli` writes the golden file anew."""
    assert help_texts() == HELP.read_text(encoding="utf-8")


def help_texts() -> str:
    texts = [fedcomet(*words, "--help") for words in commands()]
    assert all(text.returncode == 0 for text in texts)
    lines = "\n".join(text.stdout for text in texts).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def test_a_study_ends_with_a_table_and_a_report(finished: Path) -> None:
    assert (finished / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "http://" not in (finished / "report.html").read_text().replace("http://www.w3.org/", "")
    assert sorted(path.name for path in (finished / "model").iterdir()) == ["checkpoint.safetensors", "codebook.json"]


def test_the_report_is_shown_again_byte_for_byte(finished: Path) -> None:
    before = (finished / "report.html").read_bytes()
    done = fedcomet("report", finished)
    assert done.returncode == 0
    assert "federated" in done.stdout
    assert (finished / "report.html").read_bytes() == before


def test_nothing_half_written_is_left(finished: Path) -> None:
    assert not list(finished.rglob("*.partial"))


def test_tokenize_makes_a_codebook_of_its_own(tmp_path: Path) -> None:
    site = tiny.site(tmp_path, "here", seed=1)
    done = fedcomet("tokenize", site.data, "--out", tmp_path / "out", "--min-patients", 5)
    assert done.returncode == 0
    assert "train: " in done.stdout
    assert (tmp_path / "out" / "codebook.json").exists()


def test_workers_change_nothing(tmp_path: Path) -> None:
    site = tiny.site(tmp_path, "here", seed=1)
    for name, more in (("alone", ()), ("together", ("--workers", 2))):
        done = process("tokenize", site.data, "--out", tmp_path / name, "--min-patients", 5, *more)
        assert done.returncode == 0, done.stderr
    alone, together = (
        {file.relative_to(tmp_path / name): file.read_bytes() for file in (tmp_path / name).rglob("*.*")}
        for name in ("alone", "together")
    )
    assert alone == together
    assert len(alone) == 14


def test_tables_are_read_by_their_mapping_and_bad_rows_are_set_aside(tmp_path: Path) -> None:
    folder = tmp_path / "extract"
    folder.mkdir()
    rows = [f"{patient},2020-01-{day:02},{100 + day}" for patient in range(1, 21) for day in range(1, 9)]
    bad = ["1,2020-13-01,5", *["1,2020-01-01,"] * 3]
    (folder / "labs.csv").write_text("\n".join(["patient,day,glucose", *rows, *bad]) + "\n")
    (tmp_path / "mapping.toml").write_text(
        '[[table]]\nname = "labs"\nfiles = "labs.csv"\nsubject = "patient"\ntime = "day"\n'
        '[[table.event]]\ncode = "LAB//GLUCOSE"\nvalue = "glucose"\nunit = "mg/dL"\n'
    )
    arguments = ("tokenize", folder, "--source", "tables", "--mapping", tmp_path / "mapping.toml")
    arguments = (*arguments, "--out", tmp_path / "out", "--min-patients", 5)
    told = refused(*arguments)
    assert "labs.csv" in told
    assert "row 162" in told
    assert "--quarantine" in told
    done = fedcomet(*arguments, "--quarantine")
    assert done.returncode == 0, done.stderr
    assert "1 row was set aside" in done.stdout
    assert "3 rows were left out by named filters, counted in" in done.stdout
    assert "LAB//GLUCOSE//mg/dL" in (tmp_path / "out" / "codebook.json").read_text()
    assert (tmp_path / "out" / "records" / "quarantine.csv").exists()


def test_a_site_is_checked_in_the_terminal_on_a_page_and_as_json(tmp_path: Path) -> None:
    site = tiny.site(tmp_path, "here", seed=1)
    options = ("--min-patients", 5, "--context", 32, "--seconds", 0)
    done = fedcomet("site", "check", site.data, *options, "--out", tmp_path / "check.html")
    assert done.returncode == 0, done.stderr
    assert "What the survey would send" in done.stdout
    assert (tmp_path / "check.html").read_text().startswith("<!DOCTYPE html>")
    done = fedcomet("site", "check", site.data, *options, "--json")
    assert json.loads(done.stdout)["subjects"] == 40


def test_a_site_approves_a_run_and_audits_what_left(tmp_path: Path) -> None:
    files = tiny.site(tmp_path, "icu", seed=1)
    (tmp_path / "strict.toml").write_text(fedcomet("site", "policy").stdout)
    rules = 'version = 1\n[privacy]\ntraining = "optional"\n[secure_aggregation]\nrequired = false\n'
    (tmp_path / "policy.toml").write_text(rules + "[statistics]\nfloor = 5\n")
    files = dataclasses.replace(files, policy=tmp_path / "policy.toml")
    grid = tiny.FunctionGrid({1: tiny.honest(files)})
    plan = tiny.plan(rounds=1, min_sites=1)
    with pytest.raises(TooFewSites, match="has not approved"):
        coordinate(grid, tmp_path / "run", plan)
    state = ("--state", files.state)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_bytes())
    (waits, _) = fedcomet("site", "approve", *state).stdout.split(" ", 1)
    told = fedcomet("site", "approve", waits[:12], *state, "--policy", tmp_path / "strict.toml")
    assert told.returncode == 1
    assert "privacy.training: the run has no differential privacy" in told.stderr
    done = fedcomet("site", "approve", tmp_path / "run" / "manifest.json", *state, "--policy", files.policy, "--yes")
    assert done.returncode == 0, done.stderr
    for part in ("What will run: tiny", "What will leave", "What it costs a patient", manifest["software"], waits):
        assert part in done.stdout
    coordinate(grid, tmp_path / "run", plan)
    done = fedcomet("site", "audit", files.state)
    assert done.returncode == 0, done.stderr
    assert "whole" in done.stdout
    found = json.loads(fedcomet("site", "audit", files.state, "--json").stdout)
    assert (found["broken"], found["entries"], found["without_policy"]) == (None, 5, 0)
    assert fedcomet("site", "key", files.state).stdout.strip() == found["key"]
    path = next((files.state / "outbound").glob("*.jsonl"))
    path.write_bytes(path.read_bytes().replace(b"train.reply", b"train.repls"))
    done = fedcomet("site", "audit", files.state)
    assert done.returncode == 1
    assert "broken at entry 4" in done.stderr


def test_keys_are_made_once_and_shown(tmp_path: Path) -> None:
    first = fedcomet("coordinator", "key", tmp_path / "runs").stdout
    assert first.startswith("ed25519:")
    assert fedcomet("coordinator", "key", tmp_path / "runs").stdout == first


def test_futures_of_a_patient_are_shown_and_written(finished: Path, tokens: Path, tmp_path: Path) -> None:
    subject = next(iter(pl.read_parquet(finished / "records/heart/records/data/**/*.parquet")["subject_id"]))
    arguments = ("--subject", subject, "--days", 30, "--trajectories", 2, "--max-tokens", 20)
    done = fedcomet("rollout", finished / "model", tokens, *arguments, "--out", tmp_path / "futures.parquet")
    assert done.returncode == 0, done.stderr
    assert "future 2:" in done.stdout
    assert set(pl.read_parquet(tmp_path / "futures.parquet")["trajectory"]) <= {-1, 0, 1}


def test_futures_of_a_split_are_written_as_records(root: Path, finished: Path, tokens: Path, tmp_path: Path) -> None:
    arguments = ("rollout", finished / "model", tokens, "--split", "held_out", "--max-tokens", 12)
    done = fedcomet(*arguments, "--days", 30, "--until", "HOSPITAL_ADMISSION", "--out", tmp_path / "futures")
    assert done.returncode == 0, done.stderr
    assert "predictions x 3" in done.stdout
    again = fedcomet("tokenize", tmp_path / "futures", "--out", tmp_path / "again", "--min-patients", 1)
    assert again.returncode == 0, again.stderr
    done = fedcomet(*arguments, "--study", root / "study.toml", "--out", tmp_path / "asked")
    assert done.returncode == 0, done.stderr
    assert pl.read_parquet(tmp_path / "asked" / "estimates.parquet")["risk"].is_between(0, 1).all()


def test_a_model_is_evaluated_on_a_store(root: Path, finished: Path, tokens: Path, tmp_path: Path) -> None:
    arguments = (finished / "model", tokens, root / "study.toml", "--workers", 1)
    done = fedcomet("evaluate", *arguments, "--out", tmp_path / "risks.parquet")
    assert done.returncode == 0, done.stderr
    assert "AUROC" in done.stdout
    risks = pl.read_parquet(tmp_path / "risks.parquet")
    assert risks.height > 10
    assert risks["risk"].is_between(0, 1).all()
    assert {"task_hash", "se", "risk_curve", "time_days", "event"} <= set(risks.columns)
    # Sex is a fact of the record, age as of the prediction; the made-up hospitals' race is in their forms only.
    people = pl.read_parquet(finished / "records/heart/records/data/**/*.parquet").filter(pl.col("time").is_null())
    known = dict(people.filter(pl.col("code").str.starts_with("GENDER//")).select("subject_id", "code").iter_rows())
    assert {(known[subject], f"GENDER//{sex}") for subject, sex in risks.select("subject_id", "sex").iter_rows()} <= {
        ("GENDER//F", "GENDER//F"),
        ("GENDER//M", "GENDER//M"),
    }
    assert risks["age"].null_count() == 0
    done = fedcomet("score", tmp_path / "risks.parquet", "--group", "sex", "--resamples", 50)
    assert done.returncode == 0, done.stderr
    done = fedcomet("evaluate", *arguments, "--groups", "height")
    assert (done.returncode, "none of age, sex, race" in done.stderr) == (2, True)
    done = fedcomet("evaluate", *arguments, "--split", "train")
    assert done.returncode == 1
    assert "patients train by the split rule" in done.stderr


def test_a_cohort_is_counted_and_explained_patient_by_patient(tokens: Path) -> None:
    counted = fedcomet("tasks", "check", tokens, "--task", "operations", "--split", "train")
    assert counted.returncode == 0, counted.stderr
    patients = TokenStore.open(tokens).split("train").subject_ids
    row = next(line.split() for line in counted.stdout.splitlines() if line.startswith(" readmission_30d"))
    asked, predictions, *answers = (int(figure.replace(",", "")) for figure in row[1:])
    assert asked == len(patients)
    assert predictions == sum(answers) > 0
    listing = tokens.parent / "cohort.parquet"
    asked_for = ("--task", "operations", "--split", "train", "--out", listing)
    assert fedcomet("tasks", "check", tokens, *asked_for).returncode == 0
    listed = pl.read_parquet(listing).filter(pl.col("task") == "readmission_30d")
    assert set(listed["subject_id"]) == set(patients.tolist())
    made = listed.filter(pl.col("reason").is_null())
    found = [made["boolean_value"].eq_missing(value).sum() for value in (True, False, None)]
    assert (made.height, found) == (predictions, answers)
    assert listed.filter(pl.col("reason").is_not_null())["boolean_value"].null_count() == listed.height - made.height
    made.select("subject_id", "prediction_time", "boolean_value").write_parquet(listing)
    assert len(read_labels(listing).answers) == predictions
    told = fedcomet("tasks", "explain", tokens, "--patient", patients[0], "--task", "readmission_30d")
    assert told.returncode == 0, told.stderr
    assert "ends with: " in told.stdout or "out: " in told.stdout


def test_names_of_tasks_are_whole_in_a_narrow_terminal() -> None:
    listed = fedcomet("tasks", "list").stdout
    for name, group in shipped().items():
        assert f" {name} " in listed
        assert all(f" {task.name} " in listed for task in group)


def test_a_patient_that_a_store_does_not_have_is_an_error(tokens: Path) -> None:
    assert fedcomet("tasks", "explain", tokens, "--patient", -5, "--task", "icu").returncode == 1


def test_a_privacy_plan_compares_batch_sizes() -> None:
    arguments = ("--patients", 2000, "--epsilon", 4, "--rounds", 5, "--steps-per-round", 4, "--batch", 200)
    done = fedcomet("privacy", "plan", *arguments)
    assert done.returncode == 0, done.stderr
    assert "rough estimates" in done.stdout
    done = fedcomet("privacy", "plan", *arguments, "--json")
    rows = json.loads(done.stdout)["rows"]
    assert [row["batch"] for row in rows] == [50, 100, 200, 400, 800]
    assert all(3.9 < row["epsilon"] <= 4 for row in rows)
    small = ("--patients", 150, "--epsilon", 8, "--delta", 1e-4, "--rounds", 1, "--steps-per-round", 2, "--batch", 10)
    done = fedcomet("privacy", "plan", *small, "--model", "0.3m", "--measure", "--json")
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)["measured"]
    assert 3 < measured["plain"] < measured["untrained"]


def test_a_budget_tells_what_was_spent_on_what_and_what_is_left(tmp_path: Path) -> None:
    for name, cost in (("a", 0.5), ("b", 0.25)):
        release = Release("c" * 64, 1, "training", Mechanisms((Approximate(cost),)), "request")
        with Budget.open(tmp_path / name / "budget.sqlite") as budget:
            budget.charge(budget.reserve(release).release, b"answer")
    policy = tmp_path / "policy.toml"
    policy.write_text("version = 1\n[privacy]\nepsilon_total = 2.0\ndelta_total = 1e-6\n")
    done = fedcomet("privacy", "budget", "--state", tmp_path / "a", "--policy", policy)
    assert done.returncode == 0, done.stderr
    assert "spent: epsilon 0.500 at delta 1e-06" in done.stdout
    assert "left: at least 1.500" in done.stdout
    assert "1 step of (0.5, 0)-DP" in done.stdout
    done = fedcomet("privacy", "budget", "--state", tmp_path / "a", "--state", tmp_path / "b", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["sites"][0]["lines"][0]["rounds"] == 1
    assert found["across"]["one_site"] == pytest.approx(0.5, abs=1e-3)
    assert found["across"]["all_sites"] == pytest.approx(0.75, abs=1e-3)
    assert "There is no privacy budget at" in refused("privacy", "budget", "--state", tmp_path / "none")


def test_what_an_abandoned_run_reserved_is_shown_and_then_freed(tmp_path: Path) -> None:
    releases = [
        Release("c" * 64, 1, "training", Mechanisms((Approximate(0.5),)), "request"),
        Release("c" * 64, 2, "training", Mechanisms((Approximate(0.25),)), "request"),
        Release("cd" * 32, 1, "training", Mechanisms((Approximate(0.125),)), "request"),
        Release("survey", 0, "survey", Mechanisms((Approximate(0.5),)), "request"),
    ]
    with Budget.open(tmp_path / "budget.sqlite") as budget:
        for release in releases:
            budget.reserve(release)
        budget.charge(releases[0], b"answer")
    shown = fedcomet("privacy", "free", "--state", tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert [line for line in ("cccccccccccccccc", "cdcdcdcdcdcdcdcd") if line not in shown.stdout] == []
    assert "nothing was freed" in shown.stdout
    assert "several runs" in refused("privacy", "free", "c", "--state", tmp_path, "--yes")
    assert "nothing was freed" in fedcomet("privacy", "free", "cc", "--state", tmp_path).stdout
    done = fedcomet("privacy", "free", "cc", "--state", tmp_path, "--yes")
    assert "1 freed; spent or reserved: epsilon 1.125 at delta 1e-06, before 1.375" in done.stdout, done.stderr
    assert "nothing is reserved" in fedcomet("privacy", "free", "cc", "--state", tmp_path, "--yes").stdout
    told = fedcomet("privacy", "budget", "--state", tmp_path, "--json")
    lines = {line["run"]: line for line in json.loads(told.stdout)["sites"][0]["lines"]}
    assert [lines["c" * 64][name] for name in ("rounds", "waiting", "freed")] == [1, 0, 1]
    assert lines["cd" * 32]["waiting"] == 1


def test_a_model_goes_out_and_comes_back(root: Path, finished: Path, tokens: Path) -> None:
    shown = fedcomet("model", "show", finished / "model")
    assert shown.returncode == 0, shown.stderr
    for told in (
        "preset",
        "0.3m",
        "1 of 1",
        "2 sites",
        "fedcomet",
        Codebook.load(finished / "model/codebook.json").hash,
    ):
        assert told in shown.stdout
    assert "unknown" not in shown.stdout
    done = fedcomet("model", "export", finished / "model", root / "export")
    assert done.returncode == 0, done.stderr
    done = fedcomet("model", "import", root / "export", root / "back")
    assert done.returncode == 0, done.stderr
    for name in ("checkpoint.safetensors", "codebook.json"):
        assert (root / "back" / name).read_bytes() == (finished / "model" / name).read_bytes()
    assert "would be replaced" in refused("model", "import", root / "export", root / "back")
    assert "can't be read" in refused("model", "show", root / "gone")
    assert "config.json: can't be read" in refused("model", "import", finished / "model", root / "more")


def test_the_guide_to_interchange_works_as_it_stands(root: Path, finished: Path, tokens: Path) -> None:
    if not (root / "export").exists():
        assert fedcomet("model", "export", finished / "model", root / "export").returncode == 0
    (guide,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "interchange.md").read_text(), re.DOTALL)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", guide]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("numeric_value") == 3


def refused(*arguments: object) -> str:
    done = fedcomet(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not done.stdout
    return done.stderr


def test_what_is_wrong_is_said_without_a_traceback_and_with_exit_code_1(
    root: Path, finished: Path, tokens: Path, tmp_path: Path
) -> None:
    broken = tiny.site(tmp_path, "broken", seed=2).data
    shard = next(broken.rglob("data/**/*.parquet"))
    shard.write_bytes(b"PAR1")
    assert str(shard) in refused("tokenize", broken, "--out", tmp_path / "out")
    assert str(shard) in refused("site", "check", broken)
    assert "no source hl7" in refused("tokenize", broken, "--out", tmp_path / "out", "--source", "hl7").replace("'", "")
    assert "--cdm is for the source omop" in refused("site", "check", broken, "--cdm", "5.3")
    assert "needs a mapping" in refused("site", "check", broken, "--source", "tables")
    assert "not both" in refused("tokenize", broken, "--out", tmp_path / "out", "--ray", "auto", "--workers", 2)
    assert "none.toml: can't be read" in refused("site", "check", broken, "--config", tmp_path / "none.toml")
    assert not (tmp_path / "out" / "store").exists()
    assert "none.toml: can't be read" in refused("simulate", tmp_path / "none.toml")
    assert "report.json" in refused("report", tmp_path)
    assert "checkpoint.safetensors is missing" in refused("rollout", tmp_path, tokens, "--subject", 1)
    assert "no subject 77" in refused("rollout", finished / "model", tokens, "--subject", 77)
    own = tiny.site(tmp_path, "own", seed=3).data
    assert fedcomet("tokenize", own, "--out", tmp_path / "own-tokens", "--min-patients", 5).returncode == 0
    told = refused("evaluate", finished / "model", tmp_path / "own-tokens" / "store", root / "study.toml")
    assert "codebook" in told


def test_an_audit_that_contradicts_a_claim_has_exit_code_3(finished: Path, root: Path) -> None:
    quick = ("--canaries", 60, "--steps", 150, "--most", 4, "--seed", 1, "--confidence", 0.9)
    done = fedcomet("audit", finished, "--epsilon", 0.001, *quick, "--out", root / "audit.html")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "The privacy claim does not hold" in done.stdout
    assert 'class="alarm"' in (root / "audit.html").read_text()
    assert json.loads((root / "audit.json").read_text())["claim"]["epsilon"] == 0.001


def test_a_finished_model_is_audited_with_a_token_store(finished: Path, tokens: Path, root: Path) -> None:
    model = finished / "model"
    done = fedcomet("audit", "--model", model, "--members", tokens, "--most", 5, "--out", root / "model.html")
    assert done.returncode == 0, done.stderr
    assert "AUROC" in done.stdout
    assert "finished model" in (root / "model.html").read_text()


def test_tokenize_replaces_nothing_that_it_did_not_write(tmp_path: Path) -> None:
    site = tiny.site(tmp_path, "here", seed=1)
    out = tmp_path / "out"
    shutil.copytree(site.data, out / "records")
    before = {file: file.read_bytes() for file in out.rglob("*.*")}
    assert "the records are read from there" in refused("tokenize", out / "records", "--out", out, "--quarantine")
    assert "wasn't written by fedcomet" in refused("tokenize", site.data, "--out", out, "--quarantine")
    assert {file: file.read_bytes() for file in out.rglob("*.*")} == before


def test_what_the_system_refuses_is_said_with_its_place(tmp_path: Path) -> None:
    site = tiny.site(tmp_path, "here", seed=1)
    file = tmp_path / "file"
    file.touch()
    assert f"{file}: is a file" in refused("tokenize", site.data, "--out", file)
    assert f"{file}/below/it: Not a directory" in refused("tokenize", site.data, "--out", file / "below" / "it")
    told = told_by_a_full_disk(4096, "tokenize", site.data, "--out", tmp_path / "out")
    assert re.search(rf"{tmp_path}/out/store\S*: File too large. Files there may not be so large", told)
    assert not (tmp_path / "out").exists()


def told_by_a_full_disk(most_bytes: int, *arguments: object) -> str:
    """What is said where no file may be larger than `most_bytes`."""
    small = ["sh", "-c", f'ulimit -f {most_bytes // 512}; exec "$@"', "sh", sys.executable]
    command = [*small, str(REPOSITORY / "fedcomet.py"), *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_rerun_that_fails_at_the_store_leaves_what_was(tmp_path: Path) -> None:
    out, first, second = (tmp_path / name for name in ("out", "first", "second"))
    for site, code in ((first, "A"), (second, "B")):
        # So regular that the store, which isn't compressed, is much larger than the records.
        events = pl.DataFrame({"subject_id": range(20)}, schema={"subject_id": pl.Int64}).select(
            pl.col("subject_id").repeat_by(500).explode(), time=pl.datetime(2020, 1, 1), code=pl.lit(code)
        )
        write_meds(site, [("0", events)], name="site")
    done = fedcomet("tokenize", first, "--quarantine", "--out", out)
    assert done.returncode == 0, done.stderr
    before = {file: file.read_bytes() for file in out.rglob("*.*")}
    records, store = (max(len(before[f]) for f in before if name in f.parts) for name in ("records", "store"))
    most = int(records * 1.2)
    assert most < store
    told = told_by_a_full_disk(most, "tokenize", second, "--quarantine", "--out", out)
    assert re.search(rf"{out}/store\S*: File too large", told)
    assert {file: file.read_bytes() for file in out.rglob("*.*")} == before


def test_wrong_arguments_have_exit_code_2(
    finished: Path, tokens: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = import_module("fedcomet")
    for arguments in (
        ("simulate",),
        ("nonsense",),
        ("privacy", "budget"),
        ("privacy", "free", "--yes"),
        ("privacy", "plan", "--patients", 10, "--epsilon", 1, "--rounds", 1, "--passes", 1, "--batch", 11),
        ("tokenize", root, "--out", root / "x", "--values", "odd"),
        ("rollout", finished / "model", tokens, "--subject", 1, "--at", "yesterday"),
        ("evaluate", finished / "model", tokens, root / "study.toml", "--split", "odd"),
        ("rollout", finished / "model", tokens),
        ("rollout", finished / "model", tokens, "--subject", 1, "--split", "train"),
        ("rollout", finished / "model", tokens, "--split", "train"),
        ("rollout", finished / "model", tokens, "--subject", 1, "--top-p", "0.5"),
        ("audit",),
        ("audit", finished, "--model", finished / "model"),
        ("audit", finished, "--noise-multiplier", 1),
        ("audit", "--model", finished / "model"),
    ):
        monkeypatch.setattr(sys, "argv", ["fedcomet", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            program.main()
        assert end.value.code == 2, arguments
    assert capsys.readouterr().out == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in process("simulate", tmp_path / "none.toml", "--debug").stderr


if __name__ == "__main__":
    HELP.parent.mkdir(exist_ok=True)
    HELP.write_text(help_texts(), encoding="utf-8")
