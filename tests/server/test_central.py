"""The coordinator's own questions choose the best round and end a run, by what the ledger holds and nothing else."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import checkpoint
from model.cohort import cohort
from model.estimate import estimate
from model.metrics import auroc
from model.tasks import Task
from server import app as server_app
from server.app import Outcome, coordinate
from server.central import CentralPlan
from server.central_cohort import Central
from server.journal import Journal
from server.plan import FederationPlan
from server.rounds import Event
from tests import tiny
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError
from tokenizer.events import write_meds
from tokenizer.store import TokenStore

TASK = Task("lab", "Which lab comes first?", ("LAB//0", "LAB//2"), ("LAB//1",), ("LAB//3",), 0.0, 30.0, "each")


def central(root: Path, **changes: object) -> CentralPlan:
    if not (root / "held").exists():
        write_meds(root / "held", [("train/0", tiny.records(7, 30))], name="held by the server")
    options: dict[str, object] = {"tasks": (TASK,), "trajectories": 2, "max_tokens": 16, "foreign": True, "most": 20}
    return CentralPlan(str(root / "held"), **{**options, **changes})  # type: ignore[arg-type]


def lead(root: Path, plan: FederationPlan, events: list[Event], run: str = "run") -> Outcome:
    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, tiny.sites(root)), 1)))
    return coordinate(grid, root / run, plan, listen=events.append)


def told(run: Path, name: str) -> dict[int, float]:
    with Journal(run / "ledger.sqlite") as journal:
        return journal.figures(name)


def test_figures_of_every_second_round_and_the_last_are_in_the_ledger_and_true(ram_path: Path) -> None:
    events: list[Event] = []
    chosen = central(ram_path, every=2)
    outcome = lead(ram_path, tiny.plan(rounds=3, central=chosen), events)
    run = ram_path / "run"
    assert set(told(run, "central.auroc")) == set(told(run, "central.loss")) == {2, 3}
    assert [event.round for event in events if event.kind == "round.tested"] == [2, 3]
    codebook = Codebook.load(outcome.codebook)
    store = TokenStore.open(run / "central" / codebook.hash[:16], codebook.hash)
    parts = [cohort(TASK, store.split(name), codebook).labelled() for name in ("train", "tuning", "held_out")]
    assert sum(map(len, parts)) > 20
    decoder = checkpoint.load(outcome.checkpoint, codebook.hash).decoder
    whole = Central(chosen, store, codebook, 0)._cohorts[0][1]
    found = estimate(decoder, codebook, whole, TASK, trajectories=2, seed=0, max_tokens=16)
    assert told(run, "central.auroc")[3] == pytest.approx(auroc(whole.labels, found.risk))
    assert len(whole) == 20
    best = chosen.best(told(run, "central.auroc"))
    assert outcome.best_checkpoint.stem == f"{best:04d}"


def test_a_run_ends_early_keeps_its_best_round_and_says_so(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 2.0, 2.5, 2.4, 1.0])
    monkeypatch.setattr(Central, "figures", lambda *_: {"central.loss": next(values)})
    events: list[Event] = []
    plan = tiny.plan(rounds=5, central=central(ram_path, metric="loss", patience=2))
    outcome = lead(ram_path, plan, events)
    assert (outcome.checkpoint.stem, outcome.best_checkpoint.stem) == ("0004", "0002")
    assert outcome.best_checkpoint.exists()
    (early,) = (event for event in events if event.kind == "run.early")
    assert (early.round, early.text) == (4, "no better than round 2")
    # Led again, it is over as it was, without another question.
    again = lead(ram_path, plan, [])
    assert again == outcome


@pytest.mark.parametrize("moment", ["round.tested", "round.evaluated", "round.committed"])
def test_a_killed_run_goes_on_to_the_same_end_and_asks_no_round_twice(ram_path: Path, moment: str) -> None:
    plan = tiny.plan(rounds=4, central=central(ram_path, metric="brier", patience=1))
    whole = lead(ram_path, plan, [], "whole")
    asked: list[int] = []

    def die(event: Event) -> None:
        if event.kind == "round.tested":
            asked.append(event.round)
        if (event.kind, event.round) == (moment, 1):
            raise KeyboardInterrupt

    fresh = ram_path / "fresh"
    grid = tiny.FunctionGrid(dict(enumerate(map(tiny.honest, tiny.sites(fresh)), 1)))
    with pytest.raises(KeyboardInterrupt):
        coordinate(grid, ram_path / "killed", plan, listen=die)
    moment = ""
    killed = coordinate(grid, ram_path / "killed", plan, listen=die)
    assert asked == sorted(set(asked))
    assert told(ram_path / "killed", "central.brier") == told(ram_path / "whole", "central.brier")
    assert (killed.ledger_fingerprint, killed.best_checkpoint.read_bytes()) == (
        whole.ledger_fingerprint,
        whole.best_checkpoint.read_bytes(),
    )


@given(st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4]), min_size=1, max_size=8), st.integers(1, 3), st.booleans())
def test_a_run_is_over_when_so_many_evaluations_in_a_row_were_no_better(
    values: list[float], patience: int, higher: bool
) -> None:
    plan = CentralPlan("records", (TASK,), metric="auroc" if higher else "brier", patience=patience)
    by_round = {2 * place + 2: value for place, value in enumerate(values)}
    best = (np.argmax if higher else np.argmin)(values)
    assert plan.best(by_round) == 2 * best + 2
    assert plan.over(by_round) == (len(values) - 1 - best >= patience)
    assert not CentralPlan("records", (TASK,), patience=0).over(by_round)


def test_a_plan_travels_and_one_without_central_questions_has_the_bytes_it_always_had(tmp_path: Path) -> None:
    plan = tiny.plan(central=central(tmp_path))
    assert FederationPlan.from_bytes(plan.to_bytes()) == plan
    assert b"central" not in tiny.plan().to_bytes()


def test_what_cannot_be_asked_is_refused_before_the_first_round(ram_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'metric = "auroc" needs tasks'):
        CentralPlan("records")
    with pytest.raises(ConfigError, match="patience must not be negative"):
        CentralPlan("records", (TASK,), patience=-1)
    never = Task("never", "?", ("LAB//0",), ("LAB//99",), (), 0.0, 1.0)
    events: list[Event] = []
    with pytest.raises(ConfigError, match=r"task 'never' has .* 0 of them yes"):
        lead(ram_path, tiny.plan(central=central(ram_path, tasks=(never,))), events)
    assert not [event for event in events if event.kind == "round.announced"]
    assert server_app._tester(ram_path, tiny.plan(), None) is None  # type: ignore[arg-type]
