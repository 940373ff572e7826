"""A site as its own people see it: what left, what it cost, what waits, which rules hold, and what went wrong.

Each part is looked at by itself: one that is damaged tells so in its place, and hides none of the others.
"""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from client.approval import Approvals, Asked
from client.approval_page import sections
from client.archive import Archive
from client.audit import Audit, audit
from client.budget import FILE, Budget
from client.budget_report import BudgetReport
from client.budget_report import report as budget_report
from client.home import SiteHome
from client.outbound import Entry, lines, read_entry, read_head
from client.policy import Broken, Policy
from federation import pki
from federation.messages import ProtocolError
from tokenizer.errors import DataError, FedcometError

T = TypeVar("T")

_ENTRIES, _ERRORS = 50, 20
_TAIL_BYTES = 256 << 10
_BAD = ("warning", "error", "critical")


@dataclass(frozen=True)
class Outbound:
    """What left: the audit of the whole list, and its last entries, the latest first."""

    audit: Audit
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Waiting:
    """A manifest not agreed to: its hash, what it would do, rules that it breaks, what approves it; or a problem."""

    hash: str
    sections: tuple[tuple[str, list[tuple[str, str]]], ...] = ()
    broken: tuple[Broken, ...] = ()
    problem: str = ""
    command: str = ""


@dataclass(frozen=True)
class Rules:
    """The policy in force: the file's text, and what names it in approvals and on the outbound list."""

    text: str
    sha256: str


@dataclass(frozen=True)
class Trouble:
    """A line of the daemon's log that is a warning or worse."""

    time: str
    level: str
    program: str
    message: str


@dataclass(frozen=True)
class SiteView:
    """A site; a part that could not be read is the text that says why. `names` are those of runs, by hash."""

    name: str
    names: Mapping[str, str]
    certificate: str | None
    outbound: Outbound | str
    budget: BudgetReport | str
    waiting: tuple[Waiting, ...]
    refused: tuple[Waiting, ...]
    policy: Rules | str
    troubles: tuple[Trouble, ...]


