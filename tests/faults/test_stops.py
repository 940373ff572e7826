"""Daemons that are told to end in the middle of a round (SIGTERM), and a site that is slower than the deadline.

A round is held open by stopping (SIGSTOP) the process that works on it.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

import pytest

from client.outbound import lines, read_entry, read_head
from federation.manifest import LocalWork
from federation.messages import TrainReply
from server.journal import Journal, Status
from server.tables import RunState
from tests.field import Field, app_process, federation, process, until

pytestmark = pytest.mark.slow


def held(field: Field, journal: Journal, name: str) -> tuple[int, int]:
    """Stop a site's process while it works on a round; gives the process and the round."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        pid = app_process(field.place, name)
        if pid is None:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            number = journal.committed() + 1
            time.sleep(1)  # in which an answer that had left before would be noted
            opened = journal.round(number)
            if opened is not None and status(journal, number, name) is None and journal.committed() < number:
                return pid, number
            os.kill(pid, signal.SIGCONT)
    raise AssertionError(f"{name} is never at work: {field.told()}")


def status(journal: Journal, number: int, name: str) -> Status | None:
    """What became of a site's answer."""
    return next((entry.status for entry in journal.replies(number) if entry.site == name), None)


def sent(field: Field, name: str) -> list[int]:
    """The rounds whose updates are on a site's list of what left."""
    folder = field.sites[name].home.state / "outbound"
    messages = [read_entry(line, place).message for place, line in lines(folder, read_head(folder))]
    return [each.round or 0 for each in messages if each.kind == TrainReply.kind]


def test_a_coordinator_that_is_told_to_stop_in_a_round_goes_on_with_it_when_it_serves_again(tmp_path: Path) -> None:
    with federation(tmp_path) as field:
        journal = field.begin("first", rounds=5, min_sites=2, evaluate_every=0)
        field.committed("first", 1)
        pid, number = held(field, journal, "icu")
        until(lambda: status(journal, number, "ward"), field.told, 60)
        assert field.coordinator is not None
        field.coordinator.terminate()
        assert field.coordinator.wait(60) == 0
        assert "stopping; runs go on from their last round when the federation is served again" in field.told()
        for mark in ("server.superlink", "flwr-serverapp"):
            assert process(field.place, (mark,)) is None, f"{mark} has outlived the coordinator"
        assert field.state("first") == RunState.RUNNING
        assert (journal.committed(), status(journal, number, "ward")) == (number - 1, Status.ACCEPTED)
        with contextlib.suppress(ProcessLookupError):  # its node may have ended it, as nobody waits for it
            os.kill(pid, signal.SIGCONT)
        field.serve()
        field.finished("first")
        assert [status(journal, number, name) for name in field.sites] == [Status.ACCEPTED] * 2
        assert sent(field, "ward").count(number) == 1, "what was noted is not asked for again"


def test_a_site_that_is_told_to_stop_sends_what_it_finishes_in_time(tmp_path: Path) -> None:
    with federation(tmp_path) as field:
        journal = field.begin("first", rounds=4, min_sites=1, evaluate_every=0)
        field.committed("first", 1)
        pid, number = held(field, journal, "icu")
        icu = field.sites["icu"].service
        assert icu is not None
        icu.terminate()
        time.sleep(3)
        os.kill(pid, signal.SIGCONT)
        assert icu.wait(60) == 0
        until(lambda: journal.committed() >= number, field.told, 120)
        assert status(journal, number, "icu") == Status.ACCEPTED
        assert "handed back" not in "".join(icu.lines)
        field.finished("first")


def test_a_site_that_is_told_to_stop_hands_back_what_it_does_not_finish_in_time(tmp_path: Path) -> None:
    with federation(tmp_path, run=False) as field:
        for name, site in field.sites.items():
            settings = site.home.path / "site.toml"
            text = settings.read_text().replace("stop_seconds = 20", "stop_seconds = 2")
            settings.write_text(text.replace("data = ", "snapshot_minutes = 0.0\ndata = ", 1))
            field.run_site(name)
        field.all_online()
        work = LocalWork(steps=200, batch_tokens=512)
        journal = field.begin("first", rounds=4, min_sites=1, evaluate_every=0, local=work)
        field.committed("first", 1)
        pid, number = held(field, journal, "icu")
        (run,) = (field.sites["icu"].home.state / "runs").iterdir()
        if not (run / "local.safetensors").exists():
            os.kill(pid, signal.SIGCONT)
            until((run / "local.safetensors").exists, "a step is done", 60)
            os.kill(pid, signal.SIGSTOP)
        icu = field.sites["icu"].service
        assert icu is not None
        began = time.monotonic()
        icu.terminate()
        assert icu.wait(60) == 0
        assert "the work is not done within 2 s and is handed back; what is done of it is kept" in "".join(icu.lines)
        assert (run / "local.safetensors").exists()
        until(lambda: journal.committed() >= number, field.told, 60)
        assert time.monotonic() - began < 100, "the deadline is ten minutes: the coordinator heard of it"
        (entry,) = [entry for entry in journal.replies(number) if entry.site == "icu"]
        assert entry.status == Status.FAILED
        assert "the site went away before it answered; it is asked again when it is back" in entry.reason
        assert number not in sent(field, "icu")
        field.run_site("icu")
        field.finished("first")


def test_a_site_that_is_slower_than_the_deadline_leaves_stale_work_and_is_back(tmp_path: Path) -> None:
    with federation(tmp_path) as field:
        policy = field.sites["icu"].home.policy
        rules = policy.read_text()
        policy.write_text(f"{rules}\n[machine]\nshare_of_time = 0.01\n")  # read anew for every request
        work = LocalWork(steps=200, batch_tokens=512)
        journal = field.begin("first", rounds=4, min_sites=1, evaluate_every=0, local=work, deadline_s=25.0)
        until(lambda: status(journal, 1, "icu"), field.told, 200)
        assert status(journal, 1, "icu") in (Status.LATE, Status.REFUSED)  # by whoever looks at its clock first
        policy.write_text(rules)
        field.finished("first")
        accepted = [number for number in range(1, 5) if status(journal, number, "icu") == Status.ACCEPTED]
        assert accepted
        assert accepted[-1] == 4
        assert sent(field, "icu") == accepted, "work that nobody waits for is not done to its end"
        assert "The deadline of the request has passed" in (field.sites["icu"].home.state / "site.log").read_text()
        assert field.health()["online"] == 2
