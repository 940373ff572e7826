import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from client.budget import BudgetExhausted, State
from client.files import SiteFiles
from client.site import Site
from federation.manifest import LocalWork, Manifest
from federation.messages import (
    EvaluateRequest,
    PrepareReply,
    PrepareRequest,
    ProtocolError,
    SiteRefusal,
    SurveyRequest,
    TrainReply,
    TrainRequest,
)
from federation.update import to_vector
from model.decoder import Decoder
from model.train import Trainer
from tests import tiny
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import write_meds
from tokenizer.split import SplitRule

FAR = 1e12


def agree(site: Site, **changes: Any) -> tuple[Manifest, Codebook, PrepareReply]:
    """Take a site through survey and prepare."""
    plan = tiny.plan(**changes)
    survey = site.survey(SurveyRequest(plan.split, plan.tokenizer, FAR)).survey
    codebook = Codebook.build(Survey.from_bytes(survey))
    manifest = plan.manifest(codebook)
    return manifest, codebook, site.prepare(PrepareRequest(manifest.to_bytes(), codebook.to_bytes(), FAR))


def start(manifest: Manifest) -> np.ndarray:
    return to_vector(Decoder.create(manifest.model, manifest.seed))


def ask(
    manifest: Manifest, number: int = 1, weights: np.ndarray | None = None, deadline_s: float = FAR
) -> TrainRequest:
    return TrainRequest(manifest.hash, number, start(manifest) if weights is None else weights, deadline_s)


def same(one: TrainReply, other: TrainReply) -> bool:
    plain = [f.name for f in dataclasses.fields(one) if f.name not in ("update", "seconds")]
    return np.array_equal(one.update, other.update) and all(getattr(one, f) == getattr(other, f) for f in plain)


@pytest.fixture
def site(ram_path: Path) -> Site:
    return Site(tiny.site(ram_path, "icu", 1))


def test_a_store_holds_all_patients_and_is_used_again(site: Site) -> None:
    manifest, codebook, reply = agree(site)
    assert sum(counts.patients for counts in reply.splits.values()) == 40
    assert reply.manifest_hash == manifest.hash
    (store,) = (site.files.state / "stores").iterdir()
    made = (store / "manifest.json").stat().st_mtime_ns
    other = dataclasses.replace(manifest, name="another run")
    site.prepare(PrepareRequest(other.to_bytes(), codebook.to_bytes(), FAR))
    assert [p.name for p in (site.files.state / "stores").iterdir()] == [store.name]
    assert (store / "manifest.json").stat().st_mtime_ns == made
    assert len(list((site.files.state / "runs").iterdir())) == 2


def test_an_update_is_local_minus_global_and_lowers_the_loss(site: Site) -> None:
    manifest, _, _ = agree(site, local=LocalWork(steps=20, batch_tokens=512))
    weights = start(manifest)
    before = site.evaluate(EvaluateRequest(manifest.hash, 1, "tuning", weights, FAR))
    reply = site.train(ask(manifest))
    after = site.evaluate(EvaluateRequest(manifest.hash, 1, "tuning", weights + reply.update, FAR))
    assert before.tokens == after.tokens > 0
    assert after.nll < before.nll
    assert (reply.steps, reply.request_digest) == (20, ask(manifest).digest)
    assert 0 < reply.tokens <= 20 * 512


def test_the_same_request_gets_the_same_bytes_without_new_work(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, _, _ = agree(site)
    first = site.train(ask(manifest))
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("the site trained again"))
    again = Site(site.files, clock=lambda: 5.0).train(ask(manifest, deadline_s=1.0))
    assert same(first, again)
    assert again.seconds == first.seconds


def test_another_request_for_an_answered_round_is_refused(site: Site) -> None:
    manifest, _, _ = agree(site)
    site.train(ask(manifest))
    with pytest.raises(SiteRefusal, match="answered already, for another request"):
        site.train(ask(manifest, weights=start(manifest) + 1))
    site.train(ask(manifest, number=2))
    with pytest.raises(SiteRefusal, match="for another request"):
        site.train(ask(manifest, weights=start(manifest) + 1))


