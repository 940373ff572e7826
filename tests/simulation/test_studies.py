"""Grids of studies: cells follow from the file, kills and failures cost no other cell, laws are found again."""

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from simulation.pool import Pool
from simulation.studies import cell as one
from simulation.studies import grid, report, runner, tables
from simulation.studies.book import Book
from simulation.studies.cell import Figure
from simulation.studies.grid import Cell
from simulation.studies.hostile import Hostile
from simulation.studies.scaling import Law, Run, estimates, exponents, fit_law, profiles
from tests import tiny
from tokenizer.errors import ConfigError, DataError
from tokenizer.progress import Watch

REPOSITORY = Path(__file__).parents[2]
BASE = """
name = "base"
[data]
kind = "sites"
[data.sites]
{sites}
[tokenizer]
min_patients = 5
[model]
context = 64
layers = 1
width = 16
heads = 2
ff = 32
[training]
rounds = 2
local_steps = 2
batch_tokens = 512
[[task]]
name = "lab"
question = "Which laboratory test comes first?"
trigger = ["LAB//0"]
outcome = ["LAB//1"]
competing = ["LAB//2"]
"""
GRID = """
name = "tiny"
base = "base.toml"
seeds = [1, 2]
[[axis]]
name = "rate"
key = "training.learning_rate"
values = [1e-3, 1e-2]
[[axis]]
name = "outer"
point = [
  { label = "plain", "training.outer" = "fedavg" },
  { label = "adaptive", "training.outer" = "adam", "training.outer_learning_rate" = 0.01 },
]
[plot]
x = "rate"
y = ["loss"]
"""


def written(root: Path, text: str = GRID) -> Path:
    sites = "\n".join(f'{site.name} = "{site.data}"' for site in tiny.sites(root, 3))
    (root / "base.toml").write_text(BASE.format(sites=sites))
    (root / "grid.toml").write_text(text)
    return root / "grid.toml"


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cell, ...]:
    return grid.cells(grid.read(written(tmp_path_factory.mktemp("grid"))))


def made_up(cell: Cell, folder: Path, pool: Pool, watch: Watch) -> tuple[Figure, ...]:
    return (Figure("federated", "loss", cell.seed + cell.study.training.learning_rate),)


def test_cells_are_all_points_and_seeds_with_their_settings(cells: Sequence[Cell]) -> None:
    assert len(cells) == 2 * 2 * 2
    told = {(c.study.training.learning_rate, c.study.training.outer, c.study.seed) for c in cells}
    assert told == set(itertools.product([1e-3, 1e-2], ["fedavg", "adam"], [1, 2]))
    assert len({cell.digest for cell in cells}) == 8


def test_a_wrong_key_is_named_with_its_cell(tmp_path: Path) -> None:
    text = GRID.replace('key = "training.learning_rate"', 'key = "training.learning_rat"')
    with pytest.raises(ConfigError, match=r"rate 0.001.*training.learning_rat"):
        grid.cells(grid.read(written(tmp_path, text)))


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples/studies").glob("*.toml")), ids=lambda path: path.stem)
def test_every_ready_made_study_is_a_grid_of_as_many_cells_as_its_table_says(path: Path, tmp_path: Path) -> None:
    if path.stem == "hospitals":
        pytest.skip("the base of the others")
    (row,) = (
        line for line in (REPOSITORY / "docs/studies/README.md").read_text().splitlines() if f"`{path.name}`" in line
    )
    found = grid.cells(grid.read(path), tmp_path if "--data" in row else None)
    assert int(row.split("|")[3]) == len(found)
    if "--data" in row:
        assert {cell.study.data.path for cell in found} == {tmp_path}


