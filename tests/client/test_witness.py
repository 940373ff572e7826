"""A state that was put back from an older copy: seen at the first word to the coordinator, and nothing leaves then."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from typer.testing import CliRunner

from client.budget import FILE, Budget, Limit, Release
from client.files import SiteFiles
from client.home import SiteHome
from client.link import Link
from client.outbound import FIRST, Leaving, Outbound, read_head, sha256_at
from client.run_commands import app
from client.site import Site
from client.witness import Witnessed, refuse_restored
from federation.accountant import Gaussian, Mechanisms
from federation.identity import Identity
from federation.messages import SiteRefusal, SurveyRequest
from server.ledger_entries import WitnessEntry
from tests.joined import Coordinator, listening
from tokenizer.codebook import TokenizerOptions
from tokenizer.errors import ConfigError
from tokenizer.split import SplitRule

LIMITED = "version = 1\n[privacy]\nepsilon_total = 4.0\ndelta_total = 1e-5\n"


@pytest.fixture
def coordinator(ram_path: Path) -> Iterator[Coordinator]:
    with listening(ram_path) as made:
        yield made


@pytest.fixture
def home(ram_path: Path, coordinator: Coordinator) -> SiteHome:
    made = coordinator.join(ram_path / "icu", "icu")
    made.policy.write_text(LIMITED)
    return made


def spend(home: SiteHome, number: int) -> None:
    with Budget.open(home.state / FILE, Limit(4.0, 1e-5)) as budget:
        release = Release("5a" * 32, number, "training", Mechanisms((Gaussian(2.0, 0.01, 20),)), f"{number:064d}")
        budget.reserve(release)
        budget.charge(release, b"answer")


def spent(home: SiteHome) -> float:
    with Budget.open(home.state / FILE, Limit(4.0, 1e-5)) as budget:
        return budget.spent()


def restored_site(home: SiteHome, coordinator: Coordinator) -> None:
    """Let a site tell of itself, be copied, spend more, tell of that, and be put back."""
    with Link(home) as link:
        spend(home, 1)
        link.report_health()
        link.report_health()
        shutil.copytree(home.state, home.path / "old")
        spend(home, 2)
        link.report_budget()
        link.report_health()
    shutil.rmtree(home.state)
    (home.path / "old").rename(home.state)


def stands(coordinator: Coordinator) -> WitnessEntry:
    return coordinator.ledger.members.witness("icu", 0, FIRST, known="of nothing")


def test_a_restored_state_is_seen_at_the_first_report_and_answers_nothing(
    home: SiteHome, coordinator: Coordinator
) -> None:
    restored_site(home, coordinator)
    asked = SurveyRequest(SplitRule("key"), TokenizerOptions(min_patients=5), 1e12)
    with Link(home) as link, pytest.raises(SiteRefusal, match=r"older than what it has sent .* fedcomet site restored"):
        link.report_health()
    site = Site(SiteFiles("icu", home.path / "data", home.state))
    with pytest.raises(SiteRefusal, match="answers nothing"):
        site.answer(asked)
    # And it stays so, whatever it says meanwhile, for the old place of the list is not overwritten.
    before = stands(coordinator)
    with Link(home) as link:
        for _ in range(10):
            link.say("still here")
        with pytest.raises(SiteRefusal, match="answers nothing"):
            link.report_health()
    assert stands(coordinator) == before


def test_a_list_that_grew_past_the_forgotten_place_before_the_first_report_is_seen(
    home: SiteHome, coordinator: Coordinator
) -> None:
    restored_site(home, coordinator)
    outbound = Outbound(home.state / "outbound", home.identity)
    for _ in range(10):
        outbound.note(Leaving("train_reply", 1, "a" * 64, "train"), datetime.now(UTC))
    with Link(home) as link, pytest.raises(SiteRefusal, match="answers nothing"):
        link.report_health()


def test_people_go_on_by_charging_the_limit_and_nothing_private_leaves_any_more(
    home: SiteHome, coordinator: Coordinator
) -> None:
    restored_site(home, coordinator)
    held = spent(home)
    with Link(home) as link, pytest.raises(SiteRefusal):
        link.report_health()
    run = CliRunner()
    shown = run.invoke(app, ["restored", "--home", str(home.path)]).output
    assert "The coordinator last heard of a budget with epsilon" in shown
    assert "--yes charges epsilon 4 beside it" in " ".join(shown.split())
    assert spent(home) == held
    assert "takes part again" in run.invoke(app, ["restored", "--home", str(home.path), "--yes"]).output
    refuse_restored("icu", home.state)
    assert spent(home) >= 4.0
    with Link(home) as link:
        link.report_health()
        assert link.report_budget()
        link.report_health()
    told = coordinator.ledger.budgets("icu")[-1]
    assert 4.0 <= told.epsilon < 8.0, "a figure, at a delta that leaves one"
    assert told.delta == pytest.approx(2e-5)
    (event,) = coordinator.ledger.events(what="site.restored")
    assert "its people have accepted that" in event.text
    assert "not found to be restored" in run.invoke(app, ["restored", "--home", str(home.path)]).output


@pytest.mark.parametrize("moment", ["before the charge", "before the note", "before the file is gone"])
def test_accepting_that_is_killed_charges_nothing_twice(
    home: SiteHome, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    restored_site(home, coordinator)
    with Link(home) as link, pytest.raises(SiteRefusal):
        link.report_health()
    witnessed = Witnessed(home.state)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    step = {
        "before the charge": "client.budget.Budget.charge",
        "before the note": "client.witness.durable.write_bytes",
        "before the file is gone": "pathlib.Path.unlink",
    }[moment]
    with Budget.open(home.state / FILE, Limit(4.0, 1e-5)) as budget:
        with monkeypatch.context() as patch:
            patch.setattr(step, killed)
            with pytest.raises(KeyboardInterrupt):
                witnessed.accept(budget, None)
        assert witnessed.restored() is not None
        assert witnessed.accept(budget, None) == 4.0
        assert [each.release.purpose for each in budget.charges()].count("restored") == 1


def test_without_a_limit_people_must_say_what_was_spent(home: SiteHome, coordinator: Coordinator) -> None:
    restored_site(home, coordinator)
    with Link(home) as link, pytest.raises(SiteRefusal):
        link.report_health()
    with Budget.open(home.state / FILE) as budget:
        with pytest.raises(ConfigError, match="--epsilon"):
            Witnessed(home.state).accept(budget, None)
        assert Witnessed(home.state).accept(budget, 1.5) == 1.5


def test_a_lost_answer_and_a_coordinator_that_is_put_back_are_no_restored_site(
    home: SiteHome, coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Link(home) as link:
        for _ in range(3):
            link.report_health()
        with monkeypatch.context() as patch:  # the answer is lost after the coordinator has noted the report
            patch.setattr(Witnessed, "check", lambda *_: (_ for _ in ()).throw(OSError("lost")))
            with pytest.raises(OSError, match="lost"):
                link.report_health()
        for _ in range(3):
            link.report_health()
        assert (stands(coordinator).sha256, False) == Witnessed(home.state).known()
        coordinator.ledger.transactions.write(lambda session: session.execute(text("DELETE FROM witness")))
        link.report_health()
        link.report_health()
        assert (stands(coordinator).sha256, False) == Witnessed(home.state).known()


@pytest.mark.parametrize(("shift_s", "words"), [(3600.0, "ahead of"), (-3600.0, "behind")])
def test_a_clock_that_flower_would_refuse_is_named(
    home: SiteHome, coordinator: Coordinator, shift_s: float, words: str
) -> None:
    with Link(home, lambda: datetime.now(UTC) + timedelta(seconds=shift_s)) as link:
        assert link.wrong_clock() is None
        link.report_health()
        told = link.wrong_clock() or ""
    assert f"s {words} the coordinator's" in told
    assert abs(float(told.split()[4].replace(",", "")) - 3600) < 60
    assert "set it right, with NTP" in told
    with Link(home) as link:
        link.report_health()
        assert link.wrong_clock() is None


@settings(max_examples=10)
@given(kept=st.integers(0, 6), more=st.integers(0, 6), full=st.sampled_from([1, 600, 10_000]))
def test_a_place_is_held_by_a_list_exactly_if_it_was_one_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, kept: int, more: int, full: int
) -> None:
    """Entries go into files of one, some and all entries; after `kept` of them the list is put back and goes on."""
    path = tmp_path_factory.mktemp("list")
    outbound = Outbound(path / "outbound", Identity.at(path / "key"), full)
    now = datetime(2026, 1, 1, tzinfo=UTC)

    def note(what: str) -> str:
        outbound.note(Leaving("x", 1, what * 64, "y"), now)
        return read_head(outbound.folder).sha256

    mine = [note("a") for _ in range(kept)]
    if kept:
        shutil.copytree(outbound.folder, path / "old")
    forgotten = [note("b") for _ in range(more)]
    if outbound.folder.exists():
        shutil.rmtree(outbound.folder)
    if kept:
        (path / "old").rename(outbound.folder)
    mine += [note("c") for _ in range(more + 1)]
    head = read_head(outbound.folder)
    assert [sha256_at(outbound.folder, head, n) for n in range(1, len(mine) + 1)] == mine
    assert sha256_at(outbound.folder, head, len(mine) + 1) is None
    for number, sha256 in enumerate(forgotten, kept + 1):
        assert sha256_at(outbound.folder, head, number) != sha256
