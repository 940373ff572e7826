"""A site can't spend beyond its budget, and whatever happens to it, nothing leaves uncharged or twice."""

import hashlib
import math
import os
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from client.budget import Budget, BudgetExhausted, Limit, Release, State
from federation.accountant import Approximate, Gaussian, Mechanisms, epsilon
from federation.messages import SiteRefusal
from tests import services
from tests.client import spending
from tests.client.spending import LIMIT, PLANNED, RAN, Place, killed_at, lines
from tokenizer.errors import ConfigError, DataError


def round_of(number: int, run: str = "b" * 64, cost: float = 1.0, request: str = "q") -> Release:
    return Release(run, number, "training", Mechanisms((Approximate(cost),)), request)


@pytest.fixture
def budget(ram_path: Path) -> Iterator[Budget]:
    with Budget.open(ram_path / "budget.sqlite", LIMIT) as opened:
        yield opened


def test_a_site_cannot_spend_beyond_its_budget(budget: Budget) -> None:
    for number in (1, 2, 3):
        budget.charge(budget.reserve(round_of(number)).release, b"answer")
    with pytest.raises(BudgetExhausted, match="does not allow the training of round 4") as refusal:
        budget.reserve(round_of(4))
    assert "limit is 3" in refusal.value.__notes__[0]
    assert "3" not in str(refusal.value)  # the coordinator is not told how much is left
    assert budget.find("b" * 64, 4, "training") is None
    assert budget.spent() == pytest.approx(3.0, abs=2e-3)


def test_runs_surveys_and_statistics_are_spent_together(budget: Budget) -> None:
    parts = [
        Release("survey", 0, "survey", Mechanisms((Approximate(0.5), Approximate(0.0, 1e-7))), "s"),
        Release("a" * 64, 1, "training", Mechanisms((Gaussian(5.0, steps=2),)), "t"),
        Release("b" * 64, 1, "training", Mechanisms((Gaussian(5.0, steps=1),)), "t"),
        Release("b" * 64, 1, "evaluation", Mechanisms((Approximate(0.1),)), "e"),
    ]
    for part in parts:
        budget.charge(budget.reserve(part).release, b"")
    assert budget.spent() == epsilon([each for part in parts for each in part.mechanisms.all], LIMIT.delta)


def test_what_is_reserved_counts_until_it_is_given_back(budget: Budget) -> None:
    for number in (1, 2, 3):
        budget.reserve(round_of(number))
    with pytest.raises(BudgetExhausted):
        budget.reserve(round_of(4))
    budget.cancel(round_of(3))
    budget.reserve(round_of(4))
    budget.charge(round_of(4), b"")
    budget.cancel(round_of(4))
    assert budget.find("b" * 64, 4, "training") is not None


def test_what_really_ran_is_charged(budget: Budget) -> None:
    budget.reserve(PLANNED)
    assert budget.spent() == epsilon(PLANNED.mechanisms.all, LIMIT.delta)
    budget.charge(RAN, b"answer")
    assert budget.spent() == epsilon(RAN.mechanisms.all, LIMIT.delta) < epsilon(PLANNED.mechanisms.all, LIMIT.delta)


def test_more_than_was_planned_is_charged_only_within_the_limit(budget: Budget) -> None:
    budget.reserve(round_of(1))
    with pytest.raises(BudgetExhausted):
        budget.charge(round_of(1, cost=4.0), b"answer")
    assert budget.charge(round_of(1, cost=2.0), b"answer").state == State.CHARGED


def test_the_same_request_gets_the_same_key_and_then_the_same_answer(budget: Budget) -> None:
    first = budget.reserve(PLANNED)
    assert len(first.key) == 32
    assert budget.reserve(PLANNED).key == first.key
    budget.charge(RAN, b"answer")
    again = budget.reserve(PLANNED)
    assert (again.state, again.answer, again.key) == (State.CHARGED, b"answer", b"")
    assert again.sha256 == hashlib.sha256(b"answer").hexdigest()


def test_a_second_draw_can_not_be_charged(budget: Budget) -> None:
    budget.reserve(PLANNED)
    budget.charge(RAN, b"answer")
    with pytest.raises(SiteRefusal, match="Another answer was charged already"):
        budget.charge(RAN, b"answer with other noise")
    assert budget.charge(RAN, b"answer").answer == b"answer"


