"""The control service: what members may ask and tell beside the rounds, and who may do what.

A pure object over the ledger; `server.listener` puts it on a socket and says who calls. `RULES` is the whole of who may
do what, and a call that isn't in it doesn't exist. A site reads the runs that it takes part in or could approve, tells
of itself only, and learns of other sites no more than that something happened.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from federation import canonical
from federation import control_pb2 as wire
from federation.identity import verify
from federation.manifest import Manifest
from federation.messages import is_site_name, printable
from federation.pki import Member, Role
from server.enrolment import Enrolment
from server.ledger import Ledger
from server.ledger_entries import BudgetEntry, EventEntry, LedgerRefusal, MemberEntry, RunEntry
from server.tables import RunState
from tokenizer.errors import FedcometError
from tokenizer.wording import several

_ALL = frozenset(Role)
_READERS, _LEADERS = frozenset({Role.COORDINATOR, Role.VIEWER}), frozenset({Role.COORDINATOR})
_SITES = frozenset({Role.SITE})

RULES: Mapping[str, frozenset[Role]] = {
    "ListRuns": _ALL,
    "GetRun": _ALL,
    "WatchEvents": _ALL,
    "GetManifest": _ALL,
    "ListMessages": _ALL,
    "RenewCertificate": _ALL,
    "ListSites": _READERS,
    "ProposeRun": _LEADERS,
    "StartRun": _LEADERS,
    "PauseRun": _LEADERS,
    "ResumeRun": _LEADERS,
    "StopRun": _LEADERS,
    "RevokeSite": _LEADERS,
    "ApproveManifest": _SITES,
    "ReportBudget": _SITES,
    "ReportHealth": _SITES,
    "SendMessage": _SITES | _LEADERS,
}
"""The roles that may use each call."""

_OPEN = (RunState.PROPOSED, RunState.READY)
_MESSAGE = "message"
_MOST_TEXT = 500
_MOST_EVENTS = 200
_TICK_S = 1.0


class Forbidden(FedcometError):
    """The caller's role may not do this, or not for this site."""


class Unknown(FedcometError):
    """There is no such run, or the caller may not know of it."""


class Wrong(FedcometError):
    """A field of a request makes no sense."""


class RunStarter(Protocol):
    """Whoever makes a run go: starts it, or goes on where it was paused."""

    def start(self, run: str) -> None:
        """Start a run that the ledger knows, or go on with it; returns when that is under way."""


@dataclass(frozen=True)
class Caller:
    """Who calls: what the certificate (PEM) says, and what the ledger has about it now."""

    member: Member
    pem: bytes
    entry: MemberEntry

    @property
    def name(self) -> str:
        """The caller's name."""
        return self.member.name

    @property
    def is_site(self) -> bool:
        """Whether it sees only what concerns itself."""
        return self.member.role is Role.SITE


