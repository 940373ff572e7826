"""A private round at a site: what it costs is charged for what really ran, and nothing else tells of its patients."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from client import local
from client.budget import BudgetExhausted, State
from client.gate import digest_of_answer
from client.site import Site
from federation import protection
from federation.accountant import Gaussian, epsilon
from federation.manifest import LocalWork, Manifest
from federation.messages import EvaluateRequest, PrepareRequest, ProtocolError, SiteRefusal, TrainReply
from model.private import PrivateTrainer
from model.settings import Machine
from model.train import StepResult, Trainer, TrainingDiverged
from server.plan import PrivacyPlan
from tests import tiny
from tests.client.test_site import FAR, agree, ask, same, start
from tokenizer.errors import ConfigError, DataError
from tokenizer.windows import Batch

PRIVACY = PrivacyPlan(sampling_rate=0.25, noise_multiplier=2.0, delta=1e-5)
WORK = LocalWork(steps=3, batch_tokens=512)


@pytest.fixture
def site(ram_path: Path) -> Site:
    return Site(dataclasses.replace(tiny.site(ram_path, "icu", 1), snapshot_minutes=0.0))


def private(site: Site, **changes: object) -> Manifest:
    return agree(site, **{"local": WORK, "privacy": PRIVACY, **changes})[0]


def limited(site: Site, limit: float) -> Site:
    policy = site.files.state.with_name("policy.toml")
    rules = "version = 1\n[secure_aggregation]\nrequired = false\n[statistics]\nfloor = 3\n[runs]\nmanifests = 'any'\n"
    policy.write_text(f"{rules}[privacy]\nepsilon_total = {limit}\ndelta_total = 1e-5\n")
    return Site(dataclasses.replace(site.files, policy=policy))


def test_a_round_is_charged_for_what_ran_before_it_leaves(site: Site) -> None:
    manifest = private(site)
    replies = [site.train(ask(manifest, number)) for number in (1, 2)]
    with site.gate.budget() as budget:
        charges = budget.charges()
        assert budget.spent(1e-5) == pytest.approx(epsilon(protection.of_run(manifest).all, 1e-5))
    assert manifest.privacy is not None
    assert budget.delta(None) == 1e-6
    for number, (charge, reply) in enumerate(zip(charges, replies, strict=True), 1):
        assert (charge.release.run, charge.release.round) == (manifest.hash, number)
        assert charge.release.mechanisms == protection.of_steps(manifest.privacy, 3)
        assert (charge.state, charge.key, charge.sha256) == (State.CHARGED, b"", digest_of_answer(reply))
    site.gate.note(replies[0], "train", "0" * 64, 1)
    changed = dataclasses.replace(replies[0], update=replies[0].update + 1)
    with pytest.raises(DataError, match="holds no charge for this training"):
        site.gate.note(changed, "train", "0" * 64, 1)


def test_what_would_tell_of_single_patients_stays_at_the_site(site: Site) -> None:
    manifest, _, prepared = agree(site, local=WORK, privacy=PRIVACY)
    assert prepared.splits["train"].patients == 31
    assert all((counts.events, counts.tokens) == (0, 0) for counts in prepared.splits.values())
    assert prepared.fallbacks == 0
    reply = site.train(ask(manifest))
    # 31 patients x 0.25 x 3 steps, whoever was drawn.
    assert (reply.tokens, reply.steps, reply.loss, reply.seconds) == (23, 3, 0.0, 0.0)
    with pytest.raises(SiteRefusal, match="losses and token counts have no noise"):
        site.evaluate(EvaluateRequest(manifest.hash, 1, "tuning", start(manifest), FAR))


def test_two_sites_with_equal_records_draw_noise_of_their_own(site: Site, ram_path: Path) -> None:
    manifest = private(site)
    twin = Site(tiny.site(ram_path / "twin", "icu", 1))
    assert private(twin) == manifest
    one, other = site.train(ask(manifest)), twin.train(ask(manifest))
    assert not np.allclose(one.update, other.update, atol=1e-4)
    two = site.train(ask(manifest, 2))
    assert not np.allclose(one.update, two.update, atol=1e-4)


def test_a_round_that_was_stopped_goes_on_with_the_same_draws(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = private(site)
    step, batches = PrivateTrainer.step, []

    def dying(trainer: PrivateTrainer, batch: Batch) -> StepResult:
        batches.append(batch.patients.tolist())
        if len(batches) == 3:
            raise KeyboardInterrupt
        return step(trainer, batch)

    monkeypatch.setattr(PrivateTrainer, "step", dying)
    with pytest.raises(KeyboardInterrupt):
        site.train(ask(manifest))
    with site.gate.budget() as budget:
        (charge,) = budget.charges()
        assert charge.state == State.RESERVED
        assert len(charge.key) == 32
    monkeypatch.setattr(PrivateTrainer, "step", step)
    seen: list[list[int]] = []
    monkeypatch.setattr(
        PrivateTrainer,
        "step",
        lambda t, batch: seen.append(batch.patients.tolist()) or step(t, batch),  # type: ignore[func-returns-value]
    )
    assert Site(site.files).train(ask(manifest)).steps == 3
    assert seen == batches[2:]
    (site.archive.run(manifest.hash).path / "rounds/0001.safetensors").unlink()
    with pytest.raises(SiteRefusal, match="no longer kept"):
        site.train(ask(manifest))


def test_an_answer_that_was_kept_but_not_charged_is_charged_before_it_is_given(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = private(site)
    with monkeypatch.context() as patch:
        patch.setattr("client.budget.Budget.charge", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            site.train(ask(manifest))
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("the site trained again"))
    reply = site.train(ask(manifest))
    with site.gate.budget() as budget:
        assert [(charge.state, charge.sha256) for charge in budget.charges()] == [
            (State.CHARGED, digest_of_answer(reply))
        ]
    assert same(site.train(ask(manifest)), reply)


def test_a_round_beyond_the_budget_is_refused_and_the_figures_stay_at_the_site(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = private(site)
    assert manifest.privacy is not None
    one = epsilon(protection.of_steps(manifest.privacy, 3).all, 1e-5)
    two = epsilon(protection.of_steps(manifest.privacy, 6).all, 1e-5)
    tight = limited(site, (one + two) / 2)
    tight.train(ask(manifest, 1))
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("the site trained"))
    with pytest.raises(BudgetExhausted, match="does not allow the training of round 2") as refusal:
        tight.train(ask(manifest, 2))
    assert f"{one:.4f} is spent" in refusal.value.__notes__[0]
    assert f"{one:.2f}" not in str(refusal.value)
    with tight.gate.budget() as budget:
        assert len(budget.charges()) == 1


def test_a_round_that_was_given_up_costs_nothing_once_the_run_is_past_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = private(site)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", lambda *_: (_ for _ in ()).throw(TrainingDiverged("loss 7.7 at step 1")))
        with pytest.raises(SiteRefusal, match="did not end well") as refusal:
            site.train(ask(manifest, 1))
        assert "7.7" not in str(refusal.value)
    with site.gate.budget() as budget:
        assert [charge.state for charge in budget.charges()] == [State.RESERVED]
        site.train(ask(manifest, 2))
        assert [(charge.release.round, charge.state) for charge in budget.charges()] == [(2, State.CHARGED)]
    with pytest.raises(SiteRefusal, match="Round 1 is over"):
        site.train(ask(manifest, 1))


def test_a_round_whose_reservation_was_freed_is_refused_and_the_run_may_go_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = private(site)
    with monkeypatch.context() as patch:
        patch.setattr("client.budget.Budget.charge", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            site.train(ask(manifest))
    with site.gate.budget() as budget:
        budget.free([charge.release for charge in budget.charges()])
    with pytest.raises(SiteRefusal, match="given up the training of round 1"):
        site.train(ask(manifest))
    assert site.train(ask(manifest, 2)).steps == 3


@pytest.mark.parametrize("freed", [False, True])
def test_a_later_round_builds_on_nothing_that_was_not_charged(
    site: Site, ram_path: Path, monkeypatch: pytest.MonkeyPatch, freed: bool
) -> None:
    manifest = private(site)
    with monkeypatch.context() as patch:
        patch.setattr("client.budget.Budget.charge", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            site.train(ask(manifest))
    assert site.archive.run(manifest.hash).optimizer_before(2) is not None
    if freed:
        with site.gate.budget() as budget:
            budget.free([charge.release for charge in budget.charges()])
    begun: list[object] = []
    trainer = local.Work.trainer
    monkeypatch.setattr(local.Work, "trainer", lambda *given: begun.append(given[4]) or trainer(*given))  # type: ignore[func-returns-value]
    site.train(ask(manifest, 2))
    assert begun == [None]


def test_a_manifest_that_costs_more_than_it_says_is_refused_on_both_sides(site: Site) -> None:
    with pytest.raises(ConfigError, match="costs"):
        private(site, privacy=dataclasses.replace(PRIVACY, epsilon=0.1))
    manifest, codebook, _ = agree(site, local=WORK, privacy=PRIVACY)
    assert manifest.privacy is not None
    for wrong, told in (
        (dataclasses.replace(manifest, privacy=dataclasses.replace(manifest.privacy, epsilon=0.1)), "costs"),
        (dataclasses.replace(manifest, rounds=50), "in 50 rounds costs"),
        (dataclasses.replace(manifest, train=dataclasses.replace(manifest.train, clip=1.0)), "train.clip = 0"),
    ):
        with pytest.raises(ProtocolError, match=told):
            site.prepare(PrepareRequest(wrong.to_bytes(), codebook.to_bytes(), FAR))
    shared = dataclasses.replace(manifest.privacy, mechanism="distributed", sampling_rate=1.0, honest_sites=2)
    other = dataclasses.replace(manifest, privacy=shared)
    with pytest.raises(ProtocolError, match=r'mechanism "distributed" needs secure_aggregation'):
        site.prepare(PrepareRequest(other.to_bytes(), codebook.to_bytes(), FAR))


def test_a_site_of_several_processes_takes_private_steps_in_one(ram_path: Path) -> None:
    files = dataclasses.replace(tiny.site(ram_path, "icu", 1), machine=Machine(processes=2))
    site = Site(files)
    reply = site.train(ask(private(site)))
    assert isinstance(reply, TrainReply)


def test_a_plan_states_what_the_noise_costs_or_finds_the_noise() -> None:
    stated = PRIVACY.promise(WORK, 2)
    cost = epsilon(protection.of_steps(stated, 6).all, 1e-5)
    assert cost <= stated.epsilon < cost + 1e-4
    found = PrivacyPlan(0.25, 1e-5, epsilon=stated.epsilon).promise(WORK, 2)
    assert found.noise_multiplier == pytest.approx(2.0, rel=0.02)
    assert protection.steps_of_round(LocalWork(epochs=0.5), 0.25) == 2
    assert protection.steps_of_round(LocalWork(epochs=0.5), 1.0) == 1
    for wrong in ({"epsilon": None}, {"epsilon": 1.0, "sampling_rate": 2.0}, {"epsilon": 1.0, "delta": 0.0}):
        with pytest.raises(ConfigError):
            PrivacyPlan(**{"sampling_rate": 0.1, **wrong})  # type: ignore[arg-type]


LOCAL = PrivacyPlan(noise_multiplier=0.5, delta=1e-5, mechanism="local", clip=0.2)


def test_noise_on_the_update_is_one_release_a_round_of_a_clipped_update(site: Site) -> None:
    manifest = private(site, privacy=LOCAL)
    assert manifest.privacy is not None
    assert manifest.train.clip == 1.0
    reply = site.train(ask(manifest))
    assert (reply.tokens, reply.steps, reply.loss, reply.seconds) == (31, 1, 0.0, 0.0)
    # Mean square of noise with deviation 0.5 x 0.2; the clipped update adds little. Twelve sigmas of the mean square.
    size = reply.update.size
    assert float(np.square(reply.update).mean()) == pytest.approx(0.01, rel=12 * (2 / size) ** 0.5 + 0.04 / 0.01 / size)
    with site.gate.budget() as budget:
        (charge,) = budget.charges()
    # Two updates of norm 0.2 at most are 0.4 apart at most.
    assert charge.release.mechanisms.all == (Gaussian(0.25, 1.0, 1),)
    assert manifest.privacy.epsilon == pytest.approx(epsilon([Gaussian(0.25, 1.0, 2)], 1e-5), abs=1e-4)
    assert same(site.train(ask(manifest)), reply)
    found = dataclasses.replace(LOCAL, noise_multiplier=None, epsilon=8.0).promise(WORK, 2)
    assert 7.9 < epsilon(protection.of_steps(found, 2).all, 1e-5) <= 8.0


def test_the_update_under_the_noise_has_the_agreed_norm_at_most(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[float] = []
    monkeypatch.setattr("model.private.noised", lambda g, *_: before.append(float(g[0].norm())) or g)  # type: ignore[func-returns-value]
    manifest = private(site, privacy=dataclasses.replace(LOCAL, clip=0.01))
    reply = site.train(ask(manifest))
    assert before == [pytest.approx(0.01, rel=1e-4)]
    assert before[0] <= 0.01
    assert np.linalg.norm(reply.update) == pytest.approx(0.01, rel=1e-4)


def test_training_that_diverges_is_noise_alone_and_is_not_told(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = private(site, privacy=LOCAL)
    monkeypatch.setattr(Trainer, "_update", lambda *_: (_ for _ in ()).throw(TrainingDiverged("loss 7.7 at step 1")))
    reply = site.train(ask(manifest))
    assert (reply.tokens, reply.steps) == (31, 1)
    assert float(np.square(reply.update).mean()) == pytest.approx(0.01, rel=12 * (2 / reply.update.size) ** 0.5)


def test_noise_on_the_update_has_no_sampling(site: Site) -> None:
    with pytest.raises(ConfigError, match="sampling_rate must be 1"):
        private(site, privacy=dataclasses.replace(LOCAL, sampling_rate=0.5))
