"""What our decoder is called in Hugging Face's `Qwen2ForCausalLM`: the fields of config.json and the names of weights.

Pure translation, both ways; the files are `model.interchange`'s. What is written reads the same in old and new versions
of transformers (`torch_dtype`; `rope_theta` beside `rope_parameters`). What is read must ask for exactly what the
decoder computes: anything else is refused with the field or weight named, as the model would silently change.

Qwen2 has biases on q, k and v always, and nowhere else (arXiv 2407.10671, section 2.2.1): a decoder without them is
written with zeros.

Source: Qwen2Config and Qwen2ForCausalLM of transformers 5.17.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from model.decoder import Decoder
from model.settings import DecoderConfig
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError, DataError

ARCHITECTURE = "Qwen2ForCausalLM"
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"
_BIASED = ("q_proj.weight", "k_proj.weight", "v_proj.weight")


def config_json(config: DecoderConfig) -> dict[str, Any]:
    """The content of config.json for a decoder of this shape."""
    return {
        "architectures": [ARCHITECTURE],
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


def config_of(raw: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a config.json describes; biases on q, k and v, no dropout.

    Raises:
        DataError: naming the field that is wrong or asks for what the decoder does not compute.
    """
    if raw.get("model_type") != "qwen2" or raw.get("architectures", [ARCHITECTURE]) != [ARCHITECTURE]:
        told = raw.get("architectures") or raw.get("model_type")
        raise DataError(f"describes {told!r:.80}; only {ARCHITECTURE} (model_type qwen2) can be read")
    for name, differs, ours in _differences(raw):
        if differs:
            raise DataError(f"{name} is {raw.get(name)!r:.80}; the decoder {ours}, so the model would change")
    tied = raw.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise DataError(f"tie_word_embeddings is {tied!r:.80}; it must be true or false")
    try:
        return DecoderConfig(
            vocab=_whole(raw, "vocab_size"),
            layers=_whole(raw, "num_hidden_layers"),
            width=_whole(raw, "hidden_size"),
            heads=_whole(raw, "num_attention_heads"),
            kv_heads=_whole(raw, "num_key_value_heads"),
            ff=_whole(raw, "intermediate_size"),
            context=_whole(raw, "max_position_embeddings"),
            rope_base=_rope_base(raw),
            tied=tied,
            eps=_positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        )
    except ConfigError as error:
        raise DataError(str(error)) from None


def named_weights(decoder: Decoder) -> dict[str, Tensor]:
    """A decoder's weights under the names of `Qwen2ForCausalLM`, as it saves them: tied ones once.

    The tensors share memory with the decoder's, but for biases that it lacks.
    """
    weights = {name_of(name): weight.detach() for name, weight in decoder.state_dict().items()}
    if not decoder.config.qkv_bias:
        for name in [name for name in weights if name.endswith(_BIASED)]:
            weights[name.removesuffix("weight") + "bias"] = weights[name].new_zeros(len(weights[name]))
    return weights


def name_of(name: str) -> str:
    """What a weight of our decoder is called."""
    return name if name == _HEAD else f"model.{name}"


def fitting(config: DecoderConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a folder in float32, once they are exactly what a decoder asks for.

    What says nothing is left out: an output matrix equal to the embedding it is tied to, and biases of zeros where the
    decoder has none.

    Args:
        config: as `config_of` gives it.
        weights: float32, bfloat16 or float16, by Hugging Face's names.

    Raises:
        DataError: naming what is missing, too much, of another shape or type, or not finite.
    """
    layers = len({name.split(".")[2] for name in weights if name.startswith("model.layers.")})
    if layers != config.layers:  # first: building a decoder of any number of layers may take forever
        raise DataError(f"config.json tells of {config.layers} layers, the weights are of {layers}")
    with torch.device("meta"):
        shapes = {name_of(name): weight.shape for name, weight in Decoder(config).state_dict().items()}
    plain = {name: _plain(name, weight) for name, weight in weights.items()}
    if config.tied and _HEAD in plain:
        if _TABLE not in plain or not torch.equal(plain[_HEAD], plain[_TABLE]):
            raise DataError(f"tie_word_embeddings is true, but {_HEAD} is not {_TABLE}; set it to false")
        del plain[_HEAD]
    for name in [name for name in plain if name.endswith(".bias") and name not in shapes]:
        if plain[name].any():
            raise DataError(f"{name:.80} is not zero; the decoder has biases on q, k and v only")
        del plain[name]
    if missing := sorted(shapes.keys() - plain.keys()):
        raise DataError(f"{len(missing)} weights are missing, such as {missing[0]}; fetch the folder anew")
    if more := sorted(plain.keys() - shapes.keys()):
        raise DataError(f"{len(more)} weights are none of a {ARCHITECTURE}, such as {more[0]:.80}")
    for name, shape in shapes.items():
        if plain[name].shape != shape:
            raise DataError(f"{name} has shape {list(plain[name].shape)}, config.json asks for {list(shape)}")
    return plain


def _differences(raw: Mapping[str, Any]) -> list[tuple[str, bool, str]]:
    """Per field that changes what is computed: its name, whether it does so here, and what our decoder does."""
    kinds, head_dim = raw.get("layer_types"), raw.get("head_dim")
    mixed = kinds is not None and (not isinstance(kinds, list) or {*map(str, kinds)} != {"full_attention"})
    own_width = head_dim is not None and (head_dim, 0) != divmod(
        _whole(raw, "hidden_size"), max(1, _whole(raw, "num_attention_heads"))
    )
    return [
        ("hidden_act", raw.get("hidden_act", "silu") != "silu", "has silu"),
        ("use_sliding_window", bool(raw.get("use_sliding_window")), "attends to all of its context"),
        ("layer_types", mixed, "attends to all of its context in every layer"),
        ("quantization_config", bool(raw.get("quantization_config")), "has plain float weights"),
        ("head_dim", own_width, "has heads of hidden_size / num_attention_heads"),
        ("rope_scaling", _scaled(raw.get("rope_scaling")), "has plain rotary positions"),
        ("rope_parameters", _scaled(raw.get("rope_parameters")), "has plain rotary positions"),
    ]


def _scaled(rope: Any) -> bool:
    """Whether rotary parameters ask for more than a base."""
    if rope is None:
        return False
    known = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
    plain = isinstance(rope, dict) and rope.keys() <= known and rope.get("partial_rotary_factor", 1.0) == 1.0
    return not plain or any(rope.get(name, "default") != "default" for name in ("type", "rope_type"))


def _rope_base(raw: Mapping[str, Any]) -> float:
    """The base, under either spelling; 10,000 if not given, as in Qwen2Config."""
    places = (raw, raw.get("rope_scaling") or {}, raw.get("rope_parameters") or {})
    bases = {_positive("rope_theta", place["rope_theta"]) for place in places if "rope_theta" in place}
    if len(bases) > 1:
        raise DataError(f"rope_theta is told twice, as {' and '.join(map(str, sorted(bases)))}; let them be equal")
    return bases.pop() if bases else 10_000.0


def _whole(raw: Mapping[str, Any], name: str) -> int:
    value = raw.get(name)
    if type(value) is not int:
        raise DataError(f"{name} is {value!r:.80}; it must be a whole number")
    return value


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise DataError(f"{name} is {value!r:.80}; it must be a number above 0")
    return float(value)


def _plain(name: str, weight: Tensor) -> Tensor:
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise DataError(f"{name:.80} is {weight.dtype}; only float32, bfloat16 and float16 can be read")
    if not weight.isfinite().all():
        raise DataError(f"{name:.80} holds values that are not finite; take an earlier copy")
    return weight.float()
