"""A decoder as a folder of Hugging Face's `Qwen2ForCausalLM`, and back.

The decoder computes what that class computes, so the folder works with everything that loads such models. Written by
hand, without transformers:

- `config.json`, `generation_config.json`: transformers' documented fields, in the spelling that old and new versions
  read (`torch_dtype`, `rope_theta` beside `rope_parameters`). Generation draws from the whole distribution.
- `model.safetensors`: float32, names with the `model.` prefix. Qwen2 always has biases on q, k and v: a decoder without
  them gets zeros.
- `codebook.json`, `tokens.json`: the codebook as it is, and what each id reads as, for people.
- `fedcomet.json`: what a Qwen2 folder has no place for (dropout, provenance), with a digest of the weights. Reading
  takes it only for exactly these weights: after a fine-tuning elsewhere it is passed over.
- `README.md`: the same facts in words.

No pickle is read. A folder that describes something that the decoder does not compute is refused with the field named.

Source: Qwen2Config, Qwen2ForCausalLM and GenerationConfig of transformers 5.17; Qwen2 technical report,
arXiv 2407.10671, section 2.2.1 (biases on q, k and v only).
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model import card
from model.checkpoint import Checkpoint, digest_of, save
from model.decoder import Decoder, DecoderConfig, preset_of
from tokenizer import durable
from tokenizer.codebook import Codebook, Token
from tokenizer.errors import ConfigError, DataError

_ARCHITECTURE = "Qwen2ForCausalLM"
_FORMAT = "fedcomet-interchange/1"
_CONFIG, _GENERATION, _FACTS = "config.json", "generation_config.json", "fedcomet.json"
_WEIGHTS, _INDEX, _CODEBOOK, _TOKENS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "codebook.json",
    "tokens.json",
)
_PREFIX, _HEAD, _TABLE = "model.", "lm_head.weight", "model.embed_tokens.weight"


def qwen2_config(config: DecoderConfig) -> dict[str, Any]:
    """The content of `config.json` for a decoder of this shape."""
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": "qwen2",
        "vocab_size": config.vocab,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.ff,
        "max_position_embeddings": config.context,
        "hidden_act": "silu",
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "tie_word_embeddings": config.tied,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.layers,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": "float32",
        "pad_token_id": Codebook.pad,
        "bos_token_id": None,
        "eos_token_id": Codebook.eot,
    }


def qwen2_weights(decoder: Decoder) -> dict[str, Tensor]:
    """A decoder's weights under the names of `Qwen2ForCausalLM`, as it saves them: tied ones once.

    The tensors share memory with the decoder's, but for biases that it lacks.
    """
    weights = {_qwen2_name(name): weight.detach() for name, weight in decoder.state_dict().items()}
    if not decoder.config.qkv_bias:
        for name in [name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]:
            weights[name.removesuffix("weight") + "bias"] = weights[name].new_zeros(len(weights[name]))
    return weights


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
    if codebook is not None and codebook.hash != facts["codebook_hash"]:
        raise ConfigError(
            f"the checkpoint was trained with codebook {facts['codebook_hash']}, not {codebook.hash}; "
            "give the codebook that belongs to it"
        )
    weights = {name: weight.cpu().contiguous() for name, weight in qwen2_weights(decoder).items()}
    about = {
        "format": _FORMAT,
        "weights_sha256": digest_of(weights),
        "decoder": asdict(decoder.config),
        "facts": facts,
    }
    with durable.directory(folder) as aside:
        _write_json(aside / _CONFIG, qwen2_config(decoder.config))
        safetensors.torch.save_file(weights, aside / _WEIGHTS, {"format": "pt"})
        shutil.copymode(aside / _CONFIG, aside / _WEIGHTS)  # safetensors lets only the owner read
        _write_json(aside / _GENERATION, _generation())
        _write_json(aside / _FACTS, about)
        if codebook is not None:
            codebook.save(aside / _CODEBOOK)
            _write_json(aside / _TOKENS, [_readable(token) for token in codebook.tokens])
        text = card.card(checkpoint, with_codebook=codebook is not None)
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
    path = folder / _CONFIG
    config = _config(path, _read_json(path))
    if config.vocab != len(codebook):
        raise DataError(
            f"{path}: vocab_size is {config.vocab} and codebook {codebook.hash[:12]} has {len(codebook)} tokens; "
            "give the codebook that the model was trained with"
        )
    weights = _fitting(folder, config, _read_weights(folder))
    digest = digest_of(weights)
    facts: dict[str, Any] = {
        "codebook_hash": codebook.hash,
        "preset": preset_of(config),
        "imported": {"architecture": _ARCHITECTURE, "weights_sha256": digest},
    }
    about = _read_facts(folder / _FACTS, digest)
    if about is not None:
        config, facts = _agreed(folder, config, about, codebook)
        if not config.qkv_bias and any(weights[name].any() for name in weights if name.endswith(".bias")):
            raise DataError(f"{folder / _FACTS}: says that there are no biases, and there are; delete {_FACTS}")
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.load_state_dict({name: weights[_qwen2_name(name)] for name in decoder.state_dict()}, assign=True)
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


def _qwen2_name(name: str) -> str:
    return name if name == _HEAD else _PREFIX + name


def _generation() -> dict[str, Any]:
    # top_k must be said: transformers would take 50. Padding and unknown are never drawn, as in our own rollouts.
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


def _config(path: Path, raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes.

    Raises:
        DataError: naming the field that asks for what the decoder does not compute.
    """
    if raw.get("model_type") != "qwen2" or raw.get("architectures", [_ARCHITECTURE]) != [_ARCHITECTURE]:
        told = raw.get("architectures") or raw.get("model_type")
        raise DataError(f"{path}: describes {told!r:.80}; only {_ARCHITECTURE} (model_type qwen2) can be read")
    for name, wrong, why in _different(raw):
        if wrong:
            raise DataError(f"{path}: {name} is {raw.get(name)!r:.80}; the decoder {why}, so the model would change")

    def whole(name: str) -> int:
        value = raw.get(name)
        if type(value) is not int:
            raise DataError(f"{path}: {name} is {value!r:.80}; it must be a whole number")
        return value

    tied, eps = raw.get("tie_word_embeddings", False), raw.get("rms_norm_eps", 1e-6)
    if not isinstance(tied, bool):
        raise DataError(f"{path}: tie_word_embeddings is {tied!r:.80}; it must be true or false")
    try:
        return DecoderConfig(
            vocab=whole("vocab_size"),
            layers=whole("num_hidden_layers"),
            width=whole("hidden_size"),
            heads=whole("num_attention_heads"),
            kv_heads=whole("num_key_value_heads"),
            ff=whole("intermediate_size"),
            context=whole("max_position_embeddings"),
            rope_base=_rope_base(path, raw),
            tied=tied,
            eps=_positive(path, "rms_norm_eps", eps),
        )
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from None


