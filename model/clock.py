"""What rollouts must know of the tokens: how time passes, what is never sampled, what a shortened history keeps."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizer.codebook import Codebook


@dataclass(frozen=True)
class Clock:
    """What rollouts must know of the tokens.

    Attributes:
        advance_us: int64 [V], time that passes with each token.
        eot: the token that ends a timeline.
        never: bool [V], tokens that are not sampled (padding, unknown).
        is_static: bool [V], tokens that stand before every timeline.
        is_age: bool [V], tokens of which the last one is valid.
    """

    advance_us: np.ndarray
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
        return cls(codebook.advance_us, codebook.eot, never, is_static, codebook.is_header & ~is_static)

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
