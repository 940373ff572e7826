"""A small federation whose sites mask their updates, played without a transport."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.masked import MaskedSite
from federation.fixed_point import Total
from federation.identity import Identity
from federation.masking import (
    Agreement,
    Consent,
    ConsentRequest,
    KeysRequest,
    MaskedRequest,
    MaskingOptions,
    OpenRequest,
    Place,
    SharesRequest,
)
from federation.messages import Vector
from server.unmask import Opening, Stage, Unmasking

NAMES = ("ash", "birch", "cedar", "elm", "fir", "hazel", "larch")
IDENTITIES = {name: Identity(Ed25519PrivateKey.generate()) for name in NAMES}
TOTALS = (Total("steps", 50), Total("loss", 1e6, 2**-16))
FAR = 1e12


def agreement(sites: int = 5, threshold: int = 3, size: int = 1000, **changes: Any) -> Agreement:
    """A sum of the first sites; `changes` may be of the agreement, of its place or of its options."""
    roster = {name: key.public for name, key in list(IDENTITIES.items())[:sites]}
    place = Place("ab" * 32, 1, "train", 1)
    options = MaskingOptions(threshold, clip=1.0, max_weight=1000, totals=TOTALS)
    return _changed(Agreement(_changed(place, changes), "cd" * 32, size, roster, _changed(options, changes)), changes)


def _changed(part: Any, changes: Mapping[str, Any]) -> Any:
    own = {field.name for field in dataclasses.fields(part)}
    return dataclasses.replace(part, **{name: value for name, value in changes.items() if name in own})


class Federation:
    """All sites of a sum, their updates, and an honest coordinator."""

    def __init__(self, agreed: Agreement, updates: Mapping[str, Vector] | None = None, weight: int = 100) -> None:
        self.agreement = agreed
        rng = np.random.default_rng(7)
        self.updates = updates or {name: rng.normal(0, 0.2, agreed.size).astype(np.float32) for name in agreed.roster}
        self.weights = {name: weight + 10 * number for number, name in enumerate(agreed.roster)}
        self.totals = {name: {"steps": 2.0 + n, "loss": 0.25 + n} for n, name in enumerate(agreed.roster)}
        self.sites = {name: MaskedSite(agreed, name, IDENTITIES[name]) for name in agreed.roster}
        self.server = Unmasking(agreed)

    def answer(self, name: str, request: Any) -> Any:
        site = self.sites[name]
        match request:
            case KeysRequest():
                return site.keys(request)
            case SharesRequest():
                return site.shares(request)
            case MaskedRequest():
                return site.mask_(request, self.updates[name].copy(), self.weights[name], self.totals[name])
            case ConsentRequest():
                return site.consent(request)
            case OpenRequest():
                return site.open(request)
        raise AssertionError(request)

    def ask(self, name: str) -> Any:
        return self.answer(name, self.server.request(name, FAR))

    def play(self, until: Stage = Stage.DONE, dropped: Mapping[Stage, Collection[str]] | None = None) -> None:
        """Walk through the stages before `until`; sites that drop out at a stage don't answer from then on."""
        while self.server.stage is not until:
            silent = (dropped or {}).get(self.server.stage, ())
            for name in self.server.asked:
                if name not in silent:
                    self.server.receive(name, self.ask(name))
            self.server.advance()

    def requests(self, stage: Stage) -> dict[str, Any]:
        """Play up to a stage and give what each site is asked in it."""
        self.play(stage)
        return {name: self.server.request(name, FAR) for name in self.server.asked}

    def expected(self, sites: Collection[str]) -> np.ndarray:
        """The weighted mean of the clipped updates, in float64."""
        clip = self.agreement.options.clip
        parts = [self.weights[s] * np.clip(self.updates[s].astype(np.float64), -clip, clip) for s in sorted(sites)]
        return np.sum(parts, axis=0) / sum(self.weights[s] for s in sites)

    def check(self, opening: Opening) -> None:
        """The sum is that of exactly the sites it names, within the error that it states."""
        want = self.expected(opening.sites)
        allowed = opening.error + np.abs(want) * 2.0**-24 + 1e-12  # the mean is told in float32
        assert np.all(np.abs(opening.mean - want) <= allowed)
        assert opening.mean.dtype == np.float32
        assert opening.weight == sum(self.weights[s] for s in opening.sites)
        for name in ("steps", "loss"):
            assert opening.totals[name] == sum(self.totals[s][name] for s in opening.sites)
        clip = self.agreement.options.clip
        assert opening.clipped == sum(int(np.sum(np.abs(self.updates[s]) > clip)) for s in opening.sites)


def resigned(name: str, message: Any, **changes: Any) -> Any:
    """A message that its site, gone bad, has changed and signed again."""
    from federation.masking import signed

    changed = dataclasses.replace(message, **changes)
    return dataclasses.replace(changed, signature=signed(IDENTITIES[name], changed))


def changed(request: Any, field: str, index: int, **changes: Any) -> Any:
    """A request of which one item of a list was changed on its way."""
    items = list(getattr(request, field))
    items[index] = dataclasses.replace(items[index], **changes)
    return dataclasses.replace(request, **{field: tuple(items)})


def foreign_consent(name: str, digest: str, transcript: str) -> Consent:
    """A consent that a site would have signed for something else."""
    return resigned(name, Consent(name, digest, transcript, ""))
