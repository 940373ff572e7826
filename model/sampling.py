"""Random draws that depend on who draws and when, never on what else is in the batch.

A uniform is a function of (seed, prompt key, trajectory, step): Philox4x32-10, a counter-based generator (Salmon et
al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A token is the inverse of the cumulated probabilities at
that uniform. So a trajectory stays the same when patients are added, reordered, split over machines or run again.
"""

import numpy as np
import torch
from torch import Tensor

from tokenizer.errors import DataError

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def uniforms(seed: int, key: np.ndarray, trajectory: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) with 53 random bits.

    Args:
        seed: of the whole run; its low 64 bits count.
        key: int64 [B], the prompt's own number.
        trajectory: int64 [B], below 2^32.
        step: int64 [B], below 2^32.

    Returns:
        float64 [B].
    """
    wide = key.astype(np.int64).view(np.uint64)
    counter = (wide & _LOW, wide >> _HALF, trajectory.astype(np.uint64), step.astype(np.uint64))
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))
    bits = (words[0] << _HALF | words[1]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four uint64 arrays that hold 32-bit counters become four that hold 32-bit random words."""
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0, k1 = (np.uint64((part + turn * weyl) & 0xFFFFFFFF) for part, weyl in zip(key, _WEYL, strict=True))
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = right >> _HALF ^ c1 ^ k0, right & _LOW, left >> _HALF ^ c3 ^ k1, left & _LOW
    return c0, c1, c2, c3


def probabilities(logits_BV: Tensor, temperature: float) -> Tensor:
    """Chance of every token: float32 [B, V].

    Args:
        logits_BV: float32 [B, V]; minus infinity forbids a token.
        temperature: divides the logits.
    """
    scores_BV = logits_BV if temperature == 1.0 else logits_BV / temperature
    return torch.softmax(scores_BV, dim=1)


def pick(chances_BV: Tensor, uniform: np.ndarray) -> np.ndarray:
    """Invert the cumulated probabilities of each row at its uniform.

    Args:
        chances_BV: float32 [B, V], from `probabilities`.
        uniform: float64 [B] in [0, 1).

    Returns:
        int64 [B], a token of positive probability per row.

    Raises:
        DataError: when a row holds no finite distribution, as after a diverged training.
    """
    cumulated_BV = chances_BV.cumsum(1, dtype=torch.float64)
    total_B1 = cumulated_BV[:, -1:]
    if not bool(torch.isfinite(total_B1).all()):
        raise DataError(
            "the decoder's scores are not finite numbers; use a checkpoint from before its training diverged"
        )
    # A uniform just below 1 may round up to the total; the last token of positive probability is meant then.
    below_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = torch.minimum(torch.from_numpy(uniform).to(chances_BV.device)[:, None] * total_B1, below_B1)
    return torch.searchsorted(cumulated_BV, target_B1, right=True).squeeze(1).cpu().numpy()
