"""What is agreed about a model and its training, and what a machine chooses for itself: plain data.

PyTorch is not needed here, so that a process which only reads agreements (a daemon, a status command) doesn't load it.
"""

from dataclasses import dataclass, replace
from typing import Literal

from tokenizer.errors import ConfigError

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder.

    Attributes:
        vocab: number of tokens.
        layers: number of blocks.
        width: size of the residual stream.
        heads: query heads; `width / heads` is the head width and must be even.
        kv_heads: key/value heads, a divisor of `heads`.
        ff: width of the feed-forward layer.
        context: most tokens in one segment.
        rope_base: base of the rotary frequencies.
        dropout: share of the residual branches' outputs that training drops.
        tied: one matrix for embedding and output layer.
        qkv_bias: biases on q, k and v.
        eps: added to the mean square in RMSNorm.

    Raises:
        ConfigError: for a shape that can't be built.
    """

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    ff: int
    context: int
    rope_base: float = 10_000.0
    dropout: float = 0.0
    tied: bool = True
    qkv_bias: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab", "layers", "width", "heads", "kv_heads", "ff", "context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"decoder: {name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ConfigError(f"decoder: width {self.width} over {self.heads} heads must give an even whole number")
        if self.heads % self.kv_heads:
            raise ConfigError(f"decoder: kv_heads {self.kv_heads} must divide heads {self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"decoder: dropout is {self.dropout}; it must lie in [0, 1)")

    @property
    def head_width(self) -> int:
        """Size of one attention head."""
        return self.width // self.heads

    def parameters(self) -> int:
        """Exact number of parameters, without building anything."""
        kv_width = self.kv_heads * self.head_width
        attention = 2 * self.width * self.width + 2 * self.width * kv_width
        bias = (self.width + 2 * kv_width) if self.qkv_bias else 0
        block = attention + bias + 3 * self.width * self.ff + 2 * self.width
        tables = (1 if self.tied else 2) * self.vocab * self.width
        return tables + self.layers * block + self.width


def _small(layers: int, width: int, heads: int, ff: int) -> DecoderConfig:
    return DecoderConfig(500, layers, width, heads, heads, ff, context=1024)


def _comet(layers: int, width: int, heads: int, ff: int) -> DecoderConfig:
    return DecoderConfig(7105, layers, width, heads, heads, ff, context=8192)


# Small presets are named by their size at a vocabulary of about 500. CoMET's find sizes give 62.1 M, 118.7 M and
# 1,088 M with its vocabulary of 7,105, tied embeddings and as many key/value heads as query heads; layers and widths
# follow a re-implementation of arXiv 2508.12104, and only this reading gives the published 62 M, 119 M and 1 B.
PRESETS: dict[str, DecoderConfig] = {
    "0.3m": _small(layers=3, width=96, heads=3, ff=192),
    "1m": _small(layers=4, width=128, heads=4, ff=384),
    "3m": _small(layers=6, width=192, heads=6, ff=576),
    "10m": _small(layers=6, width=320, heads=5, ff=1280),
    "comet-s": _comet(layers=6, width=768, heads=12, ff=3072),
    "comet-m": _comet(layers=12, width=768, heads=12, ff=3072),
    "comet-l": _comet(layers=16, width=2048, heads=32, ff=8192),
}


def preset(name: str, vocab: int, context: int | None = None, dropout: float | None = None) -> DecoderConfig:
    """The preset `name` for a vocabulary, with another context or dropout where given.

    Raises:
        ConfigError: when no preset has this name.

    >>> f"{preset('comet-s', vocab=7105).parameters():,}"
    '62,103,552'
    """
    if name not in PRESETS:
        raise ConfigError(f"no model preset is called {name!r}; there are {', '.join(PRESETS)}")
    config = replace(PRESETS[name], vocab=vocab)
    if context is not None:
        config = replace(config, context=context)
    return config if dropout is None else replace(config, dropout=dropout)


def preset_of(config: DecoderConfig) -> str | None:
    """Name of the preset that a decoder is, whatever its vocabulary, context and dropout; None if it is none.

    >>> preset_of(preset("1m", vocab=77, context=256))
    '1m'
    """
    for name, shape in PRESETS.items():
        if config == replace(shape, vocab=config.vocab, context=config.context, dropout=config.dropout):
            return name
    return None


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        optimizer: of the blocks' matrices; everything else is trained by AdamW. "sgd" trains all of it, without
            momentum, as drift correction needs it; its weight decay is not decoupled.
        lr: peak learning rate.
        min_lr_ratio: share of the peak that the cosine ends at.
        warmup_steps: steps of linear warm-up.
        total_steps: global step at which the cosine ends; the rate stays at its floor afterwards.
        weight_decay: decoupled decay of the blocks' matrices.
        betas: AdamW's decay rates of the two moments.
        clip: largest gradient norm; 0 clips nothing.
        precision: of the products (weights are float32); "auto" leaves it to the machine.
        seed: of the dropout masks.

    Raises:
        ConfigError: for a value out of range.
    """

    optimizer: Literal["adamw", "muon", "sgd"] = "adamw"
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int = 100
    total_steps: int = 1000
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "optimizer is adamw, muon or sgd": self.optimizer in ("adamw", "muon", "sgd"),
            "lr must be positive": self.lr > 0,
            "min_lr_ratio must lie in [0, 1]": 0 <= self.min_lr_ratio <= 1,
            "warmup_steps must not be negative": self.warmup_steps >= 0,
            "total_steps must exceed warmup_steps": self.total_steps > self.warmup_steps,
            "weight_decay must not be negative": self.weight_decay >= 0,
            "betas must lie in [0, 1)": all(0 <= beta < 1 for beta in self.betas),
            "clip must not be negative": self.clip >= 0,
            "precision is auto, fp32 or bf16": self.precision in ("auto", "fp32", "bf16"),
        }
        wrong = [rule for rule, holds in checks.items() if not holds]
        if wrong:
            raise ConfigError(f"training options: {'; '.join(wrong)}")


@dataclass(frozen=True)
class Machine:
    """A machine's own choices.

    Attributes:
        device: torch's name of it; only on "cpu" does the same work give the same bits.
        precision: used where a run leaves the choice open; "auto" measures.
        micro_tokens: most tokens that go through the model at once (a step's batch takes as many passes as it needs);
            0 begins with the whole batch. It is halved by itself when memory runs out.
        checkpointing: compute activations again on the way back instead of keeping them.
        compile: run the blocks through torch.compile; where that fails, they run as they are, and the log says why.
        processes: how many processes train together, each on a device of its own (a CPU is shared).
        shard: split weights, gradients and moments over the processes (FSDP2) instead of keeping a copy in each.

    Raises:
        ConfigError: for a value out of range.
    """

    device: str = "cpu"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    micro_tokens: int = 0
    checkpointing: bool = False
    compile: bool = False
    processes: int = 1
    shard: bool = False

    def __post_init__(self) -> None:
        checks = {
            "precision is auto, fp32 or bf16": self.precision in ("auto", "fp32", "bf16"),
            "micro_tokens must not be negative": self.micro_tokens >= 0,
            "processes must be at least 1": self.processes >= 1,
            "shard needs 2 processes or more": not self.shard or self.processes > 1,
        }
        if wrong := [rule for rule, holds in checks.items() if not holds]:
            raise ConfigError(f"this machine's options: {'; '.join(wrong)}")
