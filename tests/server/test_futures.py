"""Futures of one patient: the history as it was recorded, and what may follow."""

import datetime as dt
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from model import checkpoint
from model.decoder import Decoder
from model.settings import DecoderConfig
from server.futures import Model, futures
from tests import tiny
from tokenizer.codebook import Codebook, TokenizerOptions, merge
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import MedsDataset
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey

SUBJECT = 100_007


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("futures")


@pytest.fixture(scope="module")
def store(root: Path) -> TokenStore:
    dataset = MedsDataset.open(tiny.site(root, "here", 1).data)
    rule = SplitRule("key")
    codebook = Codebook.build(merge([survey(dataset, rule, TokenizerOptions(min_patients=5))]))
    (root / "model").mkdir()
    codebook.save(root / "model" / "codebook.json")
    config = DecoderConfig(len(codebook), layers=1, width=16, heads=2, kv_heads=2, ff=32, context=64)
    decoder = Decoder.create(config, seed=1)
    checkpoint.save(root / "model" / "checkpoint.safetensors", decoder, extra={"codebook_hash": codebook.hash})
    return build_store(dataset, codebook, rule, root / "store")


@pytest.fixture(scope="module")
def model(root: Path, store: TokenStore) -> Model:
    return Model.at(root / "model")


def test_the_history_has_the_times_that_were_recorded_up_to_the_prediction(model: Model, store: TokenStore) -> None:
    mine = tiny.records(1, 40).filter((pl.col("subject_id") == SUBJECT) & (pl.col("code") != "MEDS_BIRTH"))
    times = mine["time"].drop_nulls().sort()
    at: dt.datetime = times[len(times) // 2]
    told = futures(model, store, SUBJECT, at=at, trajectories=2, max_tokens=8)
    history = told.events.filter(pl.col("trajectory") == -1)
    assert history["time"].drop_nulls().to_list() == times.filter(times <= at).to_list()
    later = told.events.filter(pl.col("trajectory") >= 0)["time"]
    assert all(time >= at for time in later.drop_nulls())


def test_equal_seeds_give_equal_futures(model: Model, store: TokenStore) -> None:
    one, same, other = (
        futures(model, store, SUBJECT, trajectories=3, max_tokens=32, seed=seed).events for seed in (1, 1, 2)
    )
    assert one.equals(same)
    assert not one.equals(other)


def test_a_horizon_ends_every_future(model: Model, store: TokenStore) -> None:
    told = futures(model, store, SUBJECT, days=0.001, trajectories=20, max_tokens=64)
    assert any("horizon" in end for end in told.ends)


def test_what_can_not_be_simulated_is_said(model: Model, store: TokenStore, root: Path) -> None:
    with pytest.raises(DataError, match="no subject 5"):
        futures(model, store, 5)
    with pytest.raises(DataError, match="no events up to 1990"):
        futures(model, store, SUBJECT, at=dt.datetime(1990, 1, 1))
    with pytest.raises(ConfigError, match="days is -1"):
        futures(model, store, SUBJECT, days=-1)
    with pytest.raises(DataError, match=r"checkpoint\.safetensors is missing"):
        Model.at(root / "nowhere")


def test_a_device_that_is_not_there_is_named(model: Model) -> None:
    for device in ("cuda:77", "abacus"):
        with pytest.raises(ConfigError, match=f"device '{device}' can't be used on this machine"):
            replace(model, device=device).decoder("any")
