"""Tokens per second and peak memory of a training step, beside Hugging Face's Qwen2ForCausalLM with the same weights.

    python -m benchmarks.train_step [--models 1m 10m] [--vocab 7105] [--rounds 5] [--device cpu]

Two batches of about 4,096 tokens: windows of very different lengths, which the peer must pad, and four full windows
of 1,024. The first losses are compared, so both compute the same. Both clip and step with fused AdamW. Seconds are the
best of the rounds, taken in turn. Peak memory is that of a process of its own per side, over what it held before.

The share is model FLOP/s by the fastest large matrix product (2048³) of the same run:
6 × (weights of the blocks' matrices + output layer) per token, and 12 × width × layers × mean context of a token for
attention (causal: half the window). What the padding costs the peer is no work of the model.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from benchmarks.qwen import qwen_of
from model.decoder import Decoder, DecoderConfig, preset
from model.machine import Machine
from model.train import Trainer, TrainOptions
from tokenizer.windows import Batch

_CONTEXT = 1024
_TOKENS = 4096


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


BATCHES = {"long-tailed": ragged_lengths(_TOKENS, _CONTEXT), "full windows": [_CONTEXT] * (_TOKENS // _CONTEXT)}


def padded(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = len(batch.lengths), int(batch.lengths.max())
    tokens = torch.zeros(rows, columns, dtype=torch.int64)
    seen = torch.arange(columns) < torch.from_numpy(batch.lengths)[:, None]
    tokens[seen] = torch.from_numpy(batch.tokens)
    return tokens, seen.long(), torch.where(seen, tokens, -100)


def our_step(decoder: Decoder, batch: Batch, device: str) -> Callable[[], float]:
    trainer = Trainer(decoder.to(device), TrainOptions(lr=1e-5, warmup_steps=0), machine=Machine(device))
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


STEPS = {"ours": our_step, "peer": peer_step}


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
    a, b = torch.ones(m, k, device=device, dtype=dtype), torch.ones(k, n, device=device, dtype=dtype)
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
    device: str

    def steps(self, *sides: str) -> dict[str, Callable[[], float]]:
        batch = batch_of(BATCHES[self.batch], self.vocab)
        return {side: STEPS[side](Decoder.create(self.config, 0), batch, self.device) for side in sides}

    @property
    def config(self) -> DecoderConfig:
        return preset(self.model, self.vocab, context=_CONTEXT)


def peak_bytes(case: Case, side: str) -> int:
    """Peak memory of two steps in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--peak", json.dumps([vars(case), side])]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def print_peak(case: Case, side: str) -> None:
    (run,) = case.steps(side).values()
    before = _held(case.device)
    run()
    run()
    print(_held(case.device) - before)


def measure(case: Case, rounds: int, largest: float, memory: bool) -> None:
    runners = case.steps("ours", "peer")
    losses = {side: run() for side, run in runners.items()}
    seconds = dict.fromkeys(runners, float("inf"))
    for _ in range(rounds):
        for side, run in runners.items():
            seconds[side] = min(seconds[side], best_seconds(run, 1, case.device))
    lengths = BATCHES[case.batch]
    told = [f"{case.model:>5} {case.batch:<13} {sum(lengths):>6}"]
    told += [f"{sum(lengths) / seconds[side]:>10,.0f}" for side in runners]
    told += [f"{seconds['peer'] / seconds['ours']:>6.2f}"]
    told += [f"{model_flops(case.config, lengths) / seconds[side] / largest:>7.1%}" for side in runners]
    told += [f"{peak_bytes(case, side) / 2**20:>7,.0f}" if memory else f"{'-':>7}" for side in runners]
    print(*told, f"  {losses['ours']:.5f} {losses['peer']:.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["1m", "10m"])
    parser.add_argument("--vocab", type=int, default=7105)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="skip the processes that measure peak memory")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        case, side = json.loads(given.peak)
        print_peak(Case(**case), side)
        return
    largest = matrix_rate((2048, 2048, 2048), given.device)
    print(f"{given.device}, {torch.get_num_threads()} threads; 2048³: {largest / 1e9:,.0f} GFLOP/s")
    for name in given.models:
        config = preset(name, given.vocab, context=_CONTEXT)
        shapes = {"projection": config.width, "feed-forward": config.ff, "output": config.vocab}
        rates = []
        for what, n in shapes.items():
            rate = matrix_rate((_TOKENS, config.width, n), given.device)
            rates.append(f"{what} {_TOKENS} x {config.width} x {n}: {rate / 1e9:,.0f}")
        print(f"{name}: {config.parameters():,} parameters; GFLOP/s of {'; '.join(rates)}")
    print("model batch         tokens  ours tok/s  peer tok/s  ratio   FLOP share      peak MiB       first losses")
    for name in given.models:
        for batch in BATCHES:
            measure(Case(name, batch, given.vocab, given.device), given.rounds, largest, not given.no_memory)


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
