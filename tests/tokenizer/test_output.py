"""The folder of a run: held by one, all of an output or nothing of it, and never a loss to another."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tokenizer.killed_output import found, write
from tokenizer.errors import ConfigError, DataError
from tokenizer.output import output
from tokenizer.sources.source import Source
from tokenizer.store import TokenStore

_HOLD = """
import sys, pathlib
from tokenizer.output import output
with output(pathlib.Path(sys.argv[1]), None):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_run_is_refused_until_the_first_one_dies(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="another run is writing"), output(out, None):
            pass
        first.kill()
    with output(out, None) as aside:
        (aside / "codebook.json").touch()
    assert [file.name for file in out.iterdir()] == ["codebook.json"]


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), output(tmp_path / "out", None):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def _fail_after(aside: Path, parts: int) -> None:
    for name in ("records", "store")[:parts]:
        (aside / name).mkdir()
    raise FileNotFoundError


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_run_that_fails_leaves_what_was(tmp_path: Path, step: int) -> None:
    write(tmp_path, "old")
    (tmp_path / "notes.txt").write_text("old")
    with pytest.raises(FileNotFoundError), output(tmp_path, None) as aside:
        _fail_after(aside, step)
    assert found(tmp_path) == ["old"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["codebook.json", "notes.txt", "records", "store"]


@pytest.mark.parametrize(
    ("what", "names"), [("new", ["codebook.json", "records", "store"]), ("meds", ["codebook.json", "store"])]
)
def test_an_output_replaces_all_of_an_earlier_one(tmp_path: Path, what: str, names: list[str]) -> None:
    write(tmp_path, "old")
    with output(tmp_path, None) as aside:
        write(aside, what)
        assert found(tmp_path) == ["old"]
    assert found(tmp_path) == [what]
    assert sorted(file.name for file in tmp_path.iterdir()) == names


@pytest.mark.parametrize("what", ["new", "meds"])
def test_whenever_a_run_is_killed_all_of_one_output_is_found(tmp_path: Path, what: str) -> None:
    """Killed at each change of the disk, and killed again at each change of what finishes it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.tokenizer.killed_output", str(tmp_path), what],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states = json.loads(done.stdout)
    assert len(states) > 20
    assert max(len(seen) for seen in states) > 5
    for seen in states:
        assert seen in ([["old"]] * len(seen), [[what]] * len(seen))
    assert states[0] == [["old"]]
    assert states[-1] == [[what]]


def test_who_reads_finishes_what_was_begun(tmp_path: Path) -> None:
    write(tmp_path, "old")
    (tmp_path / ".ready").mkdir()
    write(tmp_path / ".ready", "new")
    with pytest.raises(DataError, match="no usable token store"):
        TokenStore.open(tmp_path / "store")
    assert found(tmp_path) == ["new"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["codebook.json", "records", "store"]


_RACE: list[contextlib.AbstractContextManager[Path]] = []


def _let_the_first_end(event: str, _: object) -> None:
    if event == "fcntl.flock" and _RACE:
        _RACE.pop().__exit__(None, None, None)


def test_a_lock_that_was_removed_while_it_was_opened_holds_nothing(tmp_path: Path) -> None:
    """The first run ends between the moments at which a second one opens its lock and takes it."""
    sys.addaudithook(_let_the_first_end)
    out = tmp_path / "out"
    first = output(out, None)
    first.__enter__()
    _RACE.append(first)
    with output(out, None):
        assert not _RACE
        with pytest.raises(ConfigError, match="another run is writing"), output(out, None):
            pass


@pytest.mark.parametrize("name", ["records", "store"])
def test_folders_of_others_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="wasn't written by fedcomet"), output(tmp_path, None):
        pass


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "codebook.json").mkdir()
    with pytest.raises(ConfigError, match="is a folder, where a file is to be written"), output(tmp_path, None):
        pass


@pytest.mark.parametrize("source", ["records", "records/", "records/inner", "link"])
def test_the_source_is_not_replaced(tmp_path: Path, source: str) -> None:
    (tmp_path / "records" / "metadata").mkdir(parents=True)
    (tmp_path / "records" / "metadata" / "fedcomet_flow.json").touch()
    (tmp_path / "link").symlink_to("records")
    with pytest.raises(ConfigError, match="the records are read from there"), output(tmp_path, tmp_path / source):
        pass


@pytest.mark.parametrize(
    ("kind", "place", "refused"),
    [
        ("fhir", "in/tokens", True),
        ("fhir", "in", True),
        ("omop", "in/deep/tokens", True),
        ("meds", "in/tokens", False),
        ("meds", "in/data/tokens", True),
        ("fhir", "out", False),
    ],
)
def test_what_a_run_writes_is_not_read_by_the_next(tmp_path: Path, kind: str, place: str, refused: bool) -> None:
    (tmp_path / "in" / "data").mkdir(parents=True)
    source = Source(str(tmp_path / "in"), kind)
    expected = pytest.raises(ConfigError, match="is searched for records") if refused else contextlib.nullcontext()
    with expected, output(tmp_path / place, source.searched):
        pass
