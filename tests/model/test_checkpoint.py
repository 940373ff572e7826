"""Checkpoints: what was saved comes back, and nothing else does."""

import io
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from model import checkpoint
from model.decoder import Decoder
from model.settings import preset
from tests.tokenizer.hospital import spelling_codebook
from tokenizer.codebook import Codebook, Survey, Token
from tokenizer.errors import ConfigError, DataError

EXTRA = {"codebook_hash": "c0de", "round": 3, "shape": (1, 2), "sites": {9: "north", 10: "south"}}
ARRAYS = {"moment": torch.arange(6.0).reshape(2, 3), "step": torch.tensor(4), "none": torch.empty(0)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "run" / "7.safetensors"
    checkpoint.save(target, Decoder.create(preset("0.3m", 40), 1), extra=EXTRA, arrays=ARRAYS)
    return target


def test_what_was_saved_comes_back(path: Path) -> None:
    decoder, extra, arrays = checkpoint.load(path, "c0de")
    original = Decoder.create(preset("0.3m", 40), 1)
    assert decoder.config == original.config
    for name, weight in original.named_parameters():
        assert torch.equal(weight, decoder.get_parameter(name))
        assert decoder.get_parameter(name).requires_grad
    assert extra == {**EXTRA, "shape": [1, 2], "sites": {"9": "north", "10": "south"}}
    assert arrays.keys() == ARRAYS.keys()
    assert all(torch.equal(arrays[name], ARRAYS[name]) for name in ARRAYS)


def test_the_same_content_gives_the_same_bytes(path: Path) -> None:
    before = path.read_bytes()
    checkpoint.save(path, Decoder.create(preset("0.3m", 40), 1), extra=EXTRA, arrays=ARRAYS)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_loaded_decoder_stays_when_its_file_is_replaced(path: Path) -> None:
    decoder, _, _ = checkpoint.load(path)
    before = decoder.norm.weight.clone()
    with torch.no_grad():
        decoder.norm.weight.mul_(2)
    checkpoint.save(path, decoder, extra=EXTRA)
    assert torch.equal(checkpoint.load(path).decoder.norm.weight, before * 2)


def test_another_codebook_is_refused_with_both_hashes(path: Path) -> None:
    with pytest.raises(DataError, match=r"7\.safetensors.*c0de.*beef"):
        checkpoint.load(path, "beef")


@pytest.mark.parametrize("length", [0, 5, 100, 5000, -1])
def test_a_file_that_is_cut_short_is_refused(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"7\.safetensors: is cut short or not a checkpoint"):
        checkpoint.load(path)


def test_a_flipped_bit_is_refused(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="was altered"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (rb"\"round\": 3", rb"\"round\": 4", "was altered"),
        (rb"\"layers\": 3", rb"\"layers\": 2", "was altered"),
        (rb"\"version\": 1", rb"\"version\": 2", "format version 2"),
        (rb"\"digest\"", rb"\"digust\"", "lacks digest"),
    ],
)
def test_a_changed_header_is_refused(path: Path, old: bytes, new: bytes, told: str) -> None:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    with pytest.raises(DataError, match=told):
        checkpoint.load(path)


def test_other_files_and_no_file_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"x": torch.ones(2)}, other)
    with pytest.raises(DataError, match="no checkpoint of fedcomet"):
        checkpoint.load(other)
    with pytest.raises(DataError, match=r"gone\.safetensors: can't be read"):
        checkpoint.load(tmp_path / "gone.safetensors")
    with pytest.raises(DataError, match="can't be read"):
        checkpoint.load(tmp_path)


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [pickle.dump, torch.save])
def test_loading_never_unpickles(tmp_path: Path, save: Callable[[Trap, io.BytesIO], None]) -> None:
    sprung, buffer = tmp_path / "sprung", io.BytesIO()
    save(Trap(sprung), buffer)
    (tmp_path / "7.safetensors").write_bytes(buffer.getvalue())
    with pytest.raises(DataError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "7.safetensors")
    assert not sprung.exists()
    buffer.seek(0)
    _ = pickle.load(buffer) if save is pickle.dump else torch.load(buffer, weights_only=False)
    assert sprung.exists()  # the trap works


