"""Noise on updates is audited where it is added: what was left out is found, and right noise raises no alarm."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from federation import protection
from federation.accountant import Gaussian, epsilon
from federation.manifest import Privacy
from model.private import PrivateOptions
from simulation.attacks.audit_plan import Plan
from simulation.attacks.audit_report import render, summary
from simulation.attacks.audit_run import audit_run
from simulation.attacks.finished_run import FinishedRun, open_run
from simulation.attacks.releases import Told, attack, judge, repetitions_for
from simulation.study import run_study
from tests import tiny
from tests.simulation import studies
from tests.simulation.attacks.test_audit import without_noise
from tokenizer.errors import ConfigError

# Fresh keys in every run: with right noise a test may fail by chance with probability 1 - CONFIDENCE at most.
CONFIDENCE = 0.9999
NOISE = PrivateOptions(clip=0.5, noise_multiplier=10.0, sampling_rate=1.0)
CLAIM = epsilon([Gaussian(5.0, steps=4)], 1e-6)


def told(options: PrivateOptions = NOISE, repetitions: int = 1000) -> Told:
    return attack(options, 4, repetitions, delta=1e-6, confidence=CONFIDENCE, seed=1)


def test_right_noise_is_not_contradicted_and_half_of_it_is_told_apart_better() -> None:
    right = told()
    assert right.epsilon <= CLAIM < right.provable
    assert right.plus + right.minus == 1000
    # Scores lie at +1 or -1 with deviation 3 and 0.15: the second are never on the wrong side (10 deviations).
    less = told(replace(NOISE, noise_multiplier=0.3))
    assert less.epsilon == pytest.approx(less.provable, rel=0.05)
    assert less.epsilon > right.epsilon


def test_noise_or_clip_that_was_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("model.private.noised", without_noise)
        assert told().epsilon > CLAIM
    monkeypatch.setattr("model.private.clip_before_rounding", lambda clip: 1e9)
    # Ten clips away on either side with a deviation of 5: 2.3 % are on the wrong side, where claimed are 42 %.
    assert told().epsilon > CLAIM


def test_the_bound_holds_as_often_as_it_says() -> None:
    rng, truth, broken = np.random.default_rng(5), epsilon([Gaussian(1.0)], 1e-6), 0
    for _ in range(200):
        coins = rng.random(400) < 0.5
        scores = np.where(coins, 0.5, -0.5) + rng.normal(size=400)
        found = judge(scores, coins, 1, delta=1e-6, confidence=0.5)
        broken += found.epsilon > truth
    # By the theorem at most half; here none, as these rates' own ratio is far below epsilon at so small a delta.
    assert broken == 0


def test_a_pure_mechanism_is_bounded_from_below_no_higher_than_it_is() -> None:
    """Randomized response with epsilon 1: the best test's rates meet it exactly; the bound must not pass it often."""
    rng, above = np.random.default_rng(6), 0
    right = np.e / (1 + np.e)
    for _ in range(300):
        coins = rng.random(500) < 0.5
        scores = np.where(coins == (rng.random(500) < right), 1.0, -1.0) * 0.5
        above += judge(scores, coins, 1, delta=0.0, confidence=0.9).epsilon > 1.0
    # At most 10 % by the theorem: 300 tries exceed 45 with probability below 0.003; Bonferroni makes it far rarer.
    assert above <= 45


def test_repetitions_follow_from_what_is_claimed() -> None:
    assert repetitions_for(0.1) == 500
    assert 500 < repetitions_for(4.0) < 2000
    assert repetitions_for(30.0) == repetitions_for(None) == 40_000
    level = attack(NOISE, 1, 10, delta=1e-6, confidence=0.9, seed=1)
    assert level.provable < 1


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    root: Path = tmp_path_factory.mktemp("noised")
    sites = [tiny.site(root, f"site-{n}", n + 1, 60) for n in range(2)]
    privacy = {"mechanism": "local", "epsilon": 2.0, "delta": 1e-6, "clip": 0.5}
    run_study(studies.study(sites, arms=["federated"], privacy=privacy), root / "study", workers=1)
    return open_run(root / "study")


def test_a_run_with_noise_on_its_updates_is_audited_against_its_claim(
    run: FinishedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run.privacy is not None
    plan = Plan(confidence=CONFIDENCE, most=4, trajectories=1, seed=3)
    right = audit_run(run, plan)
    assert right.alarm == ""
    assert right.claim is not None
    assert right.releases is not None
    assert (right.claim.epsilon, right.claim.delta, right.claim.basis) == (2.0, 1e-6, "the run's manifest")
    assert right.releases.rounds == 2
    assert epsilon(protection.of_steps(run.privacy, 2).all, 1e-6) <= 2.0
    assert [target.name for target in right.targets] == ["the released model"]
    assert "noise on the update of each of 2 rounds" in right.facts["training"]
    assert 'class="alarm"' not in render(right)
    monkeypatch.setattr("model.private.noised", without_noise)
    broken = audit_run(run, plan)
    assert "does not hold" in broken.alarm
    assert "2.00 is claimed" in broken.alarm
    page = render(broken)
    assert 'class="alarm"' in page
    assert "a coin chose one of two opposite updates" in page
    assert any("a coin chose" in str(line) for line in summary(broken))


def test_noise_that_sites_share_can_not_be_audited() -> None:
    stated = Privacy("distributed", 2.0, 1e-6, 1.0, 4.0, honest_sites=2)
    with pytest.raises(ConfigError, match="shared out over the sites"):
        Plan().following(stated)
