"""A grid file: one study of `simulation.config`, the settings that differ, and the seeds.

    name = "local-steps"
    question = "How many local steps may a round have?"
    base = "hospitals.toml"              # the study whose settings hold where nothing else is said
    seeds = [1, 2, 3]
    ask = false                          # whether the study's questions are put to the arms; losses need none
    membership = false                   # whether train patients are told from held-out ones by losses
    trigger = []                         # codes planted in held-out patients' records: how far do they move risks?
    [set]
    "training.learning_rate" = 4e-3
    [[axis]]
    name = "local steps"
    point = [
      { x = 1, "training.local_steps" = 1, "training.rounds" = 64 },
      { x = 16, "training.local_steps" = 16, "training.rounds" = 4 },
    ]
    [[axis]]
    name = "outer"
    key = "training.outer"
    values = ["fedavg", "nesterov"]
    [plot]
    x = "local steps"
    y = ["loss", "bytes up"]

A cell is a point of every axis and a seed; its digest is that of the study that it is, so that a change of the file
runs only what is new. Keys under `hostile.` are of `simulation.studies.hostile`, all others of the study's file.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from simulation import config, toml_file
from simulation.config import Study
from simulation.studies.hostile import Hostile
from simulation.toml_file import Section
from tokenizer.errors import ConfigError

_LABELS = ("x", "label")


class Axis(Section):
    """What differs: either a key and its values, or points that set several keys at once."""

    name: str = Field(min_length=1)
    key: str | None = None
    values: tuple[Any, ...] = ()
    point: tuple[dict[str, Any], ...] = ()

    @model_validator(mode="after")
    def _either(self) -> "Axis":
        if bool(self.point) == bool(self.key and self.values):
            raise ValueError(f'axis "{self.name}": give key and values, or points')
        return self

    def points(self) -> "tuple[Point, ...]":
        """Give the points in their order."""
        if self.key:
            return tuple(_point({"x": value, self.key: value}) for value in self.values)
        return tuple(_point(each) for each in self.point)


class Plot(Section):
    """What is drawn: an axis along x, measures along y, a line for each point of the other axes and each arm."""

    x: str
    y: tuple[str, ...]
    arms: tuple[str, ...] = ()
    log: Literal["", "x", "y", "xy"] = ""


class Scaling(Section):
    """Fit scaling laws to each arm's cells, apart for each point of the axis `by` (together without)."""

    by: str = ""
    arms: tuple[str, ...] = ("federated",)
    resamples: int = Field(default=200, ge=20)


class Grid(Section):
    """The whole file."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    question: str = ""
    base: Path
    seeds: tuple[int, ...] = Field(min_length=1)
    ask: bool = False
    membership: bool = False
    trigger: tuple[str, ...] = ()
    set: dict[str, Any] = Field(default_factory=dict)
    axis: tuple[Axis, ...] = ()
    plot: Plot | None = None
    scaling: Scaling | None = None

    @model_validator(mode="after")
    def _coherent(self) -> "Grid":
        names = [axis.name for axis in self.axis]
        if len(set(names)) != len(names) or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("axis names and seeds may stand once each")
        wanted = [w for w in (self.plot and self.plot.x, self.scaling and self.scaling.by) if w]
        if missing := [name for name in wanted if name not in names]:
            raise ValueError(f'there is no axis "{missing[0]}"; there are {", ".join(names) or "none"}')
        return self


@dataclass(frozen=True)
class Point:
    """A point of an axis: its label, its place on a number line if it has one, and what it sets."""

    label: str
    x: float | None
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One study of a grid.

    Attributes:
        digest: names its folder and its rows in the ledger.
        seed: of the study.
        place: the point of every axis by the axis' name.
        study: all settings.
        hostile: who sends bad updates; None is nobody.
        ask: whether questions are put to the arms.
        membership, trigger: see `simulation.studies.probes`.
    """

    digest: str
    seed: int
    place: Mapping[str, Point]
    study: Study
    hostile: Hostile | None
    ask: bool
    membership: bool = False
    trigger: tuple[str, ...] = ()

    @property
    def told(self) -> str:
        """The cell in words."""
        return ", ".join([*(f"{name} {point.label}" for name, point in self.place.items()), f"seed {self.seed}"])


def read(path: Path) -> Grid:
    """Read a grid file.

    Raises:
        ConfigError: it can't be read, or keys or values are wrong.
    """
    grid = toml_file.read(path, Grid, "give the path of a grid file")
    return grid.model_copy(update={"base": path.parent / grid.base})


def cells(grid: Grid, data: Path | None = None) -> tuple[Cell, ...]:
    """Give all cells, each of them checked.

    Args:
        grid: the file.
        data: the MEDS dataset of a base study of one, in the place of its `data.path`.

    Raises:
        ConfigError: the base study can't be read, or a cell would be no study; the cell is named.
    """
    study = config.read(grid.base, data=data)
    base, questions = study.model_dump(mode="python", exclude={"task"}), study.task
    found = []
    for places in itertools.product(*(axis.points() for axis in grid.axis)):
        place = {axis.name: point for axis, point in zip(grid.axis, places, strict=True)}
        for seed in grid.seeds:
            changes = dict(grid.set)
            for point in places:
                changes |= point.changes
            found.append(_cell(grid, base | {"task": questions}, changes, place, seed))
    if len({cell.digest for cell in found}) != len(found):
        raise ConfigError(f"{grid.name}: two points set the same; each cell must be a study of its own")
    return tuple(found)


def _cell(
    grid: Grid, base: Mapping[str, Any], changes: Mapping[str, Any], place: Mapping[str, Point], seed: int
) -> Cell:
    told = ", ".join(f"{name} {point.label}" for name, point in place.items()) or "the only cell"
    raw, attack = _copied(base), {}
    for key, value in changes.items():
        if key.startswith("hostile."):
            attack[key.removeprefix("hostile.")] = value
        else:
            _put(raw, key.split("."), value)
    raw |= {"seed": seed, "name": grid.name}
    try:
        hostile = Hostile(**attack) if attack.get("attack", "none") != "none" else None
        study = Study.model_validate(raw)
    except (TypeError, ValueError, ConfigError) as problem:
        reasons = (
            "; ".join(f"{'.'.join(map(str, each['loc'])) or 'the study'}: {each['msg']}" for each in problem.errors())
            if isinstance(problem, ValidationError)
            else str(problem)
        )
        raise ConfigError(f"{grid.name}, {told}: {reasons}") from None
    if hostile is not None and hostile.attack == "backdoor" and not grid.trigger:
        raise ConfigError(f'{grid.name}, {told}: a backdoor needs a trigger = ["CODE", ...] in the grid file')
    probes = {"membership": grid.membership, "trigger": grid.trigger}
    parts = {"study": study.digest(), "hostile": vars(hostile) if hostile else None, "ask": grid.ask, **probes}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return Cell(digest, seed, place, study, hostile, grid.ask, grid.membership, grid.trigger)


def _point(given: Mapping[str, Any]) -> Point:
    x = given.get("x")
    label = str(given.get("label", x))
    number = float(x) if isinstance(x, int | float) and not isinstance(x, bool) else None
    return Point(label, number, {key: value for key, value in given.items() if key not in _LABELS})


def _copied(value: Any) -> Any:
    return {key: _copied(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def _put(table: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a dotted key, and make the tables on its way where there are none."""
    for part in path[:-1]:
        if not isinstance(table.get(part), dict):
            table[part] = {}
        table = table[part]
    table[path[-1]] = value
