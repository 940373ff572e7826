"""What a site holds of a masked sum, and what it must never do because of it.

It is shown nowhere: not by `repr`, not in a pickle, not in a copy. Only `canonical.encode` gives it away, to the site's
own archive.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from federation.masking import Agreement, Consent, Keys, Opened, OutOfTurn, Place, SecondUnmasking, Shares


class Unshown:
    """Base of what holds secrets: no repr of the content, no pickle, no copy."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: not shown>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"A {type(self).__name__} holds secrets of this site and is not to be pickled or copied.")


@dataclass(frozen=True, repr=False)
class Secrets(Unshown):
    """Two X25519 private keys, of the channels and of the masks, and the self mask's seed; in hex."""

    channel: str
    mask: str
    seed: str

    @classmethod
    def draw(cls) -> "Secrets":
        """Draw all three afresh."""
        return cls(*(secrets.token_hex(32) for _ in range(3)))

    @property
    def channel_key(self) -> X25519PrivateKey:
        """The key that seals shares."""
        return X25519PrivateKey.from_private_bytes(bytes.fromhex(self.channel))

    @property
    def mask_key(self) -> X25519PrivateKey:
        """The key that agrees on masks."""
        return X25519PrivateKey.from_private_bytes(bytes.fromhex(self.mask))


@dataclass(frozen=True, repr=False)
class Held(Unshown):
    """All that a site holds of one sum.

    `shares` are, by owner and in hex, the shares of its mask key and of its seed. `masked` names what was masked: the
    update, its totals, and whose masks; empty before. Once the site has opened a sum, its
    secrets and shares are gone, and what remains keeps it from opening another one of the same round.
    """

    place: Place
    agreement: str
    keys: Keys
    secrets: Secrets | None
    keyring: tuple[Keys, ...] = ()
    sent: Shares | None = None
    shares: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    masked: str = ""
    consent: Consent | None = None
    summed: tuple[str, ...] = ()
    opened: Opened | None = None


def check_progress(agreement: Agreement, last: Held | None) -> None:
    """Refuse a sum that could tell, with an earlier one of the run, what a single site has sent.

    Raises:
        OutOfTurn: it does not come after the last that was begun.
        SecondUnmasking: a set of sites was signed in an earlier attempt of its round.
    """
    if last is None or last.place.manifest_hash != agreement.place.manifest_hash:
        return
    new, old = agreement.place, last.place
    if (new.round, new.attempt) <= (old.round, old.attempt):
        raise OutOfTurn(
            f"Round {new.round}, attempt {new.attempt} does not come after round {old.round}, attempt {old.attempt}; a "
            "sum that was begun is never begun again."
        )
    if new.round == old.round and last.consent is not None:
        raise SecondUnmasking(
            f"A set of sites was signed for round {old.round} already; the sums of two sets would tell the updates of "
            "the sites between them."
        )
