"""A federation trains privately from end to end; what the sites' ledgers hold is what the accountant says of it."""

import json
from pathlib import Path

import numpy as np
import pytest

from client.audit import audit
from client.budget import FILE, Budget, State
from federation import protection
from federation.accountant import epsilon
from federation.manifest import LocalWork
from model import checkpoint
from server.app import coordinate
from server.journal import Journal, Status
from server.plan import PrivacyPlan
from server.report import load, terminal_tables, write_report
from server.rounds import Event, RoundFailed
from simulation.config import read
from simulation.findings import report_of
from simulation.study import Result, run_study
from tests import tiny
from tests.simulation import studies
from tokenizer.errors import ConfigError

PRIVACY = {"sampling_rate": 0.2, "epsilon": 6.0, "delta": 1e-5}
RULES = """version = 1
[runs]
manifests = "any"
[secure_aggregation]
required = false
[statistics]
floor = 3
[privacy]
epsilon_total = {limit}
delta_total = 1e-5
"""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    root = tmp_path_factory.mktemp("private")
    study = studies.study(tiny.sites(root, 2), privacy=PRIVACY, arms=["federated", "alone", "pooled", "ensemble"])
    return run_study(study, root / "study", workers=2)


def test_every_site_spends_what_the_accountant_says_and_no_more_than_was_wanted(result: Result) -> None:
    for arm in result.arms:
        assert arm.outcome is not None, arm.failure
        manifest = arm.outcome.manifest
        assert manifest.privacy is not None
        for site in arm.sites:
            with Budget.open(site.state / FILE, begin=False) as budget:
                charges = [charge for charge in budget.charges() if charge.release.run == manifest.hash]
                assert all((charge.state, charge.key) == (State.RELEASED, b"") for charge in charges)
            assert [charge.release.round for charge in charges] == [1, 2]
            spent = epsilon([each for charge in charges for each in charge.release.mechanisms.all], 1e-5)
            assert spent == epsilon(protection.of_run(manifest).all, 1e-5)
            assert 5.9 < spent <= 6.0
    for site in result.sites:
        costs = [told for told in audit(site.state).epsilons if "δ = 1e-05" in told]
        assert costs, "the list of what left tells what each round cost"


def test_every_checkpoint_says_what_its_weights_cost_a_patient(result: Result) -> None:
    for arm in result.arms:
        assert arm.outcome is not None
        manifest = arm.outcome.manifest
        found = checkpoint.load(arm.outcome.checkpoint)
        privacy = found.extra["privacy"]
        assert (privacy["mechanism"], privacy["delta"], privacy["epsilon_of_run"]) == ("dp-sgd", 1e-5, 6.0)
        assert privacy["epsilon"] == epsilon(protection.of_run(manifest).all, 1e-5)
        (first,) = set(arm.folder.glob("checkpoints/0001.safetensors"))
        half = checkpoint.load(first)
        with Budget.open(arm.sites[0].state / FILE, begin=False) as budget:
            (one,) = [c for c in budget.charges() if c.release.run == manifest.hash and c.release.round == 1]
        assert half.extra["privacy"]["epsilon"] == epsilon(one.release.mechanisms.all, 1e-5) < privacy["epsilon"]
        assert (
            "epsilon 5.9" in checkpoint.describe(found)["privacy"]
            or "epsilon 6" in checkpoint.describe(found)["privacy"]
        )


def test_no_loss_and_no_count_of_tokens_reaches_the_coordinator(result: Result) -> None:
    for arm in result.arms:
        with Journal(arm.folder / "ledger.sqlite") as journal:
            replies = [entry for number in (1, 2) for entry in journal.replies(number)]
            assert journal.scores() == []
            for entry in journal.sites():
                told = json.loads(entry.counts)
                assert {(split["events"], split["tokens"]) for split in told["splits"].values()} == {(0, 0)}
                assert told["fallbacks"] == 0
        assert {entry.loss for entry in replies} == {0.0}
        assert {entry.seconds for entry in replies} == {0.0}
        assert arm.outcome is not None
        assert arm.outcome.best_checkpoint == arm.outcome.checkpoint


def test_the_report_tells_what_every_site_has_spent(result: Result, tmp_path: Path) -> None:
    report = report_of(result, "fedcomet simulate")
    assert all(site.epsilon is not None and 5.9 < site.epsilon <= 6.0 for site in report.sites)
    assert "DP-SGD at every site: epsilon 6 at most" in dict(report.settings)["Privacy"]
    write_report(tmp_path / "report.html", report)
    assert "ε spent" in (tmp_path / "report.html").read_text()
    assert load(tmp_path / "report.json") == report
    assert [column.header for column in terminal_tables(report)[-1].columns][-2] == "epsilon"


