"""A federation by its two commands, in temporary homes: real processes, TLS, loopback; for tests that break it.

`federation` founds one with PostgreSQL or SQLite, joins sites and starts all; `Field` has what tests do to it and ask
of it. Models are tiny, so a round is a few seconds of starting processes and nothing else.
"""

import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from client.audit import audit
from client.enrol import join
from client.home import SiteHome
from federation import pki
from federation.pki import Role
from server.enrolment import invite
from server.home import CoordinatorHome, CoordinatorSettings, Database, Federation, Listen, Ports
from server.journal import Journal, Status
from server.ledger import Ledger
from server.tables import RunState
from tests import tiny
from tests.superlink import REPOSITORY, Machine, Service, free_ports, machine

FEDCOMET = (sys.executable, str(REPOSITORY / "fedcomet.py"))
PATIENCE_S = 1800.0
LAX = """
[privacy]
training = "optional"
[secure_aggregation]
required = false
[statistics]
floor = 3
"""
SITE_KINDS = ("app process of a site", "nursery of a site", "node of a site", "daemon of a site")
KINDS = (*SITE_KINDS, "SuperLink", "leading process", "daemon of the coordinator")
"""The kinds of processes that a federation has."""
ENDED = (RunState.FINISHED, RunState.FAILED, RunState.STOPPED)


def until(
    true: Callable[[], Any], what: str | Callable[[], str], seconds: float = PATIENCE_S, *, every: float = 0.25
) -> Any:
    """Wait for something to be true, looking `every` so many seconds; `what` says what it was when it never came."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, what if isinstance(what, str) else what()
        time.sleep(every)
    return found


def health(port: int) -> dict[str, Any]:
    """Give what a daemon on this machine says of itself."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=20) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return json.loads(error.read())
    except OSError:
        return {"healthy": False, "reason": "does not answer"}


def process(place: Machine, marks: Sequence[str]) -> int | None:
    """Find one of a machine's processes by words of its command line."""
    for pid in place.processes():
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        except OSError:
            continue
        if all(mark in words for mark in marks):
            return pid
    return None


def node(place: Machine, site: str) -> int | None:
    """Find a site's node."""
    return process(place, ("client.supernode", f"homes/{site}"))


def nursery(place: Machine, site: str) -> int | None:
    """Find a site's nursery itself, not what it forked, whose command line is the same."""
    return _nursery_below(place, node(place, site))


def app_process(place: Machine, site: str) -> int | None:
    """Find a process of a site that is at work: a nursery's child."""
    return _nursery_below(place, nursery(place, site))


def _nursery_below(place: Machine, parent: int | None) -> int | None:
    for pid in place.processes() if parent is not None else ():
        try:
            stat, words = Path(f"/proc/{pid}/stat").read_text(), Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if int(stat.rpartition(")")[2].split()[1]) == parent and b"federation.nursery" in words:
            return pid
    return None


def found_federation(root: Path, address: str = "127.0.0.1", database: str = "") -> CoordinatorHome:
    """Make a coordinator's home, with free ports."""
    fleet, control, enrol, ui, alive, runtime = free_ports(6)
    settings = CoordinatorSettings(
        federation=Federation(name="daemons", address=address),
        ports=Ports(fleet=fleet, control=control, enrol=enrol, ui=ui, health=alive, runtime=runtime),
        listen=Listen(host=address),
        database=Database(url=database),
    )
    (root / "office").mkdir(exist_ok=True)
    return CoordinatorHome.init(root / "office/coordinator", settings, None)


def join_site(
    root: Path, home: CoordinatorHome, ledger: Ledger, name: str, seed: int, lax: bool
) -> tuple[SiteHome, int]:
    """Join a site of a few patients; gives its home and the port of its health."""
    print_ = pki.fingerprint(pki.read_certificate(home.authority))
    token = invite(ledger, print_, name, Role.SITE, 1.0, "test")
    joined = join(root / "homes" / name, f"{home.settings.listen.host}:{home.settings.ports.enrol}", token)
    alive, runtime = free_ports(2)
    made = tiny.site(root, name, seed)
    text = (joined.path / "site.toml").read_text().replace('data = "data"', f'data = "{made.data}"')
    own = f"[daemon]\nhealth_port = {alive}\nruntime_port = {runtime}\nstop_seconds = 20\n\n"
    (joined.path / "site.toml").write_text(text.replace("[coordinator]", f"{own}[coordinator]", 1))
    key = joined.settings.coordinator.key
    manifests = '"any"' if lax else '"ask"'
    rules = f'version = 1\n[runs]\ncoordinators = ["{key}"]\nmanifests = {manifests}\n'
    (joined.path / "policy.toml").write_text(rules + (LAX if lax else ""))
    return SiteHome.open(joined.path), alive


