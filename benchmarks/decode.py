"""The decode step of rollouts on a GPU, against the bytes it can't do without.

    python -m benchmarks.decode [--models comet-s comet-l] [--rows 1600] [--patients 64] [--prompt 2048] [--own 256]

A step must read every weight of the blocks once, the keys and values of each prompt once, and those that each row has
appended. The share is these bytes by the time of a step (the CUDA graph's, and with what comes from the host), by the
rate at which the same run copies 2 GiB on the device (bytes read and written).
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch

from model.cache import Boarding
from model.decoder import Decoder
from model.pool import Pool
from model.settings import Precision, preset

_VOCAB = 7105


def seconds(run: Callable[[], object], rounds: int = 20) -> float:
    """Median time on the device."""
    times = []
    for _ in range(rounds + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return float(np.median(times[3:]))


def copy_rate() -> float:
    source = torch.randn(2**28, device="cuda").view(torch.uint8).repeat(2)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source))


@torch.inference_mode()
def measure(name: str, given: argparse.Namespace, rate: float, precision: Precision) -> None:
    config = preset(name, _VOCAB, context=given.prompt + 2 * given.own)
    decoder = Decoder.create(config, 0).to("cuda")
    rng = np.random.default_rng(0)
    pool = Pool(decoder, given.rows, 2 * given.own, [given.prompt] * given.patients, precision)
    rows = np.array_split(np.arange(given.rows), given.patients)
    pool.board([Boarding(rng.integers(3, _VOCAB, given.prompt), some) for some in rows])
    tokens = rng.integers(3, _VOCAB, len(pool.rows))
    # Own keys and values of earlier steps: what stands in the pages is of no interest here.
    pool._cache.normal_()
    pool._own[:] = given.own
    pool.advance(tokens)

    def whole() -> None:
        pool._own[:] = given.own
        pool.advance(tokens)

    itemsize = pool._cache.element_size()
    matrices = sum(weight.numel() for weight in decoder.layers.parameters() if weight.dim() == 2)
    per_token = config.layers * 2 * config.kv_heads * config.head_width * itemsize
    needed = matrices * itemsize + per_token * (given.patients * given.prompt + len(rows) * len(rows[0]) * given.own)
    (graph, _), *_ = pool._graphs.values()
    times = {"graph": seconds(graph.replay), "with the host": seconds(whole)}
    print(
        f"{name:<8} {precision} {len(pool.rows):>5} rows {needed / 1e9:>6.1f} GB of which weights "
        f"{matrices * itemsize / 1e9:.2f}; "
        + "; ".join(
            f"{what} {t * 1e3:.2f} ms, {needed / t / rate:.0%} of {rate / 1e12:.2f} TB/s" for what, t in times.items()
        )
        + f"; {len(pool.rows) / times['with the host']:,.0f} tokens/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["comet-s", "comet-m", "comet-l"])
    parser.add_argument("--rows", type=int, default=1600)
    parser.add_argument("--patients", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--own", type=int, default=256, help="tokens that each row has appended")
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this measures a CUDA device, and there is none")
    print(torch.cuda.get_device_name(), f"torch {torch.__version__}")
    rate = copy_rate()
    for name in given.models:
        measure(name, given, rate, given.precision)


if __name__ == "__main__":
    main()
