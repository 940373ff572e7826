"""The folder of a run: held by one, and never a loss to another."""

import subprocess
import sys
from pathlib import Path

import pytest

from tokenizer.errors import ConfigError
from tokenizer.output import output

_HOLD = """
import sys, pathlib
from tokenizer.output import output
with output(pathlib.Path(sys.argv[1]), "elsewhere"):
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
        with pytest.raises(ConfigError, match="another run is writing"), output(out, "elsewhere"):
            pass
        first.kill()
    with output(out, "elsewhere"):
        (out / "codebook.json").touch()
    assert [file.name for file in out.iterdir()] == ["codebook.json"]


def test_a_run_that_writes_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), output(tmp_path / "out", "elsewhere"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["records", "store"])
def test_folders_of_others_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="wasn't written by fedcomet"), output(tmp_path, "elsewhere"):
        pass


@pytest.mark.parametrize("source", ["records", "records/", "records/inner", "link"])
def test_the_source_is_not_replaced(tmp_path: Path, source: str) -> None:
    (tmp_path / "records" / "metadata").mkdir(parents=True)
    (tmp_path / "records" / "metadata" / "fedcomet_flow.json").touch()
    (tmp_path / "link").symlink_to("records")
    with pytest.raises(ConfigError, match="the records are read from there"), output(tmp_path, f"{tmp_path}/{source}"):
        pass
