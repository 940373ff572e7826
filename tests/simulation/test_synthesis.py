"""Made-up timelines: valid, repeatable, begun as enough patients begin, and all that a server learns from."""

from pathlib import Path

import numpy as np
import pytest

from model import checkpoint
from model.decoder import Decoder
from model.settings import DecoderConfig
from simulation.pool import Pool
from simulation.studies import cell as one
from simulation.studies import grid
from simulation.synthesis import Wanted, beginnings, make_up
from tests import tiny
from tests.simulation.test_studies import GRID, written
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.encode import encode
from tokenizer.errors import DataError
from tokenizer.events import MedsDataset
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey

RULE = SplitRule("key")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("site")
    records = MedsDataset.open(tiny.site(root, "north", 1, patients=60).data)
    codebook = Codebook.build(survey(records, RULE, TokenizerOptions(min_patients=5)))
    codebook.save(root / "codebook.json")
    build_store(records, codebook, RULE, root / "store")
    shape = DecoderConfig(len(codebook), 1, 16, 2, 2, 32, context=64)
    checkpoint.save(root / "model.safetensors", Decoder.create(shape, 0), extra={"codebook_hash": codebook.hash})
    return root / "model.safetensors", root / "codebook.json", root / "store"


def test_made_up_timelines_are_valid_repeatable_and_begin_as_many_patients_do(
    site: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    wanted = Wanted(timelines=30, max_tokens=40, least_patients=5, seed=3, first_id=1000)
    for name in ("one", "again"):
        assert make_up(*site, wanted, tmp_path / name) == 30
    one, again = (MedsDataset.open(tmp_path / name) for name in ("one", "again"))
    frames = [data.read(data.shards[0]) for data in (one, again)]
    assert frames[0].equals(frames[1])
    assert set(frames[0]["subject_id"]) == set(range(1000, 1030))
    codebook = Codebook.load(site[1])
    told = encode(frames[0], codebook)
    # What only an ancestor tells is told by it again; every other code has tokens of its own.
    assert all(code.endswith("(*)") for level in told.fallbacks.values() for code in level)
    made = build_store(one, codebook, SplitRule("all", 0.0, 0.0), tmp_path / "store")
    shared = beginnings(made.split("train"), codebook, 1)
    allowed = beginnings(TokenStore.open(site[2]).split("train"), codebook, 5)
    assert set(shared) <= set(allowed)
    assert np.diff(told.offsets).max() <= 40 + 4


def test_beginnings_of_too_few_patients_are_not_used(site: tuple[Path, Path, Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"shared by 1000 train patients, at most by \d+"):
        make_up(*site, Wanted(None, 10, 1000, 0, 0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_server_learns_from_made_up_timelines_alone(tmp_path: Path) -> None:
    text = GRID.split("[[axis]]", maxsplit=1)[0].replace("seeds = [1, 2]", "seeds = [1]") + (
        '[set]\narms = ["federated", "alone", "pooled", "synthesis"]\n"training.local_steps" = 60\n'
        '"training.learning_rate" = 0.02\n"synthesis.least_patients" = 2\n'
    )
    (cell,) = grid.cells(grid.read(written(tmp_path, text)))
    with Pool(1) as pool:
        found = {(f.arm, f.measure): f.value for f in one.run(cell, tmp_path / "cell", pool)}
        again = {(f.arm, f.measure): f.value for f in one.run(cell, tmp_path / "cell", pool)}
    assert found == again, "a finished cell is read again and not trained again"
    # As many steps; how full their batches are depends on how long timelines are.
    assert found["synthesis", "tokens"] == pytest.approx(found["pooled", "tokens"], rel=0.25)
    assert found["synthesis", "loss"] < found["pooled", "loss"] + 0.7
    assert found["synthesis", "loss"] > found["pooled", "loss"], "as good as records would be a leak"
