"""A plan to begin with: what it holds, and that it is one that can be started."""

import json
from pathlib import Path

import pytest

from model import task_files
from server.central import CentralPlan
from server.home import CoordinatorHome, CoordinatorSettings, Federation
from server.ledger import Ledger
from server.plan import FederationPlan
from tests import tiny
from tests.typed import fedcomet
from tests.watched import SITES, enrol
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.events import write_meds


@pytest.fixture
def home(ram_path: Path) -> Path:
    made = CoordinatorHome.init(
        ram_path / "home", CoordinatorSettings(federation=Federation(name="x", address="y")), None
    )
    with Ledger.open(made.ledger_url) as ledger:
        for site in SITES:
            enrol(ledger, made, site)
        ledger.members.invite("delft", "site", "ff" * 32, 3600)  # type: ignore[arg-type]
    return made.path


def test_a_plan_is_private_and_sums_over_the_sites_that_have_joined(home: Path) -> None:
    done = fedcomet("coordinator", "plan", "first", "--epsilon", 3, "--patients", 2000, "--home", home)
    assert (done.returncode, done.stderr) == (0, "")
    made = FederationPlan.from_bytes(done.stdout.encode())
    assert made.secure_aggregation is not None
    assert set(made.secure_aggregation.roster) == set(SITES)
    agreed = made.manifest(Codebook.build(Survey(TokenizerOptions())))
    assert agreed.privacy is not None
    assert agreed.privacy.epsilon <= 3


def test_a_plan_without_protection_says_who_will_refuse_it(home: Path) -> None:
    done = fedcomet("coordinator", "plan", "first", "--in-clear", "--min-sites", 2, "--model", "0.3m")
    assert done.stderr.count("will refuse") == 2
    assert FederationPlan.from_bytes(done.stdout.encode()).min_sites == 2
    assert json.loads(done.stdout)["secure_aggregation"] is None


def test_too_few_sites_for_sums_and_what_noise_needs_are_said(home: Path) -> None:
    with Ledger.open(CoordinatorHome.open(home).ledger_url) as ledger:
        ledger.members.revoke(SITES[0], "left", "a test")
    done = fedcomet("coordinator", "plan", "first", "--home", home)
    assert done.returncode == 1
    assert "2 sites have joined, too few for sums over 3" in done.stderr
    done = fedcomet("coordinator", "plan", "first", "--epsilon", 3, "--home", home)
    assert done.returncode == 2
    assert "--patients" in done.stderr


ASKED = """version = 1
[[task]]
name = "lab"
question = "Which lab comes first?"
trigger = ["LAB//0"]
outcome = ["LAB//1"]
horizon_days = 30
occurrence = "each"
"""


def test_a_coordinator_says_what_it_asks_by_itself_and_when_the_run_ends_for_it(tmp_path: Path) -> None:
    write_meds(tmp_path / "held", [("train/0", tiny.records(7, 5))], name="held by the server")
    (tmp_path / "lab.toml").write_text(ASKED)
    words = ("coordinator", "plan", "first", "--in-clear", "--central", tmp_path / "held")
    more = ("--ask", tmp_path / "lab.toml", "--every", 3, "--patience", 2, "--metric", "brier", "--foreign")
    done = fedcomet(*words, *more)
    assert done.returncode == 0, done.stderr
    made = FederationPlan.from_bytes(done.stdout.encode())
    tasks = task_files.read(tmp_path / "lab.toml")
    assert made.central == CentralPlan(str(tmp_path / "held"), tasks, every=3, metric="brier", patience=2, foreign=True)
    assert made.tokenizer.named == ("LAB//0", "LAB//1")
    assert made.purposes == ("Which lab comes first?",)
    loss_only = FederationPlan.from_bytes(fedcomet(*words).stdout.encode()).central
    assert loss_only == CentralPlan(str(tmp_path / "held"), metric="loss")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--patience", 2), 2, "--patience needs it"),
        (("--central", "held", "--metric", "f1"), 2, "choose auroc, brier or loss"),
        (("--central", "held", "--metric", "auroc"), 1, 'metric = "auroc" needs tasks'),
        (("--central", "held", "--ask", "operation"), 1, "`fedcomet tasks list` names them"),
        (("--central", "held", "--ask", "icu", "--ask", "icu"), 1, "every task needs a name of its own"),
        (("--central", "nowhere"), 1, "nowhere"),
    ],
)
def test_what_cannot_be_asked_centrally_is_said_when_the_plan_is_made(
    words: tuple[object, ...], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_meds(tmp_path / "held", [("train/0", tiny.records(7, 5))], name="held by the server")
    monkeypatch.chdir(tmp_path)
    done = fedcomet("coordinator", "plan", "first", "--in-clear", *words)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in " ".join(done.stderr.replace("│", " ").split())


def test_a_plan_is_started_under_its_own_name_and_too_few_sites_are_told(home: Path, ram_path: Path) -> None:
    path = ram_path / "plan.json"
    path.write_bytes(tiny.plan(name="first", min_sites=3, join_s=60.0).to_bytes())
    done = fedcomet("coordinator", "start", "other", "--plan", path, "--home", home)
    assert done.returncode == 1
    assert done.stderr.startswith(f"fedcomet: {path}: name is 'first', which sites would see; start that, or name the")
    assert "waited for" not in fedcomet("coordinator", "start", "first", "--plan", path, "--home", home).stderr
    path.write_bytes(tiny.plan(name="second", min_sites=9, join_s=60.0).to_bytes())
    done = fedcomet("coordinator", "start", "second", "--plan", path, "--home", home)
    assert done.returncode == 0
    assert done.stderr.startswith("3 sites have joined, 9 are waited for, for 60 s.\n")
    path.write_bytes(tiny.plan(name="third", model="7b").to_bytes())
    done = fedcomet("coordinator", "start", "third", "--plan", path, "--home", home)
    assert done.returncode == 1
    assert f"{path}: no model preset is called '7b'" in done.stderr
