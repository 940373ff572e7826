"""Which patients train, tune and test: a keyed hash of the subject id, alike at every site."""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tokenizer.errors import ConfigError

SPLITS = ("train", "tuning", "held_out")


@dataclass(frozen=True)
class SplitRule:
    """Shares of patients per split.

    The key is the federation's, so a patient of two sites falls in the same split.
    That holds for sites that share subject ids; otherwise the ids of two sites are independent
    draws.

    Args:
        key: Any text; another key is another split.
        tuning: Share of patients for tuning.
        held_out: Share of patients for the final evaluation.
    """

    key: str
    tuning: float = 0.1
    held_out: float = 0.2

    def __post_init__(self) -> None:
        if not (self.tuning >= 0 and self.held_out >= 0 and self.tuning + self.held_out < 1):
            raise ConfigError(
                "split rule: the shares of tuning and held_out must be 0 or more and leave some"
                f" patients to train, got tuning = {self.tuning} and held_out = {self.held_out}."
            )

    def assign(self, subject_ids: NDArray[np.int64]) -> NDArray[np.int8]:
        """Split of each subject as an index into SPLITS: int8 [N] for int64 [N]."""
        key = hashlib.blake2b(self.key.encode()).digest()
        ids = np.ascontiguousarray(subject_ids, "<i8").tobytes()
        digests = b"".join(
            hashlib.blake2b(ids[at : at + 8], key=key, digest_size=8).digest() for at in range(0, len(ids), 8)
        )
        uniform = np.frombuffer(digests, "<u8") / 2.0**64
        held_out = uniform < self.held_out
        tuning = ~held_out & (uniform < self.held_out + self.tuning)
        return (2 * held_out + 1 * tuning).astype(np.int8)
