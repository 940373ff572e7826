"""Futures of many patients: a MEDS dataset that our own reader takes, and what was asked."""

import datetime as dt
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from model import checkpoint
from model.cohort import cohort
from model.decoder import Decoder
from model.estimate import estimate
from model.settings import DecoderConfig
from model.tasks import Task
from server.futures import Model
from server.trajectories import NO_EVENT, Moment, Sampling, write_trajectories
from tests import tiny
from tokenizer.codebook import Codebook, TokenizerOptions, merge
from tokenizer.encode import decode, encode
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import MedsDataset
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey

TASK = Task("lab_zero", "?", trigger=("LAB//1",), outcome=("LAB//0",), competing=("LAB//2",), horizon_days=2)
FEW = Sampling(trajectories=3, max_tokens=20, seed=4)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trajectories")


@pytest.fixture(scope="module")
def store(root: Path) -> TokenStore:
    dataset = MedsDataset.open(tiny.site(root, "here", 1, patients=90).data)
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


@pytest.fixture(scope="module")
def written(root: Path, model: Model, store: TokenStore) -> Path:
    done = write_trajectories(model, store, "train", Moment(days=3), root / "out", sampling=FEW)
    assert done.predictions == len(store.split("train"))
    assert sum(done.reasons.values()) == 3 * done.predictions
    return root / "out"


def test_the_events_read_back_and_encode_to_valid_timelines(written: Path, model: Model) -> None:
    dataset = MedsDataset.open(written)
    assert len(dataset.shards) == 2  # more than one part
    assert not dataset.notes
    codebook = Codebook.load(model.codebook)
    for piece in dataset.pieces:
        encoded = encode(dataset.read(piece), codebook)
        for begin, end in zip(encoded.offsets[:-1], encoded.offsets[1:], strict=True):
            assert codebook.grammar.accepts(encoded.tokens[begin:end])


def test_every_subject_is_a_trajectory_of_a_patient(written: Path, store: TokenStore) -> None:
    ends = pl.read_parquet(written / "trajectories.parquet")
    events = pl.concat([pl.read_parquet(file) for file in written.glob("data/**/*.parquet")])
    assert ends["subject_id"].to_list() == list(range(ends.height))
    assert set(events["subject_id"]) <= set(ends["subject_id"])
    assert (ends["subject_id"] % 3 == ends["trajectory"]).all()
    assert ends["patient"].gather_every(3).to_list() == store.split("train").subject_ids.tolist()
    joined = events.filter(pl.col("time").is_not_null()).join(ends, on="subject_id")
    assert (joined["time"] >= joined["prediction_time"]).all()
    # Nothing lies behind the time at which its trajectory ended.
    behind = (joined["time"] - joined["prediction_time"]).dt.total_microseconds() / 86_400_000_000
    assert (behind <= joined["elapsed_days"] + 1e-6).all()
    # What passed the horizon or was censored ended without an event that was asked for.
    assert set(ends["reason"]) <= {"horizon", "end", "cap"}
    assert (ends.filter(pl.col("reason") == "horizon")["elapsed_days"] > 3).all()


def test_the_history_stands_before_the_prediction_with_its_recorded_times(
    model: Model, store: TokenStore, tmp_path: Path
) -> None:
    at = dt.datetime(2020, 6, 1)
    done = write_trajectories(model, store, "train", Moment(at), tmp_path / "out", sampling=FEW, history=True)
    ends = pl.read_parquet(tmp_path / "out/trajectories.parquet")
    assert done.excluded[NO_EVENT] == len(store.split("train")) - done.predictions > 0
    assert not (tmp_path / "out/estimates.parquet").exists()
    events = pl.concat([pl.read_parquet(file) for file in (tmp_path / "out").glob("data/**/*.parquet")])
    mine = tiny.records(1, 90).filter((pl.col("code") != "MEDS_BIRTH") & (pl.col("time") <= at).fill_null(True))
    for subject, patient in ends.select("subject_id", "patient").rows()[::17]:
        known = events.filter((pl.col("subject_id") == subject) & (pl.col("time") < at).fill_null(True))
        expected = mine.filter(pl.col("subject_id") == patient)
        assert known["time"].sort().to_list() == expected["time"].sort().to_list()
        assert sorted(known["code"]) == sorted(expected["code"])


def test_tasks_are_answered_as_the_estimator_answers_them(model: Model, store: TokenStore, tmp_path: Path) -> None:
    done = write_trajectories(model, store, "train", [TASK], tmp_path / "out", sampling=FEW)
    codebook = Codebook.load(model.codebook)
    asked = cohort(TASK, store.split("train"), codebook)
    decoder = checkpoint.load(model.checkpoint, codebook.hash).decoder
    found = estimate(decoder, codebook, asked, TASK, trajectories=3, seed=4, max_tokens=20)
    told = pl.read_parquet(tmp_path / "out/estimates.parquet")
    assert done.predictions == len(asked) == told.height
    np.testing.assert_allclose(told["risk"].to_numpy(), found.risk, atol=1e-5)
    assert told["label"].to_list() == asked.labels.tolist()
    ends = pl.read_parquet(tmp_path / "out/trajectories.parquet")
    assert (ends["reason"] == "event").sum() == found.reasons["event"] > 0
    assert set(ends["task"]) == {"lab_zero"}