def test_a_failed_cell_is_told_with_its_reason_and_the_others_are_done(tmp_path: Path, cells: Sequence[Cell]) -> None:
    def broken(cell: Cell, folder: Path, pool: Pool, watch: Watch) -> tuple[Figure, ...]:
        if cell is cells[3]:
            raise DataError("the records are gone")
        if cell is cells[4]:
            raise ZeroDivisionError("unforeseen")
        return made_up(cell, folder, pool, watch)

    assert runner.run(cells, tmp_path, workers=1, at_once=3, runner=broken) == 2
    told = {row["cell"]: (row["state"], row["reason"]) for row in report.status(cells, tmp_path).iter_rows(named=True)}
    assert told[cells[3].told] == ("failed", "the records are gone")
    assert told[cells[4].told] == ("failed", "ZeroDivisionError: unforeseen")
    assert sum(state == "done" for state, _ in told.values()) == 6
    calls: list[str] = []

    def counted(cell: Cell, folder: Path, pool: Pool, watch: Watch) -> tuple[Figure, ...]:
        calls.append(cell.digest)
        return made_up(cell, folder, pool, watch)

    assert runner.run(cells, tmp_path, workers=1, again=True, runner=counted) == 0
    assert sorted(calls) == sorted([cells[3].digest, cells[4].digest]), "what is done is not run again"


def test_the_report_has_means_over_seeds_and_the_parquet_file_all_figures(
    tmp_path: Path, cells: Sequence[Cell]
) -> None:
    runner.run(cells, tmp_path, workers=1, runner=made_up)
    with Book.at(tmp_path) as book:
        found = tables.means(book.table(cells), cells)
    first = found[0]
    assert (first.place, first.seeds) == (("0.001", "plain"), 2)
    assert first.mean == pytest.approx(1.501)
    # Student's t with one degree of freedom: 12.706 standard errors of 0.5.
    assert first.high == pytest.approx(1.501 + 12.7062 * 0.5, rel=1e-4)
    copy = pl.read_parquet(tmp_path / "results.parquet")
    assert sorted(copy["value"]) == sorted(c.seed + c.study.training.learning_rate for c in cells)
    settings = GRID.replace('base = "base.toml"', f'base = "{tmp_path}/base.toml"')
    (tmp_path / "g").mkdir()
    files = report.write(grid.read(written(tmp_path / "g", settings)), cells, tmp_path)
    assert "1.501" in (tmp_path / "report.html").read_text()
    picture = next(path for path in files if path.suffix == ".svg").read_text()
    assert picture.startswith("<svg")
    assert ">adaptive<" in picture
    assert "adaptive, federated" not in picture  # there is one arm only
    assert "prefers-color-scheme: dark" in picture
    assert "loss (nats per token)" in picture
    kept = report.write(grid.read(tmp_path / "g" / "grid.toml"), cells, tmp_path, tmp_path / "docs")
    assert [path.relative_to(tmp_path).as_posix() for path in kept] == ["docs/tiny/README.md", "docs/tiny/loss.svg"]
    told = kept[0].read_text()
    assert "![loss (nats per token)](loss.svg)" in told
    assert "| 0.001 | plain | federated | 1.501 (-4.852 to 7.854) |" in told
    with pytest.raises(ConfigError, match="no cell of tiny is done"):
        report.write(grid.read(tmp_path / "g" / "grid.toml"), cells, tmp_path / "other", tmp_path / "docs")


@pytest.mark.slow
def test_real_cells_killed_in_the_middle_end_with_the_same_figures(tmp_path: Path) -> None:
    file = written(tmp_path, GRID.replace("seeds = [1, 2]", "seeds = [1]").replace("[1e-3, 1e-2]", "[1e-3]"))
    cells = grid.cells(grid.read(file))
    calm = runner.run(cells, tmp_path / "calm", workers=1, keep=True)
    assert calm == 0, report.status(cells, tmp_path / "calm")
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from simulation.studies import grid, runner\n"
        "cells = grid.cells(grid.read(Path(sys.argv[1])))\n"
        "def die(step):\n"
        "    if step.done == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "runner.run(cells, Path(sys.argv[2]), workers=1, at_once=2, watch=die)\n"
    )
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "killed")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert runner.run(cells, tmp_path / "killed", workers=1) == 0

    def figures(folder: Path) -> dict[tuple[str, str, str], float]:
        with Book.at(folder) as book:
            rows = book.table(cells).select("digest", "arm", "measure", "value").iter_rows()
        return {(d, a, m): v for d, a, m, v in rows if m != "seconds of work"}

    assert figures(tmp_path / "killed") == figures(tmp_path / "calm")
    plain, adaptive = (cell.digest for cell in cells)
    assert (
        figures(tmp_path / "calm")[plain, "federated", "loss"]
        != figures(tmp_path / "calm")[adaptive, "federated", "loss"]
    )
    assert not any((tmp_path / "killed" / "cells").iterdir())


