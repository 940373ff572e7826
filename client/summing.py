"""A site's answers in the masked sums of a run: what was kept for a round is masked, once, and its secrets are durable.

`client.masked` is the protocol; this is what it rests on at a site. The agreement follows from the manifest that the
site agreed to and from the request whose answer it kept, so whoever trained from other weights is in another sum. What
the site holds is on the disk before an answer is handed over: killed at any moment, it gives the same answer again, or
none.
"""

from client.archive import RunArchive
from client.masked import MaskedSite
from federation.identity import Identity
from federation.masking import (
    ConsentRequest,
    KeysRequest,
    MaskedRequest,
    OpenRequest,
    Place,
    Reply,
    Request,
    SharesRequest,
)
from federation.messages import EvaluateReply, SiteRefusal
from federation.summed import Summand, aggregation_of, agreement_of, assessment_of, score_of, update_of


class Summing:
    """One site's part in the sums of one run; ask while holding the right to work on the run."""

    def __init__(self, site: str, run: RunArchive, identity: Identity, minimum: int) -> None:
        """Take part in a run.

        Args:
            site: the site's name.
            run: what it keeps of the run.
            identity: the key that the run's roster lists for it.
            minimum: the fewest sites that its policy lets it be summed with, itself among them.
        """
        self._site, self._run, self._identity = site, run, identity
        self._manifest = run.manifest()
        self._minimum = max(minimum, aggregation_of(self._manifest).min_sites)

    def answer(self, request: Request) -> Reply:
        """Answer a request of a sum; what must not be forgotten is kept before.

        Raises:
            SiteRefusal: there is nothing to mask for that round.
            ProtocolError: see `client.masked`; nothing has changed.
        """
        place = request.place
        agreement = agreement_of(self._manifest, place, self._worked_on(place))
        before = self._run.held(place.purpose)
        site = MaskedSite(agreement, self._site, self._identity, self._minimum, before)
        reply = self._answer(site, request)
        after = site.to_secret_bytes()
        if after != before:
            self._run.hold(place.purpose, after)
        return reply

    def _answer(self, site: MaskedSite, request: Request) -> Reply:
        match request:
            case KeysRequest():
                return site.keys(request)
            case SharesRequest():
                return site.shares(request)
            case MaskedRequest():
                part = self._summand(request.place)
                return site.mask_(request, part.vector, part.weight, part.totals, part.noise_key)
            case ConsentRequest():
                return site.consent(request)
            case OpenRequest():
                return site.open(request)

    def _worked_on(self, place: Place) -> str:
        """Give the digest of the request whose answer was kept."""
        if place.purpose == "train":
            digest = self._run.asked(place.round)
        elif place.purpose == "evaluate tasks":
            told = self._run.assessment(place.round)
            digest = None if told is None else told.request_digest
        else:
            score = self._score(place)
            digest = None if score is None else score.request_digest
        if digest is None:
            raise SiteRefusal(f"{self._site} has nothing to mask for round {place.round} ({place.purpose}).")
        return digest

    def _summand(self, place: Place) -> Summand:
        """Give what was kept, in memory of its own: it is masked in place."""
        if place.purpose == "evaluate tasks":
            told = self._run.assessment(place.round)
            if told is not None:
                return assessment_of(told)
        elif place.purpose != "train":
            score = self._score(place)
            if score is not None:
                return score_of(self._manifest, score)
        elif (reply := self._run.reply(place.round)) is not None:
            return update_of(self._manifest, reply, self._run.noise_key(place.round))
        raise SiteRefusal(f"{self._site} does not keep its answer of round {place.round} any more.")

    def _score(self, place: Place) -> EvaluateReply | None:
        return self._run.score(place.round, place.purpose.removeprefix("evaluate "))
