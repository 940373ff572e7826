"""The figures of docs/results.md, made again: a list of commands, and what each is expected to find.

The list is `docs/results.toml`, beside the text that it backs. Every entry names the section of that text, the command,
its seed, the data that it needs, and its figures:

    [[entry]]
    name = "demo"
    section = "Synthetic hospitals with known risks"
    shows = "four made-up hospitals against the known truth"
    command = "fedcomet simulate examples/demo.toml --out {out}"
    seed = 7
    minutes = 3
    result = "report"
    [[entry.figure]]
    key = "death_90d / federated / auroc"
    expected = 0.847
    tolerance = 0.03

Commands run in the repository; `{out}` is a clean folder and `{data}` the dataset that was given. A figure is judged if
it has a tolerance, or limits of its own; one of a machine's speed has none, and is only shown.
"""

import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from federation.manifest import software_version
from simulation import toml_file
from simulation.toml_file import Section
from tokenizer import durable
from tokenizer.errors import ConfigError, FedcometError

LIST = Path(__file__).parents[1] / "docs" / "results.toml"
"""Where the list is in a checkout; an installed wheel has none."""

STAMP, OUTPUT, RUN = "reproduce.json", "output.txt", "run"
_NAME = r"^[A-Za-z0-9._-]+$"


class Expected(Section):
    """A figure: where it stands in the result (`key`) or in what is printed (`pattern`, one group), and its limits."""

    key: str = ""
    pattern: str = ""
    expected: float | None = None
    tolerance: float | None = Field(default=None, ge=0)
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _coherent(self) -> "Expected":
        if not self.key:
            raise ValueError("key is missing: the figure's place in the result, or its name where a pattern finds it")
        if self.pattern and re.compile(self.pattern).groups != 1:
            raise ValueError(f"{self.key}: the pattern needs one group, the number")
        if self.tolerance is not None and (self.expected is None or self.low is not None or self.high is not None):
            raise ValueError(f"{self.key}: a tolerance goes with expected, and without low and high")
        return self

    @property
    def limits(self) -> tuple[float, float] | None:
        """Between which the figure must lie; None where it isn't judged."""
        if self.tolerance is not None and self.expected is not None:
            return self.expected - self.tolerance, self.expected + self.tolerance
        if self.low is None and self.high is None:
            return None
        return (-float("inf") if self.low is None else self.low), (float("inf") if self.high is None else self.high)


class Entry(Section):
    """A command whose figures stand in docs/results.md.

    `result` says where figures are read from: `report` of a study, `study` for the ledger of a grid of studies,
    `json` for a JSON file that the command writes to `{out}`, `printed` for patterns alone. An entry without a command
    says in `why_not` why there is none.
    """

    name: str = Field(pattern=_NAME)
    section: str
    shows: str
    command: str = ""
    why_not: str = ""
    seed: int | None = None
    data: str = ""
    minutes: float | None = Field(default=None, gt=0)
    machine: str = ""
    result: Literal["report", "study", "json", "printed"] = "printed"
    figure: tuple[Expected, ...] = ()

    @model_validator(mode="after")
    def _coherent(self) -> "Entry":
        if bool(self.command) == bool(self.why_not):
            raise ValueError(f"{self.name}: give a command, or say in why_not why there is none")
        if self.result == "printed" and any(f.limits and not f.pattern for f in self.figure):
            raise ValueError(f"{self.name}: a printed figure that is judged needs a pattern")
        if bool(self.data) != ("{data}" in self.command):
            raise ValueError(f"{self.name}: data names what {{data}} in the command stands for")
        return self

    def digest(self) -> str:
        """What makes a folder this entry's."""
        told = {"command": self.command, "name": self.name}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def words(self, out: Path, data: Path | None) -> list[str]:
        """The program and its arguments, with this interpreter."""
        places = {"{out}": str(out), "{data}": str(data)}
        words = [_filled(word, places) for word in shlex.split(self.command)]
        program = {"fedcomet": ["-m", "fedcomet"], "pytest": ["-m", "pytest"], "python": []}.get(words[0])
        if program is None:
            raise ConfigError(f"{self.name}: {words[0]} can't be run; commands begin with fedcomet, python or pytest")
        return [sys.executable, *program, *words[1:]]