def test_each_kind_of_task_gets_its_own_answer(model: Model, store: TokenStore, tmp_path: Path) -> None:
    kinds = ("count", "time", "set")
    asked = [replace(TASK, name=f"lab_{kind}", kind=kind, outcome=("LAB//0", "LAB//3")) for kind in kinds]
    write_trajectories(model, store, "tuning", asked, tmp_path / "out", sampling=FEW)
    told = pl.read_parquet(tmp_path / "out/estimates.parquet")
    codebook = Codebook.load(model.codebook)
    decoder = checkpoint.load(model.checkpoint, codebook.hash).decoder
    for task, column in zip(asked, ("count_mean", "time_mean", "codes_risk"), strict=True):
        whom = cohort(task, store.split("tuning"), codebook)
        found = estimate(decoder, codebook, whom, task, trajectories=3, seed=4, max_tokens=20)
        mine = told.filter(pl.col("task") == task.name)
        expected = found.codes if task.kind == "set" else found.mean
        np.testing.assert_allclose(np.array(mine[column].to_list(), float), expected, atol=1e-5)
    # What is counted doesn't end with its first event.
    ends = pl.read_parquet(tmp_path / "out/trajectories.parquet").filter(pl.col("task") == "lab_count")
    assert (ends.filter(pl.col("reason") == "event")["event"] == 1).all()


def test_an_event_that_was_named_ends_a_trajectory(model: Model, store: TokenStore, tmp_path: Path) -> None:
    write_trajectories(model, store, "train", Moment(until=("LAB//0", "LAB//3")), tmp_path / "out", sampling=FEW)
    ends = pl.read_parquet(tmp_path / "out/trajectories.parquet").filter(pl.col("reason") == "event")
    events = pl.concat([pl.read_parquet(file) for file in (tmp_path / "out").glob("data/**/*.parquet")])
    met = events.filter(pl.col("code").is_in(["LAB//0", "LAB//3"])).join(ends, on="subject_id")
    assert set(met["event"]) == {0, 1}
    assert met.height == ends.height
    assert (met["code"] == pl.Series(["LAB//0", "LAB//3"]).gather(met["event"])).all()


def test_the_history_of_a_task_holds_what_its_prompt_holds(model: Model, store: TokenStore, tmp_path: Path) -> None:
    """At a trigger nothing else of that moment is known, so nothing else of it is written."""
    write_trajectories(model, store, "train", [TASK], tmp_path / "out", sampling=FEW, history=True)
    ends = pl.read_parquet(tmp_path / "out/trajectories.parquet").filter(pl.col("trajectory") == 0)
    events = pl.concat([pl.read_parquet(file) for file in (tmp_path / "out").glob("data/**/*.parquet")])
    codebook = Codebook.load(model.codebook)
    prompts = cohort(TASK, store.split("train"), codebook).prompts
    assert len(prompts) == ends.height
    for row, prompt in zip(ends.iter_rows(named=True), prompts, strict=True):
        mine = events.filter(pl.col("subject_id") == row["subject_id"])
        told = mine.filter(pl.col("time").is_null() | (pl.col("time") < row["prediction_time"]))["code"].to_list()
        expected = decode(prompt.tokens, codebook).filter(pl.col("code") != "MEDS_BIRTH")["code"].to_list()
        assert sorted([*told, "LAB//1"]) == sorted(expected)  # the trigger itself bears the prediction's time


def test_what_is_wrong_is_said_and_leaves_nothing(model: Model, store: TokenStore, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for asked, sampling, told in (
        (Moment(days=-1), FEW, "days is -1"),
        (Moment(until=("NOTHING",)), FEW, "NOTHING"),
        ([TASK], Sampling(temperature=0.5), "bias"),
        ([TASK], Sampling(top_p=0.5), "bias"),
    ):
        with pytest.raises(ConfigError, match=told):
            write_trajectories(model, store, "train", asked, out, sampling=sampling)
    with pytest.raises(DataError, match="nobody to ask about"):
        write_trajectories(model, store, "train", Moment(dt.datetime(1990, 1, 1)), out)
    with pytest.raises(ConfigError, match="split is 'all'"):
        write_trajectories(model, store, "all", Moment(), out)
    assert not list(tmp_path.iterdir())

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_trajectories(model, store, "train", Moment(), out, sampling=FEW, progress=stop)
    assert not out.exists()
