"""Tokens per second of a training step, beside Hugging Face's Qwen2ForCausalLM with the same weights and optimizer.

    python -m benchmarks.train_step [--model 1m] [--vocab 7105] [--rounds 5]

Two batches of about 4,096 tokens: four windows of 1,024, and windows of very different lengths, which the peer must
pad. The first losses are compared, so both compute the same. Both clip and step with fused AdamW. Seconds are the
best of the rounds, taken in turn.
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from benchmarks.qwen import qwen_of
from model.decoder import Decoder, preset
from model.train import Trainer, TrainOptions
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


def padded(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = len(batch.lengths), int(batch.lengths.max())
    tokens = torch.zeros(rows, columns, dtype=torch.int64)
    seen = torch.arange(columns) < torch.from_numpy(batch.lengths)[:, None]
    tokens[seen] = torch.from_numpy(batch.tokens)
    return tokens, seen.long(), torch.where(seen, tokens, -100)


def peer_step(decoder: Decoder, batch: Batch) -> Callable[[], float]:
    qwen = qwen_of(decoder)
    qwen.train()
    optimizer = torch.optim.AdamW(qwen.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    tokens, seen, labels = padded(batch)
    inputs = {"input_ids": tokens, "labels": labels}
    if int(seen.min()) == 0:
        inputs["attention_mask"] = seen

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = qwen(**inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(qwen.parameters(), 1.0)
        optimizer.step()
        return float(loss)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1m")
    parser.add_argument("--vocab", type=int, default=7105)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    config = preset(given.model, given.vocab, context=1024)
    print(f"{given.model}: {config.parameters():,} parameters, {torch.get_num_threads()} threads")
    print("batch                     tokens   ours tokens/s   peer tokens/s   ratio   first losses")
    for name, lengths in (("4 windows of 1,024", [1024] * 4), ("ragged", ragged_lengths(4096, 1024))):
        batch = batch_of(lengths, given.vocab)
        decoder = Decoder.create(config, 0)
        peer = peer_step(decoder, batch)
        trainer = Trainer(decoder, TrainOptions(lr=1e-5, warmup_steps=0))
        runners: dict[str, Callable[[], float]] = {"ours": lambda t=trainer, b=batch: t.step(b).loss, "peer": peer}
        losses = {side: run() for side, run in runners.items()}
        seconds = dict.fromkeys(runners, float("inf"))
        for _ in range(given.rounds):
            for side, run in runners.items():
                begin = perf_counter()
                run()
                seconds[side] = min(seconds[side], perf_counter() - begin)
        ours, other = (len(batch.tokens) / seconds[side] for side in ("ours", "peer"))
        told = f"{losses['ours']:.5f} {losses['peer']:.5f}"
        print(f"{name:<24} {len(batch.tokens):>7} {ours:>15,.0f} {other:>15,.0f} {ours / other:>7.2f}   {told}")


if __name__ == "__main__":
    main()
