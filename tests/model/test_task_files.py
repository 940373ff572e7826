"""Task files: mistakes are named with file and field, equal tasks have equal hashes, the shipped ones hold."""

from pathlib import Path

import pytest

from federation import canonical
from model.task_files import find, read, shipped
from model.tasks import Task
from tokenizer.errors import ConfigError

GOOD = """
version = 1
name = "t"
question = "Will it?"
trigger = ["A"]
outcome = ["B"]
horizon_days = 3
[eligible]
min_age = 18
"""


def write(folder: Path, text: str) -> Path:
    (folder / "task.toml").write_text(text, encoding="utf-8")
    return folder / "task.toml"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("version = 1", "", "version is missing"),
        ("version = 1", "version = 9", "version is 9; this software reads version 1"),
        ("horizon_days", "horizon_dais", "horizon_dais is not a known key; did you mean horizon_days?"),
        ("horizon_days = 3", 'horizon_days = "3"', "horizon_days = '3': it must be a number"),
        ("min_age", "minage", "eligible.minage is not a known key; did you mean min_age?"),
        ('question = "Will it?"', "", "question is missing"),
        ("horizon_days = 3", 'horizon_days = 3\nkind = "often"', "one of event, count, time, value, set"),
        ("horizon_days = 3", 'kind = "count"', "needs horizon_days"),
        ("horizon_days = 3", 'horizon_days = 3\ncalendar = ["2020-13-01"]\n', "exclude one another"),
        ("horizon_days = 3", "horizon_days = 3\ntimes = 2", "times needs every_days"),
        ("horizon_days = 3", 'horizon_days = 3\nunit = "mg"', 'unit belongs to kind = "value"'),
        ("min_age = 18", "min_age = 18\nmax_age = 3", "nobody could be asked about"),
        ("version = 1", "version = ", "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        read(write(tmp_path, GOOD.replace(old, new, 1)))
    assert told in str(caught.value)
    assert "task.toml" in str(caught.value)


def test_equal_tasks_have_equal_hashes_and_what_is_asked_changes_them(tmp_path: Path) -> None:
    (one,) = read(write(tmp_path, GOOD))
    same = GOOD.replace("horizon_days = 3", "horizon_days = 3.0\ntrajectories = 9")
    assert read(write(tmp_path, same))[0].hash == one.hash
    assert read(write(tmp_path, GOOD.replace("min_age = 18", "min_age = 19")))[0].hash != one.hash


def test_a_task_travels_in_a_manifest() -> None:
    for tasks in shipped().values():
        for task in tasks:
            assert canonical.decode(Task, canonical.encode(task), "it", ConfigError) == task


def test_shipped_tasks_have_names_of_their_own_and_are_found_by_them() -> None:
    names = [task.name for tasks in shipped().values() for task in tasks]
    assert len(set(names)) == len(names)
    assert find("readmission_30d")[0].family == "operations"
    assert len(find("incident-disease")) == 6
    with pytest.raises(ConfigError, match="no shipped task or set"):
        find("nothing")
