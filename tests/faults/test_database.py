"""A coordinator whose ledger is on PostgreSQL, which is gone for half a minute in the middle of a run."""

import time
from pathlib import Path

import pytest

from server.tables import RunState
from tests import services
from tests.field import federation, until

pytestmark = pytest.mark.slow

_GONE_S = 30.0


def test_a_run_goes_on_when_the_database_is_back_and_a_pause_is_kept(tmp_path: Path) -> None:
    programs = services.postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed")
    with (
        services.postgres(programs) as folder,
        federation(tmp_path, database=services.postgres_url(folder)) as field,
    ):
        field.begin("first", rounds=4, min_sites=2, evaluate_every=0)
        field.committed("first", 1)
        services.stop_postgres(programs, folder)
        began = time.monotonic()
        reason = lambda: field.health().get("reason", "")  # noqa: E731
        until(lambda: "the ledger can't be reached" in reason(), reason, 60)
        time.sleep(max(0.0, _GONE_S - (time.monotonic() - began)))
        services.start_postgres(programs, folder)
        until(lambda: field.health()["healthy"], lambda: str(field.health()), 120)
        field.cli("coordinator", "pause", "first", "--home", str(field.home.path))
        until(lambda: field.state("first") == RunState.PAUSED, field.told, 300)
        field.cli("coordinator", "resume", "first", "--home", str(field.home.path))
        field.finished("first")
    told = [line["message"] for line in field.log()]
    assert sum("can't be reached" in each and "trying again" in each for each in told) >= 1
    assert services.PASSWORD not in "".join(told)