@dataclass
class FieldSite:
    """A site that has joined, and its daemon, once it is started."""

    home: SiteHome
    port: int
    service: Service | None = None

    def health(self) -> dict[str, Any]:
        """What it says of itself; of a site in a network namespace, what its node wrote down."""
        return health(self.port)

    def log(self) -> list[dict[str, Any]]:
        """The lines of its daemon's log."""
        return log_lines(self.home.path / "logs/site.jsonl")


def log_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a daemon's log; the last one may be half written."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


@dataclass
class Field:
    """A federation that runs, and what tests do to it."""

    root: Path
    home: CoordinatorHome
    place: Machine
    ledger: Ledger
    sites: dict[str, FieldSite] = field(default_factory=dict)
    coordinator: Service | None = None

    def serve(self, *more: str) -> Service:
        """Start the coordinator's daemon, and wait until it serves."""
        self.coordinator = self.place.start(*FEDCOMET, "coordinator", "serve", str(self.home.path), *more)
        until(lambda: self.health()["healthy"], lambda: "the coordinator serves: " + self.told(), 300)
        return self.coordinator

    def health(self) -> dict[str, Any]:
        """What the coordinator's daemon says of itself."""
        return health(self.home.settings.ports.health)

    def told(self) -> str:
        """All that the coordinator's daemon printed."""
        return "" if self.coordinator is None else "".join(self.coordinator.lines)

    def log(self) -> list[dict[str, Any]]:
        """The lines of the coordinator's log."""
        return log_lines(self.home.logs / "coordinator.jsonl")

    def join(self, name: str, lax: bool = True) -> FieldSite:
        """Let a site join."""
        made, port = join_site(self.root, self.home, self.ledger, name, len(self.sites) + 1, lax)
        self.sites[name] = FieldSite(made, port)
        return self.sites[name]

    def run_site(self, name: str, *before: str, environment: Mapping[str, str] | None = None) -> FieldSite:
        """Start a site's daemon; `before` is put before its command."""
        site = self.sites[name]
        own = [f"{key}={value}" for key, value in (environment or {}).items()]
        command = [*before, *(["env", *own] if own else []), *FEDCOMET, "site", "run", str(site.home.path)]
        site.service = self.place.start(*command)
        return site

    def stop_sites(self) -> None:
        """Tell the sites' daemons to end, and wait until they have."""
        for service in [site.service for site in self.sites.values() if site.service is not None]:
            service.stop()

    def all_online(self, count: int | None = None) -> None:
        """Wait until all sites are there."""
        wanted = len(self.sites) if count is None else count
        until(lambda: self.health().get("online") == wanted, lambda: "all sites are online: " + self.told(), 300)

    def begin(self, run: str, **changes: Any) -> Journal:
        """Propose and start a run."""
        settings = {"expect_sites": len(self.sites), "join_s": 600.0, "deadline_s": 600.0, **changes}
        path = self.root / f"{run}.json"
        path.write_bytes(tiny.plan(name=run, **settings).to_bytes())
        command = ("coordinator", "start", run, "--plan", str(path), "--home", str(self.home.path))
        assert f"run {run} is ready" in self.place.call(*FEDCOMET, *command)
        return self.ledger.journal(run)

    def committed(self, run: str, number: int, seconds: float = 600) -> None:
        """Wait until a round is committed."""
        journal = self.ledger.journal(run)
        until(lambda: journal.committed() >= number or self.state(run) in ENDED, self.told, seconds)
        assert journal.committed() >= number, self.ledger.run(run).reason + self.told()

    def state(self, run: str) -> RunState:
        """How a run is."""
        return self.ledger.run(run).state

    def finished(self, run: str, seconds: float = 900) -> None:
        """Wait until a run has finished, and see that it did so well."""
        until(lambda: self.state(run) in ENDED, self.told, seconds)
        assert self.state(run) == RunState.FINISHED, self.ledger.run(run).reason + self.told()
        self.check(run)

    def check(self, run: str) -> None:
        """See that nothing is lost, nothing counted twice, and every site's list of what left whole."""
        journal, rounds = self.ledger.journal(run), tiny_rounds(self.ledger, run)
        assert journal.committed() == rounds
        for number in range(1, rounds + 1):
            names = [entry.site for entry in journal.replies(number) if entry.status == Status.ACCEPTED]
            assert len(names) == len(set(names)) >= 1
        self.contiguous(run)

    def contiguous(self, run: str) -> None:
        """See that every committed round was committed once, and that all lists of what left are whole."""
        done = self.ledger.journal(run).committed()
        commits = [each.round for each in self.ledger.events(run=run, what="round.committed", limit=100_000)]
        assert commits == list(range(1, done + 1))
        for site in self.sites.values():
            assert audit(site.home.state).broken is None

    def order(self, word: str, run: str, state: RunState) -> None:
        """Have a run pause, resume or stop, and wait until it has."""
        self.cli("coordinator", word, run, "--home", str(self.home.path))
        until(lambda: self.state(run) == state, self.told, 300)

    def kill(self, kind: str, site: str) -> None:
        """Kill a process of a kind (`KINDS`) that is there within a minute; a daemon is started again.

        Args:
            kind: what it is.
            site: whose, where it is a site's.
        """
        if kind == "daemon of a site":
            service = self.sites[site].service
            assert service is not None
            service.kill()
            self.run_site(site)
        elif kind == "daemon of the coordinator":
            assert self.coordinator is not None
            self.coordinator.kill()
            self.serve("--wait")
        else:
            until(lambda: kill_if_there(self._find(kind, site)), f"there is no {kind} to kill", 60)

    def _find(self, kind: str, site: str) -> int | None:
        match kind:
            case "app process of a site":
                return app_process(self.place, site)
            case "nursery of a site":
                return nursery(self.place, site)
            case "node of a site":
                return node(self.place, site)
            case "SuperLink":
                return process(self.place, ("server.superlink",))
            case _:
                return process(self.place, ("flwr-serverapp",))

    def cli(self, *words: str) -> str:
        """Give what a command of fedcomet prints."""
        return self.place.call(*FEDCOMET, *words)


