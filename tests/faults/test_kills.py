"""Sites by their daemons, each kind of process killed (-9) at each phase of a private round; then what people order."""

import time
from collections import defaultdict
from pathlib import Path

import pytest

from client.budget import FILE, Budget, State
from client.outbound import lines, read_entry, read_head
from federation import protection
from federation.manifest import Manifest, PrivateEvaluation
from federation.messages import EvaluateReply, TrainReply
from server.journal import Status
from server.plan import PrivacyPlan
from server.tables import RunState
from tests.field import KINDS, SITE_KINDS, Field, app_process, federation, until

pytestmark = pytest.mark.slow

SITES = ("ward-0", "ward-1", "ward-2")
VICTIM = "ward-1"
"""The site whose processes are killed."""
PHASES = ("round.announced", "update.accepted", "round.aggregated", "round.evaluated", "round.committed")
PRIVACY = PrivacyPlan(
    sampling_rate=0.25,
    noise_multiplier=2.0,
    delta=1e-5,
    evaluation=PrivateEvaluation(every=1, bound=10.0, noise_multiplier=2.0),
)
PURPOSES = {TrainReply.kind: "training", EvaluateReply.kind: "evaluation"}


def happens(field: Field, what: str) -> None:
    """Wait until a phase of the run begins once more; some are short."""
    seen = last(field, what)
    until(lambda: last(field, what) != seen, lambda: f"no {what}: {field.told()}", 300, every=0.02)


def last(field: Field, what: str) -> int:
    events = field.ledger.events(run="first", what=what, newest=True, limit=1)
    return events[0].id if events else 0


def paid(field: Field, run: str, hit: dict[str, set[int]]) -> None:
    """See that every site has paid for what left it, once, and for nothing else.

    Args:
        field: the federation.
        run: a private run that has ended.
        hit: rounds in which processes of a site were killed. An answer that was charged and did not leave before the
            kill, and that nobody asked for again, stays charged: it might have left.
    """
    manifest = Manifest.from_bytes((field.home.runs / run / "manifest.json").read_bytes())
    privacy, done = protection.privacy_of(manifest), field.ledger.journal(run).committed()
    for name, site in field.sites.items():
        folder = site.home.state / "outbound"
        left: dict[str, dict[int, set[str]]] = {purpose: defaultdict(set) for purpose in PURPOSES.values()}
        for place, line in lines(folder, read_head(folder)):
            message = read_entry(line, place).message
            if message.kind in PURPOSES and message.run == manifest.hash:
                assert message.round is not None
                assert message.epsilon is not None
                left[PURPOSES[message.kind]][message.round].add(message.sha256)
        with Budget.open(site.home.state / FILE) as budget:
            charges = budget.charges()
        for purpose, rounds in left.items():
            own = {each.release.round: each for each in charges if each.release.purpose == purpose}
            spent = {number for number, each in own.items() if each.state.spent}
            assert all(len(answers) == 1 for answers in rounds.values()), f"{name}: two answers to one question"
            assert set(rounds) <= spent, f"{name}: {purpose} of rounds {set(rounds) - spent} left without a charge"
            more = spent - set(rounds)
            assert more <= hit.get(name, set()), f"{name}: {purpose} of rounds {more} was charged and did not leave"
            waiting = {number for number, each in own.items() if each.state == State.RESERVED}
            assert len(waiting) <= 1, f"{name}: {purpose} of rounds {waiting} stays reserved"
            training = purpose == "training"
            cost = protection.of_releases(manifest, 2) if training else protection.of_evaluations(privacy, 1)
            for number in spent:
                charge = own[number]
                assert (charge.release.run, charge.release.mechanisms, charge.key) == (manifest.hash, cost, b"")
        accepted = {number for number in range(1, done + 1) if name in takers(field, run, number)}
        assert accepted
        assert accepted <= set(left["training"])


def takers(field: Field, run: str, number: int) -> set[str]:
    """The sites whose updates of a round were accepted."""
    replies = field.ledger.journal(run).replies(number)
    return {entry.site for entry in replies if entry.status == Status.ACCEPTED}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_every_phase_no_round_is_lost_or_counted_or_paid_twice(tmp_path: Path, kind: str) -> None:
    with federation(tmp_path, SITES) as field:
        journal = field.begin("first", rounds=40, min_sites=2, privacy=PRIVACY)
        field.committed("first", 1)
        hit: set[int] = set()
        for phase in PHASES:
            happens(field, phase)
            number = journal.committed()
            field.kill(kind, VICTIM)
            hit |= {number, *range(number + 1, journal.committed() + 2)}
            field.committed("first", number + 1, 400)
            print(f"{kind} killed at {phase}: the run is at round {journal.committed()}")
        field.all_online()
        until(lambda: VICTIM in takers(field, "first", journal.committed()), f"{VICTIM} is not back", 120)
        field.order("stop", "first", RunState.STOPPED)
        field.stop_sites()  # or one might be at work
        field.contiguous("first")
        paid(field, "first", {VICTIM: hit} if kind in SITE_KINDS else {})


def test_eight_sites_lose_no_round_though_each_kind_of_process_is_killed_once(tmp_path: Path) -> None:
    with federation(tmp_path, tuple(f"ward-{number}" for number in range(8))) as field:
        journal = field.begin("first", rounds=40, min_sites=2, evaluate_every=0)
        field.committed("first", 1)
        for kind in KINDS:
            number = journal.committed()
            field.kill(kind, VICTIM)
            field.committed("first", number + 1, 400)
        field.all_online()
        number = journal.committed() + 2
        field.committed("first", number, 400)
        assert takers(field, "first", number) == set(field.sites)
        field.order("stop", "first", RunState.STOPPED)
        field.stop_sites()
        field.contiguous("first")


def test_orders_are_followed_and_a_site_that_is_told_to_stop_ends_its_work_first(tmp_path: Path) -> None:
    with federation(tmp_path, ("icu", "ward")) as field:
        field.begin("first", rounds=8, min_sites=1, evaluate_every=0)
        field.committed("first", 1)
        field.order("pause", "first", RunState.PAUSED)
        paused = field.ledger.journal("first").committed()
        time.sleep(5)
        assert field.ledger.journal("first").committed() == paused

        field.order("resume", "first", RunState.RUNNING)
        icu = field.sites["icu"].service
        assert icu is not None
        until(lambda: app_process(field.place, "icu") is not None, "a site is at work", 60)
        icu.terminate()
        assert icu.wait(60) == 0
        field.committed("first", paused + 2)  # the other one is enough
        field.run_site("icu")
        field.finished("first")

        field.begin("second", rounds=1000, min_sites=1, evaluate_every=0)
        field.committed("second", 1)
        field.order("stop", "second", RunState.STOPPED)
        field.contiguous("second")
