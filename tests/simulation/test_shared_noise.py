"""A federation whose noise is shared out over its sites, end to end: what the coordinator learns, and what it costs."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from client.archive import RunArchive
from client.audit import audit
from client.budget import FILE, Budget, State
from client.gate import digest_of_answer
from client.site import Site
from federation import protection
from federation.accountant import epsilon
from federation.discrete_noise import DiscreteGaussianNoise
from federation.fixed_point import CHUNK
from federation.manifest import Manifest, OuterOptions
from federation.messages import Kept, Vector
from federation.summed import numbers_of, objection
from federation.update import to_vector
from federation.vectors import norm
from model import checkpoint
from model.decoder import Decoder
from model.private import Secret
from model.train import Trainer, TrainingDiverged
from server.app import Outcome
from server.journal import Journal, SumEntry
from server.plan import PrivacyPlan
from simulation.config import read
from simulation.findings import report_of
from simulation.study import run_study
from tests import masked, tiny
from tests.simulation import studies
from tokenizer.errors import ConfigError

SITES = 4
PRIVACY = PrivacyPlan(epsilon=20.0, delta=1e-5, mechanism="distributed", honest_sites=3, clip=0.1)
CHOSEN = {"privacy": PRIVACY, "outer": OuterOptions(weights="uniform"), "rounds": 1, "min_sites": SITES}


@dataclasses.dataclass
class Ran:
    """A federation of one round, and what everybody has of it."""

    federation: masked.Federation
    outcome: Outcome
    entry: SumEntry

    @property
    def manifest(self) -> Manifest:
        return self.outcome.manifest

    @property
    def runs(self) -> list[RunArchive]:
        return [Site(files).archive.run(self.manifest.hash) for files in self.federation.files]

    @property
    def updates(self) -> list[Vector]:
        """What each site has kept: its update without noise."""
        return [reply.update for run in self.runs if (reply := run.reply(1)) is not None]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    federation = masked.Federation(tmp_path_factory.mktemp("shared"), SITES, **CHOSEN)
    outcome = federation.lead()
    with Journal(federation.root / "run" / "ledger.sqlite") as journal:
        entry = journal.sum(1, "train")
    assert entry is not None
    return Ran(federation, outcome, entry)


def test_the_model_moves_by_the_plain_mean_and_noise_of_the_planned_variance(ran: Ran) -> None:
    manifest = ran.manifest
    before = to_vector(Decoder.create(manifest.model, manifest.seed)).astype(np.float64)
    moved = to_vector(checkpoint.load(ran.outcome.checkpoint).decoder) - before
    noise = moved - np.mean([update.astype(np.float64) for update in ran.updates], axis=0)
    share = protection.privacy_of(manifest).share
    # The mean square of P normal numbers is normal with relative deviation sqrt(2/P): six of them are a false alarm
    # once in 5e8 runs.
    want = share**2 / SITES
    assert float(np.square(noise).mean()) == pytest.approx(want, rel=6 * math.sqrt(2 / noise.size))
    # It is what the sites' keys give, to the last step.
    fixed = numbers_of(manifest)
    total = np.zeros(noise.size, np.int64)
    for run, update in zip(ran.runs, ran.updates, strict=True):
        words = np.empty(update.size, fixed.dtype)
        secret = Secret(run.noise_key(1), f"{manifest.hash}/1/share")
        stream = DiscreteGaussianNoise(fixed.noise_variance, secret)
        for start in range(0, update.size, CHUNK):
            part = slice(start, start + CHUNK)
            fixed.encode(update[part], 1, words[part])
            total[part] += words[part].view("<i4")
            total[part] += stream.draw(words[part].size)
    np.testing.assert_allclose(moved, total * fixed.step / SITES, atol=float(np.abs(before).max()) * 2.0**-22)


def test_what_a_site_keeps_is_cut_and_its_masked_words_are_charged_with_the_key_of_their_noise(ran: Ran) -> None:
    for files, run, update in zip(ran.federation.files, ran.runs, ran.updates, strict=True):
        assert 0 < norm(update) <= protection.clip_before_rounding(ran.manifest) * (1 + 1e-6)
        reply = run.reply(1)
        assert reply is not None
        assert (reply.tokens, reply.steps, reply.loss, reply.seconds) == (1, 1, 0.0, 0.0)
        with Budget.open(files.state / FILE, begin=False) as budget:
            (charge,) = budget.charges()
        assert (charge.state, charge.key) == (State.RELEASED, b"")
        assert charge.sha256 == digest_of_answer(reply, run.noise_key(1)) != digest_of_answer(reply)
        assert charge.release.mechanisms == protection.of_releases(ran.manifest, 1)
        assert 19 < epsilon(charge.release.mechanisms.all, 1e-5) <= 20.0
        assert any("δ = 1e-05" in told for told in audit(files.state).epsilons)


def test_the_coordinator_s_ledger_holds_constants_beside_the_sum(ran: Ran) -> None:
    entry = ran.entry
    assert (entry.weight, entry.tokens, entry.steps, entry.nll, entry.clipped) == (SITES, SITES, SITES, 0.0, 0)
    with Journal(ran.federation.root / "run" / "ledger.sqlite") as journal:
        assert journal.scores() == []
        assert {(r.tokens, r.loss, r.norm, r.seconds) for r in journal.replies(1)} == {(0, 0.0, 0.0, 0.0)}
        assert {site.counts for site in journal.sites()} == {'{"fallbacks":0,"splits":{}}'}


def test_a_sum_that_is_tried_again_has_the_same_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A site vanishes once it was masked; the second attempt sums the others, with the keys of the first."""
    keys: dict[tuple[str, int], set[bytes]] = {}
    kept = RunArchive.noise_key

    def noted(run: RunArchive, number: int) -> bytes:
        key = kept(run, number)
        keys.setdefault((str(run.path), number), set()).add(key)
        return key

    monkeypatch.setattr(RunArchive, "noise_key", noted)
    fewer = dataclasses.replace(PRIVACY, honest_sites=2)
    federation = masked.Federation(tmp_path, SITES, **{**CHOSEN, "min_sites": 3, "privacy": fewer})
    federation.silence(4, "query.masked")
    outcome = federation.lead()
    with Journal(federation.root / "run" / "ledger.sqlite") as journal:
        entry = journal.sum(1, "train")
    assert entry is not None
    assert len(entry.sites.split(",")) == 3
    assert outcome.checkpoint.exists()
    assert all(len(found) == 1 and len(next(iter(found))) == 32 for found in keys.values())


