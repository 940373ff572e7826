"""A source's own patient ids become int64: numbers stay, other texts are hashed, the same at every site and time."""

import hashlib
import zlib

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tokenizer.errors import DataError

_REMEMBERED = 1_000_000

Ints = NDArray[np.int64]


class SubjectIds:
    """Gives ids, and sees to it that no two patients of a source get the same one.

    It keeps 16 bytes for each patient with a hashed id and 8 for each with a number, not their texts.
    """

    def __init__(self) -> None:
        self._recent: dict[str, int] = {}
        self._hashed = np.empty((0, 2), np.int64)
        self._new_hashed: list[tuple[int, int]] = []
        self._numbers = np.empty(0, np.int64)
        self._new_numbers: list[Ints] = []
        self._new_numbers_size = 0

    def of(self, texts: pl.Series) -> pl.Series:
        """Int64 ids of texts (or integers); a null stays null.

        Raises:
            DataError: two texts have the same hash (about one chance in 10^5 for ten million patients).
        """
        if texts.dtype.is_integer() and texts.dtype != pl.UInt64 and not bool((texts < 0).any()):
            numbers = texts.cast(pl.Int64)
            self._remember_numbers(numbers)
            return numbers
        texts = texts.cast(pl.String)
        frame = texts.alias("text").to_frame()
        # "007" and "7" are two patients, so only what an integer would be written as is one.
        number = pl.col("text").cast(pl.Int64, strict=False)
        same = number.cast(pl.String) == pl.col("text")
        ids = frame.select(id=pl.when(same & (number >= 0)).then(number))["id"]
        self._remember_numbers(ids)
        others = texts.filter(ids.is_null() & texts.is_not_null()).unique()
        if len(others):
            table = pl.DataFrame({"text": others, "hash": pl.Series([self._hash(t) for t in others], dtype=pl.Int64)})
            hashed = frame.join(table, on="text", how="left", maintain_order="left")["hash"]
            ids = pl.select(pl.coalesce(ids, hashed)).to_series()
        return ids.alias(texts.name)

    def check(self) -> None:
        """Refuse ids that stand for two patients; to be called when all are given.

        Raises:
            DataError: there is such an id.
        """
        self._settle_hashed()
        self._settle_numbers()
        both = np.intersect1d(self._hashed[:, 0], self._numbers)
        if len(both):
            raise DataError(
                f"The patient {both[0]} and one whose id is a text get the same subject_id; rename one of them."
            )

    def _hash(self, text: str) -> int:
        known = self._recent.get(text)
        if known is not None:
            return known
        content = text.encode()
        number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) >> 1
        if len(self._recent) >= _REMEMBERED:
            self._recent.clear()
        self._recent[text] = number
        self._new_hashed.append((number, zlib.crc32(content)))
        if len(self._new_hashed) >= max(_REMEMBERED, len(self._hashed)):
            self._settle_hashed()
        return number

    def _settle_hashed(self) -> None:
        if not self._new_hashed:
            return
        pairs = np.unique(np.concatenate([self._hashed, np.array(self._new_hashed, np.int64)]), axis=0)
        self._hashed, self._new_hashed = pairs, []
        twice = pairs[1:, 0][pairs[1:, 0] == pairs[:-1, 0]]
        if len(twice):
            texts = [text for text, number in self._recent.items() if number == twice[0]]
            raise DataError(
                f"Two patients get the same subject_id {twice[0]} ({', '.join(map(repr, texts))}); rename one of them."
            )

    def _remember_numbers(self, ids: pl.Series) -> None:
        fresh = ids.drop_nulls().unique().to_numpy()
        self._new_numbers.append(fresh)
        self._new_numbers_size += len(fresh)
        if self._new_numbers_size >= max(_REMEMBERED, len(self._numbers)):
            self._settle_numbers()

    def _settle_numbers(self) -> None:
        self._numbers = np.unique(np.concatenate([self._numbers, *self._new_numbers]))
        self._new_numbers, self._new_numbers_size = [], 0