def _different(raw: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
    """Per field that changes what is computed: its name, whether it does so here, and what our decoder has."""
    kinds = raw.get("layer_types") or []
    head_dim, width, heads = (raw.get(name) for name in ("head_dim", "hidden_size", "num_attention_heads"))
    return [
        ("hidden_act", raw.get("hidden_act", "silu") != "silu", "has silu"),
        ("use_sliding_window", bool(raw.get("use_sliding_window")), "has full attention"),
        ("layer_types", kinds != ["full_attention"] * len(kinds), "has full attention"),
        ("quantization_config", bool(raw.get("quantization_config")), "has plain float weights"),
        ("head_dim", head_dim is not None and head_dim * heads != width, "has heads of width / heads"),
        ("rope_scaling", _scaled(raw.get("rope_scaling")), "has plain rotary positions"),
        ("rope_parameters", _scaled(raw.get("rope_parameters")), "has plain rotary positions"),
    ]


def _scaled(rope: Any) -> bool:
    """Whether rotary parameters ask for more than a base."""
    if not rope:
        return False
    known = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
    plain = isinstance(rope, dict) and rope.keys() <= known and rope.get("partial_rotary_factor", 1.0) == 1.0
    return not plain or any(rope.get(name, "default") != "default" for name in ("type", "rope_type"))


def _rope_base(path: Path, raw: Mapping[str, Any]) -> float:
    """The base, under either spelling; 10,000 if not given, as in Qwen2Config."""
    told = [part["rope_theta"] for part in (raw, raw.get("rope_parameters") or {}) if "rope_theta" in part]
    bases = {_positive(path, "rope_theta", value) for value in told}
    if len(bases) > 1:
        raise DataError(f"{path}: rope_theta is {told[0]} and, in rope_parameters, {told[1]}; let them be equal")
    return bases.pop() if bases else 10_000.0


def _positive(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise DataError(f"{path}: {name} is {value!r:.80}; it must be a number above 0")
    return float(value)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, from one file or those that the index names."""
    if (folder / _INDEX).exists() and not (folder / _WEIGHTS).exists():
        placed = _read_json(folder / _INDEX).get("weight_map")
        names = sorted(set(placed.values())) if isinstance(placed, dict) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise DataError(f"{folder / _INDEX}: its weight_map names no files of this folder; fetch the folder anew")
    elif (folder / _WEIGHTS).exists():
        names = [_WEIGHTS]
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


def _fitting(folder: Path, config: DecoderConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in float32, without those that say nothing, once they are exactly what `config` asks for.

    Raises:
        DataError: naming what is missing, too much, or of another shape or type.
    """
    layers = {name.split(".")[2] for name in weights if name.startswith("model.layers.")}
    if len(layers) != config.layers:  # first, as building a decoder of any number of layers may take forever
        raise DataError(f"{folder}: {_CONFIG} has {config.layers} layers, the weights have {len(layers)}")
    weights = {name: _plain(folder, name, weight) for name, weight in weights.items()}
    if config.tied and _HEAD in weights:
        if _TABLE not in weights or not torch.equal(weights[_HEAD], weights[_TABLE]):
            raise DataError(f"{folder}: tie_word_embeddings is true, but {_HEAD} differs from {_TABLE}")
        del weights[_HEAD]
    with torch.device("meta"):
        shapes = {_qwen2_name(name): weight.shape for name, weight in Decoder(config).state_dict().items()}
    for name in [name for name in weights if name.endswith(".bias") and name not in shapes]:
        if weights[name].any():
            raise DataError(f"{folder}: {name} is not zero; the decoder has biases on q, k and v only")
        del weights[name]
    if missing := sorted(shapes.keys() - weights.keys()):
        raise DataError(f"{folder}: {len(missing)} weights are missing, such as {missing[0]}; fetch the folder anew")
    if more := sorted(weights.keys() - shapes.keys()):
        raise DataError(f"{folder}: {len(more)} weights are none of a {_ARCHITECTURE}'s, such as {more[0]:.80}")
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise DataError(f"{folder}: {name} is {list(weights[name].shape)}, {_CONFIG} asks for {list(shape)}")
    return weights


def _plain(folder: Path, name: str, weight: Tensor) -> Tensor:
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DataError(f"{folder}: {name:.80} is {weight.dtype}; only float32, bfloat16 and float16 can be read")
    if not weight.isfinite().all():
        raise DataError(f"{folder}: {name:.80} holds values that are not finite; take an earlier copy")
    return weight.float()


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
