"""Secure aggregation, what both sides must agree on: the options, the ten messages, and what is signed.

The protocol is the one of Bonawitz et al., Practical secure aggregation for privacy-preserving machine learning
(CCS 2017, figure 4, with the steps against an active server); docs/secure-aggregation.md tells it step by step. A
site's side is `client.masked`, the coordinator's `server.unmask`; both are pure: no clock, no files, no transport.

Every message names its `Agreement` by digest: manifest, round, attempt, what was worked on, roster of identities and
options. Every signature covers that digest, so nothing can be played back in another round, run or attempt, and sites
that were sent different weights make no sum.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from federation import canonical
from federation.fixed_point import FixedPoint, Total
from federation.identity import Identity, is_public_key, verify
from federation.messages import ProtocolError, Words, is_site_name
from tokenizer.errors import ConfigError

WEIGHT, CLIPPED = "weight", "clipped"
"""The totals that every sum has: the sites' weights, and how many values were beyond the clip."""

Purpose = Literal["train", "evaluate tuning", "evaluate held_out", "evaluate tasks"]
"""What is summed: updates, the losses on a split, or tallies of answers to questions."""

_DOMAIN = b"fedcomet masking 1\n"
_SIGNED = "masking"


class MaskingError(ProtocolError):
    """A message of secure aggregation that must not be answered, or can't be used."""


class Replayed(MaskingError):
    """A message of another run, round, attempt or roster."""


class ForgedSignature(MaskingError):
    """Something that was not signed by the identity that the roster names."""


class WeakKeys(MaskingError):
    """A public key that is no point of X25519's large group."""


class SplitRoster(MaskingError):
    """Sites are shown different keys or different sets of sites."""


class SecondUnmasking(MaskingError):
    """Shares are asked for a second set of sites in one round."""


class AlteredShare(MaskingError):
    """A share that doesn't come from its sender as it was sealed."""


class WrongLength(MaskingError):
    """A masked vector of another size or type than was agreed."""


class TooFewSites(MaskingError):
    """Fewer sites than the threshold, or than the site's own policy wants."""


class OutOfTurn(MaskingError):
    """A step that does not follow from the one before, or was done."""


@dataclass(frozen=True)
class MaskingOptions:
    """How the sums of a run are masked; part of its manifest.

    Attributes:
        threshold: how many sites must stay to the end; more than half of the roster.
        clip: values of an update beyond ±clip count as ±clip.
        max_weight: the greatest weight of a site, such as the most tokens that it can train on in a round. Far above
            what sites really have, it costs precision.
        precision_bits: the step is at most clip / 2^precision_bits.
        totals: what else is summed, such as steps and losses.
        noise: standard deviation of the discrete Gaussian noise that each site adds to its update; 0 is none.
    """

    threshold: int
    clip: float
    max_weight: int
    precision_bits: int = 20
    totals: tuple[Total, ...] = ()
    noise: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "clip", float(self.clip))
        object.__setattr__(self, "noise", float(self.noise))
        if not 0 <= self.noise < float("inf"):
            raise ConfigError("masking.noise must be a finite number, and 0 or more.")
        if not 0 < self.clip < float("inf"):
            raise ConfigError("masking.clip must be a finite number above 0.")
        if self.max_weight < 1:
            raise ConfigError("masking.max_weight must be at least 1.")
        if not 1 <= self.precision_bits <= 44:
            raise ConfigError("masking.precision_bits must be from 1 to 44.")
        names = [WEIGHT, CLIPPED, *(total.name for total in self.totals)]
        if len(set(names)) != len(names) or len(names) > 64:
            raise ConfigError(
                f"masking.totals needs distinct names, at most 62, other than {WEIGHT!r} and {CLIPPED!r}."
            )


@dataclass(frozen=True)
class Place:
    """Which sum of a run: the run, which its manifest's hash names, the round, what for, and which try, from 1."""

    manifest_hash: str
    round: int
    purpose: Purpose
    attempt: int


