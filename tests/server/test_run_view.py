import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import tables
from server.ledger import Ledger
from server.ledger_entries import LedgerRefusal
from server.overview import ONLINE_S, overview, run_lines
from server.run_entries import Phase, ReplyEntry, SiteEntry, Status
from server.run_view import look
from server.tables import RunState
from tests.watched import SITES, Watched, coordinator_home, manifest


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        home = coordinator_home(Path(folder) / "home")
        with Ledger.open(home.ledger_url) as ledger:
            made = Watched(home, ledger)
            made.fill()
            yield made


def test_a_run_tells_who_is_waited_for_and_who_is_slow(watched: Watched) -> None:
    found = look(watched.ledger, watched.run)
    assert found.committed == 6
    assert found.open is not None
    assert (found.open.number, found.open.accepted) == (7, 1)
    conditions = {site.name: (site.condition, site.accepted, site.late, site.no_update) for site in found.sites}
    assert conditions == {
        "aachen": ("accepted", 7, 0, 0),
        "bergen": ("refused", 6, 0, 1),
        "ghent": ("waited for", 5, 1, 0),
    }
    behind = [site.behind_s for site in found.sites]
    assert behind[0] == 0.0
    assert behind[1:] == pytest.approx([47, 94], abs=5.0)
    assert [site.last for site in found.sites] == [0, 1, 5]
    assert found.said == "stroke-2026 is running: round 7 of 8, collecting answers; 2 of 3 sites have answered."


def test_a_run_tells_losses_times_costs_and_refusals(watched: Watched) -> None:
    found = look(watched.ledger, watched.run)
    losses = [each.loss for each in found.rounds]
    assert losses[-1] is None
    assert [each for each in losses if each is not None] == sorted((each for each in losses if each), reverse=True)
    assert set(found.by_site) == set(SITES)
    one = found.rounds[0]
    assert one.tuning == pytest.approx(sum(found.by_site[site][1] for site in SITES) / 3)
    assert one.bytes == 3 * 4_300_000
    assert {words: last for words, last, _ in found.phases}["evaluating"] == 45.0
    assert {each.site: (each.epsilon, each.limit_epsilon) for each in found.budgets}["ghent"] == (0.7, None)
    assert [(each.round, each.site) for each in found.refusals] == [(7, "bergen"), (3, "ghent")]
    assert len(found.approvals) == 3


def test_wishes_that_are_offered_are_those_that_the_ledger_takes(watched: Watched) -> None:
    for state in RunState:
        name = f"wish-{state}"
        for wish in ("start", "resume", "pause", "stop"):
            with Ledger.open(watched.home.ledger_url) as ledger:
                ledger.propose(name)
                ledger.transactions.write(lambda session, name=name, state=state: _put(session, name, state))
                offered = look(ledger, name).wishes
                do = {"start": ledger.start, "resume": ledger.start, "pause": ledger.pause, "stop": ledger.stop}
                if wish in offered:
                    assert do[wish](name).state != state, (state, wish)
        with Ledger.open(watched.home.ledger_url) as ledger:
            ledger.transactions.write(lambda session, name=name: _put(session, name, RunState.FINISHED))
            assert look(ledger, name).wishes == ()


def _put(session, name: str, state: RunState) -> None:  # type: ignore[no-untyped-def]
    session.query(tables.Run).filter_by(name=name).one().state = state
    session.info["change"] = "test"


def test_a_site_that_did_not_join_and_a_round_that_is_evaluated_say_so(watched: Watched) -> None:
    watched.ledger.propose("other", b"p")
    watched.ledger.start("other")
    journal = watched.ledger.journal("other")
    journal.start("other", b"p")
    journal.begin(manifest("other"))
    journal.note_site(SiteEntry("aachen", Status.ACCEPTED))
    journal.note_site(SiteEntry("bergen", Status.REFUSED, "its policy forbids it"))
    journal.enter(1, Phase.ANNOUNCED)
    journal.enter(1, Phase.TRAINING)
    assert [site.condition for site in look(watched.ledger, "other").sites] == ["waited for", "not in it"]
    journal.note_reply(ReplyEntry(1, "aachen", Status.MALFORMED, "it names another run"))
    journal.enter(1, Phase.AGGREGATED)
    found = look(watched.ledger, "other")
    assert [site.reason for site in found.sites] == ["it names another run", "its policy forbids it"]
    assert "evaluating" in found.said
    with pytest.raises(LedgerRefusal, match="no run nothing"):
        look(watched.ledger, "nothing")


def test_a_federation_tells_who_is_there_and_which_certificates_end(watched: Watched) -> None:
    now = time.time()
    found = overview(watched.ledger, watched.home, now)
    conditions = {each.entry.name: each.condition for each in found.members}
    assert conditions == {"aachen": "online", "bergen": "online", "delft": "invited", "ghent": "never seen"}
    assert (found.online, len(found.sites), found.leader) == (2, 3, "")
    assert [text for text in found.warnings if "ghent" in text]
    assert not [text for text in found.warnings if "aachen" in text]
    assert overview(watched.ledger, watched.home, now + ONLINE_S).online == 0
    assert [text for text in overview(watched.ledger, watched.home, now + 400 * 86400).warnings if "the server" in text]
    watched.ledger.members.revoke("aachen")
    assert {each.condition for each in overview(watched.ledger, watched.home, now).members} >= {"revoked"}
    with watched.ledger.lead():
        assert overview(watched.ledger, watched.home, now).leader


def test_runs_are_listed_with_how_far_they_are(watched: Watched) -> None:
    lines = {line.entry.name: (line.committed, line.rounds, line.going) for line in run_lines(watched.ledger)}
    assert lines[watched.run] == (6, 8, True)
    assert lines["sepsis-pilot"] == (0, None, False)
