"""Sampled tokens per second, beside Hugging Face's generate() with the same weights.

    python -m benchmarks.rollout [--model 1m] [--vocab 7105] [--patients 8] [--prompt 256] [--tokens 64]

Every patient has 25 trajectories. The peer gets every row's prompt in full, once with the rows of one patient at a
time and once with all rows in one batch; it computes a cache and samples with temperature 1 from all tokens. Before,
the first new token's logits are compared, so both compute the same. Seconds are the best of the rounds, in turn.
"""

import argparse
from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch

from benchmarks.qwen import qwen_of
from model.clock import Clock
from model.decoder import Decoder, preset
from model.rollout import Prompt, Stop, rollout

TRAJECTORIES = 25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1m")
    parser.add_argument("--vocab", type=int, default=7105)
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    config = preset(given.model, given.vocab, context=1024)
    decoder = Decoder.create(config, 0)
    qwen = qwen_of(decoder).eval()
    prompts = np.random.default_rng(0).integers(3, given.vocab, (given.patients, given.prompt))
    compare(decoder, qwen, torch.from_numpy(prompts[:1]))

    # No token ends a timeline here: both sides sample exactly `tokens` tokens per row.
    nothing = np.zeros(given.vocab, dtype=bool)
    clock = Clock(np.zeros(given.vocab, dtype=np.int64), 1, np.arange(given.vocab) == 1, nothing, nothing)
    stop = Stop([], None, given.tokens)

    def ours() -> None:
        rollout(decoder, clock, [Prompt(row) for row in prompts], trajectories=TRAJECTORIES, stop=stop, seed=0)

    def peer(rows: np.ndarray) -> None:
        tokens = torch.from_numpy(rows)
        qwen.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=given.tokens, min_new_tokens=given.tokens, eos_token_id=None, use_cache=True,
        )  # fmt: skip

    def one_patient_at_a_time() -> None:
        for row in prompts:
            peer(np.repeat(row[None], TRAJECTORIES, 0))

    runners: dict[str, Callable[[], None]] = {
        "ours": ours,
        "peer, a patient at a time": one_patient_at_a_time,
        "peer, all rows at once": lambda: peer(np.repeat(prompts, TRAJECTORIES, 0)),
    }
    seconds = dict.fromkeys(runners, float("inf"))
    for _ in range(given.rounds):
        for side, run in runners.items():
            begin = perf_counter()
            with torch.inference_mode():
                run()
            seconds[side] = min(seconds[side], perf_counter() - begin)
    sampled = given.patients * TRAJECTORIES * given.tokens
    print(
        f"{given.model}: {config.parameters():,} parameters, {torch.get_num_threads()} threads, {given.patients} "
        f"patients x {TRAJECTORIES} trajectories, prompts of {given.prompt}, {given.tokens} new tokens"
    )
    for side, taken in seconds.items():
        print(f"{side:<28}{sampled / taken:>10,.0f} new tokens/s   {taken / seconds['ours']:>6.2f} x the time of ours")


def compare(decoder: Decoder, qwen: Callable, tokens: torch.Tensor) -> None:
    with torch.inference_mode():
        mine = decoder.logits(decoder(tokens[0], torch.tensor([tokens.shape[1]])))
        other = qwen(tokens).logits[0]
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    main()
