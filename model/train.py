"""The training step: AdamW or Muon, a schedule over the global step, clipping, and a loud end on divergence.

Notable choices:
- The learning rate, and the dropout masks, depend only on the options and the global step. A run that was stopped and
  resumed is bit for bit the run that was not; a federation's round r starts at step r x (local steps).
- Muon (`model.muon`) moves the matrices of the blocks only; embedding, output layer, norms and biases always have
  AdamW.
- Weight decay is decoupled and touches only the matrices of the blocks and an untied output layer. Norms and
  biases are free, and so is the embedding: a hospital that never writes a code must not shrink that code's row.
- Mixed precision is used where it is fast, and nowhere else: CUDA devices with bfloat16. On the CPUs that were measured
  without bfloat16 units autocast is three times slower than float32.
"""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from model.decoder import Decoder
from model.muon import Muon
from tokenizer.errors import ConfigError, DataError, FedcometError

if TYPE_CHECKING:
    from tokenizer.windows import Batch


class TrainingDiverged(FedcometError):
    """The loss or its gradient is no longer a finite number."""


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Attributes:
        optimizer: of the blocks' matrices; everything else is trained by AdamW.
        lr: peak learning rate.
        min_lr_ratio: share of the peak that the cosine ends at.
        warmup_steps: steps of linear warm-up.
        total_steps: global step at which the cosine ends; the rate stays at its floor afterwards.
        weight_decay: decoupled decay of the blocks' matrices.
        betas: AdamW's decay rates of the two moments.
        clip: largest gradient norm; 0 clips nothing.
        precision: "auto" is bfloat16 autocast on CUDA devices that have it, else float32.
        seed: of the dropout masks.

    Raises:
        ConfigError: for a value out of range.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
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
            "optimizer is adamw or muon": self.optimizer in ("adamw", "muon"),
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
class StepResult:
    """What one step did: mean loss (nats per token), targets in the batch, gradient norm before clipping, rate."""

    loss: float
    tokens: int
    grad_norm: float
    lr: float