def kill_if_there(pid: int | None) -> bool:
    """Kill a process; False if there was none, or none any more."""
    if pid is None:
        return False
    try:
        tiny.kill(pid)
    except ProcessLookupError:
        return False
    return True


def tiny_rounds(ledger: Ledger, run: str) -> int:
    """How many rounds a run was to have."""
    return int(json.loads(ledger.run(run).plan)["rounds"])


@contextmanager
def federation(
    root: Path,
    sites: Sequence[str] = ("icu", "ward"),
    *,
    address: str = "127.0.0.1",
    database: str = "",
    run: bool = True,
) -> Iterator[Field]:
    """Found a federation, join its sites, start all daemons, and end all of it afterwards.

    Args:
        root: a folder for everything.
        sites: names; the first one's records follow from seed 1, the next from 2.
        address: where the coordinator listens.
        database: URL of the ledger; a file in the home if empty.
        run: also start the sites' daemons, and wait for them.
    """
    home = found_federation(root, address, database)
    with machine(root) as place, Ledger.open(home.ledger_url) as ledger:
        made = Field(root, home, place, ledger)
        made.serve()
        for name in sites:
            made.join(name)
            if run:
                made.run_site(name)
        try:
            if run:
                made.all_online()
            yield made
        finally:
            made.stop_sites()  # first: a node whose coordinator is away asks it for a while before it ends


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """Put a disk of its own, of a few megabytes, at a folder; whoever is not root can't."""
    path.mkdir(parents=True, exist_ok=True)
    done = os.system(f"mount -t tmpfs -o size={megabytes}m,mode=700 tmpfs '{path}'")
    assert done == 0
    try:
        yield path
    finally:
        assert os.system(f"umount -l '{path}'") == 0


def fill(disk: Path) -> Path:
    """Take all room that is left on a disk; removing what is given makes it free again."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue
    return ballast
