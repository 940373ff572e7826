"""The decoder: a Qwen2-style transformer that predicts the next medical-event token.

Notable choices:
- Pre-RMSNorm, SwiGLU, rotary positions, grouped-query attention, biases on q, k and v only, tied embeddings by default:
  CoMET's architecture (arXiv 2508.12104). Parameter names, shapes and meaning are those of Hugging Face's
  `Qwen2ForCausalLM` without its `model.` prefix.
- The input is flat: all tokens of a batch end to end, and the lengths of the segments. There is no padding outside of
  attention (`model.attention`), and patients never see each other.
- Logits of a whole batch never exist (`model.loss`).
- Dropout happens when masks are given, not by a mode. A mask is a function of (seed, place), so it is the same however
  a batch is cut into passes, and when a block is computed again on the way back.

Shapes: N flat tokens, S segments, D width, H query heads, G key/value heads, K head width, F feed-forward width,
V vocabulary. `x_ND` is float [N, D].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import SegmentPlan, has_kernels, rotary_angles, rotate
from model.loss import chunked_nll
from model.settings import DecoderConfig
from tokenizer.errors import ConfigError

_INIT_STD = 0.02

# (layer, q_NHK, k_NGK, v_NGK) -> [N, H, K]: how queries meet keys, of this batch or of a cache.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Decoder(nn.Module):
    """Embedding, blocks, final norm and output layer.

    Made directly, its matrices and biases hold anything and are to be overwritten; use `create` for initial weights
    that follow from a seed.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        # Its own weight, because the default one is drawn; see `Linear`.
        table = torch.empty(config.vocab, config.width)
        self.embed_tokens = nn.Embedding(config.vocab, config.width, _weight=table)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)
        self.lm_head = None if config.tied else Linear(config.width, config.vocab, bias=False)

    @classmethod
    def create(cls, config: DecoderConfig, seed: int) -> "Decoder":
        """Build a decoder whose weights follow from `seed` alone; torch's global generator is not touched.

        Matrices are normal with deviation 0.02, those that write to the residual stream are scaled by
        1 / sqrt(2 layers) (GPT-2's rule), biases are 0 and norms 1.
        """
        decoder = cls(config)
        generator = torch.Generator().manual_seed(seed)
        residual_std = _INIT_STD / math.sqrt(2 * config.layers)
        with torch.no_grad():
            for name, weight in decoder.named_parameters():
                if name.endswith("bias"):
                    weight.zero_()
                elif weight.dim() == 1:
                    weight.fill_(1.0)
                else:
                    writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                    weight.normal_(0.0, residual_std if writes else _INIT_STD, generator=generator)
        return decoder

    @property
    def head_weight(self) -> Tensor:
        """Output matrix [V, D]: the embedding when tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self, tokens: Tensor, lengths: Tensor, dropout: "Dropout | None" = None, checkpointing: bool = False
    ) -> Tensor:
        """Final hidden states of a flat batch.

        Args:
            tokens: int64 [N], the segments end to end.
            lengths: int64 [S], their lengths; their sum is N.
            dropout: the dropout masks; None drops nothing.
            checkpointing: keep the input of every block only, and compute its inside again on the way back.

        Returns:
            float32 [N, D].

        Raises:
            ConfigError: when a segment is longer than the context, or the lengths don't add up to N.
        """
        longest, total = int(lengths.max()), int(lengths.sum())
        if longest > self.config.context or int(lengths.min()) < 1 or total != len(tokens):
            raise ConfigError(
                f"decoder: segments of up to {longest} tokens, {total} in all, don't fit "
                f"{len(tokens)} tokens and a context of {self.config.context}"
            )
        plan = SegmentPlan.of(lengths, tokens.device)

        def attend(_: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
            return plan.attend(q_NHK, k_NGK, v_NGK)

        return self.run(tokens, plan.positions, attend, dropout, checkpointing)

    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        dropout: "Dropout | None" = None,
        checkpointing: bool = False,
    ) -> Tensor:
        """Final hidden states [N, D] where `attend` decides what each token sees (rollouts bring a cache).

        Keys reach `attend` already turned by `positions` (int64 [N]).
        """
        angles = rotary_angles(positions, self.config.head_width, self.config.rope_base)
        walk = _Walk(angles, attend, self.config.dropout, dropout)
        x_ND = walk.drop(self.embed_tokens(tokens), 0)
        for index, block in enumerate(self.layers):
            if checkpointing:
                x_ND = checkpoint(block, x_ND, index, walk, use_reentrant=False, preserve_rng_state=False)
            else:
                x_ND = block(x_ND, index, walk)
        return self.norm(x_ND)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Scores of every token after each position: float32 [N, V]."""
        return F.linear(hidden_ND, self.head_weight).float()

    def nll(self, hidden_ND: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Summed negative log-likelihood (nats) of the targets, and how many there are.

        Args:
            hidden_ND: float32 [N, D] from `forward`.
            targets: int64 [N]; negative where a position has no loss.

        Returns:
            Scalar float32 tensor with gradient, and the count of positions with a target.
        """
        rows = (targets >= 0).nonzero().squeeze(1)
        if len(rows) < len(targets):
            hidden_ND, targets = hidden_ND.index_select(0, rows), targets.index_select(0, rows)
        loss = chunked_nll(hidden_ND, self.head_weight, targets, torch.is_grad_enabled())
        return loss, len(rows)


@dataclass(frozen=True)
class Dropout:
    """The masks of one step's batch, for a part of it.

    Attributes:
        seed: of all masks, below 2^63.
        rows: tokens of the whole batch.
        first: how many of them lie before this part.
    """

    seed: int
    rows: int
    first: int = 0

    def scale(self, x_ND: Tensor, rate: float, place: int) -> Tensor:
        """What to multiply by: 0 at a share `rate` of the numbers, 1 / (1 - rate) at the others; like `x_ND`."""
        # An odd factor keeps places apart; the whole mask is drawn, so that a row's share doesn't depend on the cut.
        mixed = (self.seed + place * 0x9E3779B97F4A7C15) % 2**63
        generator = torch.Generator(x_ND.device).manual_seed(mixed)
        keep_RD = x_ND.new_empty(self.rows, x_ND.shape[1]).bernoulli_(1.0 - rate, generator=generator)
        return keep_RD[self.first : self.first + len(x_ND)].div_(1.0 - rate)


@dataclass(frozen=True)
class _Walk:
    """What every block of one forward pass shares."""

    angles: tuple[Tensor, Tensor]
    attend: Attend
    rate: float
    dropout: Dropout | None

    def meet(self, layer: int, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor) -> Tensor:
        return self.attend(layer, q_NHK, k_NGK, v_NGK)

    def drop(self, x_ND: Tensor, place: int) -> Tensor:
        if self.dropout is None or self.rate == 0.0:
            return x_ND
        return x_ND * self.dropout.scale(x_ND, self.rate, place)


def hide_from_compiler() -> None:
    """Let torch.compile see neither attention nor dropout.

    What is inside of them follows from the lengths of a batch; each new plan would be compiled anew, until the compiler
    gave up. Called where something is compiled, not when this is imported: the compiler takes seconds to load.
    """
    for owner, name in ((_Walk, "meet"), (Dropout, "scale")):
        function = getattr(owner, name)
        if not hasattr(function, "_torchdynamo_disable"):
            setattr(owner, name, torch.compiler.disable(function))


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang, Sennrich 2019, arXiv 1910.07467), without a bias."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x_ND: Tensor) -> Tensor:
        """Each row over its root mean square, times the weight."""
        return F.rms_norm(x_ND, (x_ND.shape[-1],), self.weight, self.eps)


class Linear(nn.Linear):
    """A linear layer whose weights are not drawn: they come from elsewhere.

    Drawing takes longer than a small model's step, and on the meta device imports torch's compiler: seconds.
    """

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class _Attention(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        kv_width, bias = config.kv_heads * config.head_width, config.qkv_bias
        self.head_width = config.head_width
        self.q_proj = Linear(config.width, config.width, bias=bias)
        self.k_proj = Linear(config.width, kv_width, bias=bias)
        self.v_proj = Linear(config.width, kv_width, bias=bias)
        self.o_proj = Linear(config.width, config.width, bias=False)

    def forward(self, x_ND: Tensor, layer: int, walk: _Walk) -> Tensor:
        split = (-1, self.head_width)
        q_NHK = rotate(self.q_proj(x_ND).unflatten(1, split), walk.angles)
        k_NGK = rotate(self.k_proj(x_ND).unflatten(1, split), walk.angles)
        v_NGK = self.v_proj(x_ND).unflatten(1, split)
        return self.o_proj(walk.meet(layer, q_NHK, k_NGK, v_NGK).flatten(1))


class _FeedForward(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.width, config.ff, bias=False)
        self.up_proj = Linear(config.width, config.ff, bias=False)
        self.down_proj = Linear(config.ff, config.width, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_NF, up_NF = self.gate_proj(x_ND), self.up_proj(x_ND)
        if has_kernels(x_ND) and not torch.compiler.is_compiling():
            from model.fused import swiglu

            return self.down_proj(swiglu(gate_NF, up_NF))
        return self.down_proj(F.silu(gate_NF) * up_NF)


class _Block(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.eps)
        self.mlp = _FeedForward(config)

    def forward(self, x_ND: Tensor, layer: int, walk: _Walk) -> Tensor:
        x_ND = x_ND + walk.drop(self.self_attn(_narrow(self.input_layernorm(x_ND)), layer, walk), 2 * layer + 1)
        return x_ND + walk.drop(self.mlp(_narrow(self.post_attention_layernorm(x_ND))), 2 * layer + 2)


def _narrow(x_ND: Tensor) -> Tensor:
    """In autocast's type, once for all products that it goes into."""
    kind = x_ND.device.type
    return x_ND.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x_ND
