r"""Tokens per second and peak memory of a training step, beside Hugging Face's Qwen2ForCausalLM with the same weights.

    python -m benchmarks.train_step [--models 1m 10m] [--vocab 7105] [--rounds 5] [--device cpu]
    python -m benchmarks.train_step --device cuda --models comet-s comet-m comet-l --context 8192 --tokens 65536 \
        --sides compiled ours

Two batches of about `--tokens` tokens: windows of very different lengths, which the peer must pad, and full windows of
`--context`. The first losses are compared, so both compute the same. Both clip and step with fused AdamW. Seconds are
the best of the rounds, taken in turn (on a GPU, where nobody else works, one side after the other). Peak memory is that
of a process of its own per side, over what it held before.

The share is model FLOP/s by the fastest large matrix product of the same run (2048³ on CPUs, 8192³ elsewhere):
6 × (weights of the blocks' matrices + output layer) per token, and 12 × width × layers × mean context of a token for
attention (causal: half the window). What the padding costs the peer is no work of the model.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from benchmarks.qwen import qwen_of
from model.decoder import Decoder
from model.settings import DecoderConfig, Machine, TrainOptions, preset
from model.train import Trainer
from tokenizer.windows import Batch


def batch_of(lengths: list[int], vocab: int) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, vocab, sum(lengths))
    targets = np.roll(tokens, -1)
    targets[np.cumsum(lengths) - 1] = -1
    return Batch(tokens, targets, np.array(lengths), np.arange(len(lengths)))


def ragged_lengths(total: int, longest: int) -> list[int]:
    """Lengths as patients have them: log-normal around 150 tokens."""
    rng = np.random.default_rng(1)
    lengths: list[int] = []
    while sum(lengths) < total:
        lengths.append(int(np.clip(rng.lognormal(5, 1), 2, longest)))
    return lengths


def lengths_of(batch: str, tokens: int, context: int) -> list[int]:
    return ragged_lengths(tokens, context) if batch == "long-tailed" else [context] * (tokens // context)


BATCHES = ("long-tailed", "full windows")


def padded(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = len(batch.lengths), int(batch.lengths.max())
    tokens = torch.zeros(rows, columns, dtype=torch.int64)
    seen = torch.arange(columns) < torch.from_numpy(batch.lengths)[:, None]
    tokens[seen] = torch.from_numpy(batch.tokens)
    return tokens, seen.long(), torch.where(seen, tokens, -100)


def our_step(decoder: Decoder, batch: Batch, device: str) -> Callable[[], float]:
    return _trainer_step(decoder, batch, Machine(device))


def our_compiled_step(decoder: Decoder, batch: Batch, device: str) -> Callable[[], float]:
    return _trainer_step(decoder, batch, Machine(device, compile=True))


def _trainer_step(decoder: Decoder, batch: Batch, machine: Machine) -> Callable[[], float]:
    trainer = Trainer(decoder.to(machine.device), TrainOptions(lr=1e-5, warmup_steps=0), machine=machine)
    return lambda: trainer.step(batch).loss


def peer_step(decoder: Decoder, batch: Batch, device: str) -> Callable[[], float]:
    qwen = qwen_of(decoder).to(device)
    qwen.train()
    optimizer = torch.optim.AdamW(qwen.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    tokens, seen, labels = (x.to(device) for x in padded(batch))
    inputs = {"input_ids": tokens, "labels": labels}
    if int(seen.min()) == 0:
        inputs["attention_mask"] = seen

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = qwen(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(qwen.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


STEPS = {"ours": our_step, "compiled": our_compiled_step, "peer": peer_step}


def best_seconds(run: Callable[[], object], rounds: int, device: str) -> float:
    best = float("inf")
    for _ in range(rounds):
        _wait(device)
        begin = perf_counter()
        run()
        _wait(device)
        best = min(best, perf_counter() - begin)
    return best


def matrix_rate(shape: tuple[int, int, int], device: str, rounds: int = 5) -> float:
    """FLOP/s of one product [M, K] x [K, N], float32 on CPUs and bfloat16 elsewhere."""
    m, k, n = shape
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    # Random numbers: GPUs draw less power on constant ones and run faster than real work ever does.
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
    return 2.0 * m * k * n / best_seconds(lambda: torch.mm(a, b), rounds, device)


def model_flops(config: DecoderConfig, lengths: list[int]) -> float:
    """Forward and backward of a batch; see the module's docstring."""
    kv_width = config.kv_heads * config.head_width
    block = 2 * config.width * (config.width + kv_width) + 3 * config.width * config.ff
    matrices = config.layers * block + config.vocab * config.width
    attention = 12 * config.width * config.layers * sum(n * (n + 1) / 2 for n in lengths)
    return 6.0 * matrices * sum(lengths) + attention


