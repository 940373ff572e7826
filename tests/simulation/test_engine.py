import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client.app import play
from client.files import SiteFiles
from federation.manifest import LocalWork, OuterOptions
from server.app import Outcome, coordinate
from server.journal import Journal, Status
from server.rounds import Event
from simulation.engine import LocalGrid, run_federation
from simulation.engine_processes import run_as_processes
from simulation.pool import Pool
from simulation.scenario import Scenario
from tests import tiny
from tokenizer.errors import ConfigError


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
    grid = LocalGrid(lambda site, node, message: pool.submit(site.name, play, site, node, message), files[::-1])
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


def test_a_scenario_is_the_same_every_time_and_costs_no_waiting(ram_path: Path, pool: Pool) -> None:
    files = tiny.sites(ram_path)
    scenario = Scenario(seed=3, straggler=0.5, straggler_s=3000.0, absent={"site-1": (2,)})
    plan = tiny.plan(rounds=3, min_sites=1, deadline_s=3600.0)
    outcomes, statuses = [], []
    for turn in range(2):
        fresh = [SiteFiles(f.name, f.data, ram_path / f"{turn}" / f.name) for f in files]
        began = time.monotonic()
        outcomes.append(run_federation(plan, fresh, ram_path / f"run-{turn}", pool, scenario=scenario))
        assert time.monotonic() - began < 300, "an hour's deadline passes on the virtual clock"
        with Journal(ram_path / f"run-{turn}/ledger.sqlite") as journal:
            statuses.append([{e.site: e.status for e in journal.replies(n)} for n in (1, 2, 3)])
    assert content(outcomes[0]) == content(outcomes[1])
    assert statuses[0] == statuses[1]
    for number, found in enumerate(statuses[0], 1):
        for site in files:
            fate = scenario.fate(site.name, number)
            accepted = fate.answers and fate.late_s < plan.deadline_s
            assert (found[site.name] is Status.ACCEPTED) == accepted
    assert statuses[0][1]["site-1"] is not Status.ACCEPTED
    with pytest.raises(ConfigError, match="there is no site 'site-9'"):
        run_federation(plan, files, ram_path / "none", pool, scenario=Scenario(absent={"site-9": (1,)}))


def test_fates_come_as_often_as_a_scenario_says() -> None:
    """3,000 draws; each share within 4.5 standard errors, a false alarm in 100,000."""
    scenario = Scenario(seed=1, dropout=0.2, straggler=0.25, straggler_s=100.0)
    fates = [scenario.fate(f"site-{site}", number) for site in range(30) for number in range(100)]
    dropped = sum(not fate.answers for fate in fates)
    late = [fate.late_s for fate in fates if fate.late_s]
    assert abs(dropped - 600) < 4.5 * (3000 * 0.2 * 0.8) ** 0.5
    assert abs(len(late) - 600) < 4.5 * (3000 * 0.2 * 0.8) ** 0.5
    assert abs(sum(late) / len(late) - 100) < 4.5 * 100 / len(late) ** 0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray forgets its own processes
def test_ray_gives_what_this_machine_gives(ram_path: Path, pool: Pool) -> None:
    pytest.importorskip("ray", reason="fedcomet[ray] is not installed")
    from simulation.engine_ray import RayPlayers

    files = tiny.sites(ram_path)
    here = run_federation(tiny.plan(), files, ram_path / "here", pool)
    fresh = [SiteFiles(f.name, f.data, ram_path / "fresh" / f.name) for f in files]
    with RayPlayers(1) as players:
        there = run_federation(tiny.plan(), fresh, ram_path / "ray", None, answer=players.answer)
    assert content(here) == content(there)


@pytest.mark.slow
def test_processes_over_tls_give_what_this_machine_gives(tmp_path: Path, pool: Pool) -> None:
    files = tiny.sites(tmp_path, 2)
    here = run_federation(tiny.plan(), files, tmp_path / "here", pool)
    fresh = [SiteFiles(f.name, f.data, tmp_path / "fresh" / f.name) for f in files]
    told: list[Event] = []
    there = run_as_processes(tiny.plan(), fresh, tmp_path / "runs/one", told.append)
    assert here.checkpoint.read_bytes() == there.checkpoint.read_bytes()
    assert [event.round for event in told if event.kind == "round.committed"] == [1, 2]
