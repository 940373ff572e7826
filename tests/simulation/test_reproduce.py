"""Published figures have a command each, and `fedcomet reproduce` holds what it finds against them."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import typer.main

import fedcomet as command_line
from model.metrics import auroc
from simulation import config
from simulation.reproduce import LIST, Entry, read, reproduce
from simulation.study import run_study
from tests.typed import fedcomet
from tokenizer.errors import ConfigError, FedcometError

ROOT = Path(__file__).parents[2]
ENTRIES = read()
HEADINGS = re.findall(r"^##+ (.+)$", (ROOT / "docs/results.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_section_of_the_results_has_an_entry_and_every_entry_a_section() -> None:
    assert set(HEADINGS) == {entry.section for entry in ENTRIES}
    studies = {path.stem for path in (ROOT / "examples/studies").glob("*.toml")} - {"hospitals"}
    assert {f"study-{name}" for name in studies} <= {entry.name for entry in ENTRIES}


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.command], ids=lambda entry: entry.name)
def test_its_command_exists_and_takes_these_words(entry: Entry) -> None:
    program, *words = shlex.split(entry.command)
    if program == "fedcomet":
        group: click.Command = typer.main.get_command(command_line.app)
        names = []
        while isinstance(group, click.Group):
            names.append(words.pop(0))
            group = group.commands[names[-1]]
        group.make_context(" ".join(names), list(words), resilient_parsing=True)  # an unknown option raises
        study = tomllib.loads((ROOT / words[0]).read_text(encoding="utf-8"))
        assert entry.seed in study.get("seeds", [study.get("seed")])
        return
    paths = [ROOT / f"{words[1].replace('.', '/')}.py"] if program == "python" else [ROOT / words[-1]]
    text = paths[0].read_text(encoding="utf-8")
    for option in (word for word in words[2:] if word.startswith("--") and program == "python"):
        assert f'"{option}"' in text


def listed(folder: Path, body: str) -> Path:
    path = folder / "docs" / "results.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"version = 1\n{body}", encoding="utf-8")
    return path


SMALL = """
[[entry]]
name = "small"
section = "Here"
shows = "two numbers"
command = "python work.py {out}"
seed = 3
result = "json"
[[entry.figure]]
key = "speed / 0"
expected = 40.0
[[entry.figure]]
key = "share"
expected = 0.5
tolerance = 0.1
[[entry.figure]]
key = "printed"
pattern = 'reached ([0-9.]+)'
low = 0.7
"""
WORK = """
import json, pathlib, sys
share = pathlib.Path("share").read_text()
if share == "none":
    sys.exit("no share")
