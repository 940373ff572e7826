"""A round's masked sum at the coordinator: attempts, what of them is durable, and why one fails.

As pure as the round engine: it takes answers and gives requests. Before signatures are asked for, a sum that fails, or
whose coordinator dies, is begun anew with new keys: nothing was opened. What has come by then, the sum with all masks
on and the messages that its masks come from, is durable before the first site is asked to sign, because a site signs
one set in a round: from there on the same attempt goes on, also after a crash. Nothing that is kept tells of a single
site.
"""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Protocol

from federation.manifest import Manifest
from federation.masking import Agreement, MaskingError, Place, Purpose, Reply, Request, TooFewSites
from federation.messages import ProtocolError, Refusal, printable
from federation.messages import Reply as RoundReply
from federation.summed import LOSS, STEPS, TOKENS, aggregation_of, agreement_of
from server.journal import Journal, SumEntry
from server.reasons import gathered
from server.unmask import Collected, Opening, Stage, Unmasking

_MOST_TOLD, _LEAST_TOLD = 250, 80  # characters of why a sum failed, which `Rounds.fail` puts into a sentence

Answer = RoundReply | Reply | ProtocolError
"""What came back for a request: a reply of any vocabulary, or why it could not be read."""


class SumStore(Protocol):
    """Where collected sums are kept; each method returns when the bytes are on the disk."""

    def keep_sum(self, number: int, purpose: str, collected: Collected) -> str:
        """Keep a sum with all masks on, and give the sha256 of its file."""

    def collected(self, number: int, purpose: str, sha256: str) -> Collected:
        """Give back a kept sum."""


class MaskedSum:
    """The sum of one round for one purpose."""

    def __init__(
        self,
        manifest: Manifest,
        where: tuple[int, Purpose],
        work: str,
        journal: Journal,
        store: SumStore,
        dropped: Callable[[str, str], None],
    ) -> None:
        """Take the sum up where the ledger says it is.

        Args:
            manifest: the run.
            where: its round, and what for.
            work: digest of the request whose answers are summed.
            journal, store: what is durable.
            dropped: told of each site that is left out, and why.
        """
        self._manifest, (self._number, self._purpose), self._work = manifest, where, work
        self._journal, self._store, self._dropped = journal, store, dropped
        self._least = max(aggregation_of(manifest).min_sites, manifest.min_sites)
        known = journal.sum(*where)
        self._entry = known or SumEntry(self._number, self._purpose)
        self._reasons: dict[str, str] = {}
        self._unmasking: Unmasking | None = None
        if self._entry.collected_sha256:
            collected = store.collected(self._number, self._purpose, self._entry.collected_sha256)
            self._unmasking = Unmasking.resume(self._agreement(self._entry.attempt), collected)

    @property
    def name(self) -> str:
        """Names the attempt, for people who look at messages."""
        return f"{self._number}/{self._purpose}/{self._entry.attempt}"

    @property
    def signing(self) -> bool:
        """Tell whether signatures may have been given: then only the same attempt can end the sum."""
        return bool(self._entry.collected_sha256)

    @property
    def done(self) -> bool:
        """Tell whether all stages are closed."""
        return self._unmasking is not None and self._unmasking.stage is Stage.DONE

    @property
    def missing(self) -> tuple[str, ...]:
        """The sites that the open stage still waits for."""
        return self._open.missing

    def begin(self) -> None:
        """Begin an attempt, with new keys; where sites may have signed, go on with the last."""
        if self.signing:
            return
        self._entry = replace(self._entry, attempt=self._entry.attempt + 1, stage=Stage.KEYS.value)
        self._journal.note_sum(self._entry)
        self._reasons = {}
        self._unmasking = Unmasking(self._agreement(self._entry.attempt), self._least)

    def leave_out(self, sites: Collection[str]) -> None:
        """Ask only these sites: the others have nothing to add."""
        self._open.leave_out(sites)

    def request(self, site: str, deadline_s: float) -> Request:
        """Give what a site is asked in the open stage."""
        return self._open.request(site, deadline_s)

    def receive(self, site: str, answer: Answer) -> None:
        """Take a site's answer; one that can't be used is told, and the site counts as one that did not answer."""
        reason = ""
        if isinstance(answer, Reply):
            try:
                self._open.receive(site, answer)
            except MaskingError as problem:
                reason = str(problem)
        else:
            reason = _reason(answer)
        if reason:
            self._reasons[site] = printable(reason)

    def advance(self) -> None:
        """Close the open stage; the sites that have not answered are left out from here on.

        Raises:
            TooFewSites: with the stage, the missing, and why each is.
        """
        opening, stage = self._open, self._open.stage
        missing = {site: f"{stage.value}: {self._why(site)}" for site in opening.missing}
        try:
            opening.advance()
        except TooFewSites as problem:
            room = max(_LEAST_TOLD, _MOST_TOLD - len(str(problem)))
            told = gathered({site: self._why(site) for site in missing}, room)
            reason = f"{str(problem).removesuffix('.')} ({told})." if told else str(problem)
            self._entry = replace(self._entry, reason=reason)
            self._journal.note_sum(self._entry, missing)
            raise TooFewSites(reason) from None
        for site, why in missing.items():
            self._dropped(site, why)
        left = ", ".join(f"{site} ({why})" for site, why in missing.items())
        self._entry = replace(
            self._entry,
            stage=opening.stage.value,
            dropped=", ".join(filter(None, (self._entry.dropped if stage is not Stage.KEYS else "", left))),
        )
        if opening.stage is Stage.CONSENT:
            sha256 = self._store.keep_sum(self._number, self._purpose, opening.collected())
            self._entry = replace(self._entry, collected_sha256=sha256)
        self._reasons = {}
        self._journal.note_sum(self._entry, missing)

    def open_(self) -> Opening:
        """Take the masks off, and note what the sum tells.

        Raises:
            MaskingError: it can't be opened; the reason is in the ledger.
        """
        try:
            opening = self._open.open_()
        except MaskingError as problem:
            self._entry = replace(self._entry, reason=str(problem))
            self._journal.note_sum(self._entry)
            raise
        totals = opening.totals
        self._entry = replace(
            self._entry,
            sites=",".join(opening.sites),
            weight=opening.weight,
            clipped=opening.clipped,
            error=opening.error,
            tokens=round(totals[TOKENS]),
            steps=round(totals.get(STEPS, 0.0)),
            nll=totals[LOSS],
            reason="",
        )
        self._journal.note_sum(self._entry)
        return opening

    @property
    def entry(self) -> SumEntry:
        """What the ledger has of the sum."""
        return self._entry

    @property
    def _open(self) -> Unmasking:
        if self._unmasking is None:
            raise AssertionError("a sum is begun before it is asked for")
        return self._unmasking

    def _agreement(self, attempt: int) -> Agreement:
        place = Place(self._manifest.hash, self._number, self._purpose, attempt)
        return agreement_of(self._manifest, place, self._work)

    def _why(self, site: str) -> str:
        return self._reasons.get(site, "no answer before the deadline")


def _reason(answer: Answer) -> str:
    if isinstance(answer, Refusal):
        return answer.reason
    if isinstance(answer, ProtocolError):
        return str(answer)
    return f"a {answer.kind} came in the place of an answer"
