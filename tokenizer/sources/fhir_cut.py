"""Cut a JSON document that is too large to hold into the objects of its list, while it is read.

Brackets outside of strings are found for a block at once: a bracket counts where the number of unescaped quotes before
it is even.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

_BLOCK = 4 << 20
_LOOK_BACK = 256


class Readable(Protocol):
    """Something to read bytes from."""

    def read(self, size: int, /) -> bytes:
        """Give at most `size` bytes; none at the end."""
        ...


def cut(file: Readable, limit: int, *, member: bytes = b"entry", block: int = _BLOCK) -> Iterator[list[bytes] | str]:
    """Give the objects in the list `member` of the document's object, or in the document itself where it is a list.

    Args:
        file: gives the document; it is read once.
        limit: most bytes of one object.
        member: of the document's object; lists under other names are left out.
        block: bytes to read at once.

    Yields:
        Objects as JSON, as many as a block completes; at last, where the document isn't whole or an object is too long,
        a complaint.
    """
    finder = _Brackets()
    buffer = b""
    list_depth: int | None = None  # depth inside of the list that is wanted, while it is open
    began: int | None = None  # where the object that is under way begins in the buffer
    while data := file.read(block):
        offset, buffer = len(buffer), buffer + data
        found: list[bytes] = []
        for place, opens, outside in finder.find(data):
            at = offset + place
            if outside < 0:
                yield "not JSON: more is closed than was opened"
                return
            square = buffer[at] in b"[]"
            if (
                square
                and opens
                and list_depth is None
                and (outside == 0 or (outside == 1 and _named(buffer, at, member)))
            ):
                list_depth = outside + 1
            elif square and not opens and list_depth == outside + 1:
                list_depth = None
            elif not square and list_depth == outside:
                if opens:
                    began = at
                elif began is not None:
                    found.append(buffer[began : at + 1])
                    began = None
        if found:
            yield found
        keep = began if began is not None else max(len(buffer) - _LOOK_BACK, 0)
        buffer = buffer[keep:]
        began = None if began is None else 0
        if began is not None and len(buffer) > limit:
            yield f"entry of more than {limit >> 20} MiB"
            return
    if finder.open:
        yield "file is cut off: the bundle isn't closed"


def _named(buffer: bytes, at: int, member: bytes) -> bool:
    before = buffer[max(0, at - _LOOK_BACK) : at].rstrip()
    return before.endswith(b":") and before[:-1].rstrip().endswith(b'"' + member + b'"')


class _Brackets:
    """Finds the outer brackets of a text that comes in blocks."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._backslashes = 0  # at the end of the last block

    @property
    def open(self) -> bool:
        """Whether something isn't closed yet."""
        return self._depth != 0 or self._quoted

    def find(self, data: bytes) -> list[tuple[int, bool, int]]:
        """Give place, whether it opens, and the depth outside of it, for brackets at most two levels deep."""
        text = np.frombuffer(data, np.uint8)
        quotes = np.flatnonzero(text == ord('"'))
        quotes = quotes[~self._escaped(text, quotes)]
        # JSON's four brackets differ from each other in two bits: [ ] { } are 0x5b 0x5d 0x7b 0x7d.
        square = text & 0xDF
        places = np.flatnonzero((square == ord("[")) | (square == ord("]")))
        inside = (np.searchsorted(quotes, places) + self._quoted) % 2 == 1
        places = places[~inside]
        opens = (text[places] & 0x06) == 0x02
        depth = self._depth + np.cumsum(np.where(opens, 1, -1))
        outside = np.where(opens, depth - 1, depth)
        if len(depth):
            self._depth = int(depth[-1])
        self._quoted = bool((len(quotes) + self._quoted) % 2)
        near = outside <= 2
        return list(zip(places[near].tolist(), opens[near].tolist(), outside[near].tolist(), strict=True))

    def _escaped(self, text: npt.NDArray[np.uint8], quotes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether an odd number of backslashes stands before each quote."""
        slash = text == ord("\\")
        before = self._backslashes
        if not slash.any():
            self._backslashes = 0
            return (quotes == 0) & (before % 2 == 1)
        index = np.arange(len(text))
        last_other = np.maximum.accumulate(np.where(slash, -1, index))
        self._backslashes = len(text) - 1 - int(last_other[-1]) + (before if last_other[-1] < 0 else 0)
        previous = np.where(quotes > 0, last_other[quotes - 1], -1)
        run = quotes - 1 - previous + np.where(previous < 0, before, 0)
        return run % 2 == 1
