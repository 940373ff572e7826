"""A small hospital's tokens, and a recipe that learns them in seconds."""

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from model.settings import DecoderConfig, TrainOptions
from simulation.attacks.canaries import alone
from simulation.attacks.training import Recipe
from tests import tiny
from tokenizer.codebook import Codebook, TokenizerOptions, merge
from tokenizer.encode import encode
from tokenizer.events import MedsDataset, write_meds
from tokenizer.split import SplitRule
from tokenizer.store import TokenSplit
from tokenizer.survey import survey

KEY = bytes(range(32))


@cache
def words() -> Codebook:
    options = TokenizerOptions(min_patients=2, value_bins=3)
    with _dataset(tiny.records(7, 200)) as dataset:
        return Codebook.build(merge([survey(dataset, SplitRule("k"), options)]))


@cache
def patients(seed: int, count: int) -> TokenSplit:
    with _dataset(tiny.records(seed, count)) as dataset:
        encoded = encode(dataset.read(dataset.shards[0]), words())
    return alone([encoded.tokens[a:b] for a, b in itertools.pairwise(encoded.offsets)])


@contextmanager
def _dataset(records: pl.DataFrame) -> Iterator[MedsDataset]:
    with tempfile.TemporaryDirectory() as folder:
        write_meds(Path(folder, "records"), [("train/0", records)], name="small")
        yield MedsDataset.open(Path(folder, "records"))


def recipe(steps: int, *, batch_tokens: int = 1024, **changes: Any) -> Recipe:
    config = {"vocab": len(words()), "layers": 1, "width": 32, "heads": 2, "kv_heads": 2, "ff": 64, "context": 64}
    shape = DecoderConfig(**{**config, **changes.pop("decoder", {})})
    options = TrainOptions(lr=1e-2, warmup_steps=0, total_steps=steps, weight_decay=0.0)
    return Recipe(shape, options, batch_tokens, **changes)