def test_old_answers_are_dropped_but_not_forgotten(site: Site) -> None:
    manifest, _, _ = agree(site, rounds=4)
    for number in (1, 2, 3):
        site.train(ask(manifest, number))
    with pytest.raises(SiteRefusal, match="no longer kept"):
        site.train(ask(manifest, 1))
    with pytest.raises(SiteRefusal, match="for another request"):
        site.train(ask(manifest, 1, start(manifest) + 1))
    assert site.train(ask(manifest, 2)).round == 2
    run = site.files.state / "runs" / manifest.hash
    assert sorted(p.name for p in (run / "rounds").iterdir()) == ["0001.digest", "0002.safetensors", "0003.safetensors"]
    assert sorted(p.name for p in (run / "optimizer").iterdir()) == ["0002.safetensors", "0003.safetensors"]


def test_a_round_that_is_over_is_not_answered_any_more(site: Site) -> None:
    manifest, _, _ = agree(site)
    site.train(ask(manifest, 2))
    with pytest.raises(SiteRefusal, match="round 2 was answered already"):
        site.train(ask(manifest, 1))


@pytest.mark.parametrize("state", ["keep", "reset"])
@pytest.mark.parametrize("work", [LocalWork(steps=3, batch_tokens=512), LocalWork(epochs=1, batch_tokens=512)], ids=str)
def test_a_site_that_died_in_a_round_does_the_same_work_again(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any, work: LocalWork
) -> None:
    changes = {"local": dataclasses.replace(work, optimizer_state=state)}
    sites = [Site(tiny.site(ram_path / place, "icu", 1)) for place in ("here", "there")]
    (manifest, _, _), _ = agree(sites[0], **changes), agree(sites[1], **changes)
    expected = [sites[0].train(ask(manifest, number)) for number in (1, 2)]

    first = sites[1].train(ask(manifest, 1))
    real, count = Trainer.step, 0

    def dying(self: Trainer, batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return real(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", dying)
        with pytest.raises(KeyboardInterrupt):
            sites[1].train(ask(manifest, 2))
    second = Site(sites[1].files).train(ask(manifest, 2))
    assert same(first, expected[0])
    assert same(second, expected[1])


def test_keeping_the_optimizer_makes_a_difference_only_after_round_one(ram_path: Path) -> None:
    replies = {}
    for state in ("keep", "reset"):
        site = Site(tiny.site(ram_path / state, "icu", 1))
        local: Any = LocalWork(steps=3, batch_tokens=512, optimizer_state=state)  # type: ignore[arg-type]
        manifest, _, _ = agree(site, local=local)
        replies[state] = [site.train(ask(manifest, number)).update for number in (1, 2)]
    np.testing.assert_array_equal(replies["keep"][0], replies["reset"][0])
    assert not np.array_equal(replies["keep"][1], replies["reset"][1])


def test_epochs_visit_every_target_once(site: Site) -> None:
    manifest, _, reply = agree(site, local=LocalWork(epochs=2, batch_tokens=256))
    trained = [site.train(ask(manifest, number)).tokens for number in (1, 2)]
    train = reply.splits["train"]
    headers = 3 * train.patients  # gender, age, and the first token after them is no target either
    assert trained == [2 * (train.tokens - headers)] * 2


def test_sites_with_equal_records_draw_different_batches(ram_path: Path) -> None:
    updates = []
    for name in ("icu-a", "icu-b"):
        site = Site(tiny.site(ram_path / name, name, 1))
        manifest, _, _ = agree(site)
        updates.append(site.train(ask(manifest)).update)
    assert not np.array_equal(*updates)


@pytest.mark.parametrize(
    "act",
    [
        lambda site, manifest, codebook: site.survey(SurveyRequest(SplitRule("k"), TokenizerOptions(), 10.0)),
        lambda site, manifest, codebook: site.prepare(PrepareRequest(manifest.to_bytes(), codebook.to_bytes(), 10.0)),
        lambda site, manifest, codebook: site.train(ask(manifest, deadline_s=10.0)),
        lambda site, manifest, codebook: site.evaluate(
            EvaluateRequest(manifest.hash, 1, "tuning", start(manifest), 10.0)
        ),
    ],
    ids=["survey", "prepare", "train", "evaluate"],
)
def test_past_its_deadline_nothing_is_begun(site: Site, act: Callable[..., Any]) -> None:
    manifest, codebook, _ = agree(site)
    with pytest.raises(SiteRefusal, match="deadline"):
        act(Site(site.files, clock=lambda: 11.0), manifest, codebook)


def test_training_stops_at_the_deadline_and_leaves_nothing(site: Site) -> None:
    manifest, _, _ = agree(site, local=LocalWork(steps=50, batch_tokens=512))
    ticks = iter(range(100))
    with pytest.raises(SiteRefusal, match="deadline"):
        Site(site.files, clock=lambda: float(next(ticks))).train(ask(manifest, deadline_s=5.5))
    run = site.files.state / "runs" / manifest.hash
    assert not (run / "rounds").exists()
    assert not (run / "optimizer").exists()


def test_a_site_without_patients_says_so(ram_path: Path) -> None:
    site = Site(tiny.site(ram_path, "empty-icu", 1, patients=0))
    with pytest.raises(SiteRefusal, match="empty-icu has no patients"):
        site.survey(SurveyRequest(SplitRule("k"), TokenizerOptions(), FAR))


def test_a_private_survey_is_drawn_once_and_answers_one_request_only(ram_path: Path) -> None:
    files = tiny.site(ram_path, "icu", 1)
    settings = ram_path / "site.toml"
    settings.write_text("[survey_privacy]\nepsilon = 20.0\ndelta = 1e-4\n")
    files = dataclasses.replace(files, settings=str(settings))
    request = SurveyRequest(SplitRule("k"), TokenizerOptions(min_patients=5), FAR)
    told = Site(files).survey(request).survey
    with Site(files).gate.budget() as budget:
        (charge,) = budget.charges()
        assert (charge.state, charge.answer, charge.key) == (State.CHARGED, told, b"")
        assert budget.spent(1e-4) <= 20.0
    # After a crash and a later deadline: no second draw.
    assert Site(files).survey(dataclasses.replace(request, deadline_s=FAR + 1)).survey == told
    with pytest.raises(SiteRefusal, match="one private survey"):
        Site(files).survey(dataclasses.replace(request, tokenizer=TokenizerOptions(min_patients=6)))
    (files.state / "budget.sqlite").write_bytes(b"{" * 5000)
    with pytest.raises(DataError, match="may have left"):
        Site(files).survey(request)


def test_a_private_survey_beyond_the_budget_is_refused_before_it_is_drawn(ram_path: Path) -> None:
    files = tiny.site(ram_path, "icu", 1)
    settings = ram_path / "site.toml"
    settings.write_text("[survey_privacy]\nepsilon = 2.0\ndelta = 1e-4\n")
    policy = ram_path / "policy.toml"
    rules = "version = 1\n[statistics]\nfloor = 5\n[privacy]\nepsilon_total = {}\ndelta_total = 1e-4\n"
    policy.write_text(rules.format(1.0))
    files = dataclasses.replace(files, settings=str(settings), policy=policy)
    request = SurveyRequest(SplitRule("k"), TokenizerOptions(min_patients=5), FAR)
    with pytest.raises(BudgetExhausted, match="does not allow the survey") as refusal:
        Site(files).survey(request)
    assert "limit is 1" in refusal.value.__notes__[0]
    assert "limit is 1" not in str(refusal.value)
    with Site(files).gate.budget() as budget:
        assert budget.charges() == []
    policy.write_text(rules.format(2.0))
    Site(files).survey(request)


def test_without_privacy_settings_two_surveys_are_the_same_and_exact(site: Site) -> None:
    request = SurveyRequest(SplitRule("k"), TokenizerOptions(min_patients=5), FAR)
    assert site.survey(request).survey == site.survey(request).survey
    assert not (site.files.state / "budget.sqlite").exists()


def test_a_site_without_patients_to_train_on_says_so(ram_path: Path) -> None:
    plan, wanted = tiny.plan(), ram_path / "data" / "small-icu"
    ids = np.arange(1, 200)
    held_out = ids[plan.split.assign(ids) == 2][:3].tolist()
    frame = tiny.records(0, 200).filter(pl.col("subject_id").is_in(held_out))
    write_meds(wanted, [("train/0", frame)], name="small-icu")
    site = Site(SiteFiles("small-icu", wanted, ram_path / "state"))
    with pytest.raises(SiteRefusal, match="small-icu has no patients in the train split"):
        agree(site)


def test_records_that_changed_since_the_run_began_are_refused(site: Site) -> None:
    manifest, codebook, _ = agree(site)
    tiny.site(site.files.data.parents[1], "icu", 2)
    request = PrepareRequest(manifest.to_bytes(), codebook.to_bytes(), FAR)
    with pytest.raises(SiteRefusal, match="have changed since this run began"):
        site.prepare(request)


def test_a_damaged_store_is_built_again(site: Site) -> None:
    manifest, codebook, first = agree(site)
    (store,) = (site.files.state / "stores").iterdir()
    (store / "train" / "tokens.i32").write_bytes(b"short")
    with pytest.raises(DataError, match=r"tokens\.i32"):
        site.train(ask(manifest))
    assert site.prepare(PrepareRequest(manifest.to_bytes(), codebook.to_bytes(), FAR)) == first
    assert site.train(ask(manifest)).steps == 2


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"codebook_hash": "0" * 64}, ProtocolError, "codebook has hash"),
        ({"layout_hash": "0" * 64}, ProtocolError, "layout here has hash"),
        ({"tokenizer": TokenizerOptions(value_bins=5)}, ProtocolError, "options or size"),
        ({"software": "99.0"}, SiteRefusal, r"for fedcomet 99\.0"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(
    site: Site, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    manifest, codebook, _ = agree(site)
    wrong = dataclasses.replace(manifest, **changes)
    with pytest.raises(error, match=told):
        site.prepare(PrepareRequest(wrong.to_bytes(), codebook.to_bytes(), FAR))


def test_a_codebook_that_is_none_is_refused(site: Site) -> None:
    manifest, _, _ = agree(site)
    with pytest.raises(ProtocolError, match="codebook that was sent"):
        site.prepare(PrepareRequest(manifest.to_bytes(), b"{}", FAR))


@pytest.mark.parametrize("manifest_hash", ["0" * 64, "../../etc/passwd", ""])
def test_a_run_that_was_not_agreed_on_is_refused(site: Site, manifest_hash: str) -> None:
    with pytest.raises((SiteRefusal, ProtocolError)):
        site.train(TrainRequest(manifest_hash, 1, np.zeros(3, np.float32), FAR))


@pytest.mark.parametrize("weights", [np.zeros(3, np.float32), None], ids=["wrong length", "not finite"])
def test_weights_that_do_not_fit_are_refused(site: Site, weights: np.ndarray | None) -> None:
    manifest, _, _ = agree(site)
    wrong = np.full(manifest.model.parameters(), np.nan, np.float32) if weights is None else weights
    with pytest.raises(ProtocolError, match="finite numbers"):
        site.train(ask(manifest, weights=wrong))
    with pytest.raises(ProtocolError, match="no round 3"):
        site.train(ask(manifest, number=3))


def test_the_train_split_is_not_evaluated(site: Site) -> None:
    manifest, _, _ = agree(site)
    with pytest.raises(ProtocolError, match="no split 'train'"):
        site.evaluate(EvaluateRequest(manifest.hash, 1, "train", start(manifest), FAR))


@pytest.mark.parametrize("name", ["", "a/b", "..", "ICU 3", "x" * 65])
def test_a_name_that_can_not_be_a_file_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="name of a site"):
        SiteFiles(name, Path("d"), Path("s"))
