"""A coordinator's sockets on loopback, and members that joined them, for tests of enrolment and control."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from client.enrol import join
from client.home import SiteHome
from federation import pki
from federation.channel import Channel
from federation.pki import Role
from server.authority import Authority
from server.enrolment import invite
from server.home import CoordinatorHome, CoordinatorSettings, Federation, Listen, Ports
from server.ledger import Ledger
from server.ledger_entries import MemberEntry
from server.listener import Listener, listener_of

DAY = 86400.0


@dataclass
class Clock:
    """The time, as a test sets it forward."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


@dataclass
class Starter:
    """Notes which runs were to be started."""

    started: list[str] = field(default_factory=list)

    def start(self, run: str) -> None:
        self.started.append(run)


@dataclass
class Coordinator:
    """A coordinator that listens."""

    home: CoordinatorHome
    ledger: Ledger
    listener: Listener
    clock: Clock
    starter: Starter
    out: list[MemberEntry]

    @property
    def authority(self) -> Authority:
        return self.home.open_authority(None)

    def token(self, name: str, role: Role = Role.SITE, hours: float = 1.0) -> str:
        print_ = pki.fingerprint(self.authority.certificate)
        return invite(self.ledger, print_, name, role, hours, "test")

    @property
    def enrol_address(self) -> str:
        return f"127.0.0.1:{self.listener.enrol_port}"

    @property
    def control_address(self) -> str:
        return f"127.0.0.1:{self.listener.control_port}"

    def join(self, home: Path, name: str, role: Role = Role.SITE) -> SiteHome:
        return join(home, self.enrol_address, self.token(name, role))

    def channel(self, home: SiteHome) -> Channel:
        key, certificate = pki.pair(home.key, home.certificate)
        return Channel(self.control_address, home.authority.read_bytes(), key, certificate, timeout_s=20)


def new_home(path: Path) -> CoordinatorHome:
    settings = CoordinatorSettings(
        federation=Federation(name="test federation", address="127.0.0.1"),
        ports=Ports(fleet=18443, control=0, enrol=0, ui=0),
        listen=Listen(host="127.0.0.1"),
    )
    return CoordinatorHome.init(path, settings, None)


@contextmanager
def listening(path: Path, home: CoordinatorHome | None = None) -> Iterator[Coordinator]:
    home = home or new_home(path / "coordinator")
    clock, starter, out = Clock(), Starter(), list[MemberEntry]()
    with Ledger.open(home.ledger_url, patience_s=5.0) as ledger:
        listener = listener_of(home, ledger, home.open_authority(None), starter, out.append, clock)
        listener.start()
        try:
            yield Coordinator(home, ledger, listener, clock, starter, out)
        finally:
            listener.stop(0)
