"""The control service: what members may ask and tell beside the rounds, and who may do what.

A pure object over the ledger; `server.listener` puts it on a socket and says who calls. `RULES` is the whole of who may
do what, and a call that isn't in it doesn't exist. A site reads the runs that it takes part in or could approve, tells
of itself only, and learns of other sites no more than that something happened.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from federation import canonical
from federation import control_pb2 as wire
from federation.identity import verify
from federation.messages import printable
from federation.pki import Member, Role
from server.enrolment import Enrolment
from server.members import Happening, Members, Record
from server.tables import RunState
from tokenizer.errors import FedcometError

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
_MOST_TEXT = 500
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


class RunEntry(Protocol):
    """A run, as the ledger tells it."""

    name: str
    manifest_hash: str
    manifest: bytes
    state: RunState
    reason: str
    created_at: float
    started_at: float | None
    ended_at: float | None


class Runs(Protocol):
    """The ledger's part that is about runs."""

    def runs(self) -> list[RunEntry]:
        """Give all runs, the oldest first."""

    def run(self, name: str) -> RunEntry | None:
        """Give a run."""

    def sites_of(self, name: str) -> list[str]:
        """Give the names of the sites that take part in a run."""

    def propose(self, name: str, plan: bytes, manifest: bytes, who: str) -> None:
        """Note a new run."""

    def wish(self, name: str, state: RunState, who: str, reason: str = "") -> None:
        """Ask whoever leads a run to pause or stop it."""