@dataclass(frozen=True)
class Case:
    model: str
    batch: str
    vocab: int
    context: int
    tokens: int
    device: str

    def step(self, side: str) -> Callable[[], float]:
        batch = batch_of(self.lengths, self.vocab)
        return STEPS[side](Decoder.create(self.config, 0), batch, self.device)

    @property
    def lengths(self) -> list[int]:
        return lengths_of(self.batch, self.tokens, self.context)

    @property
    def config(self) -> DecoderConfig:
        return preset(self.model, self.vocab, context=self.context)


def peak_bytes(case: Case, side: str) -> int:
    """Peak memory of two steps in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--peak", json.dumps([vars(case), side])]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def print_peak(case: Case, side: str) -> None:
    run = case.step(side)
    before = _held(case.device)
    run()
    run()
    print(_held(case.device) - before)


def measure(case: Case, sides: Sequence[str], rounds: int, largest: float, memory: bool) -> None:
    losses, seconds = {}, dict.fromkeys(sides, float("inf"))
    # A large model leaves no room for a second one beside it on a GPU.
    for together in [sides] if case.device == "cpu" else [[side] for side in sides]:
        runners = {side: case.step(side) for side in together}
        losses |= {side: run() for side, run in runners.items()}
        for _ in range(rounds):
            for side, run in runners.items():
                seconds[side] = min(seconds[side], best_seconds(run, 1, case.device))
    tokens = sum(case.lengths)
    for side in sides:
        share = model_flops(case.config, case.lengths) / seconds[side] / largest
        held = f"{peak_bytes(case, side) / 2**20:,.0f}" if memory else "-"
        print(
            f"{case.model:<8}{case.batch:<14}{tokens:>7} {side:<9}{tokens / seconds[side]:>10,.0f}"
            f"{seconds[sides[-1]] / seconds[side]:>7.2f}{share:>11.1%}{held:>10}   {losses[side]:.5f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["1m", "10m"])
    parser.add_argument("--vocab", type=int, default=7105)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=4096, help="of a step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", nargs="+", default=["ours", "peer"], choices=STEPS, help="the last is the ratio's 1")
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure peak memory")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        case, side = json.loads(given.peak)
        print_peak(Case(**case), side)
        return
    cube = 2048 if given.device == "cpu" else 8192
    largest = matrix_rate((cube, cube, cube), given.device)
    print(f"{given.device}, {torch.get_num_threads()} threads; {cube}³: {largest / 1e9:,.0f} GFLOP/s")
    for name in given.models:
        config = preset(name, given.vocab, context=given.context)
        shapes = {"projection": config.width, "feed-forward": config.ff, "output": config.vocab}
        rates = []
        for what, n in shapes.items():
            rate = matrix_rate((given.tokens, config.width, n), given.device)
            rates.append(f"{what} {given.tokens} x {config.width} x {n}: {rate / 1e9:,.0f}")
        print(f"{name}: {config.parameters():,} parameters; GFLOP/s of {'; '.join(rates)}")
    print("model   batch          tokens side      tokens/s  ratio FLOP share  peak MiB   first loss")
    for name in given.models:
        for batch in BATCHES:
            case = Case(name, batch, given.vocab, given.context, given.tokens, given.device)
            measure(case, given.sides, given.rounds, largest, not given.no_memory)


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _held(device: str) -> int:
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # Not getrusage: its maximum begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


if __name__ == "__main__":
    main()
