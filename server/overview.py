"""A federation at a glance: its members and runs, as the dashboard and people see them."""

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import func, select

from federation import pki
from federation.manifest import Manifest
from federation.messages import ProtocolError
from federation.pki import Role
from server import tables
from server.home import CoordinatorHome
from server.ledger import Ledger
from server.ledger_entries import MemberEntry, RunEntry
from server.run_entries import Phase
from server.tables import RunState, SiteStatus
from tokenizer.errors import FedcometError

ONLINE_S = 90.0
"""A site that has not been seen for longer is offline, whatever it said last; its daemon speaks up every minute."""

GOING = (RunState.READY, RunState.RUNNING, RunState.PAUSING, RunState.STOPPING)
"""States in which a run has work, or a wish, before it."""


@dataclass(frozen=True)
class MemberView:
    """A member; see `condition`; `warning` is about its certificate."""

    entry: MemberEntry
    condition: str
    warning: str | None


@dataclass(frozen=True)
class RunLine:
    """A run in a list; `rounds` is how many it will have, None while nobody knows."""

    entry: RunEntry
    committed: int
    rounds: int | None

    @property
    def going(self) -> bool:
        """Whether something happens in it, or is about to."""
        return self.entry.state in GOING


@dataclass(frozen=True)
class Overview:
    """A federation; `leader` is the machine whose daemon serves it, empty if none does."""

    members: tuple[MemberView, ...]
    runs: tuple[RunLine, ...]
    warnings: tuple[str, ...]
    leader: str

    @property
    def sites(self) -> tuple[MemberView, ...]:
        """Members that are enrolled sites."""
        return tuple(
            each for each in self.members if each.entry.role == Role.SITE and each.entry.status == SiteStatus.ENROLLED
        )

    @property
    def online(self) -> int:
        """How many sites are there."""
        return sum(each.condition == "online" for each in self.sites)

    @property
    def going(self) -> tuple[RunLine, ...]:
        """Runs that have work before them."""
        return tuple(run for run in self.runs if run.going)


def overview(ledger: Ledger, home: CoordinatorHome, now: float) -> Overview:
    """Look at a federation; `now` is in seconds since the epoch."""
    members = tuple(_member(entry, now) for entry in ledger.members.all())
    warnings = [*_own_warnings(home, now), *(each.warning for each in members if each.warning)]
    holder = ledger.holder()
    return Overview(members, run_lines(ledger), tuple(warnings), holder.host if holder else "")


def run_lines(ledger: Ledger) -> tuple[RunLine, ...]:
    """Give all runs, the latest first."""
    last = select(tables.Run.name, func.max(tables.Round.round)).join(tables.Round, tables.Round.run == tables.Run.id)
    last = last.where(tables.Round.phase == Phase.COMMITTED).group_by(tables.Run.name)
    committed = ledger.transactions.read(lambda session: {row[0]: row[1] for row in session.execute(last)})
    return tuple(
        RunLine(entry, committed.get(entry.name, 0), manifest.rounds if (manifest := manifest_of(entry)) else None)
        for entry in reversed(ledger.runs())
    )


def manifest_of(entry: RunEntry) -> Manifest | None:
    """Give a run's manifest; None before there is one, and if it is of another version of this software."""
    try:
        return Manifest.from_bytes(entry.manifest) if entry.manifest else None
    except ProtocolError:
        return None


def condition(entry: MemberEntry, now: float) -> str:
    """Tell how a member is: online, offline, never seen, invited or revoked; `now` is in seconds since the epoch."""
    if entry.status != SiteStatus.ENROLLED:
        return str(entry.status)
    if entry.last_seen is None:
        return "never seen"
    return "online" if entry.online_state == "online" and now - entry.last_seen < ONLINE_S else "offline"


def _member(entry: MemberEntry, now: float) -> MemberView:
    return MemberView(entry, condition(entry, now), _warning(entry, now))


def _warning(entry: MemberEntry, now: float) -> str | None:
    if entry.status != SiteStatus.ENROLLED or not entry.certificate:
        return None
    try:
        held = pki.validity(pki.load(entry.certificate.encode(), entry.name), datetime.fromtimestamp(now, UTC))
    except FedcometError as problem:
        return f"The certificate of {entry.name} in the ledger can't be read: {problem}"
    return held.warning(entry.name, "its daemon renews it; if it is off, start it")


def _own_warnings(home: CoordinatorHome, now: float) -> list[str]:
    try:
        return home.warnings(datetime.fromtimestamp(now, UTC))
    except FedcometError as problem:
        return [str(problem)]