@dataclass
class Window:
    """Looks at one site; what takes long is kept until what it was made of has changed."""

    home: SiteHome
    _kept: dict[str, tuple[object, object]] = field(default_factory=dict)

    def look(self) -> SiteView:
        """Look at it now."""
        approvals, outbound, budget = Approvals(self.home.state), _told(self._outbound), _told(self._budget)
        runs = [] if isinstance(outbound, str) else [entry.message.run for entry in outbound.entries]
        runs += [] if isinstance(budget, str) else [line.run for line in budget.lines]
        return SiteView(
            name=self.home.name,
            names=run_names(self.home.state, filter(None, runs)),
            certificate=_told(self._certificate),
            outbound=outbound,
            budget=budget,
            waiting=tuple(self._looked_at(approvals, approvals.waiting())),
            refused=tuple(self._looked_at(approvals, approvals.refused())),
            policy=_told(self._policy),
            troubles=tuple(troubles(self.home.path / "logs")),
        )

    def stamp(self) -> str:
        """Give a text that changes with whatever the page shows, without reading much."""
        state = self.home.state
        paths = [state / "outbound" / "head.json", self.home.policy]
        paths += [state / name for name in ("waiting", "refused", "approvals")]
        paths += [state / FILE, self.home.path / "logs" / "site.jsonl", self.home.certificate]
        found = [path.stat().st_mtime_ns if path.exists() else 0 for path in paths]
        return "-".join(str(each % 10**15) for each in found)

    def _certificate(self) -> str | None:
        held = pki.validity(pki.read_certificate(self.home.certificate), datetime.now(UTC))
        return held.warning(self.home.name, "fedcomet site run renews it while it runs")

    def _outbound(self) -> Outbound:
        folder = self.home.state / "outbound"
        if not folder.is_dir():
            raise DataError("Nothing has left this site yet.")
        # Whoever changes an old entry changes a file's time or size.
        stats = [path.stat() for path in sorted(folder.glob("*.json*"))]
        made_of = [(each.st_mtime_ns, each.st_size, each.st_ino) for each in stats]
        return self._keep("outbound", made_of, lambda: Outbound(audit(self.home.state), last_entries(folder, _ENTRIES)))

    def _budget(self) -> BudgetReport:
        rules = Policy.read(self.home.policy)
        with Budget.open(self._place(), rules.limit, begin=False) as ledger:
            made_of = (rules.limit, [(each.release, each.state, each.at) for each in ledger.charges()])
            return self._keep("budget", made_of, lambda: budget_report(ledger))

    def _place(self) -> Path | str:
        return self.home.settings.site.budget or self.home.state / FILE

    def _policy(self) -> Rules:
        rules = Policy.read(self.home.policy)
        return Rules(self.home.policy.read_text(encoding="utf-8"), rules.sha256)

    def _looked_at(self, approvals: Approvals, hashes: Iterable[str]) -> Iterator[Waiting]:
        for digest in hashes:
            try:
                asked = approvals.find(digest)
                yield Waiting(
                    digest, tuple(sections(asked)), tuple(self._forbidden(asked)), command=self._command(digest)
                )
            except (FedcometError, ProtocolError, OSError) as problem:
                yield Waiting(digest, problem=str(problem))

    def _forbidden(self, asked: Asked) -> list[Broken]:
        """The rules that a run breaks, as far as its manifest and the policy tell."""
        return list(Policy.read(self.home.policy).check(asked.manifest, device=self.home.settings.site.device))

    def _command(self, digest: str) -> str:
        """What approves a manifest, as it is typed."""
        return shlex.join(["fedcomet", "site", "approve", digest[:16], "--home", str(self.home.path.absolute())])

    def _keep(self, name: str, made_of: object, make: Callable[[], T]) -> T:
        known = self._kept.get(name)
        if known is None or known[0] != made_of:
            known = self._kept[name] = (made_of, make())
        return known[1]  # type: ignore[return-value]


def troubles(folder: Path) -> list[Trouble]:
    """Give the latest warnings and errors of the daemon's log, the latest first."""
    path = folder / "site.jsonl"
    if not path.exists():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        tail = file.read().split(b"\n")
    found = [line for each in (tail if size <= _TAIL_BYTES else tail[1:]) if (line := _trouble(each)) is not None]
    return found[::-1][:_ERRORS]


def last_entries(folder: Path, most: int, but: str = "") -> tuple[Entry, ...]:
    """Give the last entries of a list, the latest first; those that can't be read are left to the audit to tell of.

    Args:
        folder: the list's.
        most: how many.
        but: leave out what answers this kind of request ("control").
    """
    found: list[Entry] = []
    for place, line in reversed(list(lines(folder, read_head(folder)))):
        try:
            entry = read_entry(line, place)
        except DataError:
            continue
        if entry.message.answers != but:
            found.append(entry)
        if len(found) == most:
            break
    return tuple(found)


def run_names(state: Path, runs: Iterable[str]) -> dict[str, str]:
    """Give the names of those runs whose manifests are at the site, by hash."""
    approvals, archive = Approvals(state), Archive(state)
    kept, names = {*approvals.waiting(), *approvals.refused()}, {}
    for run in dict.fromkeys(runs):
        try:
            names[run] = (approvals.find(run).manifest if run in kept else archive.run(run).manifest()).name
        except (FedcometError, OSError):
            continue
    return names


def _trouble(line: bytes) -> Trouble | None:
    try:
        told = json.loads(line)
    except ValueError:
        return None
    if not isinstance(told, dict) or told.get("level") not in _BAD:
        return None
    return Trouble(*(str(told.get(name, "")) for name in ("time", "level", "program", "message")))


def _told(look: Callable[[], T]) -> T | str:
    try:
        return look()
    except FedcometError as problem:
        return str(problem)
    except OSError as problem:
        return f"{problem.filename or 'a file'}: can't be read ({problem.strerror})."
