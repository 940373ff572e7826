"""Killed at any moment and started again, a federation ends as if nothing had happened."""

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from server.app import coordinate
from server.journal import Journal
from server.ledger import Ledger
from tests import tiny
from tokenizer.events import write_meds

REPOSITORY = Path(__file__).parents[2]
NEVER = ("never", 0, 0)


class Result(NamedTuple):
    fingerprint: str
    weights: bytes


class Ended(NamedTuple):
    code: int
    events: list[list[Any]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    root = tmp_path_factory.mktemp("undisturbed")
    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, tiny.sites(root)), 1)))
    outcome = coordinate(grid, root / "run", tiny.plan())
    return Result(outcome.ledger_fingerprint, outcome.checkpoint.read_bytes())


def start(root: Path, moment: tuple[str, int, int], whom: str = "group", workers: int = 2) -> Ended:
    command = [sys.executable, str(REPOSITORY / "tests/simulation/killable.py"), str(root), str(workers)]
    done = subprocess.run(
        [*command, *map(str, moment), whom],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        check=False,
    )
    return Ended(done.returncode, [json.loads(line) for line in done.stdout.splitlines()])


def end_of(run: Ended) -> Result:
    assert run.code == 0
    name, fingerprint, checkpoint = run.events[-1]
    assert name == "outcome"
    return Result(fingerprint, Path(checkpoint).read_bytes())


def kill_at(root: Path, *moments: tuple[str, int, int]) -> Result:
    """Kill one run at several moments, one after the other, and let it end."""
    for moment in moments:
        killed = start(root, moment)
        assert killed.code == -signal.SIGKILL, f"{moment} never came: {killed.events}"
    return end_of(start(root, NEVER, workers=1))


@pytest.mark.slow
def test_killed_in_the_first_round_and_before_a_commit_it_ends_the_same(tmp_path: Path, undisturbed: Result) -> None:
    tiny.sites(tmp_path)
    first_update_spooled, second_round_aggregated = ("update.accepted", 1, 1), ("round.aggregated", 2, 1)
    assert kill_at(tmp_path, first_update_spooled, second_round_aggregated) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        ("asked", 0, 1),
        ("survey.received", 0, 1),
        ("codebook.built", 0, 1),
        ("run.begun", 0, 1),
        ("site.ready", 0, 2),
        ("round.announced", 1, 1),
        ("update.accepted", 1, 3),
        ("round.aggregated", 1, 1),
        ("round.evaluated", 1, 1),
        ("round.committed", 1, 1),
        ("update.accepted", 2, 2),
        ("run.finished", 2, 1),
    ],
    ids=str,
)
def test_killed_once_it_ends_the_same(tmp_path: Path, undisturbed: Result, moment: tuple[str, int, int]) -> None:
    tiny.sites(tmp_path)
    assert kill_at(tmp_path, moment) == undisturbed


@pytest.mark.slow
def test_killed_again_and_again_it_ends_the_same(tmp_path: Path, undisturbed: Result) -> None:
    tiny.sites(tmp_path)
    moments = [("survey.received", 0, 2), ("site.ready", 0, 1), ("update.accepted", 1, 1), ("update.accepted", 1, 1)]
    moments += [("update.accepted", 1, 1), ("round.aggregated", 1, 1), ("round.committed", 1, 1)]
    assert kill_at(tmp_path, *moments, ("update.accepted", 2, 3)) == undisturbed


@pytest.mark.slow
def test_a_killed_parent_leaves_no_orphan(tmp_path: Path) -> None:
    tiny.sites(tmp_path)
    killed = start(tmp_path, ("update.accepted", 1, 1), whom="parent")
    assert killed.code == -signal.SIGKILL
    name, *workers = killed.events[-1]
    assert name == "workers"
    assert len(workers) == 2
    for worker in workers:
        try:
            descriptor = os.pidfd_open(worker)
        except ProcessLookupError:
            continue
        with os.fdopen(descriptor):
            gone, _, _ = select.select([descriptor], [], [], 30)
        assert gone, f"worker {worker} is still there"


@pytest.mark.slow
def test_the_number_of_workers_makes_no_difference(tmp_path: Path, undisturbed: Result) -> None:
    tiny.sites(tmp_path)
    assert end_of(start(tmp_path, NEVER, workers=3)) == undisturbed


@pytest.mark.slow
def test_killed_during_and_after_the_server_s_own_rollouts_it_ends_the_same(tmp_path: Path) -> None:
    """Killed between two predictions' rollouts, once they are noted, and in the last round: no round is asked twice."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for root in (whole, killed):
        tiny.sites(root)
        write_meds(root / "held", [("train/0", tiny.records(7, 30))], name="held by the server")
    undisturbed = end_of(start(whole, NEVER, workers=1))
    assert kill_at(killed, ("rollouts", 1, 2), ("round.tested", 1, 1), ("rollouts", 2, 2)) == undisturbed
    told = [figures_of(root / "run") for root in (whole, killed)]
    assert told[0] == told[1]
    assert told[1][1:] == ([1, 2], [1, 2])


def figures_of(run: Path) -> tuple[dict[int, float], list[int], list[int]]:
    """What the server's questions found by round; which rounds were noted as tested and as committed, in this order."""
    with Journal(run / "ledger.sqlite") as journal:
        found = journal.figures("central.brier")
    with Ledger.open(run / "ledger.sqlite") as ledger:
        tested, committed = (
            [e.round for e in ledger.events(what=what)] for what in ("round.tested", "round.committed")
        )
    return found, tested, committed
