"""An audit of a run from end to end: it raises the alarm where noise was left out, and only there."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from federation.manifest import Privacy
from model.private import PrivateOptions
from server.futures import Model
from simulation.attacks import audit_words
from simulation.attacks.audit_model import Subject, audit_model, open_subject
from simulation.attacks.audit_plan import Plan
from simulation.attacks.audit_report import render, summary, write_audit
from simulation.attacks.audit_run import audit_run
from simulation.attacks.finished_run import FinishedRun, open_run
from simulation.attacks.verdict import Audit, Claim
from simulation.study import run_study
from tests import tiny
from tests.simulation import studies
from tests.simulation.attacks import small
from tokenizer.errors import ConfigError, DataError
from tokenizer.progress import Step

# The secret draws are fresh in every run of these tests: with right noise the alarm may be false with probability
# 1 - CONFIDENCE at most, by the theorem, and much less where epsilon is small.
CONFIDENCE = 0.9999
PRIVATE = PrivateOptions(clip=1.0, noise_multiplier=20.0, sampling_rate=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audit")
    sites = [tiny.site(root, f"site-{n}", n + 1, 60 + 110 * n) for n in range(2)]
    run_study(studies.study(sites, arms=["federated"]), root / "study", workers=1)
    return root / "study"


@pytest.fixture(scope="module")
def run(folder: Path) -> FinishedRun:
    return open_run(folder)


def plan(**changes: object) -> Plan:
    settings: dict[str, object] = {
        "private": PRIVATE,
        "confidence": CONFIDENCE,
        # The theorem's error grows by a term in canaries x delta, which must be small against 1 - CONFIDENCE.
        "delta": 1e-8,
        "canaries": 80,
        "canary_tokens": 5,
        "repetitions": (4,),
        "courses": 2,
        "course_tokens": 8,
        "rivals": 31,
        "tries": 2,
        "trajectories": 1,
        "most": 15,
        "steps": 60,
        "seed": 3,
    }
    return Plan(**{**settings, **changes})  # type: ignore[arg-type]


def without_noise(gradients: list[Tensor], options: PrivateOptions, secret: object) -> list[Tensor]:
    """What a private step would be whose noise somebody forgot."""
    return [gradient.detach().cpu().double() for gradient in gradients]


@pytest.fixture(scope="module")
def broken(run: FinishedRun) -> Audit:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.private.noised", without_noise)
        return audit_run(run, plan())


@pytest.fixture(scope="module")
def right(run: FinishedRun) -> Audit:
    return audit_run(run, plan())


def test_a_training_whose_noise_was_left_out_raises_the_alarm(broken: Audit) -> None:
    assert broken.claim is not None
    assert broken.canaries is not None
    assert broken.claim.epsilon < 0.8
    assert broken.canaries.bound.epsilon > broken.claim.epsilon
    assert "does not hold" in broken.alarm
    assert f"{broken.claim.epsilon:.2f} is claimed" in broken.alarm


def test_right_noise_raises_none(right: Audit, broken: Audit) -> None:
    assert right.alarm == ""
    assert right.claim == broken.claim
    assert right.canaries is not None
    assert right.canaries.bound.epsilon <= right.claim.epsilon  # type: ignore[union-attr]


def test_the_page_says_so_in_red_and_needs_no_network(broken: Audit, right: Audit, tmp_path: Path) -> None:
    alarmed, calm = render(broken), render(right)
    assert 'class="alarm"' in alarmed
    assert 'class="alarm"' not in calm
    assert "do not contradict the privacy that is claimed" in calm
    for text in (alarmed, calm):
        assert text.lstrip().startswith("<!DOCTYPE html>")
        assert "http://" not in text.replace("http://www.w3.org/", "")
        assert "https://" not in text
        assert "nan" not in text.lower().replace("finance", "")
        assert "never proves privacy" in text
        assert text.count("<svg") == 5
    write_audit(tmp_path / "audit.html", broken)
    told = json.loads((tmp_path / "audit.json").read_bytes())
    assert told["alarm"] == broken.alarm
    assert told["canaries"]["bound"]["epsilon"] == broken.canaries.bound.epsilon  # type: ignore[union-attr]
    assert (tmp_path / "audit.html").read_text() == alarmed
    assert str(summary(broken)[0]) == broken.alarm


def test_all_attacks_are_made(right: Audit, run: FinishedRun) -> None:
    assert run.most_exposed() == "site-0"
    assert right.facts["audited site"] == "site-0 of 2"
    assert [target.name for target in right.targets] == ["the audited training", "the released model"]
    assert all([a.attack for a in target.attacks] == ["loss", "rollouts"] for target in right.targets)
    assert [each.patients for each in right.planted] == [0, 4]
    assert [(stage.name, len(stage.leaks)) for stage in right.stages] == [("the first round", 2), ("the last round", 2)]
    coins = right.canaries
    assert coins is not None
    assert len(coins.inside) == coins.bound.included
    assert len(coins.inside) + len(coins.outside) == 80


def test_words_follow_the_figures(broken: Audit, right: Audit) -> None:
    assert broken.canaries is not None
    said = " ".join(audit_words.of_canaries(broken.canaries, broken.claim))
    assert f"epsilon of this training is at least {broken.canaries.bound.epsilon:.2f}" in said
    large = plan(epsilon=30.0).claim(5)
    assert "could not have contradicted" in " ".join(audit_words.of_canaries(broken.canaries, large))
    assert "No privacy guarantee is claimed" in audit_words.headline(Audit("a", {}, canaries=right.canaries))


def test_a_claim_follows_from_the_steps_that_run() -> None:
    few, many = plan().claim(10), plan().claim(1000)
    assert few is not None
    assert many is not None
    assert few.epsilon < many.epsilon
    assert "1,000 steps" in many.basis
    assert plan(private=None).claim(10) is None
    assert plan(private=None, epsilon=2.0).claim(10).epsilon == 2.0  # type: ignore[union-attr]


def test_what_the_runs_manifest_claims_is_audited(run: FinishedRun) -> None:
    stated = Privacy("dp-sgd", epsilon=3.0, delta=1e-6, clip=0.5, noise_multiplier=1.5, sampling_rate=0.2)
    asked = plan(private=None, steps=None).following(stated)
    assert asked.private == PrivateOptions(clip=0.5, noise_multiplier=1.5, sampling_rate=0.2)
    assert asked.claim(50) == Claim(3.0, 1e-6, "the run's manifest")
    # Another number of steps costs something else; another claim is held against the run's own private steps.
    longer = plan(private=None, steps=60).following(stated).claim(60)
    assert longer is not None
    assert longer.basis.startswith("accountant: 60 steps")
    doubted = plan(private=None, epsilon=0.5, delta=1e-7).following(stated)
    assert doubted.private == asked.private
    assert doubted.claim(50) == Claim(0.5, 1e-7, "as given")
    # What is asked for by hand goes first.
    assert plan().following(stated) == plan()
    assert plan(private=None).following(None) == plan(private=None)
    assert run.privacy is None
    noised = plan(private=None).following(replace(stated, mechanism="local"))
    assert (noised.private, noised.update) == (None, PrivateOptions(0.5, 1.5, 0.2))


def test_a_private_run_is_audited_with_its_own_steps_and_claim(tmp_path: Path) -> None:
    sites = [tiny.site(tmp_path, f"site-{n}", n + 1, 60) for n in range(2)]
    privacy = {"sampling_rate": 0.3, "epsilon": 6.0, "delta": 1e-6}
    training = {"rounds": 2, "local_epochs": 0.8, "batch_tokens": 512}
    study = studies.study(sites, arms=["federated"], privacy=privacy, training=training)
    run_study(study, tmp_path / "study", workers=1)
    private = open_run(tmp_path / "study")
    assert private.privacy is not None
    asked = plan(private=None, steps=None).following(private.privacy)
    own = private.stores["site-0"].split("train")
    recipe = private.recipe(own, private=asked.private, steps=None, seed=0, device="cpu")
    # Rounds of 0.8 passes at a rate of 0.3 are 3 steps each, not 2.67.
    steps = recipe.options.total_steps
    assert steps == 6
    claim, counted = asked.claim(steps), replace(asked, epsilon=None).claim(steps)
    assert claim == Claim(6.0, 1e-6, "the run's manifest")
    assert counted is not None
    assert 5.9 < counted.epsilon <= 6.0


def test_without_privacy_nothing_is_claimed_and_a_claim_is_refuted(run: FinishedRun) -> None:
    steps: list[Step] = []
    quick = plan(private=None, most=4, rivals=7, tries=1, steps=120, epsilon=0.01, confidence=0.9, delta=1e-6)
    found = audit_run(run, quick, command="fedcomet audit", watch=steps.append)
    assert found.alarm
    assert found.facts["training"].endswith("without differential privacy")
    assert {step.label for step in steps} >= {"training", "reference", "courses"}
    assert "fedcomet audit" in render(found)


def test_a_finished_model_is_audited_with_a_sites_own_records(folder: Path, run: FinishedRun, tmp_path: Path) -> None:
    store = run.stores["site-1"].path
    subject = open_subject(folder / "model", store, store, folder / "model")
    found = audit_model(subject, plan(private=None))
    assert found.title == "study: a finished model"
    assert found.canaries is None
    assert found.rare is not None
    # A model as its own reference tells nothing of membership by loss.
    assert found.targets[0].attacks[0].auroc.value == 0.5
    assert "likeliest future" in render(found)
    with pytest.raises(ConfigError, match="no others"):
        Subject("m", run.model, run.codebook, run.together("train"), small.alone([]))
    with pytest.raises(DataError, match="codebook"):
        open_subject(folder / "model", store, _other_store(tmp_path))


def _other_store(root: Path) -> Path:
    from tokenizer.events import MedsDataset, write_meds
    from tokenizer.split import SplitRule
    from tokenizer.store import build_store

    write_meds(root / "records", [("train/0", tiny.records(9, 20))], name="other")
    return build_store(MedsDataset.open(root / "records"), small.words(), SplitRule("k"), root / "store").path


def test_what_can_not_be_audited_is_said(run: FinishedRun, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no site 'nowhere'; there are site-0, site-1"):
        audit_run(run, plan(site="nowhere"))
    with pytest.raises(ConfigError, match=r"no study\.json"):
        open_run(tmp_path)
    (tmp_path / "study.json").write_bytes((folder / "study.json").read_bytes())
    with pytest.raises(ConfigError, match="not finished"):
        open_run(tmp_path)
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(DataError, match="no study of this version"):
        open_run(tmp_path)
    for wrong in ({"confidence": 1.0}, {"canaries": 5}, {"delta": 1.0}, {"steps": 0}, {"epsilon": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            plan(**wrong)
    with pytest.raises(ConfigError, match="delta above 0"):
        plan(delta=0.0)
    with pytest.raises(DataError, match="is missing"):
        Model.at(tmp_path)
