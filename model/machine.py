"""How one machine computes a training step: nobody else's business, because the result is the same up to rounding.

Precision is measured, not looked up: on the CPUs that were measured without bfloat16 units, autocast is three times
slower than float32, and some with them gain nothing at small widths. The probe multiplies matrices of the model's own
shapes both ways, once per process and shape. Timings differ from run to run, so whoever must repeat a computation bit
for bit (a site's run does) writes the answer down and passes it on.
"""

import logging
import time
from functools import cache

import torch
from torch import Tensor

from model.settings import DecoderConfig, Machine, Precision
from tokenizer.errors import ConfigError

# bfloat16 loses digits, so it must win clearly to be taken.
_CLEARLY = 1.2
_PROBE_ROWS = 256
_PROBE_REPEATS = 5

_log = logging.getLogger(__name__)


def usable(device: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: when torch knows no such device, or can't use it on this machine.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        why = str(error).splitlines()[0]
        raise ConfigError(
            f"device {device!r} can't be used on this machine ({why}); take cpu, or install a build of PyTorch for it"
        ) from error
    return found


def choose_precision(asked: str, machine: Machine, config: DecoderConfig) -> Precision:
    """What to compute in: what the run asks for, else what the machine's options say, else what is measured.

    Args:
        asked: the run's own wish, "auto" when it has none.
        machine: where it runs.
        config: of the decoder, for its shapes.
    """
    for wish in (asked, machine.precision):
        if wish in ("fp32", "bf16"):
            return wish  # type: ignore[return-value]
    return measured_precision(machine.device, config.width, config.ff, config.vocab)


@cache
def measured_precision(device: str, width: int, ff: int, vocab: int) -> Precision:
    """bfloat16 on CUDA devices that have it; on others where products of these shapes are clearly faster in it."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    gain = _bf16_gain(device, ((width, ff), (width, vocab)))
    chosen: Precision = "bf16" if gain >= _CLEARLY else "fp32"
    _log.info("%s: bfloat16 runs at %.2f times the speed of float32 here, so %s is used", device, gain, chosen)
    return chosen


def _bf16_gain(device: str, shapes: tuple[tuple[int, int], ...]) -> float:
    """Time of linear layers of these (in, out) widths in float32 by their time under bfloat16 autocast."""
    kind = torch.device(device).type
    layers = [(torch.ones(_PROBE_ROWS, n, device=device), torch.ones(m, n, device=device)) for n, m in shapes]
    spent = [(_seconds(layers, kind, False), _seconds(layers, kind, True)) for _ in range(_PROBE_REPEATS + 1)]
    wide, narrow = (min(side) for side in zip(*spent[1:], strict=True))  # the first pair warms up
    return wide / narrow


def _seconds(layers: list[tuple[Tensor, Tensor]], kind: str, narrow: bool) -> float:
    begin = time.perf_counter()
    with torch.no_grad(), torch.autocast(kind, dtype=torch.bfloat16, enabled=narrow):
        for x, weight in layers:
            torch.nn.functional.linear(x, weight)
    return time.perf_counter() - begin
