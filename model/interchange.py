"""A model as a folder of Hugging Face's `Qwen2ForCausalLM`, and back.

The decoder computes what that class computes (`model.qwen2` translates), so the folder works with everything that loads
such models. It is written without transformers:

- `config.json`, `model.safetensors` (float32), `generation_config.json`: sampling from the whole distribution.
- `codebook.json`, `tokens.json`: the codebook as it is, and what each id reads as, for people.
- `fedcomet.json`: what a Qwen2 folder has no place for (dropout, provenance), with a digest of the weights. Reading
  takes it only for exactly these weights: after a fine-tuning elsewhere it is passed over.
- `README.md`: the same facts in words (`model.card`).

No pickle is read, and no code of a folder is run.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model import qwen2
from model.card import card
from model.checkpoint import Checkpoint, digest_of, save
from model.decoder import Decoder
from model.settings import DecoderConfig, preset_of
from tokenizer import durable
from tokenizer.codebook import Codebook, Token
from tokenizer.errors import ConfigError, DataError

_FORMAT = "fedcomet-interchange/1"
_CONFIG, _GENERATION, _FACTS = "config.json", "generation_config.json", "fedcomet.json"
_WEIGHTS, _INDEX, _CODEBOOK, _TOKENS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "codebook.json",
    "tokens.json",
)


def export_folder(checkpoint: Checkpoint, folder: Path, codebook: Codebook | None = None) -> None:
    """Write a checkpoint as a Hugging Face folder, which appears whole or not at all.

    The optimizer's arrays stay behind.

    Args:
        checkpoint: from `model.checkpoint.load`.
        folder: new, or empty.
        codebook: goes beside the weights; the one that the checkpoint was trained with.

    Raises:
        ConfigError: the folder has content, or the codebook is another.
    """
    _refuse_content(folder)
    decoder, facts, _ = checkpoint
    if codebook is not None and codebook.hash != facts.get("codebook_hash"):
        raise ConfigError(
            f"the checkpoint was trained with codebook {facts.get('codebook_hash')}, not {codebook.hash}; "
            "give the codebook that belongs to it"
        )
    weights = {name: weight.cpu().contiguous() for name, weight in qwen2.named_weights(decoder).items()}
    about = {
        "format": _FORMAT,
        "weights_sha256": digest_of(weights),
        "decoder": asdict(decoder.config),
        "facts": facts,
    }
    with durable.directory(folder) as aside:
        _write_json(aside / _CONFIG, qwen2.config_json(decoder.config))
        safetensors.torch.save_file(weights, aside / _WEIGHTS, {"format": "pt"})
        shutil.copymode(aside / _CONFIG, aside / _WEIGHTS)  # safetensors lets only the owner read
        _write_json(aside / _GENERATION, _generation())
        _write_json(aside / _FACTS, about)
        if codebook is not None:
            codebook.save(aside / _CODEBOOK)
            _write_json(aside / _TOKENS, [_readable(token) for token in codebook.tokens])
        text = card(checkpoint, with_codebook=codebook is not None)
        (aside / "README.md").write_text(text, encoding="utf-8")


def import_folder(folder: Path, codebook: Codebook) -> Checkpoint:
    """Read a Hugging Face folder of a `Qwen2ForCausalLM` that our decoder can be.

    Weights stay as they are, bit for bit; bfloat16 and float16 become the same numbers in float32.

    Args:
        folder: `export_folder` or transformers' `save_pretrained` wrote it; its weights may be in several files.
        codebook: what the token ids mean.

    Returns:
        Decoder on the CPU, and its facts: those of the export for weights that are still the exported ones, else the
        codebook's hash, the preset, and `imported` with the digest of the weights.

    Raises:
        DataError: something is missing, damaged, of another architecture or codebook, or not what our decoder computes.
    """
    raw = _read_json(folder / _CONFIG)
    with _at(folder / _CONFIG):
        config = qwen2.config_of(raw)
    if config.vocab != len(codebook):
        raise DataError(
            f"{folder / _CONFIG}: vocab_size is {config.vocab} and codebook {codebook.hash[:12]} has {len(codebook)} "
            "tokens; give the codebook that the model was trained with"
        )
    found = _read_weights(folder)
    with _at(folder):
        weights = qwen2.fitting(config, found)
    digest = digest_of(weights)
    facts: dict[str, Any] = {
        "codebook_hash": codebook.hash,
        "preset": preset_of(config),
        "imported": {"architecture": qwen2.ARCHITECTURE, "weights_sha256": digest},
    }
    about = _read_facts(folder / _FACTS, digest)
    if about is not None:
        config, facts = _agreed(folder, config, about, codebook)
        if not config.qkv_bias and any(weights[name].any() for name in weights if name.endswith(".bias")):
            raise DataError(f"{folder / _FACTS}: says that there are no biases, and there are; delete {_FACTS}")
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.load_state_dict({name: weights[qwen2.name_of(name)] for name in decoder.state_dict()}, assign=True)
    return Checkpoint(decoder, facts, {})


def save_model(checkpoint: Checkpoint, codebook: Codebook, folder: Path) -> None:
    """Write a model's folder, `checkpoint.safetensors` and `codebook.json`, which appears whole or not at all.

    Raises:
        ConfigError: the folder has content.
    """
    _refuse_content(folder)
    with durable.directory(folder) as aside:
        save(aside / "checkpoint.safetensors", checkpoint.decoder, extra=checkpoint.extra, arrays=checkpoint.arrays)
        codebook.save(aside / _CODEBOOK)


def _generation() -> dict[str, Any]:
    # top_k must be told: transformers would take 50. Padding and unknown are never drawn, as in our own rollouts.
    return {
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "suppress_tokens": [Codebook.pad, Codebook.unk],
        "pad_token_id": Codebook.pad,
        "eos_token_id": Codebook.eot,
    }


def _readable(token: Token) -> str:
    return f"{token.kind} {token.text}" + (f" bin {token.bin}" if token.bin else "")


def _refuse_content(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and would be replaced; name a new folder")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); name a folder that save_pretrained wrote") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path}: is not JSON; fetch the folder anew") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: is not a JSON object; fetch the folder anew")
    return content


@contextmanager
def _at(path: Path) -> Iterator[None]:
    """Say in errors where the thing is that they are about."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, from one file or those that the index names."""
    if (folder / _WEIGHTS).exists():
        names = [_WEIGHTS]
    elif (folder / _INDEX).exists():
        placed = _read_json(folder / _INDEX).get("weight_map")
        names = sorted({*map(str, placed.values())}) if isinstance(placed, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise DataError(f"{folder / _INDEX}: its weight_map names no files of this folder; fetch the folder anew")
    else:
        pickled = "; pickled weights (.bin) are not read" if list(folder.glob("*.bin")) else ""
        raise DataError(f"{folder}: has no {_WEIGHTS}{pickled}; save the model as safetensors")
    weights: dict[str, Tensor] = {}
    for name in names:
        try:
            with safetensors.safe_open(folder / name, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        except OSError as error:
            raise DataError(f"{folder / name}: can't be read ({error.strerror or error}); fetch it anew") from None
        except safetensors.SafetensorError as error:
            raise DataError(f"{folder / name}: is cut short or no safetensors file ({error}); fetch it anew") from None
    return weights


def _read_facts(path: Path, digest: str) -> dict[str, Any] | None:
    """The facts of the export if they are told of these very weights."""
    if not path.exists():
        return None
    about = _read_json(path)
    if about.get("format") != _FORMAT or about.get("weights_sha256") != digest:
        return None
    if not isinstance(about.get("decoder"), dict) or not isinstance(about.get("facts"), dict):
        raise DataError(f"{path}: lacks decoder or facts; delete it to import the weights without provenance")
    return about


def _agreed(
    folder: Path, config: DecoderConfig, about: Mapping[str, Any], codebook: Codebook
) -> tuple[DecoderConfig, dict[str, Any]]:
    """Shape and facts of an export that is what it was; config.json has no place for dropout and for no biases."""
    shape, facts = about["decoder"], dict(about["facts"])
    if facts.get("codebook_hash") != codebook.hash:
        raise DataError(
            f"{folder / _FACTS}: the model was trained with codebook {facts.get('codebook_hash')}, and the one given "
            f"is {codebook.hash}; give the one that belongs to it"
        )
    try:
        whole = replace(config, dropout=shape["dropout"], qkv_bias=shape["qkv_bias"])
        same = asdict(whole) == shape
    except (KeyError, TypeError, ConfigError):
        same = False
    if not same:
        raise DataError(
            f"{folder}: {_CONFIG} and {_FACTS} describe different decoders; delete {_FACTS} if {_CONFIG} is right"
        )
    return whole, facts
