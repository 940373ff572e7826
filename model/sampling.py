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
# Tokens in a block of `pick`: about the root of usual vocabularies.
_BLOCK = 64


def uniforms(seed: int, key: np.ndarray, trajectory: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Two uniform numbers in [0, 1) with 53 random bits each, that don't depend on each other.

    Args:
        seed: of the whole run; its low 64 bits count.
        key: int64 [B], the prompt's own number.
        trajectory: int64 [B], below 2^32.
        step: int64 [B], below 2^32.

    Returns:
        float64 [2, B].
    """
    wide = key.astype(np.int64).view(np.uint64)
    counter = (wide & _LOW, wide >> _HALF, trajectory.astype(np.uint64), step.astype(np.uint64))
    words = np.stack(philox(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)))
    bits = (words[::2] << _HALF | words[1::2]) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def philox(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Philox4x32-10: four uint64 arrays that hold 32-bit counters become four that hold 32-bit random words."""
    c0, c1, c2, c3 = counter
    for turn in range(10):
        k0, k1 = (np.uint64((part + turn * weyl) & 0xFFFFFFFF) for part, weyl in zip(key, _WEYL, strict=True))
        left, right = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = right >> _HALF ^ c1 ^ k0, right & _LOW, left >> _HALF ^ c3 ^ k1, left & _LOW
    return c0, c1, c2, c3


def nucleus_(chances_BV: Tensor, top_p: float) -> Tensor:
    """Keep the most probable tokens of each row that together reach `top_p`, in place, and scale them to 1.

    Tokens as probable as the least of them are kept, too, so what is kept follows from the chances alone, not from the
    order of tokens (Holtzman et al., "The curious case of neural text degeneration", ICLR 2020, section 3.1).

    Args:
        chances_BV: float32 [B, V], each row a distribution.
        top_p: in (0, 1].
    """
    falling_BV = chances_BV.sort(dim=1, descending=True).values
    before_BV = falling_BV.cumsum(1, dtype=torch.float64) - falling_BV
    needed_B1 = (before_BV < top_p).sum(1, keepdim=True)
    least_B1 = falling_BV.gather(1, needed_B1 - 1)
    chances_BV.mul_(chances_BV >= least_B1)
    return chances_BV.div_(chances_BV.sum(1, keepdim=True))


def pick(chances_BV: Tensor, uniform: np.ndarray) -> np.ndarray:
    """Invert the cumulated probabilities of each row at its uniform: first to a block of tokens, then to a token.

    Args:
        chances_BV: float32 [B, V], not negative; their sum need not be exactly 1.
        uniform: float64 [B] in [0, 1).

    Returns:
        int64 [B], a token of positive probability per row.

    Raises:
        DataError: when a row holds no finite distribution, as after a diverged training.
    """
    vocab = chances_BV.shape[1]
    whole = vocab - vocab % _BLOCK
    sums = chances_BV[:, :whole].unflatten(1, (-1, _BLOCK)).sum(2)
    if whole < vocab:
        sums = torch.cat([sums, chances_BV[:, whole:].sum(1, keepdim=True)], dim=1)
    cumulated = sums.cumsum(1, dtype=torch.float64)
    total = cumulated[:, -1:]
    target = torch.from_numpy(uniform).to(chances_BV.device)[:, None] * total
    block = torch.searchsorted(cumulated, _below(target, total), right=True)
    place = block * _BLOCK + torch.arange(_BLOCK, device=block.device)
    inside = chances_BV.gather(1, place.clamp(max=vocab - 1)).masked_fill_(place >= vocab, 0.0)
    rest = target - torch.where(block > 0, cumulated.gather(1, (block - 1).clamp(min=0)), 0.0)
    steps = inside.cumsum(1, dtype=torch.float64)
    token = block * _BLOCK + torch.searchsorted(steps, _below(rest, steps[:, -1:]), right=True)
    # Found and fetched in one go, since each fetch waits for a GPU.
    found = torch.where(torch.isfinite(total), token, -1).squeeze(1).cpu().numpy()
    if (found < 0).any():
        raise DataError(
            "the decoder's scores are not finite numbers; use a checkpoint from before its training diverged"
        )
    return found


def _below(target: Tensor, total: Tensor) -> Tensor:
    """The target, but below the total: what rounding lifts to it means the last token of positive probability."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