def test_a_checkpoint_is_described_by_what_it_holds(tmp_path: Path) -> None:
    facts = checkpoint.Provenance("c0de", "a9" * 32, "0.3m", 3, 9, 12_345, 60, 4, "0.1.0", "2.13.0")
    checkpoint.save(tmp_path / "x", Decoder.create(preset("0.3m", 40), 1), extra=asdict(facts), arrays=ARRAYS)
    told = checkpoint.describe(checkpoint.load(tmp_path / "x"))
    assert told["parameters"] == f"{preset('0.3m', 40).parameters():,}"
    assert (told["preset"], told["codebook"], told["manifest"]) == ("0.3m", "c0de", "a9" * 32)
    assert told["trained on"] == "12,345 tokens in 60 steps at 4 sites"
    assert (told["round"], told["written by"]) == ("3 of 9", "fedcomet 0.1.0, torch 2.13.0")
    assert told["also holds"] == "moment, none, step"
    assert told["privacy"] == "none: the training had no differential privacy"
    bare = checkpoint.Checkpoint(Decoder.create(preset("0.3m", 40), 1), {"codebook_hash": "c0de"}, {})
    told = checkpoint.describe(bare)
    assert told["preset"] == "0.3m"
    assert {told[name] for name in ("manifest", "round", "trained on", "privacy", "written by")} == {"unknown"}
    told = checkpoint.describe(bare._replace(extra={"codebook_hash": "\x1b[2J[red]\n", "manifest_hash": "x" * 10**6}))
    assert told["codebook"] == "�[2J[red]�"
    assert len(told["manifest"]) == 200


def test_the_privacy_of_a_checkpoint_is_told_in_full(tmp_path: Path) -> None:
    privacy = checkpoint.Protection("dp-sgd", "patient", "one more or less", 2.5, 1e-5, 6.0, "the one")
    facts = checkpoint.Provenance("c0de", "a9" * 32, "0.3m", 3, 9, 0, 60, 4, "0.1.0", "2.13.0", privacy)
    checkpoint.save(tmp_path / "x", Decoder.create(preset("0.3m", 40), 1), extra=asdict(facts))
    found = checkpoint.load(tmp_path / "x")
    assert checkpoint.Protection(**found.extra["privacy"]) == privacy
    assert checkpoint.describe(found)["privacy"] == (
        "epsilon 2.5 at delta 1e-05 until here, 6 for the run; per patient; neighbours: one more or less; by dp-sgd; "
        "accountant: the one"
    )
    for foreign in ("2", {"epsilon": 2}, {**asdict(privacy), "epsilon": "0"}):
        assert checkpoint.describe(found._replace(extra={"codebook_hash": "c0de", "privacy": foreign}))["privacy"] == (
            "unknown"
        )
    odd = {**asdict(privacy), "unit": "\x1b[2J" + "x" * 10**6}
    told = checkpoint.describe(found._replace(extra={"codebook_hash": "c0de", "privacy": odd}))["privacy"]
    assert len(told) == 500
    assert "\x1b" not in told


def test_a_checkpoint_without_a_codebook_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="codebook_hash"):
        checkpoint.save(tmp_path / "x", Decoder.create(preset("0.3m", 40), 1), extra={})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_grows_with_its_codebook_and_says_the_same_about_old_tokens(tied: bool) -> None:
    old = spelling_codebook()
    later = Survey(old.options, codes=dict.fromkeys(("ICD10CM//E11.62", "ICD10CM//J45.2", "LAB//B//g", "LAB//C"), 70))
    new = old.extend(later)
    decoder = Decoder.create(replace(preset("0.3m", len(old)), tied=tied), 1)
    state = torch.random.get_rng_state()
    grown = checkpoint.grow(decoder, old, new)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert grown.config.vocab == len(new) > len(old)
    tokens = torch.arange(len(old))
    hidden, again = (model(tokens, torch.tensor([len(tokens)])) for model in (decoder, grown))
    assert torch.equal(hidden, again)
    torch.testing.assert_close(grown.logits(again)[:, : len(old)], decoder.logits(hidden))
    for rows, before in (
        (grown.embed_tokens.weight, decoder.embed_tokens.weight),
        (grown.head_weight, decoder.head_weight),
    ):
        assert torch.equal(rows[: len(old)], before)

        def row(token: Token, rows: torch.Tensor = rows) -> torch.Tensor:
            return rows[new.id(token)]

        assert torch.equal(row(Token("code", "LAB//B//g")), row(Token("code", "LAB//B")))
        assert torch.equal(row(Token("code", "LAB//C")), row(Token("other", "LAB")))
        assert torch.equal(row(Token("code", "ICD10CM//J45")), row(Token("other", "ICD10CM")))
        alike = [n for n, token in enumerate(old.tokens) if token.text.startswith("ICD10CM//2//")]
        torch.testing.assert_close(row(Token("piece", "ICD10CM//2//62")), before[alike].mean(0))


def test_a_decoder_grows_with_a_later_codebook_only() -> None:
    book = spelling_codebook()
    with pytest.raises(ConfigError, match="give its own"):
        checkpoint.grow(Decoder.create(preset("0.3m", 40), 1), book, book)
    with pytest.raises(ConfigError, match="does not extend"):
        checkpoint.grow(Decoder.create(preset("0.3m", len(book)), 1), book, Codebook.build(Survey(book.options)))
