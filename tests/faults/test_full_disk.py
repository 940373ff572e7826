"""A disk that is full in the middle of a run, at a site and then at the coordinator: said, waited for, nothing lost."""

import os
import time
from pathlib import Path

import pytest

from server.journal import Status
from server.tables import RunState
from tests.field import federation, fill, small_disk, until

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")]

_FULL_S = 40.0


def test_full_disks_are_said_and_waited_for(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "homes/icu", 24) as at_site,
        small_disk(tmp_path / "office", 64) as at_coordinator,
        federation(tmp_path) as field,
    ):
        journal = field.begin("first", rounds=6, min_sites=1, evaluate_every=0)
        field.committed("first", 1)
        site = field.sites["icu"]

        ballast = fill(at_site)
        until(lambda: "is full" in site.health().get("reason", ""), lambda: str(site.health()), 120)
        field.committed("first", journal.committed() + 2)
        (entry,) = [e for e in journal.replies(journal.committed()) if e.site == "icu"]
        assert entry.status != Status.ACCEPTED
        ballast.unlink()
        until(lambda: site.health()["healthy"], lambda: str(site.health()), 300)

        ballast = fill(at_coordinator)
        until(lambda: "is full" in field.health().get("reason", ""), lambda: str(field.health()), 120)
        time.sleep(_FULL_S)
        assert field.state("first") == RunState.RUNNING, field.ledger.run("first").reason + field.told()
        ballast.unlink()
        until(lambda: field.health()["healthy"], lambda: str(field.health()), 300)
        field.finished("first")
        last = {entry.site: entry.status for entry in journal.replies(6)}
        assert last == {"icu": Status.ACCEPTED, "ward": Status.ACCEPTED}


def test_a_checkpoint_that_does_not_fit_is_said_and_its_run_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """The rest of the coordinator's disk is not full: only what leads the run meets the end of it."""
    with federation(tmp_path) as field, small_disk(field.home.runs / "first/checkpoints", 8) as disk:
        journal = field.begin("first", rounds=4, min_sites=2, evaluate_every=0)
        field.committed("first", 1)
        ballast = fill(disk)
        told = "make room, and all goes on by itself"
        until(lambda: told in field.health().get("reason", ""), lambda: str(field.health()), 120)
        time.sleep(_FULL_S)
        assert field.state("first") == RunState.RUNNING, field.ledger.run("first").reason + field.told()
        assert "run first" in field.health()["reason"]
        assert "run first ended for want of room: [Errno 28] No space left on device: '" in field.told()
        ballast.unlink()
        field.finished("first")
        assert journal.committed() == 4
        until(lambda: field.health()["healthy"], lambda: str(field.health()), 60)
