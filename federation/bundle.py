"""What Flower ships to sites: two entry modules and their metadata, signed, and never anything else.

A bundle (Flower: FAB) is built of the files that are named here, from the installed package, so nothing that lies
beside them can travel. A coordinator signs it as Flower's trusted entities do: Ed25519 (RFC 8032) over the time, 8
bytes big-endian, and the sha256 of the bundle. A site takes it only if a coordinator whose key it trusts has signed it
*and* its files are those of the site's own installation: code of a coordinator never runs at a site, signed or not.
"""

import base64
import hashlib
import io
import json
import time
import tomllib
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from federation.identity import Identity, raw_key

FILES = ("LICENSE", "fedcomet_coordinator.py", "fedcomet_site.py", "pyproject.toml")
"""All that a bundle holds, but for Flower's own list of it."""

APP = "@fedcomet/fedcomet-flower"
"""What Flower calls it: publisher and name of its pyproject.toml."""

_FOLDER = Path(__file__).parent / "flower_app"
_LIST, _METADATA = ".info/CONTENT", "pyproject.toml"
_LICENSE_MARK = "valid_license"  # Flower asks for this one beside the signatures
_MOST_BYTES = 1 << 20


def build(folder: Path = _FOLDER) -> bytes:
    """Build the bundle: the same bytes wherever the same versions of Flower and zlib do it.

    Raises:
        ValueError: a file is missing or makes no bundle for Flower.
    """
    from flwr.cli.build import build_fab_from_files

    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; install fedcomet again.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flower's patterns are of a kind that pathspec has renamed
        content, _ = build_fab_from_files({name: (folder / name).read_bytes() for name in FILES})
    return content


def digest(content: bytes) -> str:
    """Give the name that Flower has for a bundle: its sha256."""
    return hashlib.sha256(content).hexdigest()


def sign(content: bytes, identity: Identity, signed_at: int | None = None) -> dict[str, str]:
    """Sign a bundle; gives what Flower calls its verifications.

    Args:
        content: the bundle.
        identity: the coordinator's.
        signed_at: seconds since the epoch; now if None.
    """
    at = int(time.time()) if signed_at is None else signed_at
    signature = base64.urlsafe_b64encode(identity.sign_raw(_statement(content, at))).decode()
    told = json.dumps({"signature": signature, "signed_at": at})
    return {_entity(identity.public): told, _LICENSE_MARK: "Valid"}


def trusted_entities(keys: Sequence[str]) -> dict[str, str]:
    """Give coordinators' public keys (`ed25519:` and 64 digits) in the form that Flower's SuperNode takes."""
    entities = {}
    for key in keys:
        public = Ed25519PublicKey.from_public_bytes(raw_key(key))
        line = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        entities[_entity(key)] = line.decode()
    return entities


def objection(content: bytes, verifications: Mapping[str, str], keys: Sequence[str]) -> str | None:
    """Say why a site must not take a bundle; None if it may. Whatever arrives is read with care.

    Args:
        content: the bundle as it came.
        verifications: what came with it.
        keys: public keys of the coordinators that the site trusts.
    """
    if len(content) > _MOST_BYTES:
        return f"it has {len(content)} bytes, more than the {_MOST_BYTES} that a bundle may have"
    if not any(_signed(content, verifications.get(_entity(key)), key) for key in keys):
        return "no coordinator that this site trusts has signed it; the policy's runs.coordinators lists their keys"
    try:
        there = _read(content)
    except (ArithmeticError, KeyError, NotImplementedError, OSError, RuntimeError, ValueError, zipfile.BadZipFile):
        return "it is damaged"
    here = {name: (_FOLDER / name).read_bytes() for name in FILES}
    odd = sorted(name for name in {*there, *here} if not _same(name, there.get(name), here.get(name)))
    if odd:
        named = ", ".join(name[:80] for name in odd[:4])
        return (
            f"it isn't the bundle of the fedcomet that is installed here ({named}); install the coordinator's version"
        )
    return None


def _statement(content: bytes, at: int) -> bytes:
    return at.to_bytes(8, "big") + hashlib.sha256(content).digest()


def _entity(key: str) -> str:
    """Flower's name for a key: any that is the same on both sides."""
    return f"fpk_{raw_key(key).hex()}"


def _signed(content: bytes, told: str | None, key: str) -> bool:
    try:
        given: Any = json.loads(told or "")
        statement = _statement(content, given["signed_at"])
        signature = base64.urlsafe_b64decode(given["signature"])
        Ed25519PublicKey.from_public_bytes(raw_key(key)).verify(signature, statement)
    except (InvalidSignature, AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
        return False
    return True


def _read(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as bundle:
        infos = bundle.infolist()
        names = [info.filename for info in infos]
        if len(set(names)) < len(names) or sum(info.file_size for info in infos) > _MOST_BYTES:
            raise ValueError
        return {info.filename: bundle.read(info) for info in infos if info.filename != _LIST}


def _same(name: str, there: bytes | None, here: bytes | None) -> bool:
    if there is None or here is None:
        return False
    if name == _METADATA:  # Flower writes it anew, so its text may differ
        try:
            return tomllib.loads(there.decode()) == tomllib.loads(here.decode())
        except ValueError:
            return False
    return there == here
