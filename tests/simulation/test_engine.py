from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client.site import SiteFiles
from federation.manifest import LocalWork, OuterOptions
from server.app import Outcome, coordinate
from server.journal import Journal, Status
from server.rounds import Event
from simulation.engine import LocalGrid, run_federation
from simulation.pool import Pool
from tests import tiny


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as pool:
        yield pool


def content(outcome: Outcome) -> tuple[str, bytes]:
    return outcome.ledger_fingerprint, outcome.checkpoint.read_bytes()


def test_sites_in_processes_give_what_sites_in_this_process_give(ram_path: Path, pool: Pool) -> None:
    files = tiny.sites(ram_path)
    plan = tiny.plan(outer=OuterOptions.nesterov(), local=LocalWork(epochs=1, batch_tokens=256))
    by_pool = run_federation(plan, files, ram_path / "pool", pool)
    fresh = [SiteFiles(f.name, f.data, ram_path / "fresh" / f.name) for f in files]
    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, fresh), 1)))
    assert content(by_pool) == content(coordinate(grid, ram_path / "here", plan))


def test_federations_over_one_pool_do_not_disturb_each_other(ram_path: Path, pool: Pool) -> None:
    files = tiny.sites(ram_path)
    federated = run_federation(tiny.plan(), files, ram_path / "federated", pool)
    codebook = federated.codebook.read_bytes()
    plans = {f.name: tiny.plan(name=f"{f.name} alone", min_sites=1, codebook=codebook) for f in files}
    with ThreadPoolExecutor(4) as threads:
        alone = {f.name: threads.submit(run_federation, plans[f.name], [f], ram_path / f.name, pool) for f in files}
        again = threads.submit(run_federation, tiny.plan(name="again"), files, ram_path / "again", pool)
        outcomes = {name: future.result() for name, future in alone.items()}
        twice = again.result()
    assert len({content(outcome) for outcome in (*outcomes.values(), federated, twice)}) == 5
    one = files[0]
    fresh = SiteFiles(one.name, one.data, ram_path / "fresh")
    repeated = run_federation(plans[one.name], [fresh], ram_path / "repeated", pool)
    assert content(repeated) == content(outcomes[one.name])


def test_a_site_whose_worker_dies_misses_the_round_and_the_others_go_on(ram_path: Path) -> None:
    files = tiny.sites(ram_path)
    with Pool(1) as pool:

        def watch(event: Event) -> None:
            if event.kind == "asked" and event.text == "train" and event.round == 0 and not killed:
                killed.append(1)
                for pid in pool.pids():
                    tiny.kill(pid)

        killed: list[int] = []
        outcome = run_federation(tiny.plan(), files, ram_path / "run", pool, watch)
    assert outcome.checkpoint.exists()
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        statuses = [[entry.status for entry in journal.replies(number)] for number in (1, 2)]
    assert statuses[0].count(Status.FAILED) == 1
    assert statuses[1] == [Status.ACCEPTED] * 3


def test_nodes_are_the_sites_by_name(ram_path: Path, pool: Pool) -> None:
    files = tiny.sites(ram_path)
    grid = LocalGrid(pool, files[::-1])
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert grid._sites[1].name == "site-0"


@pytest.mark.slow
def test_fifty_sites_on_one_machine_take_part_in_every_round(ram_path: Path, pool: Pool) -> None:
    files = tiny.sites(ram_path, 50)
    outcome = run_federation(tiny.plan(rounds=2, min_sites=50), files, ram_path / "fifty", pool)
    with Journal(ram_path / "fifty/ledger.sqlite") as journal:
        assert journal.committed() == 2
        for number in (1, 2):
            accepted = {entry.site for entry in journal.replies(number) if entry.status == Status.ACCEPTED}
            assert len(accepted) == 50
    assert outcome.checkpoint.exists()
