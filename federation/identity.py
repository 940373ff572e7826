"""Who says so: Ed25519 keys of coordinators and sites (RFC 8032), and the signatures under requests.

A key is made on first use and lies in a file that only its owner can read. The public half travels as one line of
text, `ed25519:` and 64 hexadecimal digits, which is what a policy lists. Every signature is made for one purpose, whose
name is signed too, so a signature under an approval can never stand under a request.
"""

import dataclasses
import os
import stat
import tempfile
from pathlib import Path
from typing import Any, TypeVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from federation import canonical
from federation.messages import sha256_of_payload, to_wire
from tokenizer import durable
from tokenizer.errors import ConfigError

_SCHEME = "ed25519:"
_REQUEST = "request"


S = TypeVar("S", bound=Any)


class Identity:
    """A private key and what it can sign; its text form never holds the key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @property
    def public(self) -> str:
        """The public key, as others know it."""
        raw = self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        return _SCHEME + raw.hex()

    @classmethod
    def at(cls, path: Path) -> "Identity":
        """Read the key at `path`; make it where there is none yet.

        Two processes that come first at the same time end up with one key.

        Raises:
            ConfigError: the file is no key, or others may read it.
        """
        if not path.exists():
            _make(path)
        try:
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise ConfigError(f"{path}: others than its owner may use this private key; run chmod 600 on it.")
            key = serialization.load_pem_private_key(path.read_bytes(), password=None)
        except OSError as cause:
            raise ConfigError(f"{path}: the private key can't be read ({cause.strerror}).") from None
        except (ValueError, TypeError):
            raise ConfigError(f"{path} is not a private key; restore it from a copy.") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError(f"{path} holds a key of another kind; an Ed25519 key is needed.")
        return cls(key)

    def sign(self, purpose: str, data: bytes) -> str:
        """Sign data for a purpose; 128 hexadecimal digits."""
        return self._key.sign(_statement(purpose, data)).hex()

    def sign_raw(self, data: bytes) -> bytes:
        """Sign data in a form that others have laid down; it must not begin as a statement of ours does.

        Raises:
            ValueError: it does.
        """
        if data.startswith(_statement("", b"")[:8]):
            raise ValueError("these bytes could stand for a statement with a purpose")
        return self._key.sign(data)

    def sign_request(self, request: S) -> S:
        """Give a request, of rounds or of masked sums, with this identity's key and signature."""
        signature = self.sign(_REQUEST, _content(request))
        signed: S = dataclasses.replace(request, coordinator=self.public, signature=signature)
        return signed


def is_public_key(text: str) -> bool:
    """Tell whether a text has the form of a public key."""
    digits = text.removeprefix(_SCHEME)
    return text.startswith(_SCHEME) and len(digits) == 64 and set(digits) <= set("0123456789abcdef")


def raw_key(text: str) -> bytes:
    """Give the 32 bytes of a public key.

    Raises:
        ValueError: the text is none.
    """
    if not is_public_key(text):
        raise ValueError(f"{text[:80]!r} is not a public key")
    return bytes.fromhex(text.removeprefix(_SCHEME))


def verify(public: str, purpose: str, data: bytes, signature: str) -> bool:
    """Tell whether the owner of a public key signed data for a purpose; False for a key or signature that is none."""
    if not is_public_key(public):
        return False
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public.removeprefix(_SCHEME)))
        key.verify(bytes.fromhex(signature), _statement(purpose, data))
    except (InvalidSignature, ValueError):
        return False
    return True


def signed_by(request: Any) -> str | None:
    """Give the public key whose owner signed a request: all of it, its deadline too; None if nobody did."""
    if verify(request.coordinator, _REQUEST, _content(request), request.signature):
        return request.coordinator
    return None


def _content(request: Any) -> bytes:
    """What stands for a request under its signature: its header, and the sha256 of every payload."""
    bare = dataclasses.replace(request, deadline_s=float(request.deadline_s), coordinator="", signature="")
    wire = to_wire(bare)
    hashes = {name: sha256_of_payload(part) for name, part in wire.payloads.items()}
    return wire.header + b"\n" + canonical.encode(hashes)


def _statement(purpose: str, data: bytes) -> bytes:
    return f"fedcomet {purpose} v1\n".encode() + data


def _make(path: Path) -> None:
    pem = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(".partial", f"{path.name}.", path.parent)  # only its owner can read it
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)  # unlike a rename, it leaves a key that another process made meanwhile
        except FileExistsError:
            return
    finally:
        aside.unlink(missing_ok=True)
    durable.sync_directory(path.parent)
