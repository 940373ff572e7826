"""MEDS datasets are read in one order, and what can't be read is named."""

import json
from contextlib import suppress
from datetime import UTC, date, datetime

import polars as pl
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from meds import schema as meds

from tests.tokenizer.hospital import codebook, frame, stays
from tokenizer.encode import encode
from tokenizer.errors import DataError
from tokenizer.events import MedsDataset, write_meds


def written(tmp_path, shard, name="data/train/0.parquet"):
    """A dataset of one shard, written as a foreign tool may do it."""
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    shard.write_parquet(file)
    return tmp_path


def read_all(path):
    dataset = MedsDataset.open(path)
    return [dataset.read(shard) for shard in dataset.shards]


def rows(**columns):
    base = {"subject_id": [1, 2], "time": [None, datetime(2020, 1, 1)], "code": ["A", "B"]}
    return pl.DataFrame({**base, "numeric_value": [1.0, 2.0], **columns})


def test_what_is_written_is_valid_meds_and_reads_back_the_same(tmp_path):
    shards = {"train/0": stays(range(5)), "train/1": stays(range(5, 9)), "tuning/0": stays([20])}
    write_meds(tmp_path / "site", shards.items(), name="Site A")
    dataset = MedsDataset.open(tmp_path / "site")
    assert dataset.name == "Site A"
    assert dataset.subjects == 10
    assert dataset.notes == []
    assert dataset.shards == tuple(f"data/{shard}.parquet" for shard in shards)
    for shard in dataset.shards:
        meds.DataSchema.validate(pyarrow.parquet.read_table(tmp_path / "site" / shard))
    for shard, events in shards.items():
        read = dataset.read(f"data/{shard}.parquet")
        assert read.sort(read.columns).equals(events.sort(events.columns))
    meds.DatasetMetadataSchema.validate(json.loads((tmp_path / "site/metadata/dataset.json").read_text()))
    codes = pyarrow.parquet.read_table(tmp_path / "site/metadata/codes.parquet")
    meds.CodeMetadataSchema.validate(codes)
    assert set(codes["code"].to_pylist()) == set(pl.concat(shards.values())["code"])


def test_writing_nothing_gives_an_empty_dataset(tmp_path):
    write_meds(tmp_path / "site", [], name="nobody")
    dataset = MedsDataset.open(tmp_path / "site")
    assert dataset.subjects == 0
    assert [len(dataset.read(shard)) for shard in dataset.shards] == [0]


def test_further_columns_are_kept_on_disk(tmp_path):
    write_meds(tmp_path / "site", [("0", rows(unit=["mg", "mg"]))], name="x")
    assert pl.read_parquet(tmp_path / "site/data/0.parquet")["unit"].to_list() == ["mg", "mg"]
    assert MedsDataset.open(tmp_path / "site").read("data/0.parquet").width == 4


def test_events_are_sorted_births_first_deaths_last(tmp_path):
    codes = ["Z", "MEDS_DEATH//X", "MEDS_DEATH", "A", "MEDS_BIRTH", "A", "A"]
    values = [None, None, None, 2.0, None, None, 1.0]
    shard = frame([(1, 5, code, value) for code, value in zip(codes, values, strict=True)] + [(1, None, "S", None)])
    dataset = MedsDataset.open(written(tmp_path, shard))
    read = dataset.read(dataset.shards[0])
    assert read["code"].to_list() == ["S", "MEDS_BIRTH", "A", "A", "A", "Z", "MEDS_DEATH", "MEDS_DEATH//X"]
    assert read["numeric_value"].to_list()[2:5] == [None, 1.0, 2.0]


def test_an_unsorted_shard_is_sorted_and_noted(tmp_path):
    dataset = MedsDataset.open(written(tmp_path, stays(range(5)).reverse()))
    read = dataset.read(dataset.shards[0])
    dataset.read(dataset.shards[0])
    assert read["subject_id"].is_sorted()
    assert [note for note in dataset.notes if "not sorted" in note] == [
        "data/train/0.parquet: 65 rows were not sorted by subject and time, and sorted here."
    ]


def test_split_subjects_are_noted(tmp_path):
    shard = frame([(1, 0, "A", None), (2, 0, "A", None), (1, 1, "A", None)])
    dataset = MedsDataset.open(written(tmp_path, shard))
    dataset.read(dataset.shards[0])
    assert any("not sorted" in note for note in dataset.notes)


def test_values_that_are_not_finite_are_missing_and_noted(tmp_path):
    shard = rows(numeric_value=[float("nan"), float("inf")])
    dataset = MedsDataset.open(written(tmp_path, shard))
    assert dataset.read(dataset.shards[0])["numeric_value"].null_count() == 2
    assert any("2 values were NaN or infinite" in note for note in dataset.notes)


def test_missing_metadata_is_noted(tmp_path):
    dataset = MedsDataset.open(written(tmp_path / "ward7", rows()))
    assert dataset.name == "ward7"
    assert any("dataset.json is missing" in note for note in dataset.notes)


