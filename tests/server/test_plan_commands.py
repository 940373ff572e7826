"""A plan to begin with: what it holds, and that it is one that can be started."""

import json
from pathlib import Path

import pytest

from server.home import CoordinatorHome, CoordinatorSettings, Federation
from server.ledger import Ledger
from server.plan import FederationPlan
from tests.typed import fedcomet
from tests.watched import SITES, enrol
from tokenizer.codebook import Codebook, Survey, TokenizerOptions


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
