"""Losses of a private run leave with noise, charged before, once a round, and only where the manifest asks for them."""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.budget import BudgetExhausted, State
from client.evaluation import noised_sum
from client.gate import digest_of_answer
from client.site import Site
from federation import protection
from federation.accountant import Gaussian, epsilon
from federation.manifest import LocalWork, Manifest, PrivateEvaluation
from federation.messages import EvaluateReply, EvaluateRequest, SiteRefusal
from federation.planner import noise_for
from model.private import KEY_BYTES, Secret
from model.train import Trainer
from server.plan import PrivacyPlan
from tests import tiny
from tests.client.test_private_round import limited
from tests.client.test_site import FAR, agree, ask, start
from tokenizer.errors import ConfigError, DataError

TOLD = PrivateEvaluation(every=2, bound=4.0, noise_multiplier=3.0)
PRIVACY = PrivacyPlan(sampling_rate=0.25, noise_multiplier=2.0, delta=1e-5, evaluation=TOLD)
WORK = LocalWork(steps=2, batch_tokens=512)


@pytest.fixture
def site(ram_path: Path) -> Site:
    return Site(tiny.site(ram_path, "icu", 1, patients=90))


def private(site: Site, **changes: object) -> Manifest:
    return agree(site, **{"local": WORK, "privacy": PRIVACY, "rounds": 5, **changes})[0]


def asked(manifest: Manifest, number: int = 2, split: str = "tuning", shift: float = 0.0) -> EvaluateRequest:
    return EvaluateRequest(manifest.hash, number, split, start(manifest) + np.float32(shift), FAR)


numbers = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(numbers, max_size=20), numbers, st.floats(1e-3, 64.0), st.floats(0.1, 100.0))
def test_one_patient_more_moves_the_sum_by_the_bound_at_most(
    losses: list[float], more: float, bound: float, noise: float
) -> None:
    key, chosen = os.urandom(KEY_BYTES), PrivateEvaluation(1, bound, noise)
    one, other = (noised_sum(np.array(part), chosen, Secret(key, "x")) for part in (losses, [*losses, more]))
    # Both lie on one grid of bound / 2^16 with the same noise; what is left is float64's own error.
    assert -1e-9 * bound <= other - one <= bound * (1 + 1e-9)


def test_the_noise_has_the_agreed_size_and_the_sum_is_right_without_it() -> None:
    losses = np.array([1.0, 2.5, 9.0, math.inf, math.nan, -1.0])
    drawn = np.array([noised_sum(losses, TOLD, Secret(os.urandom(KEY_BYTES), "x")) for _ in range(4000)])
    exact, deviation = 1.0 + 2.5 + 4.0 + 4.0, 12.0
    # False alarms: 2e-9 each (6 deviations of a mean, and of a variance).
    assert abs(drawn.mean() - exact) < 6 * deviation / 4000**0.5
    assert abs(drawn.var() / deviation**2 - 1) < 6 * (2 / 4000) ** 0.5
    quiet = noised_sum(losses, PrivateEvaluation(1, 4.0, 1e-9), Secret(os.urandom(KEY_BYTES), "x"))
    assert quiet == exact


def test_an_evaluation_is_charged_before_it_leaves_and_answered_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = private(site)
    reply = site.evaluate(asked(manifest))
    store = site.archive.run(manifest.hash)
    # A patient has 0 to 4 nats; noise of deviation 12: false alarm 2e-9.
    assert reply.tokens > 0
    assert -6 * 12 < reply.nll < 4.0 * reply.tokens + 6 * 12
    with site.gate.budget() as budget:
        (charge,) = budget.charges()
    assert charge.release.mechanisms.all == (Gaussian(3.0, 1.0, 1),)
    assert (charge.state, charge.key, charge.release.purpose) == (State.CHARGED, b"", "evaluation")
    assert charge.sha256 == digest_of_answer(reply)
    site.gate.note(reply, "evaluate", "0" * 64, 1)
    for forged in (dataclasses.replace(reply, nll=0.0), dataclasses.replace(reply, tokens=1)):
        with pytest.raises(DataError, match="holds no charge for this evaluation"):
            site.gate.note(forged, "evaluate", "0" * 64, 1)
    with monkeypatch.context() as patch:
        patch.setattr("client.local.Work.patient_losses", lambda *_: pytest.fail("it was computed again"))
        assert site.evaluate(asked(manifest)) == reply
    with pytest.raises(SiteRefusal, match="Another request was made before"):
        site.evaluate(asked(manifest, shift=0.5))
    assert site.evaluate(asked(manifest, 4)).round == 4
    assert store.score(2, "tuning") is None
    with pytest.raises(SiteRefusal, match="no longer kept"):
        site.evaluate(asked(manifest))


def test_only_what_the_manifest_asks_for_is_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = private(site)
    monkeypatch.setattr("client.local.Work.patient_losses", lambda *_: pytest.fail("records were looked at"))
    for number in (1, 3):
        with pytest.raises(SiteRefusal, match=f"Round {number} is not among those"):
            site.evaluate(asked(manifest, number))
    with pytest.raises(SiteRefusal, match="of the split 'tuning' only"):
        site.evaluate(asked(manifest, split="held_out"))
    with site.gate.budget() as budget:
        assert budget.charges() == []


def test_the_last_round_is_told_and_what_a_run_costs_holds_all_evaluations(site: Site) -> None:
    manifest = private(site)
    assert [number for number in range(1, 6) if protection.evaluated(manifest, number)] == [2, 4, 5]
    assert protection.of_run(manifest).all == (Gaussian(2.0, 0.25, 10), Gaussian(3.0, 1.0, 3))
    assert protection.up_to(manifest, 1).all == (Gaussian(2.0, 0.25, 2),)
    for number in range(1, 6):
        site.train(ask(manifest, number))
        if protection.evaluated(manifest, number):
            assert isinstance(site.evaluate(asked(manifest, number)), EvaluateReply)
    assert manifest.privacy is not None
    with site.gate.budget() as budget:
        assert budget.spent(1e-5) == pytest.approx(epsilon(protection.of_run(manifest).all, 1e-5))
        assert budget.spent(1e-5) <= manifest.privacy.epsilon < budget.spent(1e-5) + 2e-4


def test_an_evaluation_beyond_the_budget_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = private(site)
    tight = limited(site, 0.1)
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("the site trained"))
    with pytest.raises(BudgetExhausted, match="does not allow the evaluation of round 2"):
        tight.evaluate(asked(manifest))


def test_a_plan_pays_for_evaluations_from_the_same_epsilon() -> None:
    plan = PrivacyPlan(0.25, 1e-5, epsilon=6.0, evaluation=TOLD)
    with_, without = (each.promise(WORK, 20) for each in (plan, dataclasses.replace(plan, evaluation=None)))
    assert with_.noise_multiplier > without.noise_multiplier
    everything = [Gaussian(with_.noise_multiplier, 0.25, 40), Gaussian(3.0, 1.0, 10)]
    assert 0.98 * 6.0 < epsilon(everything, 1e-5) <= 6.0
    with pytest.raises(ConfigError, match="beside the training costs epsilon"):
        noise_for(1.0, 1e-5, 0.25, 40, beside=[Gaussian(1.0, 1.0, 10)])
    for wrong in ({"every": 0}, {"bound": 0.0}, {"noise_multiplier": math.inf}):
        with pytest.raises(ConfigError, match=r"privacy\.evaluation"):
            dataclasses.replace(TOLD, **wrong)
