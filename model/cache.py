"""What a rollout asks of its cache of keys and values: lanes (`model.lanes`) on CPUs, pages (`model.pool`) on GPUs.

Shapes: B rows under way, W windows, D width, N flat tokens, G key/value heads, K head width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from model.attention import SegmentPlan
from model.decoder import Decoder

# New prompts wait until this share of the rows is free, so that they move in together.
_BOARDING_SHARE = 0.25
# Tokens of prompts in one pass of the decoder.
_PREFILL_TOKENS = 8192


@dataclass(frozen=True)
class Boarding:
    """A window to compute, and the rows that continue it.

    Attributes:
        window: int64 [T].
        rows: int64 [R], the caller's numbers of the rows.
    """

    window: np.ndarray
    rows: np.ndarray


class Cache(Protocol):
    """Rows in lockstep: each `advance` appends one token to every row."""

    @property
    def rows(self) -> np.ndarray:
        """int64 [B], the caller's numbers of the rows under way, in the order of all that goes in and out."""

    def take(self, waiting: deque[Boarding]) -> list[Boarding]:
        """Take from the front what should board now; nothing while that would be too little or has no room."""

    def board(self, tasks: Sequence[Boarding]) -> Tensor:
        """Compute windows and let their rows in, behind the others; the rows' last hidden states, [sum R, D]."""

    def advance(self, tokens: np.ndarray) -> Tensor:
        """Run each row's newest token (int64 [B]) through the decoder: hidden states [B, D]."""

    def drop(self, rows: np.ndarray) -> None:
        """Forget rows by their numbers; the others may change places."""

    def positions(self) -> np.ndarray:
        """int64 [B], the position that each row's next token takes in its window."""


def take_rows(waiting: deque[Boarding], busy: int, most: int) -> list[Boarding]:
    """Boardings for the free ones of `most` rows: none until a good share of them is free, or the next one's."""
    free = most - busy
    if not waiting or (busy and free < max(_BOARDING_SHARE * most, len(waiting[0].rows))):
        return []
    taken = [waiting.popleft()]
    while waiting and sum(len(task.rows) for task in taken) + len(waiting[0].rows) <= free:
        taken.append(waiting.popleft())
    return taken


def prefill(
    decoder: Decoder, windows: Sequence[np.ndarray], store: Callable[[int, Tensor, Tensor, Tensor, Tensor], None]
) -> Tensor:
    """Run windows through the decoder, some thousand tokens at a time.

    Args:
        decoder: on any device.
        windows: int64 [T] each.
        store: called per layer and pass with (layer, window of each token int64 [N], its position int64 [N], keys
            [N, G, K], values [N, G, K]).

    Returns:
        Each window's last hidden state, [W, D].
    """
    device = decoder.embed_tokens.weight.device
    lengths = np.array([len(window) for window in windows])
    last = []
    for part in _parts(lengths):
        plan = SegmentPlan.of(torch.from_numpy(lengths[part]), device)
        window = torch.from_numpy(np.repeat(np.arange(part.start, part.stop), lengths[part])).to(device)

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, plan: SegmentPlan = plan, window: Tensor = window
        ) -> Tensor:
            store(layer, window, plan.positions, k, v)
            return plan.attend(q, k, v)

        tokens = torch.from_numpy(np.concatenate(windows[part])).to(device)
        hidden_ND = decoder.run(tokens, plan.positions, attend)
        last.append(hidden_ND[torch.from_numpy(np.cumsum(lengths[part]) - 1).to(device)])
    return torch.cat(last)


def filled(dead: np.ndarray) -> np.ndarray:
    """Order of the living in which only as many move as there are holes among the first places."""
    alive = np.flatnonzero(~dead)
    order = np.arange(len(alive))
    holes = np.flatnonzero(dead[: len(alive)])
    order[holes] = alive[alive >= len(alive)]
    return order


def _parts(lengths: np.ndarray) -> Iterator[slice]:
    """Runs of windows that hold at most `_PREFILL_TOKENS` tokens (or are one window)."""
    first = 0
    for place in range(1, len(lengths) + 1):
        if place == len(lengths) or lengths[first : place + 1].sum() > _PREFILL_TOKENS:
            yield slice(first, place)
            first = place