def test_another_request_is_refused_once_one_was_charged(budget: Budget) -> None:
    first = budget.reserve(PLANNED)
    other = replace(PLANNED, request="other")
    second = budget.reserve(other)  # nothing has left
    assert second.key != first.key
    with pytest.raises(SiteRefusal, match="Another request was made before"):
        budget.charge(RAN, b"of a process that still works on the first")
    budget.charge(other, b"answer")
    for refused in (budget.reserve, budget.released):
        with pytest.raises(SiteRefusal, match="Another request was made before"):
            refused(PLANNED)


def test_nothing_is_released_or_charged_before_its_time(budget: Budget) -> None:
    with pytest.raises(SiteRefusal, match="No privacy budget was reserved"):
        budget.charge(RAN, b"")
    budget.reserve(PLANNED)
    with pytest.raises(SiteRefusal, match="was not charged; it must not leave"):
        budget.released(PLANNED)


def test_what_is_freed_costs_nothing_and_is_never_drawn_charged_or_released(ram_path: Path, budget: Budget) -> None:
    key = budget.reserve(PLANNED).key
    (freed,) = budget.free([PLANNED])
    assert (freed.state, freed.key, freed.release) == (State.FREED, b"", PLANNED)
    assert key not in (ram_path / "budget.sqlite").read_bytes()
    assert budget.spent() == 0
    assert budget.mechanisms() == []
    for later in (budget.reserve, budget.released, lambda release: budget.charge(release, b"of a process at work")):
        for release in (PLANNED, replace(PLANNED, request="another")):
            with pytest.raises(SiteRefusal, match="given up the training of round 3"):
                later(release)
    budget.cancel(PLANNED)
    budget.cancel_before(replace(PLANNED, round=9))
    assert budget.charges() == [freed]
    for number in (1, 2, 4):  # each costs a third of the limit
        budget.charge(budget.reserve(round_of(number)).release, b"answer")


def test_all_or_nothing_is_freed_and_never_what_was_charged(budget: Budget) -> None:
    budget.reserve(round_of(1))
    budget.charge(budget.reserve(round_of(2)).release, b"answer")
    for wrong in (round_of(2), round_of(3), round_of(1, request="of before")):
        with pytest.raises(DataError, match="has changed in the meantime"):
            budget.free([round_of(1), wrong])
    assert [charge.state for charge in budget.charges()] == [State.RESERVED, State.CHARGED]


def test_killed_while_it_frees_a_ledger_has_freed_all_or_nothing(ram_path: Path) -> None:
    reserved = [round_of(number) for number in (1, 2, 3)]
    states = []
    for nth in range(1, 100):
        (ram_path / str(nth)).mkdir()
        place = Place.below(ram_path / str(nth))
        with Budget.open(place.ledger, LIMIT) as budget:
            keys = [budget.reserve(each).key for each in reserved]

        def free(place: Place, _: object) -> None:
            with Budget.open(place.ledger, LIMIT) as budget:
                budget.free(reserved)

        killed = killed_at(place, nth, free)
        with Budget.open(place.ledger, LIMIT) as budget:
            (state,) = {charge.state for charge in budget.charges()}
            states.append(state)
            assert [charge.key for charge in budget.charges()] == (keys if state == State.RESERVED else [b""] * 3)
        if not killed:
            break
    assert len(states) > 10
    assert states[-1] == State.FREED
    assert sorted(states, key=list(State).index) == states


def test_without_a_limit_all_is_written_down(ram_path: Path) -> None:
    with Budget.open(ram_path / "b.sqlite") as budget:
        for number in range(5):
            budget.charge(budget.reserve(round_of(number, cost=10.0)).release, b"")
        assert budget.spent() == pytest.approx(50.0)


def test_a_limit_that_was_lowered_counts_for_what_comes(ram_path: Path) -> None:
    with Budget.open(ram_path / "b.sqlite", LIMIT) as budget:
        budget.charge(budget.reserve(round_of(1, cost=2.0)).release, b"")
    with Budget.open(ram_path / "b.sqlite", Limit(1.0, 1e-6)) as budget, pytest.raises(BudgetExhausted):
        budget.reserve(round_of(2, cost=0.1))


