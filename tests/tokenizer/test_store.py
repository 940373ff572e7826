"""The store holds what the encoder wrote, split by patient, and is refused when it isn't whole."""

import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from tests.tokenizer.hospital import codebook, stays
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.encode import encode
from tokenizer.errors import DataError
from tokenizer.events import MedsDataset, canonical_order, write_meds
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey

RULE = SplitRule("key")


@pytest.fixture
def site(tmp_path):
    shards = {"a": stays(range(60)), "b": stays(range(60, 100), 1, lab="LAB//RARE//x")}
    write_meds(tmp_path / "meds", shards.items(), name="site")
    dataset = MedsDataset.open(tmp_path / "meds")
    book = Codebook.build(survey(dataset, RULE, TokenizerOptions(min_patients=40)))
    return dataset, book, build_store(dataset, book, RULE, tmp_path / "store")


def test_every_patient_is_in_the_split_of_the_rule_with_the_encoders_tokens(site):
    dataset, book, store = site
    seen = 0
    for place, split in enumerate(SPLITS):
        part = store.split(split)
        assert (RULE.assign(part.subject_ids) == place).all()
        assert part.tokens_total == len(part.tokens) == len(part.times)
        for n in range(len(part)):
            shard = dataset.read(dataset.shards[int(part.subject_ids[n] >= 60)])
            alone = encode(canonical_order(shard.filter(pl.col("subject_id") == part.subject_ids[n])), book)
            tokens, times = part.timeline(n)
            assert tokens.tolist() == alone.tokens.tolist()
            assert times.tolist() == alone.times.tolist()
            seen += 1
    assert seen == 100


def test_the_manifest_counts_what_is_there(site):
    dataset, book, store = site
    manifest = store.manifest
    assert manifest["codebook_hash"] == store.codebook_hash == book.hash
    assert manifest["dataset_fingerprint"] == dataset.fingerprint()
    assert manifest["split_rule"] == {"key": "key", "tuning": 0.1, "held_out": 0.2}
    counts = manifest["splits"].values()
    assert sum(count["patients"] for count in counts) == 100
    assert sum(count["tokens"] for count in counts) == store.tokens_total
    rows = sum(len(dataset.read(shard)) for shard in dataset.shards)
    assert sum(count["events"] for count in counts) == rows - 100, "all rows but births"
    rare = sum((dataset.read(shard)["code"] == "LAB//RARE//x").sum() for shard in dataset.shards)
    assert manifest["fallbacks"]["unknown"]["LAB//RARE//x"] == rare
    assert manifest["fallbacks"]["ancestor"] == {}


def test_opening_maps_files_and_reads_none(site):
    part = TokenStore.open(site[2].path).split("train")
    assert isinstance(part.tokens, np.memmap)
    assert part.tokens.dtype == np.int32
    assert not part.tokens.flags.writeable


def test_building_again_gives_the_same_files(site, tmp_path):
    dataset, book, store = site
    again = build_store(dataset, book, RULE, tmp_path / "again")
    for file in sorted(path for path in store.path.rglob("*") if path.is_file()):
        assert (again.path / file.relative_to(store.path)).read_bytes() == file.read_bytes()


def test_a_store_is_replaced_by_a_new_one(site):
    dataset, book, store = site
    assert build_store(dataset, book, SplitRule("other"), store.path).manifest["split_rule"]["key"] == "other"


def test_another_codebook_is_refused_with_both_hashes(site):
    store = site[2]
    assert TokenStore.open(store.path, site[1].hash).codebook_hash == site[1].hash
    other = codebook().hash
    with pytest.raises(DataError) as error:
        TokenStore.open(store.path, other)
    assert other in str(error.value)
    assert store.codebook_hash in str(error.value)


@pytest.mark.parametrize("name", ["tokens.i32", "times.i64", "offsets.i64", "subject_ids.i64"])
def test_a_truncated_or_missing_file_is_named_with_both_sizes(site, name):
    file = site[2].path / "train" / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DataError, match=rf"{name}: has {size - 4:,} bytes, the manifest says {size:,}"):
        TokenStore.open(site[2].path)
    file.unlink()
    with pytest.raises(DataError, match=f"{name}: is missing"):
        TokenStore.open(site[2].path)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "fedcomet-store/0"}'])
def test_a_damaged_manifest_is_refused(site, content):
    (site[2].path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="no usable token store"):
        TokenStore.open(site[2].path)


def test_negative_counts_are_refused(site):
    file = site[2].path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["splits"]["train"]["tokens"] = -1
    file.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="no usable token store"):
        TokenStore.open(site[2].path)


def test_no_store_and_no_such_split_are_named(site, tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        TokenStore.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no split test"):
        site[2].split("test")
    with pytest.raises(IndexError):
        site[2].split("train").timeline(10_000)


def test_nobody_makes_an_empty_store(tmp_path):
    write_meds(tmp_path / "meds", [], name="nobody")
    dataset = MedsDataset.open(tmp_path / "meds")
    store = build_store(dataset, codebook(), RULE, tmp_path / "store")
    assert store.tokens_total == 0
    for split in SPLITS:
        part = store.split(split)
        assert (len(part), part.tokens_total, part.offsets.tolist()) == (0, 0, [0])


def test_reading_needs_no_polars():
    """The model's side runs where polars, pyarrow, meds and ddsketch are missing."""
    blocked = ["polars", "pyarrow", "meds", "ddsketch", "flwr", "grpc", "sqlalchemy"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}));"
        "import tokenizer.codebook, tokenizer.store, tokenizer.windows, tokenizer.durable"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
