"""Cut data files at the borders of subjects, so that memory is bounded by a piece, however large a file is.

A file whose subjects lie one after the other, as MEDS asks for, is cut into pieces of about a million events, each with
all events of its subjects. Where the cuts lie is a function of the file alone. A file whose subjects lie scattered is
one piece as long as it fits; a larger one must be written anew first.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

PIECE_EVENTS = 1_000_000
# A file of more rows whose subjects lie scattered must be written anew before it is read.
LARGEST_SCATTERED = 4_000_000
# Rows of the subject column that are looked at together.
CHUNK_ROWS = 4_000_000


@dataclass(frozen=True, order=True)
class Piece:
    """Rows of a data file that hold all events of their subjects.

    Attributes:
        shard: the file, relative to its dataset's folder.
        start: the first row.
        rows: how many.
    """

    shard: str
    start: int
    rows: int


@dataclass(frozen=True)
class Cut:
    """A file's pieces in the order of its rows.

    Attributes:
        pieces: they cover every row once; none for a file without rows.
        subjects: int64 [S], ascending, of the file.
        scattered: whether a subject's rows lie in several places; then there is but one piece.
    """

    pieces: tuple[Piece, ...]
    subjects: Ints
    scattered: bool


def cut(shard: str, chunks: Iterator[Ints], events: int = PIECE_EVENTS) -> Cut:
    """Cut a file.

    Args:
        shard: its name.
        chunks: int64 [N] each; the file's subject column, some rows at a time.
        events: least rows of a piece, but for the last one of a file.

    >>> cut("0", iter([np.array([7, 7, 3]), np.array([3, 3, 5, 9])]), 2).pieces
    (Piece(shard='0', start=0, rows=2), Piece(shard='0', start=2, rows=3), Piece(shard='0', start=5, rows=2))
    """
    subjects = np.empty(0, np.int64)
    cuts, rows, blocks = [0], 0, 0
    last: int | None = None
    for chunk in chunks:
        if not len(chunk):
            continue
        begins = np.flatnonzero(np.diff(chunk)) + 1
        if chunk[0] != last:
            begins = np.append(0, begins)
        subjects = np.union1d(subjects, chunk[begins])
        blocks += len(begins)
        begins += rows
        while (place := int(np.searchsorted(begins, cuts[-1] + events))) < len(begins):
            cuts.append(int(begins[place]))
        rows, last = rows + len(chunk), int(chunk[-1])
    scattered = blocks > len(subjects)
    ends = [rows] if scattered else [*cuts[1:], rows]
    starts = [0] if scattered else cuts
    pieces = tuple(Piece(shard, start, end - start) for start, end in zip(starts, ends, strict=True) if end > start)
    return Cut(pieces, subjects, scattered)
