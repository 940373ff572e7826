"""The peer of the benchmarks: Hugging Face's Qwen2ForCausalLM with the weights of one of our decoders."""

import sys
from typing import Any

from model.decoder import Decoder
from model.qwen2 import config_json, named_weights

INSTALL = "this benchmark compares with transformers, which fedcomet doesn't need: make install-dev"


def qwen_of(decoder: Decoder) -> Any:
    """A Qwen2ForCausalLM that computes what `decoder` computes."""
    try:
        from transformers import Qwen2Config, Qwen2ForCausalLM
    except ImportError:
        sys.exit(INSTALL)
    qwen = Qwen2ForCausalLM(Qwen2Config.from_dict(config_json(decoder.config), attn_implementation="sdpa"))
    missing = set(qwen.load_state_dict(named_weights(decoder), strict=False).missing_keys)
    assert missing <= {"lm_head.weight"}, missing
    qwen.tie_weights()
    return qwen
