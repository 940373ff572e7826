"""Masks: keystreams that a party adds to or takes from integers, without ever holding a whole one.

A mask is AES-256 in counter mode under a key that is used for nothing else: about twice as fast as ChaCha20 where the
processor knows AES, and constant in time there. A key comes from X25519 through HKDF-SHA256, bound to what it is for.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from federation import canonical
from federation.fixed_point import CHUNK
from federation.messages import Words

_WORDS, _TOTALS = bytes(16), b"\x80" + bytes(15)  # first counter blocks: half of all blocks apart
_ZEROS = bytes(8 * CHUNK)


@dataclass(frozen=True)
class Mask:
    """A keystream to add, or to take away; its key is shown nowhere."""

    key: bytes = field(repr=False)
    add: bool

    def __reduce__(self) -> tuple:
        raise TypeError("A mask's key is not to be pickled.")


def shared_key(own: X25519PrivateKey, other: bytes, purpose: bytes) -> bytes:
    """Agree on a key of 32 bytes with the owner of another public key, which `masking.check_keys` let pass.

    Both must name the same purpose.
    """
    secret = own.exchange(X25519PublicKey.from_public_bytes(other))
    return HKDF(SHA256(), 32, salt=None, info=purpose).derive(secret)


def pair_mask(own: X25519PrivateKey, site: str, other: str, other_key: bytes, keyring: str) -> Mask:
    """Give `site`'s mask with another: both draw the same keystream, the one that comes first by name adds it."""
    first, second = sorted((site, other))
    return Mask(shared_key(own, other_key, canonical.encode(["mask", keyring, first, second])), add=site == first)


class Masks:
    """Many masks at once, over a vector that is walked through from its beginning, chunk by chunk."""

    def __init__(self, masks: Iterable[Mask]) -> None:
        self._masks = list(masks)
        self._streams = [(_stream(mask, _WORDS), mask.add) for mask in self._masks]
        self._buffer = bytearray(len(_ZEROS))

    def apply_(self, words: Words) -> None:
        """Add the masks to, or take them from, the next words, at most `CHUNK`; little-endian uint32 or uint64."""
        for stream, add in self._streams:
            _apply_(stream, add, words, self._buffer)

    def apply_to_totals_(self, totals: NDArray[np.uint64]) -> None:
        """Do so with the totals, which have a part of each keystream of their own; once."""
        for mask in self._masks:
            _apply_(_stream(mask, _TOTALS), mask.add, totals, self._buffer)


def chunks(size: int) -> Iterator[slice]:
    """Walk through `size` values, `CHUNK` at a time."""
    return (slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


def _stream(mask: Mask, first: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(mask.key), modes.CTR(first)).encryptor()


def _apply_(stream: CipherContext, add: bool, words: Words, buffer: bytearray) -> None:
    view = memoryview(buffer)[: words.nbytes]
    stream.update_into(memoryview(_ZEROS)[: words.nbytes], view)
    mask = np.frombuffer(view, words.dtype)
    (np.add if add else np.subtract)(words, mask, out=words)
