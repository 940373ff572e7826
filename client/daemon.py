"""`fedcomet site run HOME`: one command that keeps a site in its federation for weeks.

It keeps the site's Flower node running, through crashes of either side, writes one log, and tells on loopback how
things are. Killed at any moment it is started again by whoever starts it (systemd, a container's runtime); nothing is
lost, for what a site must not forget is in its state folder before it counts.
"""

import fcntl
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from client.home import LOCK, SiteHome
from client.link import Link
from client.policy import Policy
from client.supernode import NodeFolder, NodeState, trusted_coordinators
from federation import logs, pki, supervisor, vitals
from federation.manifest import software_version
from federation.messages import SiteRefusal
from federation.vitals import notify
from tokenizer import durable
from tokenizer.errors import ConfigError, FedcometError
from tokenizer.settings import agreed

_TICK_S = 1.0
_TELL_S = 60.0
_AGAIN_S = 5.0
_TRIES, _TRY_S = 5, 0.05
_NODE = "supernode"
_GOOD = ("waiting", "working")
_STARTING_S = 60.0

_log = logging.getLogger(__name__)


def run(path: Path) -> None:
    """Run a site until SIGTERM or SIGINT.

    Raises:
        ConfigError: the home is none, is in use, or a setting, key or certificate in it can't be used.
    """
    os.umask(0o077)
    home = SiteHome.open(path)
    agreed(home.files.settings)  # names a wrong setting before anything starts
    home.check_data()
    trusted_coordinators(home)
    pki.pair(home.key, home.certificate)
    with _alone(path):
        settings = home.settings.daemon
        logs.to_files(path / "logs", "site", most_bytes=settings.log_megabytes << 20, keep=settings.log_files)
        daemon = _Daemon(home)
        daemon.run()


class _Daemon:
    def __init__(self, home: SiteHome) -> None:
        self._home, self._folder = home, NodeFolder(home.path)
        node = supervisor.Program(
            name=_NODE,
            command=(sys.executable, "-m", "client.supernode", str(home.path)),
            environment=supervisor.flower_environment(home.path / "flower"),
            stop_s=home.settings.daemon.stop_seconds + 20,
        )
        self._supervisor = supervisor.Supervisor([node])
        self._files = home.files
        self._files.forget_trouble()
        self._trouble = ""
        self._line = _Line(home)
        self._began = time.time()

    def run(self) -> None:
        wait = supervisor.until_signal()
        board = vitals.Vitals(self._home.settings.daemon.health_port, self._health, "fedcomet_site")
        self._folder.write("starting")
        self._line.start()
        _log.info("site %s runs, fedcomet %s", self._home.name, software_version())
        ready = started = False
        try:
            while not wait(_TICK_S):
                if self._line.asked.is_set() and not started:
                    started = True
                    self._supervisor.start()
                self._log_trouble()
                well, told = self._health()
                self._measure(board, well)
                if well and not ready:
                    ready = True
                    notify("READY=1")
                notify(f"WATCHDOG=1\nSTATUS={told['node']}")
        finally:
            notify("STOPPING=1")
            _log.info("stopping: work that is done within %g s still leaves", self._home.settings.daemon.stop_seconds)
            self._line.stop()
            self._supervisor.stop()
            board.close()
            _log.info("stopped")

    def _log_trouble(self) -> None:
        """Say once what stood in the way of an answer."""
        trouble = self._files.trouble()
        if trouble and trouble != self._trouble:
            _log.error("%s", trouble)
        self._trouble = trouble

    def _node(self) -> tuple[NodeState, supervisor.Condition]:
        """Give what the node that runs says of itself, not what a killed one said last; and how its process is."""
        node, condition = self._folder.read(), self._supervisor.conditions()[_NODE]
        if node.state in _GOOD and node.pid != condition.pid:
            node = NodeState("starting", node.since)
        return node, condition

    def _health(self) -> tuple[bool, Mapping[str, Any]]:
        node, condition = self._node()
        free = durable.free_bytes(self._home.state)
        well = condition.running and node.state in _GOOD and free >= durable.LEAST_FREE
        hindered = self._line.policy or self._files.trouble()
        well = well and not self._line.refused and not self._line.ended and not hindered
        told = {
            "site": self._home.name,
            "node": node.state,
            "since": node.since,
            "restarts": condition.ends,
            "control": self._line.problem or "fine",
        }
        asked = self._line.asked.is_set()
        trouble = self._line.clock or self._line.problem or (node.reason if asked else "")
        if free < durable.LEAST_FREE:
            told["reason"] = durable.full(self._home.state)
        elif self._line.ended:
            told["reason"] = (
                "nothing is told to the coordinator any more, and the certificate is not renewed; start this site again"
            )
        elif refused := self._line.refused:
            told["reason"] = refused
        elif hindered:
            told["reason"] = hindered
        elif not well and trouble:
            told["reason"] = trouble
        elif not well and asked and not condition.running and condition.ends:
            told["reason"] = "the node is started again in a moment"
        elif not well:
            before = "the coordinator is about to be asked what it has heard of this site"
            told["reason"] = "the node is about to connect" if asked else before
            told["starting"] = not condition.ends and time.time() - self._began < _STARTING_S
        return well, told

    def _measure(self, board: vitals.Vitals, well: bool) -> None:
        node, condition = self._node()
        board.set("healthy", well, "1 if the site is connected and nothing is wrong")
        board.set("control_reachable", not self._line.problem, "1 if the last word to the control service came through")
        board.set("working", node.state == "working", "1 while a message of the coordinator is worked on")
        board.set("node_restarts", condition.ends, "How often the node ended by itself since the daemon began")
        board.set("uptime_seconds", time.time() - self._began, "Since the daemon began")
        board.set("disk_free_bytes", durable.free_bytes(self._home.state), "Free on the disk of the state folder")