@dataclass(frozen=True)
class Caller:
    """Who calls: what the certificate says, and what the ledger has about it now."""

    member: Member
    record: Record

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
        members: Members,
        runs: Runs,
        enrolment: Enrolment,
        starter: RunStarter,
        wait: Callable[[float], bool],
        revoked: Callable[[Record], None] = lambda _: None,
    ) -> None:
        """Put it together.

        Args:
            members, runs: the ledger.
            enrolment: renews certificates.
            starter: starts runs.
            wait: waits so many seconds, or until the service ends; tells whether it does.
            revoked: is told of every member that was put out, to end what it has elsewhere (its Flower node).
        """
        self._members, self._runs, self._enrolment, self._starter = members, runs, enrolment, starter
        self._wait, self._revoked = wait, revoked
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
        if caller.record.role not in allowed:
            needed = " or ".join(sorted(allowed))
            raise Forbidden(f"{caller.name} is a {caller.record.role} and may not use {name}, which takes a {needed}.")
        return self.calls[name](caller, request)

    def _list_runs(self, caller: Caller, _: Any) -> wire.ListRunsReply:
        return wire.ListRunsReply(runs=[_told(run) for run in self._runs.runs() if self._visible(caller, run)])

    def _manifest(self, caller: Caller, asked: wire.RunName) -> wire.Manifest:
        run = self._run(caller, asked.run)
        if not run.manifest:
            raise Unknown(f"The run {run.name} has no manifest yet: its codebook is not made.")
        return wire.Manifest(hash=run.manifest_hash, manifest=run.manifest)

    def _propose(self, caller: Caller, asked: wire.ProposeRunRequest) -> wire.Run:
        self._runs.propose(asked.run, asked.plan, asked.manifest, caller.name)
        return _told(self._run(caller, asked.run))

    def _start(self, caller: Caller, asked: wire.RunName) -> wire.Run:
        run = self._run(caller, asked.run)
        if run.state not in (*_OPEN, RunState.PAUSED, RunState.STOPPED):
            raise Wrong(f"The run {run.name} is {run.state}; only one that waits, is paused or was stopped can start.")
        self._members.note(caller.name, "run.started", run.name)
        self._starter.start(run.name)
        return _told(self._run(caller, asked.run))

    def _pause(self, caller: Caller, asked: wire.RunName) -> wire.Run:
        run = self._run(caller, asked.run)
        self._runs.wish(run.name, RunState.PAUSING, caller.name)
        return _told(self._run(caller, asked.run))

    def _stop(self, caller: Caller, asked: wire.StopRequest) -> wire.Run:
        run = self._run(caller, asked.run)
        self._runs.wish(run.name, RunState.STOPPING, caller.name, printable(asked.reason))
        return _told(self._run(caller, asked.run))

    def _list_sites(self, _: Caller, __: Any) -> wire.ListSitesReply:
        return wire.ListSitesReply(members=[_told_member(record) for record in self._members.all()])

    def _revoke(self, caller: Caller, asked: wire.RevokeRequest) -> wire.Done:
        if asked.site == caller.name:
            raise Wrong("Nobody can revoke itself; another coordinator, or the machine's own command, does it.")
        self._revoked(self._members.revoke(asked.site, printable(asked.reason), caller.name))
        return wire.Done()

    def _approve(self, caller: Caller, asked: wire.Approval) -> wire.Done:
        self._own(caller, asked.site)
        known = [run for run in self._runs.runs() if run.manifest_hash and run.manifest_hash == asked.manifest_hash]
        if not known:
            raise Unknown(f"No run has the manifest {printable(asked.manifest_hash)}.")
        # The bytes that `client.approval.Approval` signs.
        signed = {
            "manifest_hash": asked.manifest_hash,
            "policy": asked.policy or None,
            "time": asked.time,
            "signature": "",
        }
        if not verify(caller.record.ed25519, "approval", canonical.encode(signed), asked.signature):
            raise Wrong(f"The approval is not signed with the key of {caller.name}; approve the run again.")
        self._members.approve(caller.name, asked.manifest_hash, asked.signature)
        return wire.Done()

    def _budget(self, caller: Caller, told: wire.BudgetReport) -> wire.Done:
        self._own(caller, told.site)
        epsilon_limit = told.limit_epsilon if told.HasField("limit_epsilon") else None
        delta_limit = told.limit_delta if told.HasField("limit_delta") else None
        figures = (told.epsilon, epsilon_limit or 0.0)
        deltas = (told.delta, delta_limit or 0.0)
        if not all(math.isfinite(each) and each >= 0 for each in figures) or not all(0 <= each < 1 for each in deltas):
            raise Wrong("Epsilons must be finite and not negative, deltas in [0, 1); these make no budget.")
        self._members.budget(caller.name, told.epsilon, told.delta, epsilon_limit, delta_limit)
        return wire.Done()

    def _health(self, caller: Caller, told: wire.HealthReport) -> wire.Done:
        self._own(caller, told.site)
        state = f"{told.queue} waiting, {told.free_gigabytes:,} GB free"
        self._members.health(caller.name, printable(told.version)[:64], state)
        return wire.Done()

    def _say(self, caller: Caller, said: wire.Text) -> wire.Done:
        site = said.site or (caller.name if caller.is_site else "")
        if caller.is_site:
            self._own(caller, site)
        elif (record := self._members.find(site)) is None or record.role is not Role.SITE:
            raise Unknown(f"There is no site {printable(site)!r}; fedcomet coordinator sites lists all.")
        if not 0 < len(said.text) <= _MOST_TEXT:
            raise Wrong(f"A message has 1 to {_MOST_TEXT} characters, this one {len(said.text):,}.")
        self._members.say(caller.name, site, printable(said.text))
        return wire.Done()

    def _list_messages(self, caller: Caller, asked: wire.ListMessagesRequest) -> wire.ListMessagesReply:
        site = asked.site or (caller.name if caller.is_site else "")
        if caller.is_site:
            self._own(caller, site)
        found = self._members.messages(site, asked.after)
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
            found = self._members.events(after)
            seen = self._visible_runs(caller) if found and caller.is_site else frozenset()
            for each in found:
                after = each.id
                if (not run or each.run == run) and (event := _shown(caller, each, seen)) is not None:
                    yield event
            if not found:
                if self._wait(_TICK_S):
                    return
                self._members.admit(caller.member)  # revoked meanwhile: the stream ends

    def _run(self, caller: Caller, name: str) -> RunEntry:
        run = self._runs.run(name)
        if run is None or not self._visible(caller, run):
            raise Unknown(f"There is no run {printable(name)!r} that {caller.name} may see.")
        return run

    def _visible(self, caller: Caller, run: RunEntry) -> bool:
        return not caller.is_site or run.state in _OPEN or caller.name in self._runs.sites_of(run.name)

    def _visible_runs(self, caller: Caller) -> frozenset[str]:
        return frozenset(run.name for run in self._runs.runs() if self._visible(caller, run))

    def _own(self, caller: Caller, site: str) -> None:
        if site != caller.name:
            raise Forbidden(f"{caller.name} may not speak or ask for {printable(site)!r}, only for itself.")


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


def _told_member(record: Record) -> wire.Member:
    return wire.Member(
        name=record.name,
        role=record.role.value,
        status=record.status.value,
        ed25519=record.ed25519,
        fingerprint=record.fingerprint,
        expires_at=record.expires_at,
        last_seen=record.last_seen,
        version=record.version,
        state=record.online_state,
    )


def _shown(caller: Caller, each: Happening, seen: frozenset[str]) -> wire.Event | None:
    """What a caller sees of an event: a site all of its own, and of its runs that something happened; never texts."""
    event = wire.Event(
        id=each.id,
        at=each.at,
        who=each.who,
        what=each.what,
        run=each.run,
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