@pytest.mark.slow
def test_a_flipped_update_harms_the_mean_and_not_the_median(tmp_path: Path) -> None:
    text = GRID.split("[[axis]]", maxsplit=1)[0].replace("seeds = [1, 2]", "seeds = [1]") + (
        '[set]\n"training.rounds" = 3\n"training.local_steps" = 25\n"training.learning_rate" = 0.03\n'
        '[[axis]]\nname = "attack"\nkey = "hostile.attack"\nvalues = ["none", "flipped"]\n'
        '[[axis]]\nname = "rule"\nkey = "training.outer_rule"\nvalues = ["mean", "median"]\n'
        '[[axis]]\nname = "factor"\nkey = "hostile.factor"\nvalues = [8.0]\n'
    )
    cells = grid.cells(grid.read(written(tmp_path, text)))
    loss = {}
    with Pool(1) as pool:
        for number, cell in enumerate(cells):
            figures = one.run(cell, tmp_path / str(number), pool)
            at = tuple(point.label for point in cell.place.values())[:2]
            loss[at] = next(f.value for f in figures if (f.arm, f.measure) == ("federated", "loss"))
    assert loss["flipped", "mean"] > loss["none", "mean"] + 0.1
    assert abs(loss["flipped", "median"] - loss["none", "median"]) < 0.1


@pytest.mark.slow
def test_personal_models_begin_with_the_federations_and_are_better_at_home(tmp_path: Path) -> None:
    text = GRID.split("[[axis]]", maxsplit=1)[0].replace("seeds = [1, 2]", "seeds = [1]") + (
        '[set]\narms = ["federated", "personal"]\n"training.local_steps" = 10\n"training.learning_rate" = 0.01\n'
        '"training.personal_rounds" = 1\n'
    )
    (cell,) = grid.cells(grid.read(written(tmp_path, text)))
    with Pool(1) as pool:
        found = {(f.arm, f.measure): f.value for f in one.run(cell, tmp_path / "cell", pool)}
        again = {(f.arm, f.measure): f.value for f in one.run(cell, tmp_path / "cell", pool)}
    assert found == again, "a finished cell is read again and not trained again"
    assert found["personal", "loss at home"] < found["federated", "loss at home"]
    assert found["personal", "tokens"] < found["federated", "tokens"] / 3


@pytest.mark.parametrize("attack", ["scaled", "flipped", "noise", "hidden"])
def test_attacks_are_what_they_say(attack: str) -> None:
    honest = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    sent = Hostile(attack, factor=3.0).changed(honest.copy(), seed=1)  # type: ignore[arg-type]
    along = float(sent @ honest) / float(honest @ honest)
    expected = {"scaled": 3.0, "flipped": -3.0, "noise": 0.0, "hidden": 1 - 3 * (2 / np.pi) ** 0.5}
    assert along == pytest.approx(expected[attack], abs=0.3)


def test_a_backdoor_needs_a_trigger(tmp_path: Path) -> None:
    text = GRID.split("[[axis]]", maxsplit=1)[0] + '[set]\n"hostile.attack" = "backdoor"\n'
    with pytest.raises(ConfigError, match="a backdoor needs a trigger"):
        grid.cells(grid.read(written(tmp_path, text)))


@pytest.mark.slow
def test_a_backdoor_moves_the_mean_but_not_the_median_and_loss_tells_members(tmp_path: Path) -> None:
    cells = grid.cells(grid.read(REPOSITORY / "examples/studies/attacks.toml"))
    risk, told = {}, {}
    with Pool() as pool:
        for number, cell in enumerate(cells):
            at = (cell.place["attack"].label, cell.place["rule"].label)
            if at[0] in ("none", "backdoor") and at[1] in ("mean", "median"):
                found = one.run(replace(cell, membership=True), tmp_path / str(number), pool)
                told = {f.measure: f.value for f in found}
                risk[at] = told["risk with trigger"]
    assert risk["backdoor", "mean"] > 0.5
    assert max(risk["backdoor", "median"], risk["none", "mean"], risk["none", "median"]) < 0.1
    assert 0 <= told["members found at 1 % alarms"] <= 1
    assert 0.3 < told["membership AUROC"] < 0.9


