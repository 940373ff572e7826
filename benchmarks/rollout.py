"""Sampled tokens per second, beside Hugging Face's generate() with the same weights.

    python -m benchmarks.rollout [--model 1m] [--patients 64] [--prompt 512] [--tokens 64] [--rounds 1] [--cpu]
    python -m benchmarks.rollout --device cuda --model comet-s --together 64

Every patient has 25 trajectories. The peer gets every row's prompt in full, with the rows of 1 and of `--together`
patients at a time; it computes a cache and samples with temperature 1 from all tokens. Before, the first new token's
logits are compared, so both compute the same. A third row holds ours to the grammar of a codebook as large as the
vocabulary, in which half of the prompts' events are laboratory values. Seconds are the best of the rounds, in turn.
On a GPU both sides compute in bfloat16.
ETHOS-ARES reports 15 s for 1,000 tokens of one stream on an A100: 67 tokens/s.
"""

import argparse
from collections.abc import Callable
from time import perf_counter, process_time

import numpy as np
import torch

from benchmarks.qwen import qwen_of
from model.clock import Clock, Waits
from model.decoder import Decoder
from model.rollout import Prompt, Stop, rollout
from model.settings import preset
from tokenizer import sketch
from tokenizer.codebook import Codebook, Survey, TokenizerOptions

TRAJECTORIES = 25


_ETHOS_TOKENS_PER_S = 1000 / 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1m")
    parser.add_argument("--patients", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--together", type=int, default=10)
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", nargs="+", choices=["ours", "grammar", "single", "together"], default=None)
    parser.add_argument("--cpu", action="store_true", help="seconds of one thread's work, where others use the machine")
    given = parser.parse_args()
    if given.cpu:
        torch.set_num_threads(1)
    clock_s = process_time if given.cpu else perf_counter
    book = large_codebook()
    vocab = len(book)
    config = preset(given.model, vocab, context=2 * max(512, given.prompt))
    decoder = Decoder.create(config, 0)
    qwen = qwen_of(decoder).eval()
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, vocab, (given.patients, given.prompt))
    compare(decoder, qwen, torch.from_numpy(prompts[:1]))
    decoder.to(given.device)
    qwen.to(given.device, torch.float32 if given.device == "cpu" else torch.bfloat16)
    told = [Prompt(timeline(book, given.prompt, rng)) for _ in range(given.patients)]

    # No token ends a timeline here: both sides sample exactly `tokens` tokens per row.
    nothing = np.zeros(vocab, dtype=bool)
    clock = Clock(
        Waits.of(np.arange(0), np.empty((0, 1), dtype=np.int64), vocab), 1, np.arange(vocab) == 1, nothing, nothing
    )
    settings = {
        "trajectories": TRAJECTORIES, "stop": Stop([], None, given.tokens), "seed": 0, "batch_rows": given.rows,
    }  # fmt: skip

    def ours() -> int:
        return int(rollout(decoder, clock, [Prompt(row) for row in prompts], **settings).tokens_sampled.sum())

    def ours_by_the_grammar() -> int:
        return int(rollout(decoder, book, told, **settings).tokens_sampled.sum())

    def peer(patients: int) -> int:
        for first in range(0, given.patients, patients):
            tokens = torch.from_numpy(np.repeat(prompts[first : first + patients], TRAJECTORIES, 0)).to(given.device)
            qwen.generate(
                tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                max_new_tokens=given.tokens, min_new_tokens=given.tokens, eos_token_id=None, use_cache=True,
            )  # fmt: skip
        return given.patients * TRAJECTORIES * given.tokens

    runners: dict[str, Callable[[], int]] = {
        "ours": ours,
        "ours, by the grammar": ours_by_the_grammar,
        "peer, a patient at a time": lambda: peer(1),
        f"peer, {given.together} patients at a time": lambda: peer(given.together),
    }
    if given.sides:
        names = ["ours", "grammar", "single", "together"]
        runners = {side: run for name, (side, run) in zip(names, runners.items(), strict=True) if name in given.sides}
    speed = dict.fromkeys(runners, 0.0)
    if given.device != "cpu":
        for run in runners.values():
            with torch.inference_mode():
                run()  # kernels are compiled
    for _ in range(given.rounds):
        for side, run in runners.items():
            begin = clock_s()
            with torch.inference_mode():
                sampled = run()
            speed[side] = max(speed[side], sampled / (clock_s() - begin))
    print(
        f"{given.model}: {config.parameters():,} parameters, {torch.get_num_threads()} threads, {given.patients} "
        f"patients x {TRAJECTORIES} trajectories, prompts of {given.prompt}, {given.tokens} new tokens"
    )
    for side, rate in speed.items():
        print(
            f"{side:<30}{rate:>10,.0f} new tokens/s   ours is {speed['ours'] / rate:>6.2f} x as fast"
            f"   {rate / _ETHOS_TOKENS_PER_S:>7.1f} x ETHOS-ARES' stream"
        )


def large_codebook() -> Codebook:
    """A codebook of CoMET's size: 1,000 laboratory codes with ten bins, the other codes without."""
    options = TokenizerOptions(min_patients=1)
    buckets = sketch.bucket_of(np.linspace(1.0, 100.0, 400), options.sketch_accuracy).tolist()
    values = {bucket: buckets.count(bucket) for bucket in set(buckets)}
    laboratory = [f"LAB//{number}" for number in range(1000)]
    other = [f"CODE//{number}" for number in range(6000)]
    return Codebook.build(
        Survey(
            options,
            patients=1000,
            codes=dict.fromkeys([*laboratory, *other], 100),
            values=dict.fromkeys(laboratory, values),
        )
    )


def timeline(book: Codebook, length: int, rng: np.random.Generator) -> np.ndarray:
    """A valid history whose events are laboratory values and other codes in turn: int64 [length]."""
    kinds = np.array([token.kind for token in book.tokens])
    texts = np.array([token.text for token in book.tokens])
    with_value = (kinds == "code") & np.char.startswith(texts, "LAB//")
    choices = [np.flatnonzero(with_value), np.flatnonzero(kinds == "value")]
    choices += [np.flatnonzero((kinds == "code") & ~with_value), np.flatnonzero(kinds == "interval")[:1]]
    # A code and its value, another code, an interval, and so on; an interval never stands first or last.
    tokens = np.array([rng.choice(choices[place % 4]) for place in range(length - length % 4 - 1)])
    assert book.grammar.accepts(tokens)
    return tokens


def compare(decoder: Decoder, qwen: Callable, tokens: torch.Tensor) -> None:
    with torch.inference_mode():
        mine = decoder.logits(decoder(tokens[0], torch.tensor([tokens.shape[1]])))
        other = qwen(tokens).logits[0]
    torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)


if __name__ == "__main__":
    main()