def test_by_choice_noised_losses_choose_the_best_round_and_the_report_tells_their_noise(tmp_path: Path) -> None:
    told = {"every": 1, "bound": 4.0, "noise_multiplier": 12.0}
    study = studies.study(tiny.sites(tmp_path, 2), privacy={**PRIVACY, "evaluation": told}, arms=["federated"])
    result = run_study(study, tmp_path / "study", workers=1)
    outcome = result.arms[0].outcome
    assert outcome is not None
    with Journal(result.arms[0].folder / "ledger.sqlite") as journal:
        scores, losses = journal.scores(), journal.losses("tuning")
    assert [(score.round, score.status) for score in scores] == [(n, Status.ACCEPTED) for n in (1, 1, 2, 2)]
    assert int(outcome.best_checkpoint.stem) == min(losses, key=lambda number: losses[number])
    for site in result.sites:
        with Budget.open(site.state / FILE, begin=False) as budget:
            assert budget.spent(1e-5) == epsilon(protection.of_run(outcome.manifest).all, 1e-5)
            assert 5.8 < budget.spent(1e-5) <= 6.0
    assert "6 for the run, which counts where" in checkpoint.describe(checkpoint.load(outcome.checkpoint))["privacy"]
    report = report_of(result, "fedcomet simulate")
    patients = sum(score.tokens for score in scores if score.round == 2)
    deviation = 48 * 2**0.5 / patients
    assert f"noise of standard deviation {deviation:.3g} nats (12 x 4" in dict(report.settings)["Tuning loss"]
    assert any("noised tuning losses" in note for note in report.notes)
    assert [part.bytes_sent for part in report.outbound if part.what == "noised sum of losses, and patients"] == [
        32,
        32,
    ]


def test_two_equal_studies_end_with_other_noise(result: Result, tmp_path: Path) -> None:
    study = studies.study(tiny.sites(tmp_path, 2), privacy=PRIVACY, arms=["federated"])
    again = run_study(study, tmp_path / "study", workers=1)
    weights = []
    for one in (result, again):
        outcome = one.arms[0].outcome
        assert outcome is not None
        loaded = checkpoint.load(outcome.checkpoint)
        weights.append(next(iter(loaded.decoder.parameters())).detach().numpy())
    assert not np.allclose(*weights, atol=1e-4)


def test_a_spent_budget_stops_the_federation_with_the_reason(tmp_path: Path) -> None:
    plan = tiny.plan(
        rounds=3,
        local=LocalWork(steps=2, batch_tokens=512),
        privacy=PrivacyPlan(sampling_rate=0.25, noise_multiplier=2.0, delta=1e-5),
    )
    sites = tiny.sites(tmp_path, 2)
    promised = plan.privacy.promise(plan.local, 3) if plan.privacy else None
    assert promised is not None
    two, three = (epsilon(protection.of_steps(promised, steps).all, 1e-5) for steps in (4, 6))
    (tmp_path / "policy.toml").write_text(RULES.format(limit=three + 0.01))
    files = [tiny.SiteFiles(s.name, s.data, s.state, policy=tmp_path / "policy.toml") for s in sites]
    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, files), 1)))

    def tighten(event: Event) -> None:
        if (event.kind, event.round) == ("round.committed", 2):
            (tmp_path / "policy.toml").write_text(RULES.format(limit=(two + three) / 2))

    with pytest.raises(RoundFailed, match="privacy budget does not allow the training of round 3"):
        coordinate(grid, tmp_path / "run", plan, listen=tighten)
    with Journal(tmp_path / "run" / "ledger.sqlite") as journal:
        assert {entry.status for entry in journal.replies(3)} == {Status.REFUSED}
        told = "".join(entry.reason for entry in journal.replies(3))
    for one in files:
        assert f"{two:.4f} is spent" in (one.state / "site.log").read_text()
        with Budget.open(one.state / FILE) as budget:
            assert budget.spent(1e-5) == two
    assert f"{two:.2f}" not in told
    (tmp_path / "policy.toml").write_text(RULES.format(limit=three + 0.01))
    assert coordinate(grid, tmp_path / "run", plan).checkpoint.exists()


def test_a_federation_with_noise_on_the_updates_runs_to_its_end(tmp_path: Path) -> None:
    plan = tiny.plan(privacy=PrivacyPlan(epsilon=20.0, delta=1e-5, mechanism="local", clip=0.1))
    sites = tiny.sites(tmp_path, 2)
    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, sites), 1)))
    manifest = coordinate(grid, tmp_path / "run", plan).manifest
    for site in sites:
        with Budget.open(site.state / FILE, begin=False) as budget:
            assert budget.spent(1e-5) == epsilon(protection.of_run(manifest).all, 1e-5)
            assert 19.5 < budget.spent(1e-5) <= 20


def test_a_study_file_says_what_is_wrong_with_its_privacy(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "examples" / "demo.toml").read_text()
    for more, told in (
        ("sampling_rate = 0.1", "exactly one of epsilon and noise_multiplier"),
        ("sampling_rate = 0.1\nepsilon = 1\nnoise_multiplier = 1", "exactly one of epsilon and noise_multiplier"),
        ("sampling_rate = 2.0\nepsilon = 1", "privacy.sampling_rate = 2.0"),
        ("epsilon = 1", 'sampling_rate: mechanism = "dp-sgd" needs it'),
        ('mechanism = "local"\nsampling_rate = 0.1\nepsilon = 1', "no other has one"),
        ("sampling_rate = 0.1\nepsilon = 1\nnoises = 1", "privacy.noises is not a known key; known here: clip, delta"),
    ):
        path = tmp_path / "study.toml"
        path.write_text(f"{text}\n[privacy]\n{more}\n")
        with pytest.raises(ConfigError, match=r"study\.toml") as problem:
            read(path)
        assert told in str(problem.value)
