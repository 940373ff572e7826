"""A round's local work: stopped anywhere and gone on with, it ends with the same bits; what a machine chose stays."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import local
from client.archive import Choices, RunArchive, Snapshot
from client.files import SiteFiles
from client.heads import places, with_head
from client.site import Site
from federation.manifest import LocalWork, Manifest, OuterOptions
from federation.messages import TrainReply
from model.settings import Machine, TrainOptions
from model.train import StepResult, Trainer
from tests import tiny
from tests.client.test_site import agree, ask, same
from tokenizer.errors import ConfigError
from tokenizer.windows import Batch

DROPPING = dataclasses.replace(tiny.MODEL, dropout=0.2)
WORK = LocalWork(steps=6, batch_tokens=512)


class Killed(BaseException):
    """What no part of the site catches."""


def files_of(root: Path, **changes: Any) -> SiteFiles:
    return dataclasses.replace(tiny.site(root, "icu", 1), snapshot_minutes=0.0, **changes)


def run_of(site: Site, manifest: Manifest) -> RunArchive:
    return site.archive.run(manifest.hash)


def die_after(monkeypatch: pytest.MonkeyPatch, steps: int, kept: int) -> list[int]:
    """Let the work die before the step after so many, with the snapshot of an earlier one on the disk."""
    taken: list[int] = []
    step, keep = Trainer.step, RunArchive.keep_snapshot

    def dying_step(trainer: Trainer, batch: Batch) -> StepResult:
        if len(taken) == steps:
            raise Killed
        taken.append(trainer.global_step)
        return step(trainer, batch)

    def lazy_keep(run: RunArchive, snapshot: Snapshot) -> None:
        if snapshot.done <= kept:
            keep(run, snapshot)

    monkeypatch.setattr(Trainer, "step", dying_step)
    monkeypatch.setattr(RunArchive, "keep_snapshot", lazy_keep)
    return taken


def two_rounds(site: Site, manifest: Manifest, again: Callable[[int], None] = lambda number: None) -> list[TrainReply]:
    replies = []
    for number in (1, 2):
        again(number)
        replies.append(site.train(ask(manifest, number)))
    return replies


ALIKE = OuterOptions(weights="uniform")


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"train": TrainOptions(optimizer="muon")},
        {"local": dataclasses.replace(WORK, proximal=0.5)},
        {"local": dataclasses.replace(WORK, own_head=True)},
        {
            "local": dataclasses.replace(WORK, correct_drift=True),
            "train": TrainOptions(optimizer="sgd", lr=0.1),
            "outer": ALIKE,
        },
    ],
    ids=["adamw", "muon", "proximal", "own head", "drift"],
)
@pytest.mark.parametrize(("steps", "kept"), [(4, 4), (5, 2), (2, 0)], ids=["at a snapshot", "past one", "before any"])
def test_a_round_that_was_stopped_in_the_middle_ends_with_the_same_bits(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], steps: int, kept: int
) -> None:
    plan = {"local": WORK, "model": DROPPING, **extra}
    calm = Site(files_of(ram_path / "calm"))
    manifest, _, _ = agree(calm, **plan)
    expected = two_rounds(calm, manifest)

    site = Site(files_of(ram_path / "stopped"))
    agree(site, **plan)

    taken: list[int] = []

    def stop_first(number: int) -> None:
        before = len(taken)
        with monkeypatch.context() as patch:
            die_after(patch, steps, kept)
            with pytest.raises(Killed):
                Site(site.files).train(ask(manifest, number))
        del taken[before:]
        assert (run_of(site, manifest).path / "local.safetensors").exists() == (kept > 0)

    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda t, batch: taken.append(t.global_step) or step(t, batch))  # type: ignore[func-returns-value]
    assert all(map(same, two_rounds(site, manifest, stop_first), expected))
    assert taken == [*range(kept, 6), *range(6 + kept, 12)], "only what was not in the snapshot is done again"
    assert not (run_of(site, manifest).path / "local.safetensors").exists()


def test_a_snapshot_of_another_request_is_not_gone_on_from(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(files_of(ram_path))
    manifest, _, _ = agree(site, local=WORK)
    with monkeypatch.context() as patch:
        die_after(patch, 3, 3)
        with pytest.raises(Killed):
            site.train(ask(manifest))
    other = ask(manifest, weights=ask(manifest).weights * 1.5)
    reply = site.train(other)
    assert (reply.steps, reply.request_digest) == (6, other.digest)


def test_snapshots_are_taken_as_often_as_asked_for(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr(RunArchive, "keep_snapshot", lambda run, snapshot: done.append(snapshot.done))
    minutes = iter(range(100))
    monkeypatch.setattr(local.time, "monotonic", lambda: 60.0 * next(minutes))
    site = Site(dataclasses.replace(files_of(ram_path), snapshot_minutes=3.0))
    manifest, _, _ = agree(site, local=WORK)
    site.train(ask(manifest))
    assert done == [3, 6], "a minute goes by at every look at the clock"


def test_a_measured_precision_is_kept_for_the_run(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(files_of(ram_path))
    manifest, _, _ = agree(site, local=WORK)
    expected = site.train(ask(manifest, 1))
    assert run_of(site, manifest).choices() == Choices("fp32", 0)
    monkeypatch.setattr("model.machine.measured_precision", lambda *_: "bf16")
    seen: list[str] = []
    step = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda t, batch: seen.append(t.precision) or step(t, batch))  # type: ignore[func-returns-value]
    site.train(ask(manifest, 2))
    assert seen == ["fp32"] * 6, "the second round computes as the first"
    twin = Site(files_of(ram_path / "twin"))
    agree(twin, local=WORK)
    assert not np.array_equal(twin.train(ask(manifest, 1)).update, expected.update)
    assert run_of(twin, manifest).choices() == Choices("bf16", 0)


def test_a_site_may_choose_how_it_computes(ram_path: Path) -> None:
    plain = Site(files_of(ram_path / "plain"))
    manifest, _, _ = agree(plain, local=WORK, model=DROPPING)
    small = Site(files_of(ram_path / "small", machine=Machine(micro_tokens=100, checkpointing=True)))
    agree(small, local=WORK, model=DROPPING)
    expected, found = plain.train(ask(manifest)), small.train(ask(manifest))
    np.testing.assert_allclose(found.update, expected.update, atol=2e-5)
    assert found.tokens == expected.tokens
    assert run_of(small, manifest).choices() == Choices("fp32", 100)


def test_terms_change_what_a_round_comes_to_and_a_correction_waits_for_a_second_round(ram_path: Path) -> None:
    def replies(name: str, **local: Any) -> list[TrainReply]:
        site = Site(files_of(ram_path / name))
        plan = {"local": dataclasses.replace(WORK, **local), "train": TrainOptions(optimizer="sgd"), "outer": ALIKE}
        manifest, _, _ = agree(site, **plan)
        return two_rounds(site, manifest)

    plain, proximal, corrected = replies("plain"), replies("near", proximal=2.0), replies("drift", correct_drift=True)
    assert np.linalg.norm(proximal[0].update) < np.linalg.norm(plain[0].update)
    np.testing.assert_array_equal(corrected[0].update, plain[0].update)
    assert not np.array_equal(corrected[1].update, plain[1].update)


def test_a_head_of_its_own_never_leaves_and_is_what_the_next_round_begins_with(ram_path: Path) -> None:
    def site_of(name: str, own_head: bool) -> tuple[Site, Manifest, list[TrainReply]]:
        site = Site(files_of(ram_path / name))
        manifest, _, _ = agree(site, local=dataclasses.replace(WORK, own_head=own_head))
        return site, manifest, two_rounds(site, manifest)

    (site, manifest, own), (_, _, plain) = site_of("own", True), site_of("plain", False)
    head = places(manifest.model)
    assert manifest.model.vocab * manifest.model.width + manifest.model.width == head.sum()
    for reply in own:
        assert not reply.update[head].any()
        assert reply.update[~head].any()
    np.testing.assert_array_equal(own[0].update[~head], plain[0].update[~head])
    assert own[1].loss < own[0].loss
    # The same request again goes the same way, from the head after round 1.
    run = run_of(site, manifest)
    before, after = run.head_before(2), run.head_before(3)
    assert before is not None
    assert after is not None
    assert not np.array_equal(before, after)
    begun = ask(manifest, 1).weights
    np.testing.assert_allclose(before - begun[head], plain[0].update[head], atol=1e-7)
    request = ask(manifest, 2)
    np.testing.assert_array_equal(with_head(manifest.model, request.weights, before)[~head], request.weights[~head])


@pytest.mark.parametrize("changes", [{"outer": OuterOptions()}, {"train": TrainOptions()}])
def test_a_correction_that_would_not_add_up_to_nothing_is_refused(ram_path: Path, changes: dict[str, Any]) -> None:
    plan = {"local": dataclasses.replace(WORK, correct_drift=True), "train": TrainOptions(optimizer="sgd")}
    with pytest.raises(ConfigError, match="correct_drift"):
        agree(Site(files_of(ram_path)), **{**plan, "outer": ALIKE, **changes})
