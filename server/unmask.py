"""The coordinator's side of secure aggregation: it carries keys and shares, and opens the sum and nothing else.

One object per sum, as pure as the round engine. It walks through five stages; in each it asks some sites, takes what
they answer, and `advance`s when all have answered or nobody waits any longer. Who has not answered by then has dropped
out; below the threshold the sum fails, naming the stage and the sites. Masked updates are added up as they come, chunk
by chunk. All that it does follows from the replies it was given and where `advance` stood between them, so a
coordinator that was killed is rebuilt by giving it the same again.
"""

import enum
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from federation import shamir
from federation.keystream import Mask, Masks, chunks, pair_mask
from federation.masking import (
    CLIPPED,
    WEIGHT,
    Agreement,
    Consent,
    ConsentRequest,
    ForgedSignature,
    Keys,
    KeysRequest,
    Masked,
    MaskedRequest,
    MaskingError,
    Opened,
    OpenRequest,
    OutOfTurn,
    Replayed,
    Reply,
    Request,
    Share,
    Shares,
    SharesRequest,
    SplitRoster,
    TooFewSites,
    WrongLength,
    check_keys,
    check_signature,
    keyring_of,
    transcript_of,
)
from federation.messages import ProtocolError, Vector, Words
from tokenizer.wording import several

T = TypeVar("T", Keys, Shares, Masked, Consent, Opened)


class Stage(enum.Enum):
    """What the sites are asked for."""

    KEYS = "keys"
    SHARES = "shares"
    MASKED = "masked updates"
    CONSENT = "signatures"
    OPENING = "opening shares"
    DONE = "done"


_ORDER = list(Stage)
_REPLIES: dict[Stage, type] = {
    Stage.KEYS: Keys,
    Stage.SHARES: Shares,
    Stage.MASKED: Masked,
    Stage.CONSENT: Consent,
    Stage.OPENING: Opened,
}


@dataclass(frozen=True, eq=False)
class Opening:
    """What a sum tells: nothing about a single site.

    Attributes:
        mean: the weighted mean of the sites' clipped updates, float32 [P].
        sites: whose updates are in it.
        weight: the sum of their weights.
        clipped: how many of their values were beyond the clip.
        totals: the sums of the other agreed totals.
        error: the greatest error of a value of the mean, before it was rounded to float32.
    """

    mean: Vector
    sites: tuple[str, ...]
    weight: int
    clipped: int
    totals: Mapping[str, float]
    error: float


@dataclass(frozen=True, eq=False)
class Collected:
    """A sum whose masked updates have all come: what must outlive a crash from then on.

    Attributes:
        keys, shares: the replies of the first two stages.
        summed: whose masked updates are in the sum.
        totals: the sum of the masked totals, each modulo 2⁶⁴.
        words: the sum of the masked updates, [P]; all masks are still on it.
    """

    keys: tuple[Keys, ...]
    shares: tuple[Shares, ...]
    summed: tuple[str, ...]
    totals: tuple[int, ...]
    words: Words


