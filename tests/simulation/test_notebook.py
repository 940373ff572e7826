"""What researchers use from notebooks: the API, trackers, and the example notebooks themselves."""

import json
from pathlib import Path

import polars as pl
import pytest

import simulation
from server.rounds import Event
from simulation.trackers import MLflow, TensorBoard, WeightsAndBiases, figures
from tests import tiny
from tokenizer.errors import ConfigError

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples/notebooks").glob("*.ipynb"))


@pytest.mark.slow
def test_a_federation_gives_its_ledger_as_data_frames(ram_path: Path) -> None:
    sites = simulation.Sites({f.name: f.data for f in tiny.sites(ram_path, 2)})
    assert sites.summary()["patients"].to_list() == [40, 40]
    assert sites.distances().filter(pl.col("site") == pl.col("other"))["bits"].to_list() == [0.0, 0.0]
    federation = sites.federation(ram_path / "run", rounds=2, local_steps=1, batch_tokens=256, context=64)
    events: list[Event] = []
    results = federation.with_plan(model=tiny.MODEL).run(workers=1, listen=[events.append])
    assert results.rounds.columns == ["round", "accepted", "tokens", "bytes", "loss"]
    assert results.rounds["accepted"].to_list() == [2, 2]
    assert results.rounds["loss"].null_count() == 0
    assert results.updates.height == 4
    assert any("round.evaluated/loss" in figures(event) for event in events)


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    sites = simulation.Sites({"a": tmp_path})
    with pytest.raises(ConfigError, match="exactly one of local_epochs and local_steps"):
        sites.federation(tmp_path, rounds=2)
    with pytest.raises(ConfigError, match="roundz"):
        sites.federation(tmp_path, roundz=2, local_steps=1)
    with pytest.raises(AttributeError, match="no attribute 'Hospital'"):
        simulation.Hospital  # noqa: B018


def test_trackers_get_numbers_and_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    event = Event("round.evaluated", 3, values={"loss": 1.5, "sites": 2})
    assert figures(event) == {"round.evaluated/loss": 1.5, "round.evaluated/sites": 2.0}
    for module, make in (("mlflow", MLflow), ("wandb", lambda: WeightsAndBiases("x"))):
        monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(ConfigError, match=rf"fedcomet\[{module}\]"):
            make()
    pytest.importorskip("tensorboard", reason="fedcomet[tensorboard] is not installed")
    board = TensorBoard(tmp_path)
    board(event)
    board.close()
    assert any(path.stat().st_size > 100 for path in tmp_path.glob("events.out.*"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_an_example_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    names: dict[str, object] = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    if path.stem == "federation":
        assert names["results"].rounds.height == 2
    else:
        rates = names["by_order"]
        assert rates["injured"].tail(2).mean() > 5 * rates["injured"].head(2).mean()
