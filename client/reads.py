"""Lets httpx, by which Flower's node asks, read TLS in pieces of up to a megabyte in the place of 16 KiB.

A read gives one TLS record, at most 16 KiB, and httpcore takes each through all of its layers, which costs as much as
decrypting it. Here a read goes on while there is more. Checked against httpcore 1.0.
"""

import contextlib
import ssl

from httpcore._backends.sync import SyncStream
from httpcore._sync.http11 import HTTP11Connection

_RECORD, _MOST = 1 << 14, 1 << 20

_read_one = SyncStream.read


def _read(stream: SyncStream, max_bytes: int, timeout: float | None = None) -> bytes:
    """Do what `SyncStream.read` does, and take whatever more has come already."""
    first, socket = _read_one(stream, max_bytes, timeout), stream._sock
    if len(first) < _RECORD or not isinstance(socket, ssl.SSLSocket):
        return first
    found, left = [first], max_bytes - len(first)
    socket.settimeout(0)
    with contextlib.suppress(OSError):  # there is no more yet; what is wrong with the connection, the next read tells
        while left >= _RECORD and (more := socket.recv(_RECORD)):
            found.append(more)
            left -= len(more)
    return b"".join(found)


def read_more_at_a_time() -> None:
    """Let this process do so."""
    HTTP11Connection.READ_NUM_BYTES = _MOST
    SyncStream.read = _read  # type: ignore[method-assign, assignment]