def test_own_heads_are_compared_by_losses_only(tmp_path: Path) -> None:
    text = GRID.split("[[axis]]", maxsplit=1)[0].replace("seeds = [1, 2]", "seeds = [1]")
    with pytest.raises(ConfigError, match="set evaluate_every to rounds"):
        grid.cells(grid.read(written(tmp_path, f'{text}[set]\n"training.own_head" = true\n')))
    more = '[set]\n"training.own_head" = true\n"training.evaluate_every" = 9\n'
    (asked,) = grid.cells(grid.read(written(tmp_path, f"ask = true\n{text}{more}")))
    (probed,) = grid.cells(grid.read(written(tmp_path, f"membership = true\n{text}{more}")))
    with Pool(1) as pool:
        with pytest.raises(ConfigError, match="no head to answer with"):
            one.run(asked, tmp_path / "asked", pool)
        with pytest.raises(ConfigError, match="has no head"):
            one.run(probed, tmp_path / "probed", pool)


@pytest.mark.slow
def test_own_heads_fit_their_own_sites_and_are_not_sent(tmp_path: Path) -> None:
    text = GRID.split("[[axis]]", maxsplit=1)[0].replace("seeds = [1, 2]", "seeds = [1]") + (
        '[set]\n"training.rounds" = 3\n"training.local_steps" = 20\n"training.learning_rate" = 0.02\n'
        '"training.evaluate_every" = 3\n[[axis]]\nname = "head"\nkey = "training.own_head"\nvalues = [false, true]\n'
    )
    loss = {}
    with Pool(1) as pool:
        for cell in grid.cells(grid.read(written(tmp_path, text))):
            found = {f.measure: f.value for f in one.run(cell, tmp_path / cell.digest, pool)}
            loss[cell.study.training.own_head] = found["loss at home"]
    assert loss[True] != loss[False]
    assert abs(loss[True] - loss[False]) < 0.3, "with the head that it began with, the model would know next to nothing"


LAW = Law(floor=1.2, a=40.0, b=300.0, alpha=0.35, beta=0.33)


def runs(noise: float, seed: int = 0) -> list[Run]:
    rng = np.random.default_rng(seed)
    made = []
    for compute in (1e12, 1e13, 1e14):
        middle = LAW.best(compute)[0]
        for share in (0.2, 0.45, 1.0, 2.2, 5.0):
            n = middle * share
            d = compute / 6 / n
            made += [Run(n, d, LAW.loss(n, d) * float(np.exp(noise * rng.normal()))) for _ in range(2)]
    return made


def test_a_known_law_is_found_again() -> None:
    law = fit_law(runs(0.0))
    assert (law.floor, law.alpha, law.beta) == pytest.approx((1.2, 0.35, 0.33), rel=0.05)
    at = LAW.best(1e13)
    assert min(LAW.loss(at[0] * s, at[1] / s) for s in (0.9, 1.0, 1.1)) == LAW.loss(*at)
    slope = exponents(profiles(runs(0.0)))
    assert slope is not None
    assert slope[0] == pytest.approx(0.33 / 0.68, abs=0.02)


def test_intervals_hold_the_truth_and_widen_with_noise() -> None:
    narrow, wide = (estimates(runs(noise, 1), 30)["IsoFLOP exponent of N"] for noise in (0.001, 0.01))
    for found in (narrow, wide):
        assert found.low is not None
        assert found.high is not None
    assert narrow.low - 0.02 < 0.33 / 0.68 < narrow.high + 0.02  # type: ignore[operator]
    assert wide.high - wide.low > narrow.high - narrow.low  # type: ignore[operator]


def test_too_few_runs_give_no_law() -> None:
    with pytest.raises(DataError, match="6 runs"):
        fit_law(runs(0.0)[:5])
    assert estimates(runs(0.0)[:4], 20)["alpha"].value is None