def test_a_commit_survives_a_power_failure_and_keys_are_overwritten(ram_path: Path, budget: Budget) -> None:
    with budget._engine.connect() as connection:
        found = [connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in
                 ("journal_mode", "synchronous", "secure_delete")]  # fmt: skip
    assert found == ["delete", 3, 1]
    key = budget.reserve(PLANNED).key
    file = ram_path / "budget.sqlite"
    assert key in file.read_bytes()
    budget.charge(RAN, b"answer")
    assert key not in file.read_bytes()
    assert [path.name for path in ram_path.iterdir()] == ["budget.sqlite"]


def test_only_its_owner_reads_the_ledger_and_secrets_are_not_printed(ram_path: Path, budget: Budget) -> None:
    assert stat.S_IMODE((ram_path / "budget.sqlite").stat().st_mode) == 0o600
    charge = budget.reserve(PLANNED)
    assert repr(charge.key) not in repr(charge)
    assert charge.key.hex() not in repr(charge)


def test_processes_that_reserve_at_once_stay_within_the_limit_together(ram_path: Path) -> None:
    def reserve(number: int) -> bool:
        with Budget.open(ram_path / "budget.sqlite", LIMIT) as budget:
            try:
                budget.reserve(round_of(number))
            except BudgetExhausted:
                return False
            return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(reserve, range(8))) == 3


def test_a_damaged_missing_or_newer_ledger_is_refused(ram_path: Path) -> None:
    with pytest.raises(DataError, match="There is no privacy budget at"):
        Budget.open(ram_path / "none.sqlite", begin=False)
    (ram_path / "damaged.sqlite").write_bytes(b"SQLite?" * 1000)
    with pytest.raises(DataError, match="may have left; restore"):
        Budget.open(ram_path / "damaged.sqlite")
    with Budget.open(ram_path / "foreign.sqlite") as opened:
        with sqlite3.connect(ram_path / "foreign.sqlite") as raw:
            raw.execute("DROP TABLE release")
        raw.close()
        with pytest.raises(DataError, match=r"no such table.*may have left; restore"):
            opened.charges()
    Budget.open(ram_path / "newer.sqlite").close()
    with sqlite3.connect(ram_path / "newer.sqlite") as raw:
        raw.execute("UPDATE ledger SET schema_version = 99")
    raw.close()
    with pytest.raises(DataError, match="tables of version 99"):
        Budget.open(ram_path / "newer.sqlite")
    for wrong in ((0.0, 1e-6), (1.0, 0.0), (1.0, 1.0), (math.nan, 1e-6)):
        with pytest.raises(ConfigError, match="limit"):
            Limit(*wrong)


def test_a_database_that_is_away_is_to_be_started_and_nothing_to_be_restored(ram_path: Path) -> None:
    """Whoever puts a copy back because of a stopped server or a lost mount rolls the budget back."""
    away = r"can't be used now \(.*\); nothing private leaves\. Start it.*don't restore a copy"
    with pytest.raises(DataError, match=away) as refusal:
        Budget.open("postgresql://postgres:s3cret@127.0.0.1:1/budget")
    assert "s3cret" not in str(refusal.value)
    path = ram_path / "lost" / "budget.sqlite"
    with Budget.open(path, LIMIT) as opened:
        opened.reserve(round_of(1))
        opened._engine.dispose()
        path.rename(path.with_name("elsewhere"))
        path.mkdir()
        for ask in (opened.charges, lambda: opened.reserve(round_of(2))):
            with pytest.raises(DataError, match=away):
                ask()
        path.rmdir()
        path.with_name("elsewhere").rename(path)
        assert [charge.release for charge in opened.charges()] == [round_of(1)]


def check(place: Place) -> None:
    """What must be true whenever the site is dead."""
    with Budget.open(place.ledger, LIMIT) as budget:
        charge = budget.find(PLANNED.run, PLANNED.round, PLANNED.purpose)
    assert len(set(lines(place.draws))) <= 1, "noise was drawn twice"
    assert len(set(lines(place.outbox))) <= 1, "two answers left"
    for answer in lines(place.outbox):
        assert charge is not None
        assert charge.state in (State.CHARGED, State.RELEASED), "an answer left uncharged"
        assert (charge.release, charge.answer) == (RAN, answer)


def test_killed_at_any_step_nothing_leaves_uncharged_and_no_noise_is_drawn_twice(ram_path: Path) -> None:
    """SIGKILL before and after every SQL statement, at every commit and between them; at some twice."""
    deaths = 0
    for nth in range(1, 1000):
        (ram_path / str(nth)).mkdir()
        place = Place.below(ram_path / str(nth))
        if not killed_at(place, nth):
            break
        check(place)
        deaths += 1
        if nth % 3 == 0:
            deaths += killed_at(place, nth)
            check(place)
        assert not killed_at(place, 1000)
        check(place)
        with Budget.open(place.ledger, LIMIT) as budget:
            (charge,) = budget.charges()
        assert charge.state == State.RELEASED
        assert lines(place.outbox)
    assert deaths > 30


