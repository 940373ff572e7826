"""The peer of the benchmarks: Hugging Face's Qwen2ForCausalLM with the weights of one of our decoders."""

import sys
from typing import Any

from model.decoder import Decoder

INSTALL = "this benchmark compares with transformers, which fedcomet doesn't need: pip install transformers"


def qwen_of(decoder: Decoder) -> Any:
    """A Qwen2ForCausalLM that computes what `decoder` computes."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        sys.exit(INSTALL)
    config = decoder.config
    qwen = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=config.ff,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.context,
            rms_norm_eps=config.eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
            tie_word_embeddings=config.tied,
            attn_implementation="sdpa",
            pad_token_id=0,
        )
    )
    weights = {
        name if name.startswith("lm_head") else f"model.{name}": weight.clone()
        for name, weight in decoder.state_dict().items()
    }
    missing = set(qwen.load_state_dict(weights, strict=False).missing_keys)
    assert missing <= {"lm_head.weight"}, missing
    qwen.tie_weights()
    return qwen
