"""Killed at any of its steps, a site never lets an uncharged answer go and never draws a second noise for a round."""

import itertools
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.budget import FILE, Budget, State
from client.outbound import lines as listed
from client.outbound import read_entry, read_head
from federation import protection
from federation.accountant import epsilon
from tests.client.killed_round import (
    ROUNDED,
    Place,
    answer,
    answer_evaluation,
    answer_masked,
    answer_masked_with_forgotten_keys,
    answer_rounded,
    answer_with_forgotten_keys,
    killed_at,
    lines,
)

NEVER = 10**9


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path_factory.getbasetemp()
    folder = root / f"fedcomet-killed-{tmp_path_factory.getbasetemp().name}"
    yield Place.prepared(folder)
    shutil.rmtree(folder)


def keys_of(place: Place) -> dict[str, set[str]]:
    """The keys that every draw was made with."""
    keys: dict[str, set[str]] = defaultdict(set)
    for draw, key in lines(place.draws):
        keys[draw].add(key)
    return keys


def check(place: Place, *, finished: bool, purpose: str = "training") -> None:
    assert all(len(keys) == 1 for keys in keys_of(place).values()), "a second noise was drawn for a round"
    sent = lines(place.outbox)
    assert len({update for _, update in sent}) <= 1, "two answers to one question"
    with Budget.open(place.files.state / FILE) as budget:
        charges = budget.charges()
    folder = place.files.state / "outbound"
    on_list = set()
    if (folder / "head.json").exists():
        on_list = {read_entry(line, where).message.sha256 for where, line in listed(folder, read_head(folder))}
    for content, update in sent:
        (charge,) = charges
        assert (charge.state, charge.sha256) == (State.RELEASED, update), "an uncharged release"
        assert content in on_list
    if finished:
        assert sent
        (charge,) = charges
        assert charge.key == b""
        privacy = place.manifest.privacy
        assert privacy is not None
        assert charge.release.purpose == purpose
        if purpose == "evaluation":
            assert charge.release.mechanisms == protection.of_evaluations(privacy, 1)
            assert set(keys_of(place)) == {f"{place.manifest.hash}/1/evaluation"}
            return
        assert charge.release.mechanisms == protection.of_steps(privacy, 2)
        assert epsilon(charge.release.mechanisms.all, privacy.delta) > 0
        assert set(keys_of(place)) == {
            f"{place.manifest.hash}/1/{s}/{use}" for s in (0, 1) for use in ("patients", "noise")
        }


def kill_and_go_on(prepared: Place, nth: int, kind: str = "", purpose: str = "training") -> str:
    how = answer if purpose == "training" else answer_evaluation
    folder = prepared.files.state.with_name(f"kill-{nth}-{kind}")
    place = prepared.copy(folder)
    name = killed_at(place, nth, kind, how)
    check(place, finished=not name, purpose=purpose)
    assert killed_at(place, NEVER, how=how) == ""
    check(place, finished=True, purpose=purpose)
    shutil.rmtree(folder)
    return name


@pytest.mark.parametrize(
    ("nth", "kind"),
    [
        (1, "sql commit"),  # the ledger is opened
        (3, "sql commit"),  # reserved, or about to be
        (1, "after PrivateTrainer.step"),
        (2, "after replace"),  # in the middle of what is kept of steps and answer
        (1, "before RunArchive.keep"),
        (1, "after RunArchive.keep"),
        (1, "after Budget.charge"),
        (1, "before Outbound.note"),
        (1, "after Outbound.note"),
        (1, "after Budget.released"),
        (1, "about to leave"),
        (1, "sent"),
    ],
)
def test_killed_between_any_two_of_its_duties_a_site_keeps_its_promise(prepared: Place, nth: int, kind: str) -> None:
    assert kill_and_go_on(prepared, nth, kind) == kind


@pytest.mark.parametrize(
    ("nth", "kind"),
    [
        (3, "sql commit"),
        (1, "before RunArchive.keep_score"),
        (1, "after RunArchive.keep_score"),
        (1, "after Budget.charge"),
        (1, "after Outbound.note"),
        (1, "after Budget.released"),
        (1, "sent"),
    ],
)
def test_killed_while_it_evaluates_a_site_keeps_its_promise(prepared: Place, nth: int, kind: str) -> None:
    assert kill_and_go_on(prepared, nth, kind, "evaluation") == kind


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path_factory.getbasetemp()
    folder = root / f"fedcomet-killed-rounded-{tmp_path_factory.getbasetemp().name}"
    yield Place.prepared(folder, plan=ROUNDED)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def undisturbed(rounded: Place) -> Place:
    """A site that was never killed."""
    place = rounded.copy(rounded.files.state.with_name("undisturbed"))
    assert killed_at(place, NEVER, how=answer_rounded) == ""
    assert [number for number, _ in lines(place.outbox)] == ["1", "2"]
    return place


def residuals(place: Place) -> dict[str, bytes]:
    """What rounding took from every update that is kept."""
    folder = place.files.state / "runs" / place.manifest.hash / "residuals"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_and_go_on_rounded(rounded: Place, undisturbed: Place, nth: int, kind: str = "") -> str:
    folder = rounded.files.state.with_name(f"rounded-{nth}-{kind}")
    place = rounded.copy(folder)
    name = killed_at(place, nth, kind, answer_rounded)
    assert killed_at(place, NEVER, how=answer_rounded) == ""
    assert {tuple(each) for each in lines(place.outbox)} == {tuple(each) for each in lines(undisturbed.outbox)}
    assert residuals(place) == residuals(undisturbed)
    shutil.rmtree(folder)
    return name


