"""A run pauses and stops as the ledger wishes, goes on as if it never had, and fails as one where nobody takes part."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from flwr.app import Context, Message, RecordDict

from federation import flower
from federation.messages import Refusal
from server import app as server_app
from server import lease, wishes
from server.app import Outcome, coordinate
from server.lease import LeaseTaken
from server.ledger import Ledger
from server.post import TooFewSites
from server.rounds import Event, RoundFailed
from server.tables import RunState
from server.transactions import LeaseLost
from server.wishes import RunHalted
from tests import tiny
from tests.tiny import FunctionGrid, Node

PLAN = tiny.plan(name="icu")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("undisturbed")
    return coordinate(FunctionGrid(nodes(root)), root / "run", PLAN).ledger_fingerprint


@pytest.fixture
def ledger(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setattr(wishes, "_EVERY_S", 0.0)
    with Ledger.open(ram_path / "ledger.sqlite") as opened:
        opened.propose("icu", PLAN.to_bytes())
        opened.start("icu")
        yield opened


def nodes(root: Path) -> dict[int, Node]:
    return dict(enumerate(map(tiny.honest, tiny.sites(root)), 1))


def lead(
    ledger: Ledger, root: Path, there: Mapping[int, Node], listen: Callable[[Event], None] = lambda event: None
) -> Outcome:
    return coordinate(FunctionGrid(there), root / "run", PLAN, listen=listen, journal=ledger.journal("icu"))


def at(kind: str, number: int, do: Callable[[], object]) -> Callable[[Event], None]:
    return lambda event: do() and None if (event.kind, event.round) == (kind, number) else None


def test_a_pause_waits_for_the_end_of_the_round(ledger: Ledger, ram_path: Path, undisturbed: str) -> None:
    there = nodes(ram_path)
    with pytest.raises(RunHalted, match="paused after round 1"):
        lead(ledger, ram_path, there, at("update.accepted", 1, lambda: ledger.pause("icu", "alice")))
    assert ledger.run("icu").state is RunState.PAUSED
    assert [e.what for e in ledger.events(run="icu", what="run.")][-2:] == ["run.pausing", "run.paused"]
    ledger.start("icu")
    assert lead(ledger, ram_path, there).ledger_fingerprint == undisturbed
    run = ledger.run("icu")
    assert (run.state, run.reason, run.manifest_hash != "") == (RunState.FINISHED, "", True)
    assert run.started_at is not None
    assert run.ended_at is not None


def test_a_stop_does_not_wait_for_all_answers_and_loses_none(ledger: Ledger, ram_path: Path, undisturbed: str) -> None:
    there = nodes(ram_path)
    with pytest.raises(RunHalted, match="stopped after round 1"):
        lead(ledger, ram_path, there, at("update.accepted", 2, lambda: ledger.stop("icu")))
    assert ledger.run("icu").state is RunState.STOPPED
    assert len(ledger.journal("icu").replies(2)) == 1
    ledger.start("icu")
    assert lead(ledger, ram_path, there).ledger_fingerprint == undisturbed
    assert ledger.run("icu").state is RunState.FINISHED


def test_a_stop_is_seen_while_nobody_answers(ledger: Ledger, ram_path: Path) -> None:
    there = {**nodes(ram_path), 3: lambda message: None}

    def wait(_: float) -> None:
        ledger.stop("icu")

    with pytest.raises(RunHalted, match="stopped after round 0"):
        coordinate(FunctionGrid(there), ram_path / "run", PLAN, pause=wait, journal=ledger.journal("icu"))
    assert ledger.run("icu").state is RunState.STOPPED


def test_a_wish_from_before_the_start_is_kept(ledger: Ledger, ram_path: Path) -> None:
    ledger.journal("icu").start("icu")  # by a process that died
    ledger.pause("icu")
    grid = FunctionGrid(nodes(ram_path))
    with pytest.raises(RunHalted, match="paused after round 0"):
        coordinate(grid, ram_path / "run", PLAN, journal=ledger.journal("icu"))
    assert grid.asked == []


def refusing(node: Node, kind: str) -> Node:
    def answer(message: Message) -> Message | None:
        reply = node(message)
        if message.metadata.message_type != kind or reply is None:
            return reply
        site = flower.read(reply).site  # type: ignore[union-attr]
        return flower.reply(Refusal(site, f"{site} says no"), message)

    return answer


@pytest.mark.parametrize(("kind", "error"), [("query.prepare", TooFewSites), ("train", RoundFailed)])
def test_a_run_in_which_everybody_refuses_has_failed(
    ledger: Ledger, ram_path: Path, kind: str, error: type[Exception]
) -> None:
    there = nodes(ram_path)
    with pytest.raises(error):
        lead(ledger, ram_path, {place: refusing(node, kind) for place, node in there.items()})
    run = ledger.run("icu")
    assert run.state is RunState.FAILED
    assert "site-0, site-1, site-2: " in run.reason
    assert "the site says no" in run.reason
    for site in ("site-0", "site-1", "site-2"):
        assert any(each.site == site and "says no" in each.reason for each in ledger.refusals("icu"))
    ledger.start("icu")
    lead(ledger, ram_path, there)
    assert ledger.run("icu").state is RunState.FINISHED


def test_a_coordinator_that_another_has_replaced_ends_without_a_word(
    ledger: Ledger, ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_renew", lambda *_: None)
    with Ledger.open(ram_path / "ledger.sqlite") as other, ledger.lead(ttl_s=0.0):
        taken = other.lead()
        with pytest.raises(LeaseLost, match="has taken over"):
            lead(ledger, ram_path, nodes(ram_path), at("update.accepted", 1, taken.__enter__))
        assert len(other.journal("icu").replies(1)) == 1
        assert other.run("icu").state is RunState.RUNNING
        other.note("new", "mine")
        taken.__exit__(None, None, None)


def flower_app(root: Path, monkeypatch: pytest.MonkeyPatch, there: Mapping[int, Node]) -> None:
    (root / "runs/icu").mkdir(parents=True, exist_ok=True)
    (root / "runs/icu/plan.json").write_bytes(PLAN.to_bytes())
    monkeypatch.setenv("FEDCOMET_RUNS", str(root / "runs"))
    monkeypatch.setenv("FEDCOMET_LEDGER", f"sqlite:///{root / 'ledger.sqlite'}")
    context = Context(0, 1, {}, RecordDict(), {"run": "icu"})
    server_app.app(FunctionGrid(there), context)


def test_flowers_server_app_leads_with_the_federations_ledger(
    ledger: Ledger, ram_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: str
) -> None:
    there = nodes(ram_path)
    with ledger.lead() as token:
        with pytest.raises(LeaseTaken):
            flower_app(ram_path, monkeypatch, there)
        ledger.journal("icu").start("icu")
        ledger.pause("icu")
        monkeypatch.setenv("FEDCOMET_LEASE", str(token))
        flower_app(ram_path, monkeypatch, there)  # paused, which is no error
        assert ledger.run("icu").state is RunState.PAUSED
        ledger.start("icu")
        flower_app(ram_path, monkeypatch, there)
    assert ledger.run("icu").state is RunState.FINISHED
    assert ledger.journal("icu").fingerprint() == undisturbed
    assert not (ram_path / "runs/icu/ledger.sqlite").exists()
