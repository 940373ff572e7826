"""`fedcomet coordinator serve HOME`: one command that keeps a federation going for weeks.

It holds the ledger's lease, serves enrolment and control, keeps Flower's SuperLink running, starts the processes that
lead runs and takes up those that died, makes enrolled sites Flower nodes and revoked ones none, and tells on loopback
how things are. All that counts is in the ledger, the runs' folders and the SuperLink's database: killed at any moment
and started again, everything goes on.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from federation import handover, logs, supervisor, vitals
from federation.flower_tasks import TaskOptions, Tasks
from federation.identity import Identity
from federation.manifest import software_version
from federation.vitals import notify
from server import nodes
from server.control import Control
from server.enrolment import Enrolment, Welcome
from server.flower_link import Control as LinkControl
from server.flower_link import FlowerNode, LinkError, LinkRefusal
from server.home import CoordinatorHome
from server.keeper import Keeper
from server.ledger import Ledger
from server.ledger_entries import MemberEntry, RunEntry
from server.listener import Listener
from server.superlink import LinkFolder, LinkOptions
from server.tables import RunState
from server.transactions import LedgerUnreachable
from tokenizer import durable
from tokenizer.errors import FedcometError

_TICK_S = 1.0
_PATIENCE_S = 5.0
_LATE_S = 60.0
_CERTIFICATE_S = 3600.0
_LINK = "superlink"

_log = logging.getLogger(__name__)


class LeaseEnded(FedcometError):
    """This coordinator does not hold the lease any more."""


def serve(path: Path, *, wait: bool = False, passphrase: str | None = None) -> None:
    """Serve a federation until SIGTERM or SIGINT.

    Args:
        path: the coordinator's home.
        wait: wait for another coordinator on the same ledger to end, instead of being refused.
        passphrase: of the authority's key, if it is encrypted.

    Raises:
        ConfigError: the home is none, or a setting, key, certificate or port can't be used.
        LeaseTaken: another coordinator leads.
        LeaseEnded: another coordinator took over, or the lease can't be renewed.
    """
    os.umask(0o077)
    home = CoordinatorHome.open(path)
    log = home.settings.log
    logs.to_files(home.logs, "coordinator", most_bytes=log.megabytes << 20, keep=log.files)
    authority = home.open_authority(passphrase)
    home.server_pair()
    stopping, lost = supervisor.until_signal(), threading.Event()

    def pause(seconds: float) -> None:
        if stopping(seconds):
            raise _Stopped

    try:
        with Ledger.open(home.ledger_url, backups=home.backups, pause=pause) as ledger:
            with (
                ledger.lead(wait=wait, tell=lambda told: _log.info("%s", told), lost=lost) as token,
                ExitStack() as stack,
            ):
                # From here on a loop comes back by itself, must tell that it lives, and ends what it had started.
                ledger.transactions.patience_s, ledger.transactions.pause = _PATIENCE_S, time.sleep
                daemon = _Daemon(home, ledger, token, stack, Enrolment(ledger, authority, _welcome(home)), passphrase)
                daemon.run(stopping, lost)
            if lost.is_set():
                raise LeaseEnded(
                    "This coordinator does not hold the lease any more (the log says why: as a rule another one leads "
                    "this federation now), and has ended what it had started."
                )
    except _Stopped:
        _log.info("stopping; this coordinator had not begun to lead")


def _welcome(home: CoordinatorHome) -> Welcome:
    settings = home.settings
    return Welcome(
        federation=settings.federation.name,
        fleet_port=settings.ports.fleet,
        control_port=settings.ports.control,
        coordinator=Identity.at(home.signing_key).public,
    )


class _Stopped(Exception):
    """A signal came while this process waited for the ledger or the lease."""


class _NoRoom(FedcometError):
    """The disk of the home is full."""


class _Daemon:
    """What runs under the lease; all of it ends, in the other order, when `stack` is closed."""

    def __init__(
        self,
        home: CoordinatorHome,
        ledger: Ledger,
        token: int,
        stack: ExitStack,
        enrolment: Enrolment,
        passphrase: str | None,
    ) -> None:
        self._home, self._ledger, self._passphrase = home, ledger, passphrase
        settings = home.settings
        folder = LinkFolder(home.path / "flower")
        folder.write(
            LinkOptions(
                host=settings.listen.host,
                fleet=settings.ports.fleet,
                runtime=settings.ports.runtime,
                certificate=str(home.server_certificate.absolute()),
                key=str(home.server_key.absolute()),
                identity=str(home.signing_key.absolute()),
            )
        )
        self._folder = folder
        self._began, self._answered, self._problem = time.time(), 0.0, ""
        self._nodes: dict[str, FlowerNode] = {}
        self._enrolled: set[str] = set()
        self._measured: set[str] = set()
        self._following = threading.Lock()
        self._remarks: dict[str, list[str]] = {}
        self._certificate_at = 0.0  # by `time.monotonic`
        self._runs: list[RunEntry] = []
        self._link = LinkControl(settings.ports.runtime, folder.token())
        stack.callback(self._link.close)
        self._keeper = Keeper(ledger, self._link, lambda run: ledger.journal(run).committed(), home.runs)
        command = (sys.executable, "-m", "server.superlink", str(folder.root))
        environment = supervisor.flower_environment(folder.root)
        self._supervisor = supervisor.Supervisor([supervisor.Program(_LINK, command, environment, stop_s=20.0)])
        apps = {
            **environment,
            "FEDCOMET_RUNS": str(home.runs.absolute()),
            "FEDCOMET_LEDGER": home.ledger_url,
            "FEDCOMET_LEASE": str(token),
            handover.FOLDER: str(folder.objects.absolute()),
        }
        options = TaskOptions("coordinator", settings.ports.runtime, folder.secret(), folder.root / "tasks", apps)
        self._tasks = Tasks(options)
        # Whoever asks for its health from here on is told how these are, before they are started, too.
        self._board = vitals.Vitals(settings.ports.health, self._health, "fedcomet_coordinator")
        stack.callback(self._board.close)
        self._listen(stack, enrolment)
        self._supervisor.start()
        stack.callback(self._supervisor.stop)
        # Before the SuperLink ends, the processes that lead runs do: they tell it so, and the ledger says "running".
        self._tasks.start()
        stack.callback(self._tasks.stop)

    def start(self, run: str) -> None:
        """Take up a run that is ready; the next look at the ledger would do it, too."""
        self._write_plan(run)

    def run(self, stopping: Any, lost: threading.Event) -> None:
        """Look after everything until it is time to stop."""
        _log.info("federation %s is served, fedcomet %s", self._home.settings.federation.name, software_version())
        ready = False
        while not stopping(_TICK_S) and not lost.is_set():
            self._look()
            self._keep_certificate()
            well, told = self._health()
            self._measure(well)
            if well and not ready:
                ready = True
                notify("READY=1")
            notify(f"WATCHDOG=1\nSTATUS={told['online']} of {told['sites']} sites are online")
        notify("STOPPING=1")
        _log.info("stopping; runs go on from their last round when the federation is served again")

    def _listen(self, stack: ExitStack, enrolment: Enrolment) -> None:
        ended = threading.Event()
        control = Control(self._ledger, enrolment, self, ended.wait, self._put_out)
        listener = Listener(self._home, self._ledger, control, enrolment, ended)
        listener.start()
        stack.callback(listener.stop)

    def _put_out(self, member: MemberEntry) -> None:
        """Let a revoked member be no node from its next request on; the next look does it where that fails."""
        try:
            self._follow()
        except LinkError as error:
            _log.warning("%s is revoked; its node ends as soon as the SuperLink answers (%s)", member.name, error)

    def _look(self) -> None:
        try:
            if not self._answered:
                self._keeper.begin()
            self._follow()
            self._runs = self._ledger.runs()
            if durable.free_bytes(self._home.path) < durable.LEAST_FREE:
                raise _NoRoom(durable.full(self._home.path))  # a process that leads a run would only end again
            for run in self._runs:
                if run.state == RunState.READY:
                    self._write_plan(run.name)
            self._keeper.look(self._folder.bundle.read_text())
            self._answered, self._problem = time.time(), self._keeper.trouble
        except LinkRefusal as error:
            self._warn(str(error), error)
        except LinkError as error:
            if time.time() - max(self._answered, self._began) > _LATE_S:
                self._warn("the SuperLink does not answer; logs/ says why", error)
        except LedgerUnreachable as error:
            away = self._ledger.transactions.away
            self._warn(f"the ledger can't be reached ({away}); runs go on when its database is back", error)
        except (_NoRoom, OSError) as error:
            self._warn(durable.full(self._home.path) if durable.out_of_room(error) else str(error), error)

    def _keep_certificate(self) -> None:
        if time.monotonic() >= self._certificate_at:
            self._certificate_at = time.monotonic() + _CERTIFICATE_S
            self._remark("certificates", self._home.keep_certificate(self._passphrase, datetime.now(UTC)))

    def _warn(self, problem: str, error: Exception) -> None:
        """Say what is wrong: once in the log, and in the health as long as it is so."""
        if problem != self._problem:
            _log.warning("%s", error)
        self._problem = problem

    def _remark(self, on: str, told: list[str]) -> None:
        """Say what people should look at while all goes on: as `_warn` does, but not as a reason to be unwell."""
        for text in told:
            if text not in self._remarks.get(on, ()):
                _log.warning("%s", text)
        self._remarks[on] = told

    def _follow(self) -> None:
        with self._following:  # calls of control do this, too
            members = self._ledger.members.all()
            self._enrolled = {member.name for member in members if nodes.enrolled(member)}
            self._nodes, refused = nodes.follow(members, self._link)
            self._remark("nodes", refused)

    def _write_plan(self, name: str) -> None:
        """Put a run's plan where the process that leads it reads it."""
        path, plan = self._home.runs / name / "plan.json", self._ledger.run(name).plan
        if not path.exists():
            durable.write_bytes(path, plan)

    def _health(self) -> tuple[bool, Mapping[str, Any]]:
        condition = self._supervisor.conditions()[_LINK]
        well = condition.running and not self._problem and time.time() - self._answered < _LATE_S
        online = sum(node.online for node in self._nodes.values())
        told = {
            "superlink": condition.running,
            "sites": len(self._nodes),
            "online": online,
            "leading": self._tasks.busy,
            "warnings": [text for told in list(self._remarks.values()) for text in told],
        }
        reason = self._problem or "the SuperLink does not answer yet; logs/ says why"
        return well, told if well else {**told, "reason": reason}

    def _measure(self, well: bool) -> None:
        board, condition = self._board, self._supervisor.conditions()[_LINK]
        board.set("healthy", well, "1 if the SuperLink answers and nothing is wrong")
        board.set("superlink_restarts", condition.ends, "How often the SuperLink ended by itself")
        board.set("warnings", sum(map(len, self._remarks.values())), "What people must see to; /health has the words")
        board.set("leading", self._tasks.busy, "Processes that lead a run")
        board.set("uptime_seconds", time.time() - self._began, "Since the daemon began")
        there, enrolled = self._nodes, self._enrolled
        for name in enrolled:
            online = name in there and there[name].online
            board.set("site_online", online, "1 if an enrolled site's node is connected", site=name)
        for name in self._measured - enrolled:
            board.drop("site_online", site=name)
        self._measured = enrolled
        for state in RunState:
            count = sum(run.state == state for run in self._runs)
            board.set("runs", count, "Runs by state", state=state)
        board.set("disk_free_bytes", durable.free_bytes(self._home.path), "Free on the disk of the home")
