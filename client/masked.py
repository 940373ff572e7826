"""A site's side of secure aggregation: one object per sum, which takes requests and gives replies.

It gives away a masked update once, signs one set of sites once, and releases shares only after enough sites have signed
the same set; everything else is refused by an error of `federation.masking`. The order is
    keys → shares → mask_ → consent → open.
A small request that was answered gets the same answer again. What it holds is in memory; `to_secret_bytes` gives it to
the site's own archive, where a reply must not leave before the state that goes with it is durable.
"""

import dataclasses
import secrets
from collections.abc import Collection, Mapping, Sequence
from hashlib import sha256

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from client.held import Held, Secrets, Unshown, check_progress
from federation import canonical, shamir
from federation.discrete_noise import DiscreteGaussianNoise
from federation.identity import Identity
from federation.keystream import Mask, Masks, chunks, pair_mask, shared_key
from federation.masking import (
    CLIPPED,
    WEIGHT,
    Agreement,
    AlteredShare,
    Consent,
    ConsentRequest,
    ForgedSignature,
    Keys,
    KeysRequest,
    Masked,
    MaskedRequest,
    Opened,
    OpenRequest,
    OutOfTurn,
    Replayed,
    SecondUnmasking,
    Share,
    Shares,
    SharesRequest,
    SplitRoster,
    TooFewSites,
    check_keys,
    check_signature,
    keyring_of,
    signed,
    transcript_of,
)
from federation.messages import ProtocolError, Vector, Words
from model.private import Secret
from tokenizer.errors import ConfigError, DataError

_NONCE_BYTES = 12