pathlib.Path(sys.argv[1], "out.json").write_text(json.dumps({"share": float(share), "speed": [41]}))
print("reached 0.75")
"""


def test_figures_within_and_outside_and_what_isn_t_judged(tmp_path: Path) -> None:
    path = listed(tmp_path, SMALL)
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "share").write_text("none")
    out = tmp_path / "out"
    entry = read(path)[0]
    with pytest.raises(FedcometError, match="exit code 1"):
        reproduce(entry, tmp_path, out)
    (tmp_path / "share").write_text("0.55")  # the same call goes on in the same folder
    lines: list[str] = []
    verdicts = reproduce(entry, tmp_path, out, hear=lines.append)
    assert lines == ["reached 0.75"]
    told = [(verdict.key, verdict.measured, verdict.inside) for verdict in verdicts]
    assert told == [("speed / 0", 41.0, None), ("share", 0.55, True), ("printed", 0.75, True)]
    with pytest.raises(ConfigError, match="finished run"):
        reproduce(entry, tmp_path, out)

    (tmp_path / "share").write_text("0.65")
    said = fedcomet("reproduce", "small", "--file", path, "--out", tmp_path / "other")
    assert said.returncode == 3, said.stderr
    assert "outside" in said.stdout
    kept = json.loads((tmp_path / "other/reproduce.json").read_text())
    assert kept["outside"] == ["share"]
    assert kept["measured"] == {"share": 0.65, "speed / 0": 41.0, "printed": 0.75}


def test_a_figure_that_was_not_found_is_outside(tmp_path: Path) -> None:
    path = listed(tmp_path, SMALL.replace('key = "share"', 'key = "part"'))
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "share").write_text("0.5")
    assert [v.inside for v in reproduce(read(path)[0], tmp_path, tmp_path / "out")] == [None, False, True]


def test_what_is_wrong_is_said_before_anything_runs(tmp_path: Path) -> None:
    for old, new, told in (
        ("tolerance = 0.1", "tolerance = 0.1\nlow = 0.2", "tolerance goes with expected"),
        ("([0-9.]+)", "[0-9.]+", "needs one group"),
        ('result = "json"', 'result = "printed"', "needs a pattern"),
        ("python work.py {out}", "python work.py {data}", "data names what"),
        ('command = "python work.py {out}"', "", "why_not"),
        ("seed = 3", "sed = 3", "sed"),
    ):
        with pytest.raises(ConfigError, match=told):
            read(listed(tmp_path, SMALL.replace(old, new)))
    with pytest.raises(ConfigError, match="run this in a checkout"):
        read(tmp_path / "nowhere.toml")
    demo = next(entry for entry in ENTRIES if entry.name == "demo")
    icu = next(entry for entry in ENTRIES if entry.name == "icu-mortality")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/report.json").write_text("{}")
    with pytest.raises(ConfigError, match="not empty"):
        reproduce(demo, ROOT, tmp_path / "full")
    with pytest.raises(ConfigError, match="needs no --data"):
        reproduce(demo, ROOT, tmp_path / "new", data=tmp_path)
    with pytest.raises(ConfigError, match="needs --data"):
        reproduce(icu, ROOT, tmp_path / "new")
    with pytest.raises(ConfigError, match="is missing"):
        reproduce(icu, ROOT, tmp_path / "new", data=tmp_path / "nowhere")
    assert fedcomet("reproduce", "nothing").returncode == 1
    assert LIST == ROOT / "docs/results.toml"


TINY = """
[model]
layers = 1
width = 16
heads = 2
ff = 32
context = 64
[training]
rounds = 1
local_steps = 2
batch_tokens = 512
[evaluation]
trajectories = 2
max_tokens = 16
resamples = 100
"""
OF_TINY = """
[[entry]]
name = "tiny"
section = "Here"
shows = "the interaction study, much smaller: how far behind the best possible, Brier score, gradient boosting"
command = "fedcomet simulate tiny.toml --out {out} --workers 1"
seed = 11
result = "report"
figure = [
  { key = "kidney_injury_90d / federated / auroc", low = 0.0, high = 1.0 },
  { key = "kidney_injury_90d / true risk / known behind", expected = 0.0, tolerance = 1e-9 },
  { key = "kidney_injury_90d / federated / known behind", low = 0.0 },
  { key = "kidney_injury_90d / federated / brier", low = 0.0, high = 1.0 },
  { key = "kidney_injury_90d / gradient boosting, pooled / difference", low = -1.0, high = 1.0 },
]
"""


@pytest.mark.slow
def test_a_study_is_run_and_judged_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    text = (ROOT / "examples/interaction.toml").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^\[(?:model|training|evaluation)\]\n[^\[]*", "", text)
    text = re.sub(r"hospitals = .*", 'hospitals = ["heart-lifelike", "general-lifelike"]', text)
    (tmp_path / "tiny.toml").write_text(text.replace("patients = 3000", "patients = 150") + TINY)
    said = fedcomet("reproduce", "tiny", "--file", listed(tmp_path, OF_TINY), "--out", tmp_path / "out")
    assert said.returncode == 0, said.stdout + said.stderr
    measured = json.loads((tmp_path / "out/reproduce.json").read_text())["measured"]
    best, reached = (measured[f"kidney_injury_90d / {arm} / known auroc"] for arm in ("true risk", "federated"))
    assert best - reached == pytest.approx(measured["kidney_injury_90d / federated / known behind"])
    assert measured["kidney_injury_90d / true risk / known slope"] == pytest.approx(1.0)
    # Asked again, supervised models are not trained again.
    (kept,) = (tmp_path / "out/run/answers").glob("supervised-*.npz")
    written = kept.stat().st_mtime_ns
    (again,) = run_study(config.read(tmp_path / "tiny.toml"), tmp_path / "out/run", workers=1).answers
    assert kept.stat().st_mtime_ns == written
    figure = measured["kidney_injury_90d / gradient boosting, pooled / auroc"]
    assert auroc(again.cohort.labels, again.risks["gradient boosting, pooled"]) == pytest.approx(figure)
