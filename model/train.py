"""The training step: AdamW, Muon or plain SGD, a schedule over the global step, clipping, and a loud end on divergence.

Notable choices:
- The learning rate, and the dropout masks, depend only on the options and the global step. A run that was stopped and
  resumed is bit for bit the run that was not; a federation's round r starts at step r x (local steps).
- Muon (`model.muon`) moves the matrices of the blocks only; embedding, output layer, norms and biases always have
  AdamW.
- Weight decay is decoupled and touches only the matrices of the blocks and an untied output layer. Norms and
  biases are free, and so is the embedding: a hospital that never writes a code must not shrink that code's row.
- The agreed batch is a matter of learning, how much of it goes through the model at once one of memory: a step takes
  as many passes as it needs, over whole windows, and when memory runs out it starts again with half as much per pass.
- What a machine decides for itself (precision, passes, checkpointing, compiling) is `model.settings.Machine`; several
  processes that share a step in `model.parallel`.
"""

import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from model import parallel
from model.decoder import Decoder, Dropout, hide_from_compiler
from model.descent import SGD, AdamW, Optimizer
from model.machine import choose_precision
from model.muon import Muon
from model.parallel import ALONE, Team, shares
from model.pull import Pull
from model.settings import Machine, Precision, TrainOptions
from tokenizer.errors import ConfigError, DataError, FedcometError

if TYPE_CHECKING:
    from tokenizer.windows import Batch

_log = logging.getLogger(__name__)


class TrainingDiverged(FedcometError):
    """The loss or its gradient is no longer a finite number."""