def test_other_widths_and_missing_values_are_read(tmp_path):
    shard = rows().select(
        pl.col("subject_id").cast(pl.UInt16),
        pl.col("time").cast(pl.Datetime("ns")),
        pl.col("code").cast(pl.Categorical),
    )
    dataset = MedsDataset.open(written(tmp_path, shard))
    read = dataset.read(dataset.shards[0])
    assert dict(read.schema) == {
        "subject_id": pl.Int64,
        "time": pl.Datetime("us"),
        "code": pl.String,
        "numeric_value": pl.Float32,
    }
    assert read["numeric_value"].null_count() == 2


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        (rows().drop("code"), r"0\.parquet: column code is missing"),
        (rows().drop("time"), r"0\.parquet: column time is missing"),
        (rows().drop("subject_id"), r"0\.parquet: column subject_id is missing"),
        (rows(subject_id=["1", "2"]), r"0\.parquet: column subject_id is of type String"),
        (rows(code=[1, 2]), r"0\.parquet: column code is of type Int64"),
        (rows(time=["2020", "2021"]), r"0\.parquet: column time is of type String"),
        (rows(time=[date(2020, 1, 1)] * 2), r"0\.parquet: column time is of type Date"),
        (rows(time=[datetime(2020, 1, 1, tzinfo=UTC)] * 2), r"column time has the time zone UTC"),
        (rows(numeric_value=["a", "b"]), r"0\.parquet: column numeric_value is of type String"),
        (rows(subject_id=[1, None]), r"0\.parquet: row 1 \(from 0\) has no subject_id"),
        (rows(code=["A", None]), r"0\.parquet: row 1 \(from 0\) has no code"),
        (rows(code=["A", ""]), r"0\.parquet: row 1 \(from 0\) has no code"),
        (rows(code=["A", " \t\n "]), r"0\.parquet: row 1 \(from 0\) has no code"),
        (
            rows(subject_id=pl.Series([1, 2**63], dtype=pl.UInt64)),
            r"row 1 \(from 0\): subject_id .*9223372036854775808",
        ),
        (rows(time=pl.Series([None, 2**62]).cast(pl.Datetime("ms"))), r"row 1 \(from 0\) has the time 294247-"),
        (rows(time=pl.Series([None, -(2**62)]).cast(pl.Datetime("ms"))), r"row 1 \(from 0\) has the time -290308-"),
    ],
)
def test_a_shard_that_is_no_meds_is_named_with_row_and_column(tmp_path, shard, message):
    with pytest.raises(DataError, match=message):
        read_all(written(tmp_path, shard))


def test_a_folder_of_that_ending_is_no_shard(tmp_path):
    written(tmp_path, rows(), "data/events.parquet/part-0.parquet")
    assert MedsDataset.open(tmp_path).shards == ("data/events.parquet/part-0.parquet",)


def test_a_place_without_data_is_named_for_what_it_is(tmp_path):
    (tmp_path / "file").touch()
    for place, what in (("nowhere", "there is no such folder"), ("file", "is a file"), ("", "data: no parquet files")):
        with pytest.raises(DataError, match=f"{what}. A MEDS dataset keeps"):
            MedsDataset.open(tmp_path / place)


@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "flipped"])
def test_a_damaged_shard_is_named(tmp_path, damage):
    file = written(tmp_path, stays(range(50))) / "data/train/0.parquet"
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[20 : len(data) // 2] = bytes(len(data) // 2 - 20)
    shortened = {"text": b"subject_id,time,code", "truncated": data[: len(data) // 2], "empty": b""}
    file.write_bytes(shortened.get(damage, data))
    with pytest.raises(DataError, match=r"0\.parquet: not a readable parquet file"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", r": not JSON .*remove it"),
        ('{"dataset_name": 5}', r": dataset_name: 5 is not of type 'string', as MEDS asks for\. Correct the field"),
        ('{"site_id_columns": ["a", null]}', r": site_id_columns\[1\]: None is not of type 'string'"),
        ("[1]", r": must be a JSON object with fields such as dataset_name"),
        ("[" * 100_000, r": not JSON"),
    ],
)
def test_damaged_metadata_is_refused_with_its_field(tmp_path, text, told):
    written(tmp_path, rows())
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata/dataset.json").write_text(text)
    with pytest.raises(DataError, match=rf"dataset\.json{told}"):
        MedsDataset.open(tmp_path)


def test_a_subject_in_two_shards_is_refused_with_both_named(tmp_path):
    written(tmp_path, stays([1, 2]))
    written(tmp_path, stays([2, 3]), "data/tuning/0.parquet")
    with pytest.raises(DataError, match=r"Subject 2 is in data/train/0\.parquet and in data/tuning/0\.parquet"):
        MedsDataset.open(tmp_path)
    with pytest.raises(DataError, match="Subject 2 is in a and in b"):
        write_meds(tmp_path / "new", [("a", stays([1, 2])), ("b", stays([2, 3]))], name="x")
    assert not (tmp_path / "new").exists(), "nothing half-written stays behind"


def test_a_shard_named_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="given twice"):
        write_meds(tmp_path / "new", [("a", stays([1])), ("a", stays([3]))], name="x")


def test_the_fingerprint_follows_the_contents(tmp_path):
    for place, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_meds(tmp_path / place, [("0", stays(range(5), seed))], name=place)
    prints = [MedsDataset.open(tmp_path / place).fingerprint() for place in "abc"]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("time", [datetime(9999, 12, 31), datetime(1, 1, 1)])
def test_a_time_that_no_record_can_hold_is_named_with_its_row(tmp_path, time):
    with pytest.raises(DataError, match=r"0\.parquet: row 1 \(from 0\) has the time .* outside of 1800.*--quarantine"):
        read_all(written(tmp_path, rows(time=[datetime(2020, 1, 1), time])))


@given(st.data())
def test_damage_anywhere_is_an_error_of_the_data_or_harmless(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged")
    write_meds(path / "meds", [("0", stays(range(8)))], name="x")
    file = path / "meds/data/0.parquet"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))])
    book = codebook("fused")
    with suppress(DataError):
        for part in read_all(path / "meds"):
            encoded = encode(part, book)
            assert len(encoded.tokens) == len(encoded.times) == encoded.offsets[-1]
