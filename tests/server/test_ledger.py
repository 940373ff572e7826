"""A federation's ledger keeps what it is told, in SQLite and in PostgreSQL, and says who did it."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from federation.pki import Role
from server.ledger import Ledger
from server.ledger_entries import BudgetEntry, Identity, LedgerRefusal, MetricEntry, RefusalEntry
from server.tables import RunState, SiteStatus

Open = Callable[[], Ledger]


def identity(of: str) -> Identity:
    return Identity(f"pem of {of}", f"serial {of}", f"fingerprint {of}", f"ed25519 {of}", f"node {of}", 2e9)


def invited(ledger: Ledger, site: str = "north", token: str = "t", valid_s: float = 60.0) -> None:
    ledger.members.invite(site, Role.SITE, token, valid_s)


def test_an_invitation_makes_one_member_once(opened: Open) -> None:
    ledger = opened()
    invited(ledger)
    member = ledger.members.enrol("t", identity("north"))
    assert (member.status, member.fingerprint) == (SiteStatus.ENROLLED, "fingerprint north")
    assert ledger.members.with_certificate("fingerprint north") == member
    assert ledger.members.with_certificate("") is None
    with pytest.raises(LedgerRefusal, match="used already"):
        ledger.members.enrol("t", identity("other"))
    with pytest.raises(LedgerRefusal, match="no such invitation"):
        ledger.members.enrol("x", identity("other"))
    invited(ledger, "south", "late", valid_s=0.0)
    with pytest.raises(LedgerRefusal, match="run out"):
        ledger.members.enrol("late", identity("south"))
    invited(ledger, "south", "first")
    invited(ledger, "south", "second")
    with pytest.raises(LedgerRefusal, match="run out"):
        ledger.members.enrol("first", identity("south"))
    assert [event.what for event in ledger.events(site="north")] == ["site.invited", "site.enrolled"]


def test_of_many_who_use_an_invitation_at_once_one_is_enrolled(opened: Open) -> None:
    invited(opened())
    ledgers = [opened() for _ in range(4)]

    def enrol(number: int) -> bool:
        try:
            ledgers[number].members.enrol("t", identity(f"copy {number}"))
        except LedgerRefusal:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(enrol, range(4))) == 1


def test_a_revoked_member_is_known_as_such_and_can_be_invited_anew(opened: Open) -> None:
    ledger = opened()
    invited(ledger)
    ledger.members.enrol("t", identity("north"))
    invited(ledger, token="open")
    assert ledger.members.revoke("north", "key lost", "alice").status is SiteStatus.REVOKED
    assert opened().members.get("north").status is SiteStatus.REVOKED
    (event,) = ledger.events(what="site.revoked")
    assert (event.who, event.site, event.text) == ("alice", "north", "key lost")
    with pytest.raises(LedgerRefusal, match="run out"):
        ledger.members.enrol("open", identity("again"))
    with pytest.raises(LedgerRefusal, match="is revoked"):
        ledger.members.renew("north", identity("again"))
    invited(ledger, token="new")
    member = ledger.members.enrol("new", identity("again"))
    assert (member.status, member.revoked_at, member.ed25519) == (SiteStatus.ENROLLED, None, "ed25519 again")


def test_no_two_members_have_a_key_in_common(opened: Open) -> None:
    ledger = opened()
    for name in ("north", "south"):
        invited(ledger, name, name)
    ledger.members.enrol("north", identity("north"))
    with pytest.raises(LedgerRefusal, match="north has this fingerprint already"):
        ledger.members.enrol("south", identity("north"))
    ledger.members.enrol("south", identity("south"))
    with pytest.raises(LedgerRefusal, match="south is a site"):
        ledger.members.invite("south", Role.VIEWER, "x", 60.0)


def test_whoever_reads_on_from_the_last_event_misses_none(opened: Open) -> None:
    """While many write at once: numbers that became visible out of order would be passed over."""
    writers, reader = [opened() for _ in range(4)], opened()
    seen: list[str] = []
    with ThreadPoolExecutor(4) as threads:
        done = [
            threads.submit(lambda ledger, w: [ledger.note(f"w{w}", f"{w}-{n}") for n in range(8)], ledger, w)
            for w, ledger in enumerate(writers)
        ]
        after = 0
        while len(seen) < 32:
            last = all(each.done() for each in done)
            fresh = reader.events(after)
            seen += [event.what for event in fresh]
            after = fresh[-1].id if fresh else after
            assert fresh or not last, f"missed {32 - len(seen)}"
    assert sorted(seen) == sorted(f"{w}-{n}" for w in range(4) for n in range(8))
    for w in range(4):
        assert [what for what in seen if what.startswith(f"{w}-")] == [f"{w}-{n}" for n in range(8)]


def test_events_are_found_by_run_site_and_kind(opened: Open) -> None:
    ledger = opened()
    ledger.propose("icu", b"plan", "alice")
    ledger.note("north", "message", run="icu", site="north", told="hello")
    ledger.note("south", "message_", site="south")
    assert [(e.who, e.what, e.run) for e in ledger.events(run="icu")] == [
        ("alice", "run.proposed", "icu"),
        ("north", "message", "icu"),
    ]
    assert [e.site for e in ledger.events(what="message_")] == ["south"]
    assert [e.what for e in ledger.events(limit=1, newest=True)] == ["message_"]
    assert [e.what for e in ledger.events(limit=2)] == ["run.proposed", "message"]
    with pytest.raises(LedgerRefusal, match="no run other"):
        ledger.note("north", "message", run="other")


def test_budgets_approvals_refusals_and_figures_are_kept(opened: Open) -> None:
    ledger = opened()
    ledger.propose("icu", b"plan")
    ledger.note_manifest("icu", "ab" * 32, b"{}")
    ledger.approve("ab" * 32, "south", "01")
    ledger.approve("ab" * 32, "north", "02")
    ledger.approve("ab" * 32, "north", "03")
    ledger.report_budget(BudgetEntry("north", 1.5, 1e-6, 3.0, 1e-6, run="icu"))
    ledger.report_budget(BudgetEntry("north", 1.75, 1e-6))
    ledger.note_refusal("icu", RefusalEntry(2, "north", "approve", "too costly", 5.0))
    ledger.note_metric("icu", MetricEntry(1, "loss", 2.0))
    ledger.note_metric("icu", MetricEntry(1, "loss", 1.0))
    ledger.note_metric("icu", MetricEntry(1, "loss", 4.0, site="north"))
    ledger.note_flower_run("icu", "77")
    kept = opened()
    assert [(e.site, e.signature) for e in kept.approvals("ab" * 32)] == [("north", "03"), ("south", "01")]
    budgets = kept.budgets("north")
    assert [(e.epsilon, e.limit_epsilon, e.run) for e in budgets] == [(1.5, 3.0, "icu"), (1.75, None, None)]
    assert kept.budgets() == budgets
    assert kept.refusals("icu") == [RefusalEntry(2, "north", "approve", "too costly", 5.0)]
    assert kept.metrics("icu") == [MetricEntry(1, "loss", 1.0), MetricEntry(1, "loss", 4.0, "north")]
    run = kept.run("icu")
    assert (run.plan, run.manifest, run.flower_run, run.state) == (b"plan", b"{}", "77", RunState.PROPOSED)
    with pytest.raises(LedgerRefusal, match="another plan"):
        kept.propose("icu", b"other")
    with pytest.raises(LedgerRefusal, match="another needs another run"):
        kept.note_manifest("icu", "cd" * 32, b"{}")


LED = st.sampled_from(["start", "pause", "stop", "lead", "abandon", "halt", "finish"])


@settings(max_examples=40)
@given(steps=st.lists(LED, max_size=12))
def test_a_run_that_was_paused_or_stopped_stays_so_until_it_is_started(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    """Whatever is pressed: a run that was stopped or paused is not running again unless it was started again."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    with Ledger.open(path) as ledger:
        ledger.propose("icu")
        journal, wanted = ledger.journal("icu"), "nothing"
        for step in steps:
            before = ledger.run("icu").state
            try:
                if step in ("start", "pause", "stop"):
                    getattr(ledger, step)("icu")
                    wanted = step
                elif step == "abandon":
                    ledger.abandon("icu", "gone")
                elif step == "lead":
                    journal.start("icu")
                elif step == "halt" and before in (RunState.PAUSING, RunState.STOPPING):
                    journal.end(RunState.PAUSED if before is RunState.PAUSING else RunState.STOPPED)
                elif step == "finish" and before is RunState.RUNNING:
                    journal.end(RunState.FINISHED)
            except LedgerRefusal:
                assert ledger.run("icu").state is before
            state = ledger.run("icu").state
            if state in (RunState.RUNNING, RunState.READY):
                assert wanted in ("start", "nothing")
            if state in (RunState.STOPPED, RunState.STOPPING):
                assert wanted == "stop"
            if before is RunState.FINISHED:
                assert state is RunState.FINISHED


def test_the_ledger_is_its_owners_alone(ram_path: Path) -> None:
    path = ram_path / "ledger.sqlite"
    Ledger.open(path).close()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_site_moves_the_place_of_its_list_only_if_it_knows_the_one_before(opened: Open) -> None:
    ledger = opened()
    ledger.members.invite("icu", Role.SITE, "t" * 64, 60.0)
    witness = ledger.members.witness
    assert (witness("icu", 3, "a", known="").entries, witness("icu", 5, "b", known="a").sha256) == (3, "b")
    assert witness("icu", 9, "c", known="").sha256 == "b"  # a state that has forgotten, or never knew
    assert not ledger.events(what="site.restored")
    assert witness("icu", 4, "d", known="b", restored=True).sha256 == "d"
    assert len(ledger.events(what="site.restored")) == 1
