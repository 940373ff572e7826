"""A site whose clock is wrong is told by how much, costs the others nothing, and is back when the clock is right."""

from pathlib import Path

import pytest

from server.journal import Status
from server.tables import RunState
from tests.field import federation, until

_FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_FAKETIME is None, reason="libfaketime is not installed (make test-services)"),
]


@pytest.mark.parametrize(("shift", "where"), [("+400", "ahead of"), ("-400", "behind")])
def test_a_wrong_clock_is_said_and_waited_for(tmp_path: Path, shift: str, where: str) -> None:
    """Beyond Flower's 300 s, in both directions; only the wall clock is wrong, as on a machine without NTP."""
    wrong = {"LD_PRELOAD": str(_FAKETIME), "FAKETIME": f"{shift}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    with federation(tmp_path, (), run=False) as field:
        field.join("wrong")
        field.join("right")
        field.run_site("wrong", environment=wrong)
        field.run_site("right")
        told = until(lambda: next(iter(reasons(field.sites["wrong"].health())), None), field.told, 300)
        assert "this machine's clock is 4" in told or "this machine's clock is 3" in told  # 400 s, and a round trip
        assert f" s {where} the coordinator's" in told
        field.all_online(1)
        journal = field.begin("first", rounds=200, min_sites=1, evaluate_every=0)
        field.committed("first", 2)

        def accepted(number: int) -> set[str]:
            return {entry.site for entry in journal.replies(number) if entry.status == Status.ACCEPTED}

        assert accepted(2) == {"right"}
        service = field.sites["wrong"].service
        assert service is not None
        service.stop()
        field.run_site("wrong")
        until(lambda: accepted(journal.committed()) == {"wrong", "right"}, field.told, 400)
        field.cli("coordinator", "stop", "first", "--home", str(field.home.path))
        until(lambda: field.state("first") == RunState.STOPPED, field.told, 200)
        done = journal.committed()
        commits = [each.round for each in field.ledger.events(run="first", what="round.committed", limit=1000)]
        assert commits == list(range(1, done + 1))


def reasons(health: dict[str, object]) -> list[str]:
    """What a daemon says of a clock."""
    return [text for text in map(str, health.values()) if "clock" in text]
