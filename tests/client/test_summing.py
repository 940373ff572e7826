"""Claims about a site in the masked sums of a run: what it adds, what it refuses, and that a kill changes nothing."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.approval import site_key
from client.archive import Agreement, RunArchive
from client.files import SiteFiles
from client.site import Site
from client.summing import Summing
from federation.identity import Identity
from federation.manifest import Manifest, SecureAggregation
from federation.masking import Masked, MaskingOptions, OutOfTurn, Place, Replayed, TooFewSites
from federation.messages import EvaluateReply, PrepareRequest, SiteRefusal, TrainReply
from federation.summed import agreement_of, objection, update_of
from server.unmask import Opening, Stage, Unmasking
from tests import tiny
from tokenizer.codebook import Codebook, Survey, TokenizerOptions
from tokenizer.errors import DataError

FAR = 1e12
NAMES = ("ash", "birch", "cedar", "elm")
IDENTITIES = {name: Identity(Ed25519PrivateKey.generate()) for name in NAMES}
WORK = "ab" * 32
CODEBOOK = Codebook.build(Survey(TokenizerOptions()))


def manifest_of(**changes: Any) -> Manifest:
    masking = MaskingOptions(3, clip=1.0, max_weight=1000)
    chosen = SecureAggregation(3, masking, {name: key.public for name, key in IDENTITIES.items()})
    plan = tiny.plan(tokenizer=TokenizerOptions(), secure_aggregation=chosen)
    return dataclasses.replace(plan.manifest(CODEBOOK), **changes)


MANIFEST = manifest_of()


def reply_of(number: int, **changes: Any) -> TrainReply:
    update = np.random.default_rng(number).normal(0, 0.1, MANIFEST.model.parameters()).astype(np.float32)
    reply = TrainReply(NAMES[number], MANIFEST.hash, 1, WORK, update, 100 + number, 2, 2.5 + number, 1.0)
    return dataclasses.replace(reply, **changes)


class Sites:
    """Sites that have kept an update each; every answer is given by an object that knows only what is on the disk."""

    def __init__(self, root: Path) -> None:
        self.runs = {name: RunArchive(root / name) for name in NAMES}
        self.server = Unmasking(agreement_of(MANIFEST, Place(MANIFEST.hash, 1, "train", 1), WORK))
        for number, run in enumerate(self.runs.values()):
            run.agree(MANIFEST, CODEBOOK, Agreement("", ""))
            run.keep(reply_of(number), None)

    def answer(self, name: str, request: Any, minimum: int = 3) -> Any:
        return Summing(name, self.runs[name], IDENTITIES[name], minimum).answer(request)

    def ask(self, name: str) -> Any:
        return self.answer(name, self.server.request(name, FAR))

    def play(self, until: Stage = Stage.DONE) -> None:
        while self.server.stage is not until:
            for name in self.server.asked:
                self.server.receive(name, self.ask(name))
            self.server.advance()


@pytest.fixture
def sites(ram_path: Path) -> Sites:
    return Sites(ram_path)


def check(opening: Opening) -> None:
    replies = [reply_of(number) for number in range(4)]
    weight = sum(reply.tokens for reply in replies)
    want = sum(reply.tokens * reply.update.astype(np.float64) for reply in replies) / weight
    assert np.all(np.abs(opening.mean - want) <= opening.error + np.abs(want) * 2.0**-23)
    assert opening.weight == opening.totals["tokens"] == weight
    assert opening.totals["steps"] == 8
    assert opening.totals["loss"] == pytest.approx(sum(r.loss * r.tokens for r in replies), rel=1e-6)


class Crash(BaseException):
    """The end of the process."""


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Masked):
        return np.array_equal(one.words, other.words) and one.totals == other.totals
    return bool(one == other)


@pytest.mark.parametrize("written", [False, True])
def test_a_site_that_is_killed_at_any_write_adds_the_same(
    sites: Sites, monkeypatch: pytest.MonkeyPatch, written: bool
) -> None:
    """Before it, the secrets of that stage were never used; after it, the answer is lost, and given again."""
    hold: Callable[[RunArchive, str, bytes], None] = RunArchive.hold
    dying: list[str] = []

    def crashing(run: RunArchive, purpose: str, secrets: bytes) -> None:
        if written or run.path.name not in dying:
            hold(run, purpose, secrets)
        if run.path.name in dying:
            dying.remove(run.path.name)
            raise Crash

    monkeypatch.setattr(RunArchive, "hold", crashing)
    crashes = 0
    while sites.server.stage is not Stage.DONE:
        for name in sites.server.asked:
            dying[:] = [name]
            with pytest.raises(Crash):
                sites.ask(name)
            crashes += 1
            reply = sites.ask(name)
            assert same(sites.ask(name), reply)
            sites.server.receive(name, reply)
        sites.server.advance()
    assert crashes == 5 * 4
    check(sites.server.open_())


def test_an_update_that_changed_after_it_was_masked_is_not_masked_again(sites: Sites) -> None:
    sites.play(Stage.MASKED)
    sites.ask("ash")
    sites.runs["ash"].keep(reply_of(0, update=reply_of(0).update * 2), None)
    with pytest.raises(OutOfTurn, match="never used twice"):
        sites.ask("ash")


def test_a_site_that_was_asked_for_other_work_is_in_another_sum(sites: Sites) -> None:
    sites.runs["ash"].keep(reply_of(0, request_digest="cd" * 32), None)
    with pytest.raises(Replayed, match="ash is at"):
        sites.ask("ash")
    assert sites.runs["ash"].held("train") is None


def test_a_site_without_an_update_has_nothing_to_mask(sites: Sites) -> None:
    shutil.rmtree(sites.runs["ash"].path / "rounds")
    with pytest.raises(SiteRefusal, match=r"nothing to mask for round 1 \(train\)"):
        sites.ask("ash")


def test_a_site_s_policy_sets_the_fewest_sites_of_every_sum(sites: Sites) -> None:
    request = sites.server.request("ash", FAR)
    with pytest.raises(TooFewSites, match="its own minimum 5"):
        sites.answer("ash", request, minimum=5)


def test_secrets_are_for_their_owner_only_and_gone_once_the_sum_is_open(sites: Sites) -> None:
    sites.play(Stage.MASKED)
    folder = sites.runs["ash"].path / "held"
    assert folder.stat().st_mode & 0o077 == 0
    assert b'"seed"' in (folder / "train.json").read_bytes()
    sites.play()
    assert b'"secrets":null' in (folder / "train.json").read_bytes()


def test_losses_are_summed_apart_from_updates(sites: Sites) -> None:
    for name, run in sites.runs.items():
        run.keep_score(EvaluateReply(name, MANIFEST.hash, 1, "tuning", WORK, 30.0 if name == "ash" else 10.5, 4))
    sites.server = Unmasking(agreement_of(MANIFEST, Place(MANIFEST.hash, 1, "evaluate tuning", 1), WORK))
    sites.play()
    opening = sites.server.open_()
    assert opening.totals["tokens"] == 16
    assert opening.totals["loss"] == pytest.approx(61.5, abs=4 * 2.0**-11)
    assert (sites.runs["ash"].path / "held" / "evaluate-tuning.json").exists()
    assert sites.runs["ash"].held("train") is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, ""),
        ({"tokens": 1001}, "beyond masking.max_weight = 1000"),
        ({"tokens": 0}, "beyond masking.max_weight"),
        ({"update": reply_of(0).update * np.float32(np.nan)}, "not finite"),
        ({"update": reply_of(0).update * 100}, "above the agreed 20"),
    ],
)
def test_a_site_keeps_an_update_out_that_breaks_what_was_agreed(changes: dict[str, Any], told: str) -> None:
    found = objection(manifest_of(max_norm=20.0), reply_of(0, **changes))
    assert told in found
    assert bool(found) == bool(told)


def test_all_count_the_same_where_that_was_agreed() -> None:
    uniform = dataclasses.replace(MANIFEST, outer=dataclasses.replace(MANIFEST.outer, weights="uniform"))
    place = Place(uniform.hash, 1, "train", 1)
    assert update_of(uniform, reply_of(3)).weight == 1
    assert agreement_of(uniform, place, WORK).options.max_weight == 1
    assert update_of(MANIFEST, reply_of(3)).weight == 103


@pytest.mark.parametrize("count", [3, 50, 2047])
def test_totals_fit_for_any_number_of_sites(count: int) -> None:
    roster = {f"s{n}": f"ed25519:{n:064x}" for n in range(count)}
    masking = MaskingOptions(2 * count // 3 + 1, clip=1.0, max_weight=10**9)
    many = manifest_of(secure_aggregation=SecureAggregation(masking.threshold, masking, roster))
    for purpose in ("train", "evaluate tuning"):
        agreed = agreement_of(many, Place(many.hash, 1, purpose, 1), WORK)  # type: ignore[arg-type]
        assert agreed.numbers.dtype.itemsize == 4


def test_an_update_in_clear_never_leaves_a_masked_run(ram_path: Path) -> None:
    files = SiteFiles("ash", ram_path / "data", ram_path / "state")
    site = Site(files)
    site.archive.run(MANIFEST.hash).agree(MANIFEST, CODEBOOK, Agreement("", ""))
    score = EvaluateReply("ash", MANIFEST.hash, 1, "tuning", WORK, 30.0, 4)
    for reply in (reply_of(0), score):
        with pytest.raises(DataError, match="must not leave without masks"):
            site.gate.note(reply, "train", "", 0)


def test_a_site_takes_no_part_in_a_run_that_lists_another_key_for_it(ram_path: Path) -> None:
    files = tiny.site(ram_path, "ash", 1)
    request = PrepareRequest(MANIFEST.to_bytes(), CODEBOOK.to_bytes(), FAR)
    with pytest.raises(SiteRefusal, match="has another key for ash; the key here is ed25519:"):
        Site(files).answer(request)
    stranger = dataclasses.replace(files, name="oak")
    with pytest.raises(SiteRefusal, match="does not list oak"):
        Site(stranger).answer(request)
    assert Identity.at(site_key(files.state)).public not in MANIFEST.to_bytes().decode()