def _unusable(home: SiteHome) -> str:
    """Say why a site's policy can't be used; empty if it can."""
    try:
        Policy.read(home.policy)
    except ConfigError as problem:
        return f"{problem} Nothing is answered until the policy is mended"
    return ""


class _Line(threading.Thread):
    """The line to the control service: the site's health and budget are told, and its certificate is renewed, in time.

    No request of a run is taken before the coordinator was asked once what it has heard of this site, which shows a
    state that was restored from an older copy: again soon, then each minute, for each try is an entry on the list of
    what leaves. Later, a coordinator that is away costs nothing: the next minute is the next try.
    """

    def __init__(self, home: SiteHome) -> None:
        super().__init__(name="line", daemon=True)
        self._home, self._stopping = home, threading.Event()
        self.problem, self.refused, self.clock, self.asked = "", "", "", threading.Event()
        self.policy = ""

    def run(self) -> None:
        again_s = _AGAIN_S
        while not self._stopping.is_set():
            try:
                with Link(self._home) as link:
                    while not self._stopping.is_set() and not link.outdated:
                        self._tell(link)
                        self.problem = self.refused = ""
                        again_s = _AGAIN_S
                        self._stopping.wait(_TELL_S)
            except SiteRefusal as restored:
                self.asked.set()  # the runs hear of it, too
                if not self.refused:
                    _log.error("%s", restored)
                self.problem, self.refused = "", str(restored)
                self._stopping.wait(again_s)
            except Exception as error:  # whatever it is: without this line no certificate is renewed
                known = isinstance(error, FedcometError | OSError)
                problem = str(error) if known else f"unexpected {type(error).__name__}: {error}"
                if problem != self.problem:
                    _log.warning("%s", problem, exc_info=None if known else error)
                self.problem = problem
                self._stopping.wait(_TELL_S if self.asked.is_set() else again_s)
            again_s = min(2 * again_s, _TELL_S)

    def _tell(self, link: Link) -> None:
        told, self.policy = self.policy, _unusable(self._home)
        if self.policy and not told:
            _log.error("%s", self.policy)
        if link.renew_if_due():
            _log.info("the site's certificate was renewed")
        if warning := link.warning():
            _log.warning("%s", warning)
        link.report_health()
        self.asked.set()
        self.clock = link.wrong_clock() or ""
        if self.clock:
            _log.error("%s", self.clock)
        if not self.policy:
            link.report_budget()

    @property
    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self.ident is not None and not self.is_alive() and not self._stopping.is_set()

    def stop(self) -> None:
        self._stopping.set()
        if self.is_alive():
            self.join(_TICK_S)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the home: two daemons of one site would take each other's work.

    Raises:
        ConfigError: another daemon holds it.
    """
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for left in reversed(range(_TRIES)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise ConfigError(f"{path}: another `fedcomet site run` uses this home; stop it first.") from None
                time.sleep(_TRY_S)  # `site status` holds it for a moment to see whether a daemon does
        yield
    finally:
        os.close(descriptor)