class Unmasking:
    """One sum, from the first key to the mean."""

    def __init__(self, agreement: Agreement, least: int = 0) -> None:
        """Begin with the keys.

        Args:
            agreement: what is summed.
            least: the fewest sites that may be summed; the threshold where it is smaller.
        """
        self.stage = Stage.KEYS
        self._agreement, self._least = agreement, least
        self._asked = tuple(sorted(agreement.roster))
        self._replies: dict[Stage, dict[str, Reply]] = {stage: {} for stage in _REPLIES}
        self._keyring, self._transcript = "", ""
        self._words: Words | None = None
        self._totals = np.zeros(len(agreement.numbers.totals), np.uint64)

    @classmethod
    def resume(cls, agreement: Agreement, collected: Collected) -> "Unmasking":
        """Go on with a sum after its masked updates came: with the signatures."""
        self = cls(agreement)
        self._replies[Stage.KEYS] = {reply.site: reply for reply in collected.keys}
        self._replies[Stage.SHARES] = {reply.site: reply for reply in collected.shares}
        nothing = np.empty(0, agreement.numbers.dtype)
        self._keyring = keyring_of(agreement, collected.keys)
        self._replies[Stage.MASKED] = {
            site: Masked(site, agreement.digest, self._keyring, (), nothing) for site in collected.summed
        }
        self._words, self._totals = collected.words, np.array(collected.totals, np.uint64)
        self._transcript = transcript_of(self._keyring, self._answered(Stage.SHARES), collected.summed)
        self._asked, self.stage = collected.summed, Stage.CONSENT
        return self

    def collected(self) -> Collected:
        """Give what `resume` needs, between the masked updates and the opening.

        Raises:
            OutOfTurn: they have not come yet, or the sum was opened.
        """
        if self.stage is not Stage.CONSENT or self._words is None:
            raise OutOfTurn("A sum is kept when its masked updates have come.")
        summed, totals = self._answered(Stage.MASKED), tuple(self._totals.tolist())
        return Collected(tuple(self._of(Keys)), tuple(self._of(Shares)), summed, totals, self._words)

    def leave_out(self, sites: Collection[str]) -> None:
        """Ask none but these sites; in the first stage only."""
        if self.stage is not Stage.KEYS:
            raise OutOfTurn("Sites are left out before the first keys.")
        self._asked = tuple(site for site in self._asked if site in sites)

    @property
    def asked(self) -> tuple[str, ...]:
        """The sites, by name, that the open stage asks: those that have not dropped out."""
        return self._asked

    @property
    def missing(self) -> tuple[str, ...]:
        """The asked sites that have not answered."""
        return tuple(site for site in self._asked if site not in self._replies.get(self.stage, {}))

    def request(self, site: str, deadline_s: float) -> Request:
        """Give what a site is asked in the open stage."""
        which = self._agreement.place, self._agreement.digest
        match self.stage:
            case Stage.KEYS:
                return KeysRequest(*which, deadline_s)
            case Stage.SHARES:
                return SharesRequest(*which, tuple(self._of(Keys)), deadline_s)
            case Stage.MASKED:
                shares = tuple(_for(site, shares) for shares in self._of(Shares) if shares.site != site)
                return MaskedRequest(*which, self._keyring, shares, deadline_s)
            case Stage.CONSENT:
                return ConsentRequest(*which, self._answered(Stage.SHARES), self._asked, deadline_s)
            case Stage.OPENING:
                return OpenRequest(*which, self._answered(Stage.MASKED), tuple(self._of(Consent)), deadline_s)
            case Stage.DONE:
                raise OutOfTurn("The sum is open; there is nothing more to ask.")

    def receive(self, site: str, reply: Reply) -> None:
        """Take a site's reply of the open stage; the first one counts, one that came again or late changes nothing.

        Raises:
            MaskingError: the reply can't be used; the site counts as one that has not answered.
        """
        stage = next(stage for stage, kind in _REPLIES.items() if isinstance(reply, kind))
        if _ORDER.index(stage) < _ORDER.index(self.stage):
            return
        if stage is not self.stage:
            raise OutOfTurn(f"{site} sent {stage.value} while {self.stage.value} are asked for.")
        if reply.site != site or site not in self._asked:
            raise ForgedSignature(f"A reply of {site} names {reply.site:.80}, or was not asked for.")
        if site in self._replies[self.stage]:
            return
        if reply.agreement != self._agreement.digest:
            raise Replayed(f"{site} answers for sum {reply.agreement:.64}; this is {self._agreement.digest}.")
        self._check(reply)
        if isinstance(reply, Masked):
            self._add(reply)
            reply = Masked(site, reply.agreement, reply.keyring, (), np.empty(0, reply.words.dtype))
        self._replies[self.stage][site] = reply

    def advance(self) -> None:
        """Close the open stage: who has not answered has dropped out.

        Raises:
            TooFewSites: fewer answered than the threshold, naming the stage and who is missing.
        """
        if self.stage is Stage.DONE:
            raise OutOfTurn("The sum is open; no stage is left.")
        answered, threshold = self._answered(self.stage), self._agreement.options.threshold
        if self.stage in (Stage.KEYS, Stage.SHARES, Stage.MASKED):
            threshold = max(threshold, self._least)
        if len(answered) < threshold:
            missing = ", ".join(sorted(set(self._agreement.roster) - set(answered)))
            place = self._agreement.place
            raise TooFewSites(
                f"Round {place.round}, attempt {place.attempt}: {several(len(answered), 'site')} gave "
                f"{self.stage.value}, {threshold} must. Missing: {missing}. {self._way_out()}"
            )
        if self.stage is Stage.KEYS:
            self._keyring = keyring_of(self._agreement, self._of(Keys))
        if self.stage is Stage.MASKED:
            self._transcript = transcript_of(self._keyring, self._answered(Stage.SHARES), answered)
        self._asked = answered
        self.stage = _ORDER[_ORDER.index(self.stage) + 1]

    def open_(self) -> Opening:
        """Take the masks off the sum, in place; once, after the last stage was closed.

        Raises:
            MaskingError: naming the site whose secret the shares don't give back, and those who sent them.
            OutOfTurn: a stage is open, or the sum was opened before.
        """
        if self.stage is not Stage.DONE or self._words is None:
            raise OutOfTurn(f"The sum can't be opened while {self.stage.value} are asked for, or a second time.")
        masks = self._remaining_masks()
        words, self._words = self._words, None
        masks.apply_to_totals_(self._totals)
        numbers, sites = self._agreement.numbers, self._answered(Stage.MASKED)
        totals = numbers.decode_totals(self._totals)
        weight, clipped = round(totals.pop(WEIGHT)), round(totals.pop(CLIPPED))
        if not 1 <= weight <= len(sites) * self._agreement.options.max_weight:
            raise MaskingError(f"The sum of {', '.join(sites)} has the weight {weight}: a site didn't mask as agreed.")
        mean = words.view(np.float32) if words.itemsize == 4 else np.empty(words.size, np.float32)
        for part in chunks(words.size):
            masks.apply_(words[part])
            numbers.decode(words[part], weight, mean[part])
        return Opening(mean, sites, weight, clipped, totals, numbers.mean_error(len(sites), weight))

    def _check(self, reply: Reply) -> None:
        match reply:
            case Keys():
                check_keys(self._agreement, reply)
            case Shares():
                check_signature(self._agreement, reply)
                self._check_keyring(reply.site, reply.keyring)
                if set(reply.sealed) != set(self._answered(Stage.KEYS)) - {reply.site}:
                    raise MaskingError(f"{reply.site} has not shared its secrets out over all sites that sent keys.")
            case Masked():
                self._check_keyring(reply.site, reply.keyring)
                self._check_length(reply)
            case Consent():
                check_signature(self._agreement, reply)
                if reply.transcript != self._transcript:
                    raise SplitRoster(f"{reply.site} signed other keys or sites than it was shown.")
            case Opened():
                summed, shared = self._answered(Stage.MASKED), self._answered(Stage.SHARES)
                if set(reply.seeds) != set(summed) or set(reply.keys) != set(shared) - set(summed):
                    raise MaskingError(f"{reply.site} has not released the shares that open the sum, or others.")

    def _check_keyring(self, site: str, keyring: str) -> None:
        if keyring != self._keyring:
            raise SplitRoster(f"{site} answers for other keys than were sent.")

    def _check_length(self, reply: Masked) -> None:
        numbers, size = self._agreement.numbers, self._agreement.size
        if reply.words.shape != (size,) or reply.words.dtype != numbers.dtype:
            raise WrongLength(
                f"The masked update of {reply.site} is {reply.words.dtype} {reply.words.shape}; {numbers.dtype} "
                f"[{size}] was agreed."
            )
        if len(reply.totals) != len(numbers.totals) or not all(0 <= total < 2**64 for total in reply.totals):
            raise WrongLength(f"{reply.site} sent {len(reply.totals)} totals; {len(numbers.totals)} were agreed.")

    def _add(self, reply: Masked) -> None:
        if self._words is None:
            self._words = np.zeros(self._agreement.size, self._agreement.numbers.dtype)
        for part in chunks(self._words.size):
            self._words[part] += reply.words[part]
        self._totals += np.array(reply.totals, np.uint64)

    def _remaining_masks(self) -> Masks:
        """What stands over the sum: the self masks of the summed, and their masks with those that dropped out."""
        summed, dropped = self._answered(Stage.MASKED), self._answered(Stage.SHARES)
        keys = {reply.site: reply for reply in self._of(Keys)}
        masks = [Mask(self._seed(site), add=False) for site in summed]
        for site in set(dropped) - set(summed):
            own = self._mask_key(site, keys[site])
            for other in summed:
                # The dropped site's own mask is what would have cancelled the other's.
                masks.append(pair_mask(own, site, other, bytes.fromhex(keys[other].mask), self._keyring))
        return Masks(masks)

    def _seed(self, site: str) -> bytes:
        shares = {reply.site: reply.seeds[site] for reply in self._of(Opened)}
        commitments = {reply.site: reply.commitment for reply in self._of(Shares)}
        return self._secret(site, shares, lambda secret: sha256(secret).hexdigest() == commitments[site])

    def _mask_key(self, site: str, keys: Keys) -> X25519PrivateKey:
        shares = {reply.site: reply.keys[site] for reply in self._of(Opened)}
        secret = self._secret(site, shares, lambda secret: _public(secret) == keys.mask)
        return X25519PrivateKey.from_private_bytes(secret)

    def _secret(self, site: str, shares: Mapping[str, str], fits: Callable[[bytes], bool]) -> bytes:
        """Combine a threshold of shares; where more came, one that is wrong is gone around."""
        senders, threshold = sorted(shares) * 2, self._agreement.options.threshold
        for start in range(len(shares)):
            chosen = senders[start : start + threshold]
            try:
                secret = shamir.combine({self._agreement.points[one]: bytes.fromhex(shares[one]) for one in chosen})
            except (ValueError, ProtocolError):
                continue
            if fits(secret):
                return secret
        opening = ", ".join(self._answered(Stage.OPENING))
        raise MaskingError(
            f"The shares of {site}'s secret don't give back what it was bound to: {site} shared a wrong one out, or "
            f"one of {opening} released a wrong share. This round's updates are lost; the next round has new keys."
        )

    def _way_out(self) -> str:
        if self.stage in (Stage.KEYS, Stage.SHARES, Stage.MASKED):
            return "Try the round again in a new attempt once they can answer."
        return (
            "Ask the missing again, they keep their answer; a site that has signed takes part in no other attempt of "
            "this round."
        )

    def _of(self, kind: type[T]) -> list[T]:
        stage = next(stage for stage, reply in _REPLIES.items() if reply is kind)
        return [reply for _, reply in sorted(self._replies[stage].items()) if isinstance(reply, kind)]

    def _answered(self, stage: Stage) -> tuple[str, ...]:
        return tuple(sorted(self._replies[stage]))


def _public(secret: bytes) -> str:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw().hex()


def _for(site: str, shares: Shares) -> Share:
    return Share(
        shares.site, shares.agreement, shares.keyring, shares.commitment, shares.sealed[site], shares.signature
    )