class MaskedSite(Unshown):
    """One site's part in one sum."""

    def __init__(
        self,
        agreement: Agreement,
        site: str,
        identity: Identity,
        minimum: int = 3,
        before: bytes | None = None,
    ) -> None:
        """Begin a sum with fresh keys, or go on with the same sum as before.

        Args:
            agreement: what is summed; made of the manifest that the site agreed to, never of a request.
            site: the site's own name.
            identity: the site's enrolled key.
            minimum: the fewest sites that the site's own policy lets itself be summed with, itself among them.
            before: what `to_secret_bytes` gave for the last sum of this run, if there was one.

        Raises:
            ConfigError: the roster has no such site, or another key for it.
            TooFewSites: the roster is smaller than the minimum.
            SecondUnmasking: the site has signed a set of sites for this round in an earlier attempt.
            OutOfTurn: an earlier round, or an earlier attempt, than the last.
        """
        self._agreement, self._site, self._identity = agreement, site, identity
        if agreement.roster.get(site) != identity.public:
            raise ConfigError(f"The roster does not list {site} with the key that this site was enrolled with.")
        self._minimum, self._least = minimum, max(agreement.options.threshold, minimum)
        self._enough(agreement.roster, "the roster")
        last = None if before is None else canonical.decode(Held, before, "The kept masking state", ConfigError)
        if last is not None and last.agreement == agreement.digest:
            self._held = last
        else:
            check_progress(agreement, last)
            self._held = self._begin()

    def to_secret_bytes(self) -> bytes:
        """Give what the site holds, for its own archive only: whoever reads it can take the masks off."""
        return canonical.encode(self._held)

    def keys(self, request: KeysRequest) -> Keys:
        """Give the public keys of this sum, signed."""
        self._belongs(request.agreement)
        return self._held.keys

    def shares(self, request: SharesRequest) -> Shares:
        """Check all keys, and share the own secrets out over their owners.

        Raises:
            Replayed, ForgedSignature, WeakKeys, SplitRoster, TooFewSites: see `federation.masking`; the site is named.
        """
        self._belongs(request.agreement)
        if self._held.sent is not None:
            if request.keys != self._held.keyring:
                raise SplitRoster(f"{self._site} was shown another list of keys before; a sum has one.")
            return self._held.sent
        names = _in_order([keys.site for keys in request.keys], "The keys")
        for keys in request.keys:
            check_keys(self._agreement, keys)
        public = [key for keys in request.keys for key in (keys.channel, keys.mask)]
        if len(set(public)) != len(public):
            raise ForgedSignature("Two sites show the same key; each draws its own.")
        if self._held.keys not in request.keys:
            raise SplitRoster(f"The list of keys does not hold the keys that {self._site} has sent.")
        self._enough(names, "the sites that sent keys")
        return self._share_out(request.keys)

    def mask_(
        self, request: MaskedRequest, update: Vector, weight: int, totals: Mapping[str, float], noise_key: bytes = b""
    ) -> Masked:
        """Check and take the others' shares, and mask the update in place.

        Args:
            request: whose shares came, and the shares for this site.
            update: float32 [P], finite; **overwritten**: with 32-bit words the reply is a view of its memory.
            weight: how much the update counts, above 0.
            totals: the agreed totals.
            noise_key: where noise was agreed, 32 secret bytes from which it follows; the same in every attempt.

        Raises:
            DataError: the update, weight, totals or noise don't fit what was agreed; nothing has changed.
            OutOfTurn: shares were not given yet, or something else was masked already: the difference of two vectors
                under the same masks would tell the difference of the updates. The same again gives the same words.
            Replayed, ForgedSignature, SplitRoster, AlteredShare, TooFewSites: see `federation.masking`.
        """
        self._belongs(request.agreement)
        sent = self._held.sent
        if sent is None:
            raise OutOfTurn(
                f"{self._site} has not shared its secrets out yet; an update would be lost if it broke down."
            )
        self._same_keyring(request.keyring, "the request")
        held = self._take_shares(sent, request.shares)
        numbers = self._agreement.numbers
        if update.dtype != np.float32 or update.shape != (self._agreement.size,):
            raise DataError(
                f"The update is {update.dtype} {update.shape}; float32 [{self._agreement.size}] was agreed."
            )
        if not (update.flags.c_contiguous and update.flags.writeable):
            raise DataError("The update is masked in place; it must be contiguous and writable.")
        if weight < 1:
            raise DataError(f"The weight is {weight}; a site without weight has nothing to add.")
        numbers.check(update, {WEIGHT: weight, CLIPPED: 0, **totals})
        noise = self._noise(noise_key)
        # Other shares would mean other masks, whose difference is a mask that the coordinator must not know.
        told = {"shares": request.shares, "weight": weight, "totals": totals, "update": sha256(update.data).hexdigest()}
        if noise is not None:
            told["noise"] = sha256(noise_key).hexdigest()
        masked = sha256(canonical.encode(told)).hexdigest()
        if self._held.masked not in ("", masked):
            raise OutOfTurn(f"{self._site} has masked another update for this sum; masks are never used twice.")
        self._held = dataclasses.replace(self._held, shares=held, masked=masked)
        masks = Masks(self._masks())
        words: Words = (
            update.view(numbers.dtype) if numbers.dtype.itemsize == 4 else np.empty(update.size, numbers.dtype)
        )
        clipped = 0
        for part in chunks(update.size):
            clipped += numbers.encode(update[part], weight, words[part])
            if noise is not None:
                noise.add_to_(words[part])
            masks.apply_(words[part])
        sums = numbers.encode_totals({WEIGHT: weight, CLIPPED: clipped, **totals})
        masks.apply_to_totals_(sums)
        return Masked(self._site, self._agreement.digest, sent.keyring, tuple(sums.tolist()), words)

    def consent(self, request: ConsentRequest) -> Consent:
        """Sign the set of sites that are summed: one set, once.

        Raises:
            SecondUnmasking: another set was signed before.
            OutOfTurn: this site's update was not masked yet.
            Replayed, SplitRoster, TooFewSites: see `federation.masking`.
        """
        self._belongs(request.agreement)
        sent = self._held.sent
        if sent is None or not self._held.masked:
            raise OutOfTurn(f"{self._site} has not masked its update yet.")
        summed = _in_order(request.summed, "The summed sites")
        transcript = transcript_of(sent.keyring, request.shared, summed)
        if self._held.consent is not None:
            if transcript != self._held.consent.transcript:
                raise SecondUnmasking(
                    f"{self._site} has signed another set of sites for round {self._agreement.place.round}."
                )
            return self._held.consent
        if sorted(request.shared) != sorted(self._held.shares):
            raise SplitRoster(f"{self._site} was brought the shares of other sites than those that are named now.")
        if self._site not in summed or not set(summed) <= set(request.shared):
            raise SplitRoster(f"The summed sites must be {self._site} and others whose shares it was brought.")
        self._enough(summed, "the sites that are summed")
        consent = Consent(self._site, self._agreement.digest, transcript, "")
        consent = dataclasses.replace(consent, signature=signed(self._identity, consent))
        self._held = dataclasses.replace(self._held, consent=consent, summed=summed)
        return consent

    def open(self, request: OpenRequest) -> Opened:
        """Release the shares that open the signed sum, once enough sites have signed the same; then forget them.

        Raises:
            SecondUnmasking: the set is not the one that this site has signed.
            OutOfTurn: this site has signed none.
            Replayed, ForgedSignature, SplitRoster, TooFewSites: see `federation.masking`.
        """
        self._belongs(request.agreement)
        own = self._held.consent
        if own is None:
            raise OutOfTurn(f"{self._site} has signed no set of sites yet.")
        if request.summed != self._held.summed:
            raise SecondUnmasking(f"{self._site} opens the sum of the sites that it has signed, and no other.")
        self._check_consents(own, request)
        if self._held.opened is not None:
            return self._held.opened
        seeds = {site: seed for site, (_, seed) in self._held.shares.items() if site in request.summed}
        keys = {site: key for site, (key, _) in self._held.shares.items() if site not in request.summed}
        opened = Opened(self._site, self._agreement.digest, seeds, keys)
        self._held = dataclasses.replace(self._held, secrets=None, shares={}, opened=opened)
        return opened

    def _noise(self, key: bytes) -> DiscreteGaussianNoise | None:
        """Give this round's noise in steps, the same for the same key; None where none was agreed."""
        numbers, place = self._agreement.numbers, self._agreement.place
        if bool(key) != bool(numbers.noise):
            raise DataError(
                f"Noise was {'' if numbers.noise else 'not '}agreed for this sum, but {'a' if key else 'no'} key for "
                "it is kept beside the update, which must not leave."
            )
        if not key:
            return None
        return DiscreteGaussianNoise(numbers.noise_variance, Secret(key, f"{place.manifest_hash}/{place.round}/share"))

    def _begin(self) -> Held:
        agreement, drawn = self._agreement, Secrets.draw()
        channel, mask = (key.public_key().public_bytes_raw().hex() for key in (drawn.channel_key, drawn.mask_key))
        keys = Keys(self._site, agreement.digest, channel, mask, signature="")
        keys = dataclasses.replace(keys, signature=signed(self._identity, keys))
        return Held(agreement.place, agreement.digest, keys, drawn)

    def _share_out(self, keyring: tuple[Keys, ...]) -> Shares:
        own, agreement = self._secrets(), self._agreement
        points = {keys.site: agreement.points[keys.site] for keys in keyring}
        of_key, of_seed = (
            shamir.split(bytes.fromhex(secret), points.values(), agreement.options.threshold)
            for secret in (own.mask, own.seed)
        )
        name = keyring_of(agreement, keyring)
        commitment = sha256(bytes.fromhex(own.seed)).hexdigest()
        sealed = {}
        for keys in keyring:
            if keys.site != self._site:
                nonce, point = secrets.token_bytes(_NONCE_BYTES), points[keys.site]
                channel = self._channel(keys, name, self._site, keys.site)
                sealed[keys.site] = nonce + channel.encrypt(nonce, of_key[point] + of_seed[point], commitment.encode())
        told = {site: data.hex() for site, data in sealed.items()}
        shares = Shares(self._site, agreement.digest, name, commitment, told, signature="")
        shares = dataclasses.replace(shares, signature=signed(self._identity, shares))
        point = points[self._site]
        kept = {self._site: (of_key[point].hex(), of_seed[point].hex())}
        self._held = dataclasses.replace(self._held, keyring=keyring, sent=shares, shares=kept)
        return shares

    def _take_shares(self, sent: Shares, shares: tuple[Share, ...]) -> dict[str, tuple[str, str]]:
        names = _in_order([share.site for share in shares], "The shares")
        if unknown := sorted(set(names) - set(sent.sealed)):
            raise SplitRoster(f"A share of {unknown[0]} came, whose keys {self._site} was not shown.")
        self._enough([self._site, *names], "the sites that shared their secrets")
        held = dict(self._held.shares)
        keys = {keys.site: keys for keys in self._held.keyring}
        for share in shares:
            check_signature(self._agreement, share)
            self._same_keyring(share.keyring, share.site)
            held[share.site] = self._unseal(keys[share.site], share)
        return held

    def _unseal(self, sender: Keys, share: Share) -> tuple[str, str]:
        try:
            sealed = bytes.fromhex(share.sealed)
            nonce, text = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
            channel = self._channel(sender, share.keyring, share.site, self._site)
            opened = channel.decrypt(nonce, text, share.commitment.encode())
        except (InvalidTag, ValueError):
            raise AlteredShare(f"The share of {share.site} for {self._site} was changed on its way.") from None
        if len(opened) != 2 * shamir.SHARE_BYTES:
            raise AlteredShare(f"The share of {share.site} has {len(opened)} bytes.")
        return opened[: shamir.SHARE_BYTES].hex(), opened[shamir.SHARE_BYTES :].hex()

    def _channel(self, other: Keys, keyring: str, sender: str, receiver: str) -> ChaCha20Poly1305:
        purpose = canonical.encode(["share", keyring, sender, receiver])
        return ChaCha20Poly1305(shared_key(self._secrets().channel_key, bytes.fromhex(other.channel), purpose))

    def _masks(self) -> list[Mask]:
        """The masks of all that shared their secrets: one with each of the others, and the own."""
        own, keyring = self._secrets(), self._held.keyring
        pairs = [keys for keys in keyring if keys.site in self._held.shares and keys.site != self._site]
        name = keyring_of(self._agreement, keyring)
        masks = [pair_mask(own.mask_key, self._site, keys.site, bytes.fromhex(keys.mask), name) for keys in pairs]
        return [*masks, Mask(bytes.fromhex(own.seed), add=True)]

    def _check_consents(self, own: Consent, request: OpenRequest) -> None:
        names = _in_order([consent.site for consent in request.consents], "The signatures")
        for consent in request.consents:
            check_signature(self._agreement, consent)
            if consent.transcript != own.transcript:
                raise SplitRoster(f"{consent.site} was shown other keys or other sites than {self._site}.")
        if stranger := sorted(set(names) - set(request.summed)):
            raise SplitRoster(f"{stranger[0]} signed, but is not among the summed sites.")
        self._enough(names, "the sites that signed", self._agreement.options.threshold)

    def _belongs(self, agreement: str) -> None:
        if agreement != self._agreement.digest:
            raise Replayed(
                f"The request is for sum {agreement:.64}; {self._site} is at {self._agreement.digest}, round "
                f"{self._agreement.place.round}, attempt {self._agreement.place.attempt}."
            )

    def _same_keyring(self, keyring: str, who: str) -> None:
        sent = self._held.sent
        if sent is None or keyring != sent.keyring:
            raise SplitRoster(f"{self._site} and {who} were shown different lists of keys.")

    def _enough(self, sites: Collection[str], what: str, least: int | None = None) -> None:
        """Refuse fewer sites than the least: the threshold or, where sums are about, the site's own minimum."""
        least = least or self._least
        if len(sites) < least:
            raise TooFewSites(
                f"{what[0].upper()}{what[1:]} are {len(sites)} ({', '.join(sorted(sites))}); {self._site} needs "
                f"{least}: the threshold is {self._agreement.options.threshold}, its own minimum {self._minimum}."
            )

    def _secrets(self) -> Secrets:
        if self._held.secrets is None:
            raise OutOfTurn(f"{self._site} has opened this sum and forgotten its secrets.")
        return self._held.secrets


def _in_order(names: Sequence[str], what: str) -> tuple[str, ...]:
    if list(names) != sorted(set(names)):
        raise ProtocolError(f"{what} are not in the order of distinct site names.")
    return tuple(names)
