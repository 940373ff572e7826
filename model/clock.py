"""What rollouts must know of the tokens: how time passes, what is never sampled, what a shortened history keeps."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizer.codebook import Codebook


@dataclass(frozen=True)
class Waits:
    """How long tokens that let time pass do so: one of equally likely times each.

    C such tokens with K times each stand in the order of their times, which don't overlap, so all C * K ascend.

    Attributes:
        tokens: int64 [C].
        times_us: int64 [C, K].
        place: int64 [V], which of these a token is, or -1.
    """

    tokens: np.ndarray
    times_us: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, times_us: np.ndarray, vocab: int) -> "Waits":
        """Sort the tokens by their times."""
        order = np.argsort(times_us[:, 0], kind="stable") if len(tokens) else np.arange(0)
        place = np.full(vocab, -1)
        place[tokens[order]] = np.arange(len(order))
        return cls(tokens[order], times_us[order], place)

    def beyond(self, limit_us: np.ndarray) -> np.ndarray:
        """How many of each token's times exceed a limit: int64 [B, C] for int64 [B]."""
        count = self.times_us.shape[1]
        passed = np.searchsorted(self.times_us.ravel(), limit_us, side="right")
        return np.clip(count * np.arange(1, len(self.tokens) + 1) - passed[:, None], 0, count)

    def draw(self, token: np.ndarray, uniform: np.ndarray, least_us: np.ndarray) -> np.ndarray:
        """The time that passes with each token, int64 [B]: 0 with most, else at least so long where it can be.

        Args:
            token: int64 [B].
            uniform: float64 [B] in [0, 1).
            least_us: int64 [B].
        """
        passes = np.flatnonzero(self.place[token] >= 0)
        time_us = np.zeros(len(token), dtype=np.int64)
        if len(passes):
            place, count = self.place[token[passes]], self.times_us.shape[1]
            enough = self.beyond(least_us[passes] - 1)[np.arange(len(passes)), place].clip(min=1)
            time_us[passes] = self.times_us[place, count - enough + (uniform[passes] * enough).astype(np.int64)]
        return time_us


@dataclass(frozen=True)
class Clock:
    """What rollouts must know of the tokens.

    Attributes:
        waits: how long time passes.
        eot: the token that ends a timeline.
        never: bool [V], tokens that are not sampled (padding, unknown).
        is_static: bool [V], tokens that stand before every timeline.
        is_age: bool [V], tokens of which the last one is valid.
    """

    waits: Waits
    eot: int
    never: np.ndarray
    is_static: np.ndarray
    is_age: np.ndarray

    @classmethod
    def of(cls, codebook: "Codebook") -> "Clock":
        """Read the clock of a codebook."""
        never = np.zeros(len(codebook), dtype=bool)
        never[[codebook.pad, codebook.unk]] = True
        is_static = np.array([token.kind == "static" for token in codebook.tokens])
        first = codebook.first_id("interval")
        waits = Waits.of(first + np.arange(len(codebook.waits_us)), codebook.waits_us, len(codebook))
        return cls(waits, codebook.eot, never, is_static, codebook.is_header & ~is_static)

    def header(self) -> list[int]:
        """How the timeline of somebody or other begins: a static token and an age, where there are such."""
        statics, ages = np.flatnonzero(self.is_static).tolist(), np.flatnonzero(self.is_age).tolist()
        return [*statics[-1:], *ages[len(ages) // 2 : len(ages) // 2 + 1]]

    def crop(self, window: np.ndarray, length: int) -> np.ndarray:
        """Shorten a window to `length` tokens: its static tokens, the last age before the cut, the newest tokens."""
        if len(window) <= length:
            return window
        most = length // 2  # header tokens, whatever their number, leave half to the newest
        statics = np.flatnonzero(self.is_static[window])[: max(0, most - 1)]
        cut = len(window) - (length - len(statics) - 1)
        last_age = np.flatnonzero(self.is_age[window[:cut]])[-1:][:most]
        header = np.concatenate([statics, last_age])
        return np.concatenate([window[header], window[len(window) - (length - len(header)) :]])