@dataclass(frozen=True)
class Agreement:
    """One sum: what it is part of, who may take part, and how.

    Attributes:
        place: which sum; each try has its own keys.
        work: digest of the request that all have answered. A coordinator that sends one site other weights, such that
            the others have nothing to add (Pasquini et al. 2022, arXiv 2111.07380), gets no sum.
        size: the length P of the update.
        roster: the enrolled sites and their public keys, as `federation.identity` writes them.
        options: as follow from the manifest.
    """

    place: Place
    work: str
    size: int
    roster: Mapping[str, str]
    options: MaskingOptions

    def __post_init__(self) -> None:
        check_roster(self.roster, self.options.threshold)
        if self.size < 1:
            raise ConfigError("There is nothing to sum: the size must be at least 1.")
        _ = self.numbers

    @cached_property
    def digest(self) -> str:
        """Name the sum: the sha256 of everything above."""
        return hashlib.sha256(_DOMAIN + canonical.encode(self)).hexdigest()

    @cached_property
    def numbers(self) -> FixedPoint:
        """How updates and totals become integers."""
        options = self.options
        always = (Total(WEIGHT, options.max_weight), Total(CLIPPED, self.size))
        totals = (*always, *options.totals)
        return FixedPoint(
            len(self.roster), options.clip, options.max_weight, options.precision_bits, totals, options.noise
        )

    @cached_property
    def points(self) -> dict[str, int]:
        """Where each site's Shamir shares stand, from 1."""
        return {site: point for point, site in enumerate(sorted(self.roster), 1)}


def check_roster(roster: Mapping[str, str], threshold: int) -> None:
    """Refuse a roster that can't be summed over, or not with that threshold.

    Raises:
        TooFewSites: it has fewer than three sites.
        ConfigError: the threshold doesn't fit; a name or key is none, or stands twice.
    """
    count = len(roster)
    if count < 3:
        raise TooFewSites(f"The roster has {count} sites; a sum hides nothing below 3.")
    if not count / 2 < threshold <= count:
        raise ConfigError(
            f"masking.threshold is {threshold}; for {count} sites it must be from {count // 2 + 1} to {count}, "
            "or two halves of the sites could be made to open two sums."
        )
    if wrong := [name for name in roster if not is_site_name(name)]:
        raise ConfigError(f"{wrong[0]!r:.80} can't be the name of a site in the roster.")
    for name, key in roster.items():
        if not is_public_key(key):
            raise ConfigError(
                f"The roster's key of {name} is not a public key: ed25519: and 64 hexadecimal digits, as `fedcomet "
                "site key` shows it there."
            )
    if len(set(roster.values())) != count:
        raise ConfigError("Two sites of the roster have the same identity key; each needs its own.")


@dataclass(frozen=True)
class KeysRequest:
    """Asks for a site's fresh public keys for one sum.

    Every request names the place of its sum, by which the site finds what it agreed to, and is signed by its
    coordinator as those of `federation.messages` are.
    """

    kind: ClassVar[str] = "query.mask_keys"
    place: Place
    agreement: str
    deadline_s: float
    coordinator: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Keys:
    """A site's X25519 public keys, in hex: `channel` seals shares, `mask` agrees on masks."""

    kind: ClassVar[str] = "query.mask_keys.reply"
    site: str
    agreement: str
    channel: str
    mask: str
    signature: str


@dataclass(frozen=True)
class SharesRequest:
    """Shows all keys that came, in the order of names, and asks for shares of the site's two secrets."""

    kind: ClassVar[str] = "query.mask_shares"
    place: Place
    agreement: str
    keys: tuple[Keys, ...]
    deadline_s: float
    coordinator: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Shares:
    """A site's shares for every other site, each sealed for that site, in hex.

    `keyring` names the keys that the site was shown; `commitment` is the sha256 of its self mask's seed.
    """

    kind: ClassVar[str] = "query.mask_shares.reply"
    site: str
    agreement: str
    keyring: str
    commitment: str
    sealed: Mapping[str, str]
    signature: str


@dataclass(frozen=True)
class Share:
    """What one site gets of another's `Shares`."""

    site: str
    agreement: str
    keyring: str
    commitment: str
    sealed: str
    signature: str


@dataclass(frozen=True)
class MaskedRequest:
    """Brings a site the shares of the others, in the order of names, and asks for its masked update."""

    kind: ClassVar[str] = "query.masked"
    place: Place
    agreement: str
    keyring: str
    shares: tuple[Share, ...]
    deadline_s: float
    coordinator: str = ""
    signature: str = ""


@dataclass(frozen=True, eq=False)
class Masked:
    """A site's masked update: words [P], and its masked totals, each an integer modulo 2⁶⁴."""

    kind: ClassVar[str] = "query.masked.reply"
    site: str
    agreement: str
    keyring: str
    totals: tuple[int, ...]
    words: Words


