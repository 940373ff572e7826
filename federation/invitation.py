"""The one-time token by which a site joins: what it is called, whom it can trust, and a secret.

One line of text, `fedcomet1` and about 100 letters, which a coordinator hands to one person at the site. It carries the
sha256 of the federation's authority, so the first connection is checked as strictly as every later one: who sits in
between, and has no certificate of that authority, learns nothing. The last four bytes are a checksum, so that a token
that was cut off or mistyped is told from one that is wrong.
"""

import base64
import binascii
import hashlib
import secrets
from dataclasses import dataclass, field

from federation.messages import is_site_name
from federation.pki import Role
from tokenizer.errors import ConfigError

_PREFIX = "fedcomet1"
_SECRET, _HASH, _CHECK = 20, 32, 4
_ROLES = tuple(Role)
_SHORTEST = 1 + _HASH + _SECRET + 1 + _CHECK


@dataclass(frozen=True)
class Invitation:
    """What a token says.

    Attributes:
        name, role: who is invited, and as what.
        authority: sha256 of the authority's certificate, hexadecimal digits.
        secret: 20 random bytes, which the coordinator knows by their sha256 only.
    """

    name: str
    role: Role
    authority: str
    secret: bytes = field(repr=False)

    @classmethod
    def new(cls, name: str, role: Role, authority: str) -> "Invitation":
        """Invite a member.

        Raises:
            ConfigError: the name is none.
        """
        if not is_site_name(name):
            raise ConfigError(f"{name!r} is no name; use up to 64 letters, digits, '.', '_' and '-'.")
        return cls(name, role, authority, secrets.token_bytes(_SECRET))

    @property
    def digest(self) -> bytes:
        """The sha256 of the secret: what is kept, and what a certificate request answers."""
        return hashlib.sha256(self.secret).digest()

    @property
    def token(self) -> str:
        """The token; it is a secret."""
        place = bytes([_ROLES.index(self.role)])
        data = place + bytes.fromhex(self.authority) + self.secret + self.name.encode()
        return _PREFIX + base64.urlsafe_b64encode(data + _check(data)).decode().rstrip("=")

    @classmethod
    def read(cls, token: str) -> "Invitation":
        """Read a token.

        Raises:
            ConfigError: it is none, or not all of it.
        """
        wrong = ConfigError(
            "This is not a whole invitation token; copy all of it, from fedcomet1 to its last letter, or ask the "
            "coordinator for a new one (fedcomet coordinator invite)."
        )
        text = "".join(token.split())
        if not text.startswith(_PREFIX):
            raise wrong
        letters = text.removeprefix(_PREFIX)
        try:
            data = base64.b64decode(letters + "=" * (-len(letters) % 4), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise wrong from None
        body, check = data[:-_CHECK], data[-_CHECK:]
        if len(data) < _SHORTEST or check != _check(body) or body[0] >= len(_ROLES):
            raise wrong
        authority, rest = body[1 : 1 + _HASH], body[1 + _HASH :]
        name = rest[_SECRET:].decode(errors="replace")
        if not is_site_name(name):
            raise wrong
        read = cls(name, _ROLES[body[0]], authority.hex(), rest[:_SECRET])
        if read.token != text:  # letters that base64 ignores
            raise wrong
        return read


def _check(data: bytes) -> bytes:
    return hashlib.sha256(b"fedcomet token" + data).digest()[:_CHECK]
