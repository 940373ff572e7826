"""A coordinator whose ledger is on PostgreSQL, which is gone for half a minute in the middle of a run."""

import time
from pathlib import Path

import pytest

from server.tables import RunState
from tests import services
from tests.field import Field, federation, until

pytestmark = pytest.mark.slow

_GONE_S = 30.0


def test_a_coordinator_without_a_run_says_that_its_database_is_gone_and_when_it_is_back(tmp_path: Path) -> None:
    programs = services.postgres_programs()
    if programs is None:
        pytest.skip(services.POSTGRES_MISSING)
    with (
        services.postgres(programs) as folder,
        federation(tmp_path, (), database=services.postgres_url(folder), run=False) as field,
    ):
        gone_for(_GONE_S, programs, folder, field)
        assert [each.what for each in field.ledger.events(what="lease.")] == ["lease.taken"]
    told = [line["message"] for line in field.log()]
    assert sum("can't be reached" in each and "trying again" in each for each in told) == 1
    assert any("is back after" in each for each in told)
    assert services.PASSWORD not in "".join(told)


def gone_for(seconds: float, programs: Path, folder: Path, field: Field) -> None:
    """Stop the database as in a crash, see that the daemon says so and lives, and start it again."""

    def reason() -> str:
        return str(field.health().get("reason", ""))

    services.stop_postgres(programs, folder)
    began = time.monotonic()
    until(lambda: "the ledger can't be reached" in reason(), reason, 60)
    time.sleep(max(0.0, seconds - (time.monotonic() - began)))
    services.start_postgres(programs, folder)
    until(lambda: field.health()["healthy"], reason, 120)


def test_a_run_goes_on_when_the_database_is_back_and_a_pause_is_kept(tmp_path: Path) -> None:
    programs = services.postgres_programs()
    if programs is None:
        pytest.skip(services.POSTGRES_MISSING)
    with (
        services.postgres(programs) as folder,
        federation(tmp_path, database=services.postgres_url(folder)) as field,
    ):
        field.begin("first", rounds=12, min_sites=2, evaluate_every=0)  # more than are done while a command starts
        field.committed("first", 1)
        gone_for(_GONE_S, programs, folder, field)
        field.cli("coordinator", "pause", "first", "--home", str(field.home.path))
        until(lambda: field.state("first") == RunState.PAUSED, field.told, 300)
        field.cli("coordinator", "resume", "first", "--home", str(field.home.path))
        field.finished("first")
