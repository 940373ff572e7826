"""Seconds and memory of the gradient of a private step, beside that of a plain step on the same windows.

    python -m benchmarks.private_step [--model 1m] [--vocab 7105] [--lengths ragged | 1024] [--rounds 5]
    python -m benchmarks.private_step --step                  # with noise and optimizer
    python -m benchmarks.private_step --device cuda --model comet-s --tokens 65536 --rounds 3

One window of each patient. "plain" is the gradient of the batch's mean loss, as training without privacy makes it;
"private" the sum of per-patient gradients, each clipped (`model.clipping`); "one at a time" the same with a single
patient under way, as a loop over patients does it; "as rows" writes out gradients of single patients, as "private" does
on CPUs. Before timing, the norms are compared with those of plain backward passes of each patient. Each side runs in a
process of its own, in turn; memory is the process's peak over that of one that has loaded the model only. On a GPU all
compute in bfloat16, and "one at a time" is left out unless `--sides` names it. With `--step` both take the whole step,
noise, AdamW and all; noise is drawn once a step, however many patients it has. Every round is printed to stderr, so a
run that is cut off still tells something.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from time import perf_counter

import numpy as np
import torch

from benchmarks.train_step import batch_of, ragged_lengths
from model.clipping import BUDGET_BYTES, clipped_sum
from model.decoder import Decoder
from model.private import PrivateOptions, PrivateTrainer, Secret
from model.settings import TrainOptions, preset
from model.train import Trainer
from tokenizer.windows import Batch

SIDES = ("plain", "private", "as rows", "one at a time")
OPTIONS = TrainOptions(lr=1e-5, warmup_steps=0)


def loss_of(decoder: Decoder, batch: Batch) -> torch.Tensor:
    device = decoder.embed_tokens.weight.device
    with narrow(device.type)():
        hidden = decoder(torch.from_numpy(batch.tokens).to(device), torch.from_numpy(batch.lengths))
        nll, count = decoder.nll(hidden, torch.from_numpy(batch.targets).to(device))
    return nll / count


def narrow(kind: str) -> Callable[[], AbstractContextManager]:
    return partial(torch.autocast, kind, torch.bfloat16, enabled=kind != "cpu")


def plain(decoder: Decoder, batch: Batch) -> None:
    decoder.zero_grad(set_to_none=True)
    loss_of(decoder, batch).backward()


def check_norms(decoder: Decoder, batch: Batch) -> None:
    ends = np.cumsum(batch.lengths)
    kind = decoder.embed_tokens.weight.device.type
    norms = clipped_sum(decoder, batch, 1.0, autocast=narrow(kind)).norms
    for place in range(min(4, len(ends))):
        part = slice(ends[place] - batch.lengths[place], ends[place])
        one = slice(place, place + 1)
        plain(decoder, Batch(batch.tokens[part], batch.targets[part], batch.lengths[one], batch.patients[one]))
        grads = [weight.grad.flatten() for weight in decoder.parameters() if weight.grad is not None]
        np.testing.assert_allclose(
            norms[place], torch.cat(grads).double().norm().item(), rtol=1e-4 if kind == "cpu" else 0.02
        )


def held(device: str) -> float:
    """Peak memory in KiB."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return torch.cuda.max_memory_allocated() / 1024


def measure(side: str, given: argparse.Namespace) -> None:
    """What a measured process does: answers each line on its input with seconds, and ends with its memory."""
    ragged = given.lengths == "ragged"
    longest = 1024 if ragged else int(given.lengths)
    decoder = Decoder.create(preset(given.model, given.vocab, context=max(1024, longest)), 0).to(given.device)
    counts = ragged_lengths(given.tokens, longest) if ragged else [longest] * max(1, given.tokens // longest)
    batch, autocast = batch_of(counts, given.vocab), narrow(given.device)
    before = held(given.device)
    work: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(decoder, batch),
        "private": lambda: clipped_sum(decoder, batch, 1.0, autocast=autocast),
        "as rows": lambda: clipped_sum(decoder, batch, 1.0, factored=False, autocast=autocast),
        "one at a time": lambda: clipped_sum(decoder, batch, 1.0, budget_bytes=1, factored=False, autocast=autocast),
    }
    if given.step:
        whole = Trainer(decoder, OPTIONS)
        noisy = PrivateTrainer(
            decoder, replace(OPTIONS, clip=0.0), PrivateOptions(1.0, 1.0, 1.0), len(counts),
            lambda step, use: Secret(bytes(32), f"{step} {use}"),
        )  # fmt: skip
        work = {"plain": lambda: whole.step(batch), "private": lambda: noisy.step(batch)}
    for _ in sys.stdin:
        start = perf_counter()
        work[side]()
        if given.device != "cpu":
            torch.cuda.synchronize()
        print(perf_counter() - start, flush=True)
    peak = held(given.device)
    if side == "private":
        check_norms(decoder, batch)
    print(json.dumps({"over": (peak - before) / 1024, "tokens": len(batch.tokens), "patients": len(counts)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1m")
    parser.add_argument("--vocab", type=int, default=7105)
    parser.add_argument("--lengths", default="ragged", help="ragged, or the length of every window")
    parser.add_argument("--tokens", type=int, default=4096, help="of the batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", action="store_true", help="measure whole steps, with noise and optimizer")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="beside plain")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        measure(given.side, given)
        return
    arguments = ["--model", given.model, "--vocab", str(given.vocab), "--lengths", given.lengths]
    arguments += ["--tokens", str(given.tokens), "--device", given.device, *(["--step"] if given.step else [])]
    sides = [
        "plain",
        *(given.sides or (["private", "one at a time"] if given.device == "cpu" and not given.step else ["private"])),
    ]
    processes = {
        side: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.private_step", "--side", side, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for side in sides
    }  # fmt: skip
    seconds = dict.fromkeys(sides, float("inf"))
    for turn in range(given.rounds + 1):
        for side, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            print(file=process.stdin, flush=True)
            took = float(process.stdout.readline())
            print(f"round {turn} of {given.rounds}, {side}: {took:.3f} s", file=sys.stderr, flush=True)
            # The first turn warms up.
            seconds[side] = min(seconds[side], took) if turn else seconds[side]
    found = {side: json.loads(process.communicate()[0]) for side, process in processes.items()}
    told, budget = found["plain"], BUDGET_BYTES["cpu" if given.device == "cpu" else "other"]
    print(
        f"{given.model}, vocabulary {given.vocab:,}, {torch.get_num_threads()} threads: {told['patients']} patients, "
        f"{told['tokens']:,} tokens, up to {budget >> 20} MiB of gradients where they are written out"
    )
    print(f"{'':16}{'seconds':>9}{'x plain':>9}{'peak MiB over the model':>25}{'x plain':>9}")
    for side in sides:
        ratio, over = seconds[side] / seconds["plain"], found[side]["over"]
        print(f"{side:16}{seconds[side]:>9.3f}{ratio:>9.2f}{over:>25,.0f}{over / told['over']:>9.2f}")


if __name__ == "__main__":
    main()
