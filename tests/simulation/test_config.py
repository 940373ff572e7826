"""A study file says what is wrong with it: every key and value, by its place."""

from pathlib import Path

import pytest

from simulation.config import read
from tokenizer.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples"
GOOD = """
name = "small"
[data]
kind = "sites"
[data.sites]
a = "records/a"
[training]
rounds = 1
local_epochs = 1
[[task]]
name = "t"
question = "Will it?"
trigger = ["A"]
outcome = ["B"]
horizon_days = 3
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "study.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_examples_can_be_read() -> None:
    assert read(EXAMPLES / "demo.toml").data.kind == "synthetic"
    assert read(EXAMPLES / "icu-mortality.toml", data=Path("somewhere")).data.path == Path("somewhere").absolute()


def test_paths_are_taken_from_the_folder_of_the_file(tmp_path: Path) -> None:
    assert read(write(tmp_path, GOOD)).data.sites == {"a": tmp_path / "records" / "a"}


def test_equal_settings_have_an_equal_digest_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    one = read(write(tmp_path, GOOD)).digest()
    other = GOOD.replace("rounds = 1\nlocal_epochs = 1", "local_epochs = 1.0\nrounds = 1")
    assert read(write(tmp_path, other)).digest() == one
    assert read(write(tmp_path, GOOD.replace("rounds = 1", "rounds = 2"))).digest() != one


def test_a_question_may_ask_for_its_own_number_of_trajectories(tmp_path: Path) -> None:
    second = GOOD[GOOD.index("[[task]]") :].replace('"t"', '"u"') + "trajectories = 7\n[evaluation]\ntrajectories = 5\n"
    study = read(write(tmp_path, GOOD + second))
    assert [study.trajectories(name) for name in ("t", "u")] == [5, 7]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("rounds = 1", "runds = 1", "training.runds is not a known key; did you mean rounds?"),
        ("rounds = 1", "", "training.rounds is missing"),
        ("rounds = 1", "rounds = 0", "training.rounds = 0: Input should be greater than or equal to 1"),
        ("rounds = 1", 'rounds = "many"', "training.rounds = 'many'"),
        ("local_epochs = 1", "", "training: give exactly one of local_epochs and local_steps"),
        ("local_epochs = 1", "local_epochs = 1\nlocal_steps = 2", "exactly one of local_epochs and local_steps"),
        ('name = "small"', 'name = "a/b"', "name = 'a/b'"),
        ('name = "small"', 'name = "small"\nxyz = 1', "xyz is not a known key; known here: arms, data"),
        ('trigger = ["A"]', "", "task[1]: task 't': trigger is empty; name"),
        ('name = "small"', 'name = "small"\narms = ["federated", "ensemble"]', '"ensemble" averages'),
        ('name = "small"', 'name = "small"\narms = ["pooled"]', "\"federated\" can't be left out"),
        ('kind = "sites"', 'kind = "meds"', "data: kind = \"meds\" needs a [data.partition] table"),
        ('a = "records/a"', "", 'needs a [data.sites] table'),
        ("horizon_days = 3", "horizon_days = -1", "task[1]: task 't': horizon_days is -1.0; it must be"),
        ("[training]", "[split]\ntuning = 0.6\nheld_out = 0.5\n[training]", "must leave patients to train on"),
        ("[training]", '[data.partition]\nby = "iid"\n[training]', "data.partition: by = \"iid\" needs sites = N"),
        ("[[task]]", "[[tusk]]", "task is missing"),
        ("rounds = 1", "rounds = ", "is not valid TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, old: str, new: str, told: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        read(write(tmp_path, GOOD.replace(old, new, 1)))
    assert told in str(caught.value)
    assert "study.toml" in str(caught.value)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(write(tmp_path, GOOD.replace("rounds = 1", "rounds = 0").replace('question = "Will it?"', "")))
    assert "training.rounds = 0" in str(caught.value)
    assert "task[1].question is missing" in str(caught.value)


def test_a_missing_file_and_a_missing_dataset_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        read(tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"data\.path is missing; name a MEDS dataset there or with --data"):
        read(EXAMPLES / "icu-mortality.toml")
    with pytest.raises(ConfigError, match=r'--data needs data\.kind = "meds"'):
        read(EXAMPLES / "demo.toml", data=tmp_path)