def test_training_that_diverges_adds_noise_alone_and_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = masked.Federation(tmp_path, SITES, **CHOSEN)
    update = Trainer._update
    monkeypatch.setattr(Trainer, "_update", lambda *_: (_ for _ in ()).throw(TrainingDiverged("loss 7.7 at step 1")))
    told: list[object] = []
    federation.lead(lambda event: told.append(event.text))
    monkeypatch.setattr(Trainer, "_update", update)
    with Journal(federation.root / "run" / "ledger.sqlite") as journal:
        entry, manifest = journal.sum(1, "train"), journal.manifest()
    assert entry is not None
    assert manifest is not None
    assert (len(entry.sites.split(",")), entry.nll, entry.clipped) == (SITES, 0.0, 0)
    assert "7.7" not in str(told)
    for files in federation.files:
        reply = Site(files).archive.run(manifest.hash).reply(1)
        assert reply is not None
        assert not reply.update.any()


def test_an_answer_says_that_it_is_kept_whatever_the_update_is(ran: Ran) -> None:
    """No check of a single update may refuse: that would tell of it."""
    site = Site(ran.federation.files[0])
    (run,) = [one for one in ran.runs if one.path.is_relative_to(site.files.state)]
    reply = run.reply(1)
    assert reply is not None
    assert objection(ran.manifest, reply) == ""
    assert ran.manifest.max_norm is None
    assert {field.name for field in dataclasses.fields(Kept)} == {"site", "manifest_hash", "round", "request_digest"}


def test_a_study_shares_the_noise_out_in_its_federated_arm_and_a_lone_site_adds_its_own(tmp_path: Path) -> None:
    privacy = {"mechanism": "distributed", "honest_sites": 2, "epsilon": 20.0, "delta": 1e-5, "clip": 0.1}
    training = {"rounds": 1, "local_steps": 1, "batch_tokens": 512}
    study = studies.study(
        tiny.sites(tmp_path, 3),
        privacy=privacy,
        secure_aggregation={},
        training=training,
        arms=["federated", "alone"],
        evaluation={"trajectories": 1, "max_tokens": 4, "resamples": 100},
    )
    result = run_study(study, tmp_path / "study", workers=2)
    federated, *alone = result.arms
    assert federated.outcome is not None
    manifest = federated.outcome.manifest
    assert protection.privacy_of(manifest).honest_sites == 2
    assert manifest.outer.weights == "uniform"
    for arm in alone:
        assert arm.outcome is not None, arm.failure
        assert protection.privacy_of(arm.outcome.manifest).mechanism == "local"
    report = report_of(result, "fedcomet simulate")
    assert "noise shared out over 2 honest sites" in dict(report.settings)["Privacy"]
    assert all(site.epsilon is not None and 19 < site.epsilon <= 20.0 for site in report.sites)


def test_a_study_file_says_what_shared_noise_needs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "examples" / "demo.toml").read_text()
    shared = '[privacy]\nmechanism = "distributed"\nepsilon = 8\n'
    for more, told in (
        (shared, "honest_sites: mechanism = "),
        (f"{shared}honest_sites = 2\n", r'"distributed" needs \[secure_aggregation\]'),
        ('[privacy]\nmechanism = "local"\nepsilon = 8\nhonest_sites = 2\n', "no other has them"),
    ):
        path = tmp_path / "study.toml"
        path.write_text(f"{text}\n{more}")
        with pytest.raises(ConfigError, match=told):
            read(path)
    path.write_text(f"{text}\n{shared}honest_sites = 2\n[secure_aggregation]\n")
    assert read(path).privacy is not None