def learning_rate(options: TrainOptions, step: int) -> float:
    """Learning rate of the global step `step` (0-based): linear warm-up, then a cosine to the floor.

    >>> options = TrainOptions(lr=1.0, min_lr_ratio=0.1, warmup_steps=4, total_steps=104)
    >>> [round(learning_rate(options, step), 3) for step in (0, 3, 4, 54, 104, 999)]
    [0.25, 1.0, 1.0, 0.55, 0.1, 0.1]
    """
    if step < options.warmup_steps:
        return options.lr * (step + 1) / options.warmup_steps
    done = (step - options.warmup_steps) / (options.total_steps - options.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return options.lr * (options.min_lr_ratio + (1.0 - options.min_lr_ratio) * cosine)


class Trainer:
    """Owns the optimizer of one decoder and counts the global step.

    Args:
        decoder: trained in place, on the device where it lies.
        options: see `TrainOptions`.
        start_step: global step of the first call to `step`.
    """

    def __init__(self, decoder: Decoder, options: TrainOptions, start_step: int = 0) -> None:
        self.decoder = decoder
        self.options = options
        self.global_step = start_step
        self._names = [name for name, _ in decoder.named_parameters()]
        matrices = [p for name, p in decoder.named_parameters() if _is_decayed(name, p)]
        free = [p for name, p in decoder.named_parameters() if not _is_decayed(name, p)]
        groups = [{"params": free, "weight_decay": 0.0}]
        self._optimizers: list[torch.optim.Optimizer] = []
        if options.optimizer == "muon":
            inner = [p for p in matrices if p is not decoder.head_weight]
            matrices = [p for p in matrices if p is decoder.head_weight]
            self._optimizers.append(Muon(inner, options.lr, weight_decay=options.weight_decay))
        groups.append({"params": matrices, "weight_decay": options.weight_decay})
        self._optimizers.append(torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True))

    @property
    def _device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    def step(self, batch: "Batch") -> StepResult:
        """Take one optimizer step on a batch; a batch without targets counts as a step that changes nothing.

        Returns:
            The loss before the step and the size of the step.

        Raises:
            TrainingDiverged: when loss or gradient is not finite; the weights are as before the step.
        """
        lr = learning_rate(self.options, self.global_step)
        nll, tokens = _batch_nll(self.decoder, batch, self.options.precision, self._dropout_generator())
        if tokens == 0:
            self.global_step += 1
            return StepResult(0.0, 0, 0.0, lr)
        loss = nll / tokens
        if not math.isfinite(mean := loss.item()):
            raise TrainingDiverged(self._diverged("loss", mean, lr))
        self.decoder.zero_grad(set_to_none=True)
        loss.backward()
        norm = self._clip()
        if not math.isfinite(norm):
            raise TrainingDiverged(self._diverged("gradient norm", norm, lr))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.global_step += 1
        return StepResult(mean, tokens, norm, lr)

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step counts as named tensors (int64 scalars, float32 like the parameters)."""
        state = {"global_step": torch.tensor(self.global_step)}
        for name, weight in self.decoder.named_parameters():
            for key, value in self._state_of(weight).items():
                state[f"{key}.{name}"] = value.detach().clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave; afterwards training goes on bit for bit.

        Raises:
            DataError: when a tensor is missing or has another shape than its parameter.
        """
        self.global_step = int(state["global_step"])
        for optimizer in self._optimizers:
            optimizer.state.clear()
            keys = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
            held = {weight for group in optimizer.param_groups for weight in group["params"]}
            for name, weight in self.decoder.named_parameters():
                moments = {key: state.get(f"{key}.{name}") for key in keys if weight in held}
                if all(value is None for value in moments.values()):
                    continue
                for key, value in moments.items():
                    if value is None or (key != "step" and value.shape != weight.shape):
                        raise DataError(f"optimizer state: {key}.{name} is missing or misshapen")
                    optimizer.state[weight][key] = value.to(weight.device, copy=True)

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        """What the optimizers remember of a parameter; empty before its first step."""
        return {key: value for o in self._optimizers for key, value in o.state.get(weight, {}).items()}

    def _clip(self) -> float:
        grads = [p.grad for p in self.decoder.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.options.clip:
            torch.nn.utils.clip_grads_with_norm_(self.decoder.parameters(), self.options.clip, norm)
        return norm.item()

    def _dropout_generator(self) -> torch.Generator | None:
        """A generator that depends on seed and global step only, so that a resumed run drops the same units."""
        if self.decoder.config.dropout == 0.0:
            return None
        words = np.random.SeedSequence([self.options.seed, self.global_step]).generate_state(2)
        seed = int(words[0]) << 32 | int(words[1])
        return torch.Generator(self._device).manual_seed(seed)

    def _diverged(self, what: str, value: float, lr: float) -> str:
        return (
            f"training diverged at step {self.global_step}: {what} is {value} at learning rate {lr:.3g}; "
            "lower the learning rate or lengthen the warm-up, and restart from the last checkpoint"
        )


@torch.no_grad()
def evaluate(
    decoder: Decoder,
    batches: Iterable["Batch"],
    precision: Literal["auto", "fp32", "bf16"] = "auto",
) -> tuple[float, int]:
    """Mean negative log-likelihood (nats per token) over all targets, and their number; NaN when there is none."""
    total, tokens = 0.0, 0
    for batch in batches:
        nll, count = _batch_nll(decoder, batch, precision, None)
        total += nll.item()
        tokens += count
    return (total / tokens if tokens else math.nan), tokens


def _batch_nll(decoder: Decoder, batch: "Batch", precision: str, dropout: torch.Generator | None) -> tuple[Tensor, int]:
    device = decoder.embed_tokens.weight.device
    tokens = torch.from_numpy(batch.tokens).to(device)
    targets = torch.from_numpy(batch.targets).to(device)
    with _autocast(device, precision):
        hidden = decoder(tokens, torch.from_numpy(batch.lengths), dropout)
        return decoder.nll(hidden, targets)


def _autocast(device: torch.device, precision: str) -> AbstractContextManager:
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" or (precision == "auto" and fast):
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _is_decayed(name: str, weight: Tensor) -> bool:
    return weight.dim() == 2 and not name.startswith("embed_tokens")