def test_a_site_that_sends_before_it_charges_is_found_out(ram_path: Path) -> None:
    found = 0
    for nth in range(1, 1000):
        (ram_path / str(nth)).mkdir()
        place = Place.below(ram_path / str(nth))
        if not killed_at(place, nth, spending.work_in_the_wrong_order):
            break
        try:
            check(place)
        except AssertionError:
            found += 1
        if found > 2:
            return
    pytest.fail("nothing was found")


class Ledger(RuleBasedStateMachine):
    """Any order of calls, by any number of processes: the limit holds, and what was charged stays as it is."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(f"/dev/shm/fedcomet-{os.urandom(8).hex()}" if Path("/dev/shm").is_dir() else os.devnull)
        self.folder.mkdir()
        self.charged: dict[int, bytes] = {}
        self.freed: set[int] = set()
        self.budget = Budget.open(self.folder / "budget.sqlite", LIMIT)

    def teardown(self) -> None:
        if hasattr(self, "budget"):
            self.budget.close()
            (self.folder / "budget.sqlite").unlink()
            self.folder.rmdir()

    numbers, costs, requests = st.integers(1, 3), st.sampled_from((0.0, 0.7, 1.6, 2.9)), st.sampled_from("xy")

    @rule(number=numbers, cost=costs, request=requests)
    def reserve(self, number: int, cost: float, request: str) -> None:
        try:
            charge = self.budget.reserve(round_of(number, cost=cost, request=request))
        except SiteRefusal:
            return
        assert (charge.answer is None) == (number not in self.charged)
        assert charge.answer == self.charged.get(number)

    @rule(number=numbers, cost=costs, request=requests, answer=st.sampled_from((b"1", b"2")))
    def charge(self, number: int, cost: float, request: str, answer: bytes) -> None:
        try:
            charge = self.budget.charge(round_of(number, cost=cost, request=request), answer)
        except SiteRefusal:
            return
        assert charge.answer == self.charged.setdefault(number, answer) == answer

    @rule(number=numbers)
    def cancel(self, number: int) -> None:
        self.budget.cancel(round_of(number))

    @rule(number=numbers)
    def free(self, number: int) -> None:
        reserved = [c for c in self.budget.charges() if c.release.round == number and c.state == State.RESERVED]
        self.budget.free([charge.release for charge in reserved])
        self.freed |= {charge.release.round for charge in reserved}

    @rule()
    def reopen(self) -> None:
        self.budget.close()
        self.budget = Budget.open(self.folder / "budget.sqlite", LIMIT)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "budget"):
            return
        charges = {charge.release.round: charge for charge in self.budget.charges()}
        assert {n: c.answer for n, c in charges.items() if c.state.spent} == self.charged
        assert {n for n, c in charges.items() if c.state == State.FREED} == self.freed
        assert all((len(c.key) == 32) == (c.state == State.RESERVED) for c in charges.values())
        assert self.budget.spent() <= LIMIT.epsilon


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=15, stateful_step_count=15)


@pytest.mark.skipif(services.postgres_programs() is None, reason=services.POSTGRES_MISSING)
def test_a_postgresql_keeps_the_ledger_too() -> None:
    with services.postgres(services.postgres_programs()) as server:  # type: ignore[arg-type]
        url = f"postgresql+psycopg://postgres:{quote(services.PASSWORD, safe='')}@/postgres?host={server}"

        def reserve(number: int) -> bool:
            with Budget.open(url, LIMIT) as budget:
                try:
                    budget.reserve(round_of(number))
                except BudgetExhausted:
                    return False
                return True

        with ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(reserve, range(6))) == 3
        with Budget.open(url, LIMIT) as budget:
            first = budget.charges()[0].release
            budget.charge(first, b"answer")
            budget.released(first)
            assert [charge.state for charge in budget.charges()].count(State.RELEASED) == 1
        with pytest.raises(DataError) as refusal:
            Budget.open(url.replace(quote(services.PASSWORD, safe=""), "wrong"), LIMIT)
        assert services.PASSWORD not in str(refusal.value)