class WindowTooLarge(FedcometError):
    """One window is more than the memory that there is; the text names no file."""


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
        machine: see `Machine`; its device is the decoder's.
        team: the processes that train together; each of them must hold the same weights and get the same batches.

    Attributes:
        micro_tokens: most tokens of a pass, 0 while nothing has asked for a limit.
        precision: what it computes in.
        pull: terms that are added to every gradient; None adds none.

    Raises:
        ConfigError: options that don't go together.
    """

    def __init__(
        self,
        decoder: Decoder,
        options: TrainOptions,
        start_step: int = 0,
        machine: Machine | None = None,
        team: Team = ALONE,
    ) -> None:
        machine = machine or Machine(device=str(decoder.embed_tokens.weight.device))
        if team.sharded and options.optimizer == "muon":
            raise ConfigError("Muon needs whole matrices: train with shard off, or with the optimizer adamw.")
        self.decoder = decoder
        self.options = options
        self.global_step = start_step
        self.micro_tokens = machine.micro_tokens
        self.precision: Precision = choose_precision(options.precision, machine, decoder.config)
        self._team = team
        self._loss: nn.Module = _Loss(decoder, self.precision, machine.checkpointing)
        if team.sharded:
            parallel.shard_(self._loss, decoder.layers)
        if machine.compile:
            compile_blocks_(decoder, self.precision)
        self._named = dict(decoder.named_parameters())  # a walk over all modules takes long beside a small model's step
        self._optimizers = list(_optimizers(decoder, self._named, options))
        self.pull: Pull | None = None

    def step(self, batch: "Batch") -> StepResult:
        """Take one optimizer step on a batch; a batch without targets counts as a step that changes nothing.

        Returns:
            The loss before the step and the size of the step.

        Raises:
            TrainingDiverged: when loss or gradient is not finite; the weights are as before the step.
            WindowTooLarge: when not even one window fits into the device's memory.
        """
        lr = learning_rate(self.options, self.global_step)
        tokens = int((batch.targets >= 0).sum())
        if tokens == 0:
            self.global_step += 1
            return StepResult(0.0, 0, 0.0, lr)
        mean = self._gradients(batch, tokens)
        if not math.isfinite(mean):
            raise TrainingDiverged(self._diverged("loss", mean, lr))
        return StepResult(mean, tokens, self._update(lr), lr)

    def _update(self, lr: float) -> float:
        """Clip the gradient, follow it, and count the step; gives the norm before clipping."""
        if self.pull is not None:
            self.pull.add_(self.decoder)
        norm = self._clip()
        if not math.isfinite(norm):
            raise TrainingDiverged(self._diverged("gradient norm", norm, lr))
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        self.global_step += 1
        return norm

    def _gradients(self, batch: "Batch", tokens: int) -> float:
        """Leave the gradient of the batch's mean loss in the parameters; gives that loss."""
        while True:
            loss = self._passes(batch, tokens)
            if not self._team.any(loss is None):
                assert loss is not None
                break
            loss = None
            self._shrink(batch)
        if not self._team.sharded:
            self._team.sum_(self._grads())
        self._team.sum_([loss])
        return loss.item()

    def _passes(self, batch: "Batch", tokens: int) -> Tensor | None:
        """This process's part of `_gradients`; None where memory ran out."""
        for weight in self._named.values():
            weight.grad = None
        device = self.decoder.embed_tokens.weight.device
        total = torch.zeros((), device=device)
        try:
            for part, first in self._parts(batch):
                loss = self._loss(*_placed(part, device), self._dropout(batch, first)) / tokens
                loss.backward()
                total += loss.detach()
        except RuntimeError as error:
            if not _out_of_memory(error) or self._team.sharded:
                raise
            return None
        return total

    def _parts(self, batch: "Batch") -> Iterator[tuple["Batch", int]]:
        """This process's passes, and the window that each begins with."""
        mine = shares(batch.lengths, self.micro_tokens, self._team)
        for first, last in mine:
            yield batch.windows(first, last), first
        if self._team.sharded:
            # Weights come together for all processes at once, so all must make as many passes: the rest learn nothing.
            teams = [replace(self._team, rank=rank) for rank in range(self._team.size)]
            most = max(len(shares(batch.lengths, self.micro_tokens, team)) for team in teams)
            shortest = int(batch.lengths.argmin())
            idle = batch.windows(shortest, shortest + 1)
            for _ in range(most - len(mine)):
                yield replace(idle, targets=np.full_like(idle.targets, -1)), shortest

    def _shrink(self, batch: "Batch") -> None:
        """Halve the passes, down to the longest window."""
        self._loss.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        longest, device = int(batch.lengths.max()), self.decoder.embed_tokens.weight.device
        tried = min(self.micro_tokens or len(batch.tokens), -(-len(batch.tokens) // self._team.size))
        if tried <= longest:
            raise WindowTooLarge(
                f"A window of {longest} tokens doesn't fit into the memory of {device}. Set checkpointing in the "
                "site's options, or shard over more processes; or agree on a shorter context."
            )
        self.micro_tokens = max(longest, tried // 2)
        _log.warning("memory ran out; from now on a pass has %d tokens at most", self.micro_tokens)

    def _grads(self) -> list[Tensor]:
        """The gradients of all parameters; a process whose share held nothing gets zeros."""
        for weight in self._named.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        return [weight.grad for weight in self._named.values() if weight.grad is not None]

    def _dropout(self, batch: "Batch", first: int) -> Dropout | None:
        """Masks that depend on seed and global step only, so that a resumed run drops the same units."""
        if self.decoder.config.dropout == 0.0:
            return None
        words = np.random.SeedSequence([self.options.seed, self.global_step]).generate_state(2)
        seed = (int(words[0]) << 32 | int(words[1])) % 2**63
        return Dropout(seed, len(batch.tokens), int(batch.lengths[:first].sum()))

    def state_dict(self) -> dict[str, Tensor]:
        """Moments and step counts as named tensors (int64 scalars, float32 like the parameters)."""
        state = {"global_step": torch.tensor(self.global_step)}
        for name, weight in self._named.items():
            for key, value in self._state_of(weight).items():
                state[f"{key}.{name}"] = parallel.whole(value.detach()).clone()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave; afterwards training goes on bit for bit.

        Raises:
            DataError: when a tensor is missing or has another shape than its parameter.
        """
        self.global_step = int(state["global_step"])
        for optimizer in self._optimizers:
            optimizer.state.clear()
            if isinstance(optimizer, SGD):
                continue
            keys = ("momentum_buffer",) if isinstance(optimizer, Muon) else ("step", "exp_avg", "exp_avg_sq")
            held = {weight for group in optimizer.param_groups for weight in group["params"]}
            for name, weight in self._named.items():
                moments = {key: state.get(f"{key}.{name}") for key in keys if weight in held}
                if all(value is None for value in moments.values()):
                    continue
                for key, value in moments.items():
                    if value is None or (key != "step" and value.shape != weight.shape):
                        raise DataError(f"optimizer state: {key}.{name} is missing or misshapen")
                    optimizer.state[weight][key] = value.clone() if key == "step" else parallel.like(value, weight)

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        """What the optimizers remember of a parameter; empty before its first step."""
        plain = (o for o in self._optimizers if not isinstance(o, SGD))  # which remembers nothing
        return {key: value for o in plain for key, value in o.state.get(weight, {}).items()}

    def _clip(self) -> float:
        grads = [weight.grad for weight in self._named.values() if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.options.clip:
            torch.nn.utils.clip_grads_with_norm_(self._named.values(), self.options.clip, norm)
        return parallel.whole(norm).item()

    def _diverged(self, what: str, value: float, lr: float) -> str:
        return (
            f"training diverged at step {self.global_step}: {what} is {value} at learning rate {lr:.3g}; "
            "lower the learning rate or lengthen the warm-up, and restart from the last checkpoint"
        )


@torch.no_grad()
def evaluate(decoder: Decoder, batches: Iterable["Batch"], precision: Precision = "fp32") -> tuple[float, int]:
    """Mean negative log-likelihood (nats per token) over all targets, and their number; NaN when there is none."""
    loss = _Loss(decoder, precision)
    device = decoder.embed_tokens.weight.device
    total, tokens = 0.0, 0
    for batch in batches:
        total += loss(*_placed(batch, device), None).item()
        tokens += int((batch.targets >= 0).sum())
    return (total / tokens if tokens else math.nan), tokens


class _Loss(nn.Module):
    """The decoder with its loss: what goes through the model in one call, so that sharded weights are whole inside."""

    def __init__(self, decoder: Decoder, precision: Precision, checkpointing: bool = False) -> None:
        super().__init__()
        self.decoder = decoder
        self._narrow, self._checkpointing = precision == "bf16", checkpointing

    def forward(self, tokens: Tensor, lengths: Tensor, targets: Tensor, dropout: Dropout | None) -> Tensor:
        """Summed negative log-likelihood in nats."""
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=self._narrow):
            hidden = self.decoder(tokens, lengths, dropout, self._checkpointing)
            return self.decoder.nll(hidden, targets)[0]


def compile_blocks_(decoder: Decoder, precision: Precision, backend: str = "inductor") -> None:
    """Run the decoder's blocks through torch.compile; where that fails they stay as they are, and the log says why.

    All lengths share one compiled block, and torch's own limit bounds how often it is compiled again. The
    first compilation happens here, on a few tokens, not in the middle of a round.
    """
    hide_from_compiler()
    for block in decoder.layers:
        block.compile(dynamic=True, backend=backend)
    device = decoder.embed_tokens.weight.device
    begin = time.monotonic()
    try:
        for length in (8, 24):
            tokens = torch.zeros(length, dtype=torch.int64, device=device)
            _Loss(decoder, precision)(tokens, torch.tensor([length]), tokens, None).backward()
    except Exception as error:  # the compiler's errors have no common class
        _log.warning("torch.compile does not work here, so the model runs without: %s", error)
        for block in decoder.layers:
            block._compiled_call_impl = None
    else:
        _log.info("the blocks were compiled in %.1f s", time.monotonic() - begin)
    decoder.zero_grad(set_to_none=True)


def _optimizers(decoder: Decoder, named: Mapping[str, nn.Parameter], options: TrainOptions) -> Iterable[Optimizer]:
    matrices = [p for name, p in named.items() if _is_decayed(name, p)]
    free = [p for name, p in named.items() if not _is_decayed(name, p)]
    groups: list[dict[str, Any]] = [{"params": free, "weight_decay": 0.0}]
    if options.optimizer == "muon":
        inner = [p for p in matrices if p is not decoder.head_weight]
        matrices = [p for p in matrices if p is decoder.head_weight]
        yield Muon(inner, options.lr, weight_decay=options.weight_decay)
    groups.append({"params": matrices, "weight_decay": options.weight_decay})
    if options.optimizer == "sgd":
        yield SGD(groups, options.lr)
        return
    yield AdamW(groups, options.lr, options.betas)


def _placed(batch: "Batch", device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, lengths and targets as tensors; lengths stay on the CPU, where attention is planned."""
    tokens = torch.from_numpy(batch.tokens).to(device, non_blocking=True)
    targets = torch.from_numpy(batch.targets).to(device, non_blocking=True)
    return tokens, torch.from_numpy(batch.lengths), targets


def _out_of_memory(error: RuntimeError) -> bool:
    # On a CPU torch has no class for it.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def _is_decayed(name: str, weight: Tensor) -> bool:
    return weight.dim() == 2 and not name.startswith("embed_tokens")