class _File(Section):
    version: Literal[1]
    entry: tuple[Entry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _unique(self) -> "_File":
        names = [entry.name for entry in self.entry]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{twice[0]} stands twice; every entry has a name of its own")
        return self


@dataclass(frozen=True)
class Verdict:
    """A figure as it is now beside what was expected; `inside` is None where it isn't judged."""

    key: str
    measured: float | None
    expected: float | None
    limits: tuple[float, float] | None
    inside: bool | None


def read(path: Path = LIST) -> tuple[Entry, ...]:
    """Read a list of entries.

    Raises:
        ConfigError: it can't be read, or keys or values are wrong (all are named).
    """
    return toml_file.read(path, _File, "run this in a checkout, or name a list with --file").entry


def reproduce(
    entry: Entry, root: Path, out: Path, *, data: Path | None = None, hear: Callable[[str], None] = lambda line: None
) -> tuple[Verdict, ...]:
    """Run an entry's command and hold its figures against what is expected.

    A run that was stopped goes on in the same folder; a finished one is never read again instead of being made.

    Args:
        entry: what to make again.
        root: the repository, where the command runs.
        out: the folder of this run: `run/` (what the command writes), `output.txt`, and `reproduce.json` with all
            figures that were found, expected or not.
        data: the dataset that the entry needs.
        hear: told every line that the command prints.

    Raises:
        ConfigError: there is no command, data are missing or not wanted, or the folder holds something else.
        FedcometError: the command failed.
    """
    if not entry.command:
        raise ConfigError(f"{entry.name} has no command: {entry.why_not}")
    if bool(entry.data) != (data is not None):
        raise ConfigError(
            f"{entry.name} needs --data: {entry.data}" if entry.data else f"{entry.name} needs no --data; leave it out"
        )
    if data is not None and not data.exists():
        raise ConfigError(f"{data} is missing; --data names {entry.data}")
    stamp: dict[str, Any] = {"entry": entry.digest(), "name": entry.name, "command": entry.command, "seed": entry.seed}
    stamp |= {"software": software_version(), "data": None if data is None else str(data.absolute())}
    _claim(out, stamp)
    words = entry.words((out / RUN).absolute(), None if data is None else data.absolute())
    printed = _run(words, root, out / OUTPUT, hear)
    measured = {**_READERS[entry.result](out / RUN), **dict(_by_pattern(entry, printed))}
    verdicts = tuple(_judged(figure, measured.get(figure.key)) for figure in entry.figure)
    told = {**stamp, "finished": True, "measured": measured, "outside": [v.key for v in verdicts if v.inside is False]}
    durable.write_bytes(out / STAMP, json.dumps(told, indent=1, sort_keys=True).encode())
    return verdicts


def _filled(word: str, places: Mapping[str, str]) -> str:
    for mark, text in places.items():
        word = word.replace(mark, text)
    return word


def _claim(out: Path, stamp: Mapping[str, Any]) -> None:
    """Take a clean folder, or go on with the same run where it stopped."""
    known = out / STAMP
    if known.exists():
        before = json.loads(known.read_bytes())
        if before.get("finished"):
            raise ConfigError(f"{out} holds a finished run; take another --out, or remove the folder to run it anew")
        if {key: before.get(key) for key in stamp} != stamp:
            raise ConfigError(f"{out} holds a run of something else ({before.get('name')}); take another --out")
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty, and nothing of an earlier run may be read; take another --out")
    else:
        durable.write_bytes(known, json.dumps(stamp, indent=1, sort_keys=True).encode())
    (out / RUN).mkdir(exist_ok=True)


def _run(words: list[str], root: Path, log: Path, hear: Callable[[str], None]) -> str:
    """Run a command, keep and tell what it prints; its progress goes where ours does."""
    lines = []
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(words, cwd=root, stdout=subprocess.PIPE, text=True, errors="replace") as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            lines.append(line)
            hear(line.rstrip("\n"))
    if process.returncode:
        raise FedcometError(
            f"{shlex.join(words)} ended with exit code {process.returncode}; what it printed is in {log}. "
            "The same command goes on from here"
        )
    return "".join(lines)


def _by_pattern(entry: Entry, printed: str) -> Iterator[tuple[str, float]]:
    for figure in entry.figure:
        if figure.pattern and (found := re.search(figure.pattern, printed, re.MULTILINE)):
            yield figure.key, float(found[1].replace(",", "").replace("−", "-"))


def _judged(figure: Expected, measured: float | None) -> Verdict:
    limits = figure.limits
    inside = None if limits is None else measured is not None and limits[0] <= measured <= limits[1]
    return Verdict(figure.key, measured, figure.expected, limits, inside)


def _of_report(folder: Path) -> dict[str, float]:
    """`question / arm / measure` of a study's report, and `question / together / measure` of what sites told."""
    from server.report import load

    report, found = load(folder / "report.json"), dict[str, float | None]()
    for question in report.questions:
        for arm in question.arms:
            for name, value in vars(arm).items():
                found[f"{question.name} / {arm.arm} / {name}"] = _number(value)
            for name, value in vars(arm.known).items() if arm.known else ():
                found[f"{question.name} / {arm.arm} / known {name}"] = _number(value)
    for merged in report.together:
        for name, figure, pooled in merged.figures:
            place = f"{merged.question} / together / {name}"
            found[place] = figure.value
            if figure.value is not None and pooled is not None:
                found[f"{place} minus pooled"] = figure.value - pooled
    return {key: value for key, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    """A field of a report as a number: a figure's value, or itself."""
    value = getattr(value, "value", value)
    return value if isinstance(value, float) else None


def _of_study(folder: Path) -> dict[str, float]:
    """`points of the axes / arm / measure` of a grid's ledger, the mean over seeds."""
    import polars as pl

    path = folder / "results.parquet"
    if not path.exists():
        raise ConfigError(f"{path} is missing: no cell of the study is done; `fedcomet study status` tells why")
    rows: dict[str, list[float]] = {}
    for place, arm, measure, value in pl.read_parquet(path).select("place", "arm", "measure", "value").iter_rows():
        points = ", ".join(map(str, json.loads(place).values())) or "all"
        rows.setdefault(f"{points} / {arm} / {measure}", []).append(value)
    return {key: sum(values) / len(values) for key, values in sorted(rows.items())}


def _of_json(folder: Path) -> dict[str, float]:
    """Every number of the JSON file that was written, its keys joined by ` / `."""
    found: dict[str, float] = {}

    def walk(place: str, value: Any) -> None:
        if isinstance(value, dict | list):
            for key, each in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{place} / {key}" if place else str(key), each)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[place] = float(value)

    for path in sorted(folder.glob("*.json")):
        walk("", json.loads(path.read_bytes()))
    return found


_READERS: dict[str, Callable[[Path], dict[str, float]]] = {
    "report": _of_report,
    "study": _of_study,
    "json": _of_json,
    "printed": lambda folder: {},
}
