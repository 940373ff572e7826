"""Task files: TOML with one task, or a set of them in `[[task]]` tables; and the sets that come with the software.

docs/tasks.md has the schema. A name that is no file is looked for among the shipped sets and their tasks.
"""

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from model.tasks import VERSION, Task, parse
from tokenizer.errors import ConfigError

_SET_KEYS = ("version", "family", "task")


def read(path: Path) -> tuple[Task, ...]:
    """Read the tasks of a file.

    Raises:
        ConfigError: the file is missing or no TOML, or tasks in it are wrong (all are named).
    """
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({getattr(error, 'strerror', error)}); name a task file") from error


@cache
def shipped() -> Mapping[str, tuple[Task, ...]]:
    """The sets that come with the software, by name."""
    folder = resources.files("model") / "task_sets"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): _parse(file.read_text(encoding="utf-8"), file.name) for file in files}


def find(name: str, folder: Path = Path()) -> tuple[Task, ...]:
    """Read a task file, or find a shipped set or task by its name.

    Args:
        name: a path, absolute or from `folder` (it ends with .toml), or the name of a set or task.
        folder: where paths start.

    Raises:
        ConfigError: there is none.
    """
    if name.endswith(".toml"):
        return read(folder / name)
    if name in shipped():
        return shipped()[name]
    if found := tuple(task for tasks in shipped().values() for task in tasks if task.name == name):
        return found
    raise ConfigError(
        f"{name!r} is no shipped task or set; `fedcomet tasks list` names them, and a file's name ends with .toml"
    )


def tasks_of(listed: object, place: str, folder: Path) -> tuple[list[Task], list[str]]:
    """Make tasks of what a study lists: tables, files, names of shipped tasks and sets.

    Returns:
        The good ones, and what is wrong with the others.
    """
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        return [], [f"{place}: task = {listed!r}: write [[task]] tables, or a list of files and names"]
    tasks: list[Task] = []
    problems = []
    for number, each in enumerate(listed, 1):
        try:
            if isinstance(each, Mapping):
                tasks.append(parse(each, f"{place}: task[{number}]"))
            else:
                tasks += find(str(each), folder)
        except ConfigError as problem:
            problems.append(str(problem))
    return tasks, problems


def _parse(text: str, place: str) -> tuple[Task, ...]:
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{place}: is not valid TOML: {error}") from error
    if "version" not in raw:
        raise ConfigError(f"{place}: version is missing; write version = {VERSION} on top")
    if "task" not in raw:
        return (parse(raw, place),)
    if other := sorted(set(raw) - set(_SET_KEYS)):
        raise ConfigError(f"{place}: {other[0]} does not belong above [[task]]; known there: {', '.join(_SET_KEYS)}")
    above: dict[str, Any] = {key: raw[key] for key in ("version", "family") if key in raw}
    tables = [{**above, **each} if isinstance(each, dict) else each for each in raw["task"]]
    tasks, problems = tasks_of(tables, place, Path())
    names = [task.name for task in tasks]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"{place}: the name {twice[0]} stands more than once; every task has its own")
    if problems:
        raise ConfigError("\n".join(problems))
    return tuple(tasks)
