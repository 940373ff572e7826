"""Who may sign in to the dashboard: names, roles, and hashes of passwords, in one file of the coordinator's home.

    passwords.json   {name: {role, salt, hash}}, only its owner can read it

Hashes are scrypt's with N = 2^15, r = 8, p = 3: 32 MiB and about a tenth of a second per try.

Source: Percival, "Stronger key derivation via sequential memory-hard functions", 2009; the cost is one of those of the
OWASP Password Storage Cheat Sheet.
"""

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from federation import canonical, pki
from federation.messages import is_site_name
from federation.sessions import Person
from tokenizer.errors import ConfigError

Role = Literal["coordinator", "viewer"]

SHORTEST = 12
"""Characters that a password has at least."""

_LONGEST = 1024
_N, _R, _P = 1 << 15, 8, 3
_FILE = "passwords.json"


@dataclass(frozen=True)
class _Entry:
    role: Role
    salt: str
    hash: str


@dataclass(frozen=True)
class _Entries:
    people: Mapping[str, _Entry]


class Passwords:
    """The passwords of the coordinator with this home."""

    def __init__(self, home: Path) -> None:
        self._path = home / _FILE

    def set(self, name: str, role: Role, password: str) -> None:
        """Give somebody a role and a password; sessions that were opened with another one end.

        Raises:
            ConfigError: the name is none, or the password is too short or too long.
        """
        if not is_site_name(name):
            raise ConfigError(f"{name!r} is no name; use up to 64 letters, digits, '.', '_' and '-'.")
        if not SHORTEST <= len(password) <= _LONGEST:
            raise ConfigError(f"A password has {SHORTEST} to {_LONGEST} characters, this one {len(password)}.")
        salt = secrets.token_bytes(16)
        self._write({**self._read(), name: _Entry(role, salt.hex(), _hash(password, salt))})

    def remove(self, name: str) -> None:
        """Let somebody no longer sign in; their sessions end.

        Raises:
            ConfigError: nobody has this name.
        """
        people = dict(self._read())
        if people.pop(name, None) is None:
            raise ConfigError(f"Nobody signs in as {name!r}; there are: {', '.join(sorted(people)) or 'none'}.")
        self._write(people)

    def people(self) -> Mapping[str, Role]:
        """Give the roles by name."""
        return {name: entry.role for name, entry in sorted(self._read().items())}

    def check(self, name: str, password: str) -> Person | None:
        """Give who signs in, if that is the password; takes as long for names that nobody has."""
        entry = self._read().get(name)
        told = _hash(password[:_LONGEST], bytes.fromhex(entry.salt) if entry else b"nobody")
        if entry is None or not hmac.compare_digest(told, entry.hash):
            return None
        return Person(name, entry.role, entry.hash)

    def holds(self, person: Person) -> bool:
        """Tell whether the password that somebody signed in with, and the role, are still the same."""
        entry = self._read().get(person.name)
        return entry is not None and (entry.hash, entry.role) == (person.stamp, person.role)

    def _read(self) -> Mapping[str, _Entry]:
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return {}
        return canonical.decode(_Entries, data, str(self._path), ConfigError).people

    def _write(self, people: Mapping[str, _Entry]) -> None:
        pki.write_private(self._path, canonical.encode(_Entries(people)))


def _hash(password: str, salt: bytes) -> str:
    return hashlib.scrypt(password.encode(), salt=salt, n=_N, r=_R, p=_P, maxmem=64 << 20, dklen=32).hex()