@dataclass(frozen=True)
class ConsentRequest:
    """Shows whose shares went round and whose masked updates came, and asks for a signature on both."""

    kind: ClassVar[str] = "query.mask_consent"
    place: Place
    agreement: str
    shared: tuple[str, ...]
    summed: tuple[str, ...]
    deadline_s: float
    coordinator: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Consent:
    """A site's signature on the one set of sites whose sum it helps to open; `transcript` names what it saw."""

    kind: ClassVar[str] = "query.mask_consent.reply"
    site: str
    agreement: str
    transcript: str
    signature: str


@dataclass(frozen=True)
class OpenRequest:
    """Shows the signatures, in the order of names, and asks for the shares that open the sum."""

    kind: ClassVar[str] = "query.mask_open"
    place: Place
    agreement: str
    summed: tuple[str, ...]
    consents: tuple[Consent, ...]
    deadline_s: float
    coordinator: str = ""
    signature: str = ""


@dataclass(frozen=True)
class Opened:
    """A site's shares, in hex: of the self masks of all that are summed, of the mask keys of all that dropped out."""

    kind: ClassVar[str] = "query.mask_open.reply"
    site: str
    agreement: str
    seeds: Mapping[str, str]
    keys: Mapping[str, str]


Request = KeysRequest | SharesRequest | MaskedRequest | ConsentRequest | OpenRequest
Reply = Keys | Shares | Masked | Consent | Opened

KINDS: dict[str, type[Any]] = {kind.kind: kind for kind in (*Request.__args__, *Reply.__args__)}
"""The vocabulary, as `federation.messages.from_wire` takes it."""


def keyring_of(agreement: Agreement, keys: Iterable[Keys]) -> str:
    """Name a list of keys."""
    listed = {"agreement": agreement.digest, "keys": sorted(keys, key=lambda k: k.site)}
    return hashlib.sha256(_DOMAIN + canonical.encode(listed)).hexdigest()


def transcript_of(keyring: str, shared: Iterable[str], summed: Iterable[str]) -> str:
    """Name everything that a site has seen before shares are released."""
    seen = {"keyring": keyring, "shared": sorted(shared), "summed": sorted(summed)}
    return hashlib.sha256(_DOMAIN + canonical.encode(seen)).hexdigest()


def signed(identity: Identity, message: Keys | Shares | Consent) -> str:
    """Sign a message as it stands, but for its signature and its sealed shares; hex."""
    return identity.sign(_SIGNED, _statement(message))


def check_signature(agreement: Agreement, message: Keys | Shares | Share | Consent) -> None:
    """Refuse a message that is not part of the agreement, or not signed by the site that it names.

    Raises:
        Replayed: it belongs to another sum.
        ForgedSignature: naming the site whose identity did not sign it.
    """
    if message.agreement != agreement.digest:
        raise Replayed(
            f"What is said to come from {message.site} belongs to sum {message.agreement:.64}, this is "
            f"{agreement.digest}: another run, round, attempt, roster or other options."
        )
    if message.site not in agreement.roster:
        raise ForgedSignature(f"{message.site} is not in the roster of enrolled sites.")
    if not verify(agreement.roster[message.site], _SIGNED, _statement(message), message.signature):
        raise ForgedSignature(
            f"What is said to be {message.site}'s {_what(message)} is not signed by its enrolled identity: somebody in "
            "between has changed it, or the roster is out of date."
        )


def check_keys(agreement: Agreement, keys: Keys) -> None:
    """Refuse keys that `check_signature` refuses, or that agree on the same secret with everybody.

    Raises:
        Replayed, ForgedSignature: as above.
        WeakKeys: naming the site.
    """
    check_signature(agreement, keys)
    try:
        for key in (keys.channel, keys.mask):
            if not _is_key(key):
                raise ValueError
            X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(key)))
    except ValueError:
        raise WeakKeys(f"No secret can be agreed on with the keys of {keys.site}: the site must be left out.") from None


def _statement(message: Keys | Shares | Share | Consent) -> bytes:
    left_out = {"signature", "sealed"}
    fields = {name: value for name, value in vars(message).items() if name not in left_out}
    return canonical.encode({"what": _what(message), **fields})


def _is_key(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _what(message: Keys | Shares | Share | Consent) -> str:
    match message:
        case Keys():
            return "keys"
        case Consent():
            return "consent"
        case _:
            return "shares"
