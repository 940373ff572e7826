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
from federation.messages import EvaluateReply, SiteRefusal, TrainReply
from federation.summed import Summand, aggregation_of, agreement_of, score_of, update_of


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
        kept = self._kept(place)
        agreement = agreement_of(self._manifest, place, kept.request_digest)
        before = self._run.held(place.purpose)
        site = MaskedSite(agreement, self._site, self._identity, self._minimum, before)
        reply = self._answer(site, request, kept)
        after = site.to_secret_bytes()
        if after != before:
            self._run.hold(place.purpose, after)
        return reply

    def _answer(self, site: MaskedSite, request: Request, kept: TrainReply | EvaluateReply) -> Reply:
        match request:
            case KeysRequest():
                return site.keys(request)
            case SharesRequest():
                return site.shares(request)
            case MaskedRequest():
                part = self._summand(kept)
                return site.mask_(request, part.vector, part.weight, part.totals)
            case ConsentRequest():
                return site.consent(request)
            case OpenRequest():
                return site.open(request)

    def _summand(self, kept: TrainReply | EvaluateReply) -> Summand:
        return update_of(self._manifest, kept) if isinstance(kept, TrainReply) else score_of(kept)

    def _kept(self, place: Place) -> TrainReply | EvaluateReply:
        """Give what is to be masked, in memory of its own."""
        kept: TrainReply | EvaluateReply | None
        if place.purpose == "train":
            kept = self._run.reply(place.round)
        else:
            kept = self._run.score(place.round, place.purpose.removeprefix("evaluate "))
        if kept is None:
            raise SiteRefusal(f"{self._site} has nothing to mask for round {place.round} ({place.purpose}).")
        return kept
