"""Plans on paper: their figures are the sums that they show, and their limits follow from what is uncertain."""

import time
from functools import cache
from pathlib import Path

import pytest

from simulation import sizing
from tokenizer.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "sizing"


@cache
def lines(name: str) -> dict[str, sizing.Line]:
    return {line.name: line for line in sizing.plan(sizing.read(EXAMPLES / name))}


def test_cosmos_on_paper_is_what_a_pencil_gives() -> None:
    found = lines("cosmos.toml")
    parameters = found["parameters N"].value
    assert parameters == pytest.approx(1.088e9, rel=1e-3)
    assert found["tokens"].value == pytest.approx(151e9, rel=1e-6)
    assert found["patients"].value == pytest.approx(118e6, rel=1e-4)
    # 1,000 tokens per parameter of 151 B tokens: 7.2 passes (comet.md: 6.6 for 1 B).
    assert found["passes"].value == pytest.approx(1000 * parameters / 151e9, rel=0.05)
    work = 6 * parameters + 12 * 16 * 2048 * 8192 / 2
    assert found["work"].value == pytest.approx(work, rel=1e-9)
    steps = 487_096_774 * 1000 * parameters / 151e9 / 524_288
    assert found["rounds"].value == pytest.approx(steps / 100, rel=0.05)
    assert found["bytes of a site"].value == pytest.approx(found["rounds"].value * 4 * parameters, rel=1e-6)
    training = 524_288 * 100 * work / (2.496e15 * 0.35)
    assert found["a round: training"].value == pytest.approx(training, rel=0.1)


def test_what_is_uncertain_has_limits_and_what_is_given_has_none() -> None:
    found = lines("cosmos.toml")
    assert found["parameters N"].low == found["parameters N"].high
    ratio = found["tokens per parameter"]
    assert (ratio.low, ratio.high) == pytest.approx((500, 2000), rel=0.1)
    assert found["whole run"].low < found["whole run"].value < found["whole run"].high


def test_more_tokens_than_the_law_asks_for_make_a_larger_model() -> None:
    found = lines("five-hospitals.toml")
    assert found["parameters N"].value == pytest.approx(10 * 1.3e9 / 300, rel=0.05)
    assert found["epsilon"].value > 0


def test_a_file_that_makes_no_sense_is_refused_by_name(tmp_path: Path) -> None:
    text = (EXAMPLES / "cosmos.toml").read_text()
    for changed, told in (
        (text.replace('preset = "comet-l"', 'preset = "huge"'), "no preset 'huge'"),
        (text.replace("[0.2, 0.35, 0.5]", "[0.5, 0.35, 0.2]"), "utilisation"),
        (text.replace("count = 310", "cuont = 310"), "site.0.cuont"),
    ):
        (tmp_path / "wrong.toml").write_text(changed)
        with pytest.raises(ConfigError, match=told):
            sizing.read(tmp_path / "wrong.toml")


def test_this_machine_is_measured_by_training() -> None:
    low, middle, high = sizing.measured("0.3m", 0.1, time.perf_counter)
    assert 0 < low <= middle <= high
