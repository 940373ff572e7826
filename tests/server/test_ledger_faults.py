"""A database that goes away and comes back costs patience, and nothing that was noted; nothing is noted twice."""

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import NullPool, create_engine, event, text

from server.ledger import Ledger
from server.transactions import LedgerUnreachable
from tests import services
from tokenizer.errors import DataError

Open = Callable[[], Ledger]


def broken(url: str) -> Exception:
    """What a driver says when a connection breaks."""
    if url.startswith("postgresql"):
        return psycopg.OperationalError("server closed the connection unexpectedly")
    problem = sqlite3.OperationalError("disk I/O error")
    problem.sqlite_errorcode = sqlite3.SQLITE_IOERR
    return problem


@pytest.mark.parametrize("committed", [True, False])
def test_a_commit_whose_answer_is_lost_counts_once(
    place: str, opened: Open, monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    ledger = opened()
    dialect = ledger.transactions.engine.dialect
    commit, calls = dialect.do_commit, []

    def lose(connection: Any) -> None:
        calls.append(connection)
        if len(calls) == 1:
            if committed:
                commit(connection)
            raise broken(place)
        commit(connection)

    monkeypatch.setattr(dialect, "do_commit", lose)
    number = ledger.note("somebody", "once")
    assert len(calls) > 1
    assert [(each.id, each.what) for each in opened().events()] == [(number, "once")]


def test_a_server_that_crashes_and_comes_back_loses_and_doubles_nothing(
    postgres_server: Path, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    programs = services.postgres_programs()
    assert programs is not None
    with Ledger.open(postgres_url, patience_s=120.0) as ledger, ThreadPoolExecutor(1) as threads:
        began = ledger.note("writer", "0")
        writer = threads.submit(lambda: [ledger.note("writer", str(number)) for number in range(1, 60)])
        for _ in range(2):
            services.stop_postgres(programs, postgres_server)
            services.start_postgres(programs, postgres_server)
        numbers = [began, *writer.result(300)]
        ledger.note("writer", "60")
        assert [e.what for e in ledger.events()] == [str(number) for number in range(61)]
        assert [e.id for e in ledger.events()][:60] == numbers


def test_a_server_that_stays_away_is_told_with_what_to_do(
    postgres_server: Path, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    programs = services.postgres_programs()
    assert programs is not None
    with Ledger.open(postgres_url) as ledger:
        ledger.transactions.patience_s = 0.5
        services.stop_postgres(programs, postgres_server)
        try:
            with pytest.raises(LedgerUnreachable, match=r"could not be reached for \d+ s .*Start the database") as told:
                ledger.note("writer", "never")
            assert services.PASSWORD not in str(told.value) + caplog.text
            assert "can't be reached" in caplog.text
        finally:
            services.start_postgres(programs, postgres_server)
        caplog.clear()
        ledger.transactions.patience_s = 60.0
        ledger.note("writer", "again")
        assert [e.what for e in ledger.events()] == ["again"]


def test_a_server_that_only_reads_until_its_failover_is_over_is_waited_for(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    admin = create_engine(postgres_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def only_reads(on: str) -> None:
        with admin.connect() as connection:
            connection.execute(text("SET default_transaction_read_only = off"))
            connection.execute(text(f'ALTER DATABASE "{admin.url.database}" SET default_transaction_read_only = {on}'))

    with Ledger.open(postgres_url, patience_s=120.0) as ledger:
        ledger.note("writer", "before")
        only_reads("on")
        ledger.transactions.engine.dispose()  # the lines to it broke, and each new one only reads, as long as it lives
        waited: list[float] = []

        def pause(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                only_reads("off")

        ledger.transactions.pause = pause
        ledger.note("writer", "after")
        assert len(waited) == 2
        assert "read-only transaction" in caplog.text
        assert [event.what for event in ledger.events()] == ["before", "after"]


def test_a_wrong_password_is_told_at_once(postgres_url: str) -> None:
    wrong = postgres_url.replace("s3cret", "guessed")
    with pytest.raises(DataError, match="authentication failed") as told:
        Ledger.open(wrong, patience_s=600.0)
    assert "guessed" not in str(told.value)


def test_a_full_disk_is_waited_for(ram_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Ledger.open(ram_path / "ledger.sqlite") as ledger:
        engine, limit = ledger.transactions.engine, [100]

        def small(connection: Any, _: Any) -> None:
            connection.execute(f"PRAGMA max_page_count={limit[0]}")

        event.listen(engine, "connect", small)
        engine.dispose()
        ledger.transactions.patience_s = 0.2
        noted: list[int] = []

        def fill() -> None:
            while len(noted) < 1000:
                noted.append(ledger.note("writer", str(len(noted)), told="x" * 4000))

        with pytest.raises(LedgerUnreachable, match=r"database or disk is full.*free its disk"):
            fill()
        kept = len(noted)
        assert kept > 0

        def free(_: float) -> None:
            limit[0] = 10_000
            engine.dispose()

        ledger.transactions.pause, ledger.transactions.patience_s = free, 60.0
        ledger.note("writer", "after", told="x" * 4000)
        assert [e.what for e in ledger.events()] == [*map(str, range(kept)), "after"]
        assert "is back" in caplog.text
