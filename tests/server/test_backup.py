"""A backup holds all of a ledger, in one moment, and is put back whole or not at all, in either kind of database."""

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from federation import database
from federation.pki import Role
from server import backup, lease
from server.lease import LeaseTaken
from server.ledger import Ledger
from server.ledger_entries import BudgetEntry, Identity
from server.restore import restore
from server.transactions import LeaseLost
from tests.server.test_journal import fill
from tokenizer import durable
from tokenizer.errors import ConfigError, DataError


def filled(ledger: Ledger) -> dict[str, int]:
    """Note something in most tables; gives the number of rows in each."""
    ledger.propose("icu", b"\0plan\xff")
    fill(ledger.journal("icu"), seconds=0.1 + 0.2)
    for name in ("north", "Ärzte-süd"):
        ledger.members.invite(name, Role.SITE, f"token {name}", 60.0)
    ledger.members.enrol("token north", Identity("pem", "1", "f", "e", "n", 2e9))
    ledger.report_budget(BudgetEntry("north", 1 / 3, 1e-6, None, None, run="icu"))
    return ledger.transactions.read(lambda session: backup.digest(session.connection())[1])


def same(one: Ledger, other: Ledger) -> bool:
    """Whether both hold the same, but for the event that says what was restored."""
    assert other.events()[-1].what == "ledger.restored"
    told = [(vars(e), None) for e in other.events()[:-1]] == [(vars(e), None) for e in one.events()]
    parts: list[Callable[[Ledger], object]] = [
        Ledger.runs,
        lambda ledger: ledger.members.all(),
        Ledger.budgets,
        *(lambda ledger, read=read: read(ledger, "icu") for read in (Ledger.metrics, Ledger.refusals)),
        lambda ledger: ledger.journal("icu").fingerprint(),
    ]
    return told and all(part(one) == part(other) for part in parts)


def test_a_ledger_comes_back_as_it_was(place: str, opened: Callable[[], Ledger], ram_path: Path) -> None:
    ledger, file = opened(), ram_path / "copy.backup"
    rows = filled(ledger)
    made = backup.save(ledger.transactions, file)
    assert made == backup.check(file)
    assert made.rows == rows
    assert file.stat().st_mode & 0o777 == 0o600
    assert "s3cret" not in made.place
    with Ledger.open(ram_path / "other.sqlite") as other:
        assert restore(file, other.transactions) == made
        assert same(ledger, other)
        assert backup.save(other.transactions, ram_path / "again.backup").rows["event"] == rows["event"] + 1
    again = opened()
    again.note("somebody", "later")
    restore(file, again.transactions, replace=True)
    assert [e.what for e in again.events()][-2:] == ["budget.reported", "ledger.restored"]
    assert again.note("somebody", "goes on") == again.events()[-1].id
    assert again.propose("second").name == "second"


def test_a_file_becomes_a_server_and_back(postgres_url: str, ram_path: Path) -> None:
    with Ledger.open(ram_path / "one.sqlite") as one, Ledger.open(postgres_url) as server:
        filled(one)
        first = backup.save(one.transactions, ram_path / "one.backup")
        restore(ram_path / "one.backup", server.transactions)
        assert same(one, server)
        assert server.note("somebody", "goes on") == one.events()[-1].id + 2
        back = backup.save(server.transactions, ram_path / "two.backup")
        assert back.rows == {**first.rows, "event": first.rows["event"] + 2}


def test_nothing_is_overwritten_without_being_asked(ram_path: Path) -> None:
    file = ram_path / "copy.backup"
    with Ledger.open(ram_path / "one.sqlite") as ledger:
        filled(ledger)
        backup.save(ledger.transactions, file)
        with pytest.raises(ConfigError, match=r"copy\.backup exists; --yes"):
            backup.save(ledger.transactions, file)
        ledger.note("somebody", "later")
        with pytest.raises(ConfigError, match=r"is not empty .*--yes replaces"):
            restore(file, ledger.transactions)
        assert ledger.events()[-1].what == "later"
        backup.save(ledger.transactions, file, replace=True)


@pytest.mark.parametrize("change", ["UPDATE reply SET tokens = 11", "DELETE FROM event WHERE id = 2", "DROP TABLE sum"])
def test_a_backup_that_has_changed_is_refused(ram_path: Path, change: str) -> None:
    file = ram_path / "copy.backup"
    with Ledger.open(ram_path / "one.sqlite") as ledger:
        filled(ledger)
        backup.save(ledger.transactions, file)
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute(change)
        with pytest.raises(DataError, match="has changed since it was made"):
            restore(file, ledger.transactions, replace=True)
        assert ledger.events()[-1].what == "budget.reported"
        with pytest.raises(DataError, match="is not a backup"):
            restore(ram_path / "one.sqlite", ledger.transactions, replace=True)
        with pytest.raises(DataError, match="There is no backup"):
            restore(ram_path / "none", ledger.transactions)
    with pytest.raises(DataError, match="It is a backup, not a ledger"):
        Ledger.open(file)


def test_a_backup_taken_while_others_write_is_of_one_moment(opened: Callable[[], Ledger], ram_path: Path) -> None:
    writer, reader, done = opened(), opened(), threading.Event()

    def write() -> None:
        for number in range(10_000):
            writer.propose(f"run-{number}")  # a run and an event at once
            if done.is_set():
                return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for number in range(3):
            made = backup.save(reader.transactions, ram_path / f"{number}.backup")
            assert made.rows["run"] == made.rows["event"]
    finally:
        done.set()
        thread.join()


def test_a_full_disk_of_a_backup_is_said_at_once_and_not_of_the_ledger(
    opened: Callable[[], Ledger], ram_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    ledger, file, connect = opened(), ram_path / "copy.backup", database.connect
    filled(ledger)
    monkeypatch.setattr(database, "connect", lambda url, pragmas: connect(url, (*pragmas, "max_page_count=9")))
    with pytest.raises(
        ConfigError, match=r"copy\.backup can't be written \(.*is full\); make room on its disk"
    ) as told:
        backup.save(ledger.transactions, file)
    assert durable.out_of_room(told.value)
    assert "can't be reached" not in caplog.text
    assert not list(ram_path.glob("copy.backup*"))


def test_a_ledger_is_not_replaced_under_whoever_leads(
    opened: Callable[[], Ledger], ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_renew", lambda *_: None)
    ledger, other, file = opened(), opened(), ram_path / "copy.backup"
    filled(ledger)
    backup.save(ledger.transactions, file)
    with ledger.lead(), pytest.raises(LeaseTaken, match="stop it first"):
        restore(file, other.transactions, replace=True)
    with ledger.lead(ttl_s=0.0) as token:  # it hangs, and wakes up after the restoration
        restore(file, other.transactions, replace=True)
        with pytest.raises(LeaseLost):
            ledger.note("old", "late")
    with other.lead() as later:
        assert later > token