@pytest.mark.parametrize(
    ("nth", "kind"),
    [
        (1, "before RunArchive.keep"),  # the residual is there, and its answer is not
        (1, "after RunArchive.keep"),
        (1, "sent"),
        (2, "before RunArchive.keep"),
        (2, "after RunArchive.keep"),
        (2, "after replace"),
        (2, "about to leave"),
    ],
)
def test_killed_anywhere_a_site_adds_what_rounding_took_away_once(
    rounded: Place, undisturbed: Place, nth: int, kind: str
) -> None:
    assert len(residuals(undisturbed)["0002.safetensors"]) > 1000
    assert kill_and_go_on_rounded(rounded, undisturbed, nth, kind) == kind


@pytest.mark.slow
def test_killed_at_every_step_a_site_adds_what_rounding_took_away_once(rounded: Place, undisturbed: Place) -> None:
    names = list(
        itertools.takewhile(bool, (kill_and_go_on_rounded(rounded, undisturbed, nth) for nth in itertools.count(1)))
    )
    assert {"after fsync", "after replace", "after RunArchive.keep", "sent"} <= set(names)
    assert len(names) > 30


def test_a_site_that_loses_what_rounding_took_away_is_found_out(rounded: Place, undisturbed: Place) -> None:
    """The negative control of the tests above."""
    place = rounded.copy(rounded.files.state.with_name("rounded-forgetful"))
    assert killed_at(place, 1, "sent", answer_rounded) == "sent"
    (place.files.state / "runs" / place.manifest.hash / "residuals/0001.safetensors").unlink()
    assert killed_at(place, NEVER, how=answer_rounded) == ""
    assert lines(place.outbox)[-1] != lines(undisturbed.outbox)[-1]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else tmp_path_factory.getbasetemp()
    folder = root / f"fedcomet-killed-shared-{tmp_path_factory.getbasetemp().name}"
    yield Place.prepared(folder, shared=True)
    shutil.rmtree(folder)


def check_shared(place: Place, *, finished: bool) -> None:
    sent = lines(place.outbox)
    assert len({under_masks for _, under_masks in sent}) <= 1, "a second noise was drawn for a round"
    with Budget.open(place.files.state / FILE) as budget:
        charges = budget.charges()
    folder = place.files.state / "outbound"
    on_list = (
        {read_entry(line, where).message.sha256 for where, line in listed(folder, read_head(folder))} if sent else ()
    )
    for content, _ in sent:
        (charge,) = charges
        assert (charge.state, charge.key) == (State.RELEASED, b""), "an uncharged release"
        assert charge.release.mechanisms == protection.of_releases(place.manifest, 1)
        assert content in on_list
    assert bool(sent) or not finished


def kill_and_go_on_shared(shared: Place, nth: int, kind: str = "") -> str:
    folder = shared.files.state.with_name(f"shared-{nth}-{kind}")
    place = shared.copy(folder)
    name = killed_at(place, nth, kind, answer_masked)
    check_shared(place, finished=not name)
    assert killed_at(place, NEVER, "", answer_masked) == ""
    check_shared(place, finished=True)
    shutil.rmtree(folder)
    return name


@pytest.mark.parametrize(
    ("nth", "kind"),
    [
        (3, "sql commit"),  # reserved, or about to be
        (1, "before RunArchive.keep"),
        (1, "after RunArchive.keep"),
        (1, "before Budget.charge"),
        (1, "after Budget.charge"),
        (3, "before RunArchive.hold"),  # the update is masked, what was masked not yet written down
        (3, "after RunArchive.hold"),
        (4, "after Outbound.note"),  # of the masked update
        (1, "after Budget.released"),
        (1, "sent"),
    ],
)
def test_killed_anywhere_a_site_puts_the_same_noise_under_the_masks_of_every_attempt(
    shared: Place, nth: int, kind: str
) -> None:
    assert kill_and_go_on_shared(shared, nth, kind) == kind


@pytest.mark.slow
def test_killed_at_every_step_a_site_shares_out_one_noise(shared: Place) -> None:
    names = list(itertools.takewhile(bool, (kill_and_go_on_shared(shared, nth) for nth in itertools.count(1))))
    assert {"sql commit", "after fsync", "after replace", "after RunArchive.hold", "sent"} <= set(names)
    assert len(names) > 100


def test_a_site_that_draws_its_share_anew_is_found_out(shared: Place) -> None:
    """The negative control of the tests above."""
    place = shared.copy(shared.files.state.with_name("shared-forgetful"))
    for _ in range(2):
        killed_at(place, NEVER, "", answer_masked_with_forgotten_keys)
    with pytest.raises(AssertionError, match="a second noise"):
        check_shared(place, finished=False)


@pytest.mark.slow
def test_killed_at_every_step_a_site_keeps_its_promise(prepared: Place) -> None:
    names = list(itertools.takewhile(bool, (kill_and_go_on(prepared, nth) for nth in itertools.count(1))))
    assert {"sql commit", "after fsync", "after replace", "after PrivateTrainer.step", "sent"} <= set(names)
    assert len(names) > 100


def test_a_site_whose_ledger_forgets_the_key_is_found_out(prepared: Place) -> None:
    """The negative control of the tests above."""
    place = prepared.copy(prepared.files.state.with_name("forgetful"))
    for _ in range(2):
        killed_at(place, 1, "before RunArchive.keep", answer_with_forgotten_keys)
        (place.files.state / "runs" / place.manifest.hash / "local.safetensors").unlink()
    with pytest.raises(AssertionError, match="a second noise"):
        check(place, finished=False)