class Control:
    """The calls; each takes the caller and a message, and gives a message or several."""

    def __init__(
        self,
        ledger: Ledger,
        enrolment: Enrolment,
        starter: RunStarter,
        wait: Callable[[float], bool],
        revoked: Callable[[MemberEntry], None] = lambda _: None,
    ) -> None:
        """Put it together.

        Args:
            ledger: the federation's; its patience should be short, as callers wait.
            enrolment: renews certificates.
            starter: starts runs.
            wait: waits so many seconds, or until the service ends; tells whether it does.
            revoked: is told of every member that was put out, to end what it has elsewhere (its Flower node).
        """
        self._ledger, self._enrolment, self._starter = ledger, enrolment, starter
        self._wait, self._revoked = wait, revoked
        self._told: dict[str, str] = {}
        self.calls: Mapping[str, Callable[[Caller, Any], Any]] = {
            "ListRuns": self._list_runs,
            "GetRun": lambda caller, asked: _told(self._run(caller, asked.run)),
            "WatchEvents": self._watch,
            "GetManifest": self._manifest,
            "ListMessages": self._list_messages,
            "RenewCertificate": self._renew,
            "ListSites": self._list_sites,
            "ProposeRun": self._propose,
            "StartRun": self._start,
            "PauseRun": self._pause,
            "ResumeRun": self._start,
            "StopRun": self._stop,
            "RevokeSite": self._revoke,
            "ApproveManifest": self._approve,
            "ReportBudget": self._budget,
            "ReportHealth": self._health,
            "SendMessage": self._say,
        }

    def call(self, name: str, caller: Caller, request: Any) -> Any:
        """Do a call, if the caller's role may.

        Raises:
            Forbidden: it may not.
            FedcometError: it can't be done; the message says why.
        """
        allowed = RULES[name]
        if caller.entry.role not in allowed:
            needed = " or ".join(sorted(allowed))
            raise Forbidden(f"{caller.name} is a {caller.entry.role} and may not use {name}, which takes a {needed}.")
        return self.calls[name](caller, request)

    def _list_runs(self, caller: Caller, _: Any) -> wire.ListRunsReply:
        return wire.ListRunsReply(runs=[_told(run) for run in self._ledger.runs() if self._visible(caller, run)])

    def _manifest(self, caller: Caller, asked: wire.RunName) -> wire.Manifest:
        run = self._run(caller, asked.run)
        if not run.manifest:
            raise Unknown(f"The run {run.name} has no manifest yet: its codebook is not made.")
        return wire.Manifest(hash=run.manifest_hash, manifest=run.manifest)

    def _propose(self, caller: Caller, asked: wire.ProposeRunRequest) -> wire.Run:
        if not is_site_name(asked.run):
            raise Wrong(f"{printable(asked.run)!r} is no name; use up to 64 letters, digits, '.', '_' and '-'.")
        manifest = Manifest.from_bytes(asked.manifest) if asked.manifest else None
        self._ledger.propose(asked.run, asked.plan, caller.name)
        if manifest is not None:
            self._ledger.note_manifest(asked.run, manifest.hash, asked.manifest, caller.name)
        return _told(self._run(caller, asked.run))

    def _start(self, caller: Caller, asked: wire.RunName) -> wire.Run:
        self._ledger.start(self._run(caller, asked.run).name, caller.name)
        self._starter.start(asked.run)
        return _told(self._run(caller, asked.run))

    def _pause(self, caller: Caller, asked: wire.RunName) -> wire.Run:
        return _told(self._ledger.pause(self._run(caller, asked.run).name, caller.name))

    def _stop(self, caller: Caller, asked: wire.StopRequest) -> wire.Run:
        run = self._ledger.stop(self._run(caller, asked.run).name, caller.name)
        if asked.reason:
            self._ledger.note(caller.name, "run.stop.reason", run=run.name, told=printable(asked.reason))
        return _told(run)

    def _list_sites(self, _: Caller, __: Any) -> wire.ListSitesReply:
        return wire.ListSitesReply(members=[_told_member(entry) for entry in self._ledger.members.all()])

    def _revoke(self, caller: Caller, asked: wire.RevokeRequest) -> wire.Done:
        if asked.site == caller.name:
            raise Wrong("Nobody can revoke itself; another coordinator, or the machine's own command, does it.")
        self._revoked(self._ledger.members.revoke(asked.site, printable(asked.reason), caller.name))
        return wire.Done()

    def _approve(self, caller: Caller, asked: wire.Approval) -> wire.Done:
        self._own(caller, asked.site)
        known = [run for run in self._ledger.runs() if run.manifest_hash and run.manifest_hash == asked.manifest_hash]
        if not known:
            raise Unknown(f"No run has the manifest {printable(asked.manifest_hash)}.")
        # The bytes that `client.approval.Approval` signs.
        signed = {
            "manifest_hash": asked.manifest_hash,
            "policy": asked.policy or None,
            "time": asked.time,
            "signature": "",
        }
        if not verify(caller.entry.ed25519, "approval", canonical.encode(signed), asked.signature):
            raise Wrong(f"The approval is not signed with the key of {caller.name}; approve the run again.")
        self._ledger.approve(asked.manifest_hash, caller.name, asked.signature)
        return wire.Done()

    def _budget(self, caller: Caller, told: wire.BudgetReport) -> wire.Done:
        self._own(caller, told.site)
        epsilon_limit = told.limit_epsilon if told.HasField("limit_epsilon") else None
        delta_limit = told.limit_delta if told.HasField("limit_delta") else None
        figures = (told.epsilon, epsilon_limit or 0.0)
        deltas = (told.delta, delta_limit or 0.0)
        if not all(math.isfinite(each) and each >= 0 for each in figures) or not all(0 <= each < 1 for each in deltas):
            raise Wrong("Epsilons must be finite and not negative, deltas in [0, 1); these make no budget.")
        self._ledger.report_budget(BudgetEntry(caller.name, told.epsilon, told.delta, epsilon_limit, delta_limit))
        return wire.Done()

    def _health(self, caller: Caller, told: wire.HealthReport) -> wire.Witness:
        self._own(caller, told.site)
        self._ledger.members.seen(caller.name, printable(told.version)[:64])
        # In steps of two, so that the ledger hears of what changes, not of every gigabyte.
        free = 1 << (told.free_gigabytes.bit_length() - 1) if told.free_gigabytes else 0
        waiting = several(told.queue, "run waits for approval", "runs wait for approval")
        state = f"{waiting}, {free:,} GB or more are free"
        if self._told.get(caller.name) != state:
            self._told[caller.name] = state
            self._ledger.note(caller.name, "site.health", site=caller.name, told=state)
        return self._witness(caller, told)

    def _witness(self, caller: Caller, told: wire.HealthReport) -> wire.Witness:
        """Tell a site what it said of its list before, so that it sees whether it has forgotten some of it."""
        now = time.time()
        if not told.entries_sha256:
            return wire.Witness(time=now)
        if not _is_sha256(told.entries_sha256) or (told.known_sha256 and not _is_sha256(told.known_sha256)):
            raise Wrong("A sha256 has 64 hexadecimal digits.")
        stands = self._ledger.members.witness(
            caller.name, told.entries, told.entries_sha256, told.known_sha256, told.restored
        )
        found = wire.Witness(entries=stands.entries, sha256=stands.sha256, time=now)
        if stands.sha256 != told.entries_sha256 and (budgets := self._ledger.budgets(caller.name)):
            found.epsilon, found.delta = budgets[-1].epsilon, budgets[-1].delta
        return found

    def _say(self, caller: Caller, said: wire.Text) -> wire.Done:
        site = said.site or (caller.name if caller.is_site else "")
        if caller.is_site:
            self._own(caller, site)
        elif site not in {entry.name for entry in self._ledger.members.all() if entry.role == Role.SITE}:
            raise Unknown(f"There is no site {printable(site)!r}; fedcomet coordinator sites lists all.")
        if not 0 < len(said.text) <= _MOST_TEXT:
            raise Wrong(f"A message has 1 to {_MOST_TEXT} characters, this one {len(said.text):,}.")
        self._ledger.note(caller.name, _MESSAGE, site=site, told=printable(said.text))
        return wire.Done()

    def _list_messages(self, caller: Caller, asked: wire.ListMessagesRequest) -> wire.ListMessagesReply:
        site = asked.site or (caller.name if caller.is_site else "")
        if caller.is_site:
            self._own(caller, site)
        found = self._ledger.events(asked.after, site=site or None, what=_MESSAGE, limit=_MOST_EVENTS)
        return wire.ListMessagesReply(
            messages=[
                wire.Message(id=each.id, at=each.at, who=each.who, site=each.site, text=each.text) for each in found
            ]
        )

    def _renew(self, caller: Caller, asked: wire.RenewRequest) -> wire.Certificate:
        return wire.Certificate(certificate=self._enrolment.renew(caller.member, asked))

    def _watch(self, caller: Caller, asked: wire.WatchRequest) -> Iterator[wire.Event]:
        if asked.run:
            self._run(caller, asked.run)
        return self._events(caller, asked.run, asked.after)

    def _events(self, caller: Caller, run: str, after: int) -> Iterator[wire.Event]:
        while True:
            found = self._ledger.events(after, limit=_MOST_EVENTS)
            seen = self._visible_runs(caller) if found and caller.is_site else frozenset()
            for each in found:
                after = each.id
                wanted = each.what != _MESSAGE and (not run or each.run == run)
                if wanted and (event := _shown(caller, each, seen)) is not None:
                    yield event
            if not found and self._wait(_TICK_S):
                return
            self._enrolment.admit(caller.member, caller.pem)  # whoever was revoked meanwhile hears no more

    def _run(self, caller: Caller, name: str) -> RunEntry:
        try:
            run = self._ledger.run(name)
        except LedgerRefusal:
            run = None
        if run is None or not self._visible(caller, run):
            raise Unknown(f"There is no run {printable(name)!r} that {caller.name} may see.")
        return run

    def _visible(self, caller: Caller, run: RunEntry) -> bool:
        if not caller.is_site or run.state in _OPEN:
            return True
        return caller.name in {entry.site for entry in self._ledger.journal(run.name).sites()}

    def _visible_runs(self, caller: Caller) -> frozenset[str]:
        return frozenset(run.name for run in self._ledger.runs() if self._visible(caller, run))

    def _own(self, caller: Caller, site: str) -> None:
        if site != caller.name:
            raise Forbidden(f"{caller.name} may not speak or ask for {printable(site)!r}, only for itself.")


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _told(run: RunEntry) -> wire.Run:
    return wire.Run(
        name=run.name,
        manifest_hash=run.manifest_hash,
        state=str(run.state),
        reason=run.reason,
        created_at=run.created_at,
        started_at=run.started_at,
        ended_at=run.ended_at,
    )


def _told_member(entry: MemberEntry) -> wire.Member:
    return wire.Member(
        name=entry.name,
        role=entry.role.value,
        status=entry.status.value,
        ed25519=entry.ed25519,
        fingerprint=entry.fingerprint,
        expires_at=entry.expires_at,
        last_seen=entry.last_seen,
        version=entry.version,
        state=entry.online_state,
    )


def _shown(caller: Caller, each: EventEntry, seen: frozenset[str]) -> wire.Event | None:
    """What a caller sees of an event: a site all of its own, and of its runs that something happened; never texts."""
    event = wire.Event(
        id=each.id,
        at=each.at,
        who=each.who,
        what=each.what,
        run=each.run or "",
        round=each.round,
        site=each.site,
        text=each.text,
    )
    if not caller.is_site or each.site == caller.name:
        return event
    if not each.run or each.run not in seen:
        return None
    event.who, event.site, event.text = "", "", ""
    return event
