"""Eight sites by their daemons, each kind of process killed (-9) at each phase of a round; then what people order."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from client.audit import audit
from server.tables import RunState
from tests.field import Field, federation, process, until

pytestmark = pytest.mark.slow

SITES = tuple(f"ward-{number}" for number in range(8))
PHASES = ("round.announced", "update.accepted", "round.aggregated", "round.committed")
NODES = {
    "nursery of a site": ("federation.nursery",),
    "node of a site": ("client.supernode", "homes/ward-3"),
    "SuperLink": ("server.superlink",),
    "leading process": ("flwr-serverapp",),
}


def happens(field: Field, what: str) -> None:
    """Wait until a phase of the run begins once more; events are looked for often, as some phases are short."""
    seen = last(field, what)
    end = time.monotonic() + 300
    while last(field, what) == seen:
        assert time.monotonic() < end, f"no {what}: {field.told()}"
        time.sleep(0.02)


def last(field: Field, what: str) -> int:
    events = field.ledger.events(run="first", what=what, newest=True, limit=1)
    return events[0].id if events else 0


def child(field: Field) -> int | None:
    """An app process that is at work: a nursery's child."""
    nurseries = [pid for pid in field.place.processes() if "federation.nursery" in command_of(pid)]
    return next((pid for pid in nurseries if parent_of(pid) in nurseries), None)


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def kill(pid: int | None) -> None:
    if pid is not None:
        os.kill(pid, signal.SIGKILL)


def contiguous(field: Field, run: str) -> None:
    """See that every committed round was committed once, and that all lists of what left are whole."""
    done = field.ledger.journal(run).committed()
    commits = [each.round for each in field.ledger.events(run=run, what="round.committed", limit=100_000)]
    assert commits == list(range(1, done + 1))
    for site in field.sites.values():
        assert audit(site.home.state).broken is None


def ordered(field: Field, *words: str, state: RunState) -> None:
    field.cli("coordinator", *words, "--home", str(field.home.path))
    until(lambda: field.state(words[1]) == state, field.told, 300)


def killed_everywhere(field: Field, kinds: Sequence[str]) -> None:
    journal = field.ledger.journal("first")
    for kind in kinds:
        for phase in PHASES:
            happens(field, phase)
            number = journal.committed()
            if kind == "app process of a site":
                kill(child(field))
            elif kind == "daemon of a site":
                service = field.sites["ward-5"].service
                assert service is not None
                service.kill()
                field.run_site("ward-5")
            elif kind == "daemon of the coordinator":
                assert field.coordinator is not None
                field.coordinator.kill()
                field.serve("--wait")
            else:
                kill(process(field.place, NODES[kind]))
            field.committed("first", number + 2, 400)
            print(f"{kind} killed at {phase}: the run is at round {journal.committed()}")


def test_every_process_is_killed_at_every_phase_and_no_round_is_lost_or_counted_twice(tmp_path: Path) -> None:
    kinds = ("app process of a site", "daemon of a site", "daemon of the coordinator", *NODES)
    with federation(tmp_path, SITES) as field:
        field.begin("first", rounds=1000, min_sites=4, evaluate_every=0)
        field.committed("first", 1)
        killed_everywhere(field, kinds)
        field.all_online()
        ordered(field, "stop", "first", state=RunState.STOPPED)
        contiguous(field, "first")


def test_orders_are_followed_and_a_site_that_is_told_to_stop_ends_its_work_first(tmp_path: Path) -> None:
    with federation(tmp_path, ("icu", "ward")) as field:
        field.begin("first", rounds=8, min_sites=1, evaluate_every=0)
        field.committed("first", 1)
        ordered(field, "pause", "first", state=RunState.PAUSED)
        paused = field.ledger.journal("first").committed()
        time.sleep(5)
        assert field.ledger.journal("first").committed() == paused

        ordered(field, "resume", "first", state=RunState.RUNNING)
        icu = field.sites["icu"].service
        assert icu is not None
        until(lambda: child(field) is not None, "a site is at work", 60)
        icu.terminate()
        assert icu.wait(60) == 0
        field.committed("first", paused + 2)  # the other one is enough
        field.run_site("icu")
        field.finished("first")

        field.begin("second", rounds=1000, min_sites=1, evaluate_every=0)
        field.committed("second", 1)
        ordered(field, "stop", "second", state=RunState.STOPPED)
        contiguous(field, "second")
