"""The site's Flower node as a process: `python -m client.supernode HOME`, started by `fedcomet site run`.

It reads everything from the site's home, so no path, password or key stands on a command line. What it is doing is in
`HOME/flower/node.json`, for the daemon. SIGTERM lets it finish the message in work, for a while, and sign off.
"""

import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.flower_node import Node, NodeOptions, Refused
from client.home import SiteHome
from client.policy import Policy
from federation import handover, pki, supervisor
from federation.flower_tasks import TaskOptions, Tasks
from tokenizer import durable
from tokenizer.errors import ConfigError, FedcometError

APP_MODULES = ("client.app", "flwr.supernode.runtime.run_clientapp", "federation.handover")
"""What a message's process needs."""

_LATE_S = 10.0
_BEFORE = ("starting", "connecting")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeState:
    """What the node says of itself (starting, connecting, waiting, working, refused, stopping), since when, and why.

    A killed node's last words stand until the next one speaks; `pid` tells whose they are.
    """

    state: str
    since: float
    reason: str = ""
    pid: int = 0


class NodeFolder:
    """Where the node keeps what it needs between starts, in the site's home."""

    def __init__(self, home: Path) -> None:
        """Take the home; the folder is made when something is written."""
        self.root = home / "flower"
        self.memory, self.objects = self.root / "number.json", self.root / "objects"
        self._state = self.root / "node.json"

    def write(self, state: str, reason: str = "") -> None:
        """Say what the node is doing; where the disk is full nothing is said, and the daemon says that.

        Why it was refused is told until it is let in, for it tries again within seconds.
        """
        if state in _BEFORE and not reason:
            reason = self.read().reason
        aside = self._state.with_suffix(".partial")
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            aside.write_text(json.dumps(vars(NodeState(state, time.time(), reason, os.getpid()))))
            aside.replace(self._state)
        except OSError as problem:
            if not durable.out_of_room(problem):
                raise
            aside.unlink(missing_ok=True)

    def read(self) -> NodeState:
        """Tell what the node is doing; "starting" when it has not said anything yet."""
        try:
            told = json.loads(self._state.read_bytes())
            return NodeState(str(told["state"]), float(told["since"]), str(told["reason"]), int(told["pid"]))
        except (OSError, KeyError, TypeError, ValueError):
            return NodeState("starting", 0.0)


def trusted_coordinators(home: SiteHome) -> Sequence[str]:
    """Give the keys of the coordinators whose bundles the site takes: the policy's, or else that of its enrolment.

    Raises:
        ConfigError: the policy can't be read.
    """
    return Policy.read(home.policy).runs.coordinators or (home.settings.coordinator.key,)


class _Trusted:
    """Whose bundles a site takes, by its policy as it is now.

    While that can't be read, it is as it was: the node stays, and each answer is a refusal that says so.
    """

    def __init__(self, home: SiteHome) -> None:
        self._home, self._last = home, trusted_coordinators(home)

    def now(self) -> Sequence[str]:
        with contextlib.suppress(ConfigError):
            self._last = trusted_coordinators(self._home)
        return self._last


def main(path: str) -> int:
    """Run the node until SIGTERM; gives the exit code."""
    supervisor.begin_child()
    folder = NodeFolder(Path(path))
    folder.write("starting")
    stopping = threading.Event()
    try:
        home = SiteHome.open(Path(path))
        limit_s = home.settings.daemon.stop_seconds
        _stop_on_signals(stopping, folder, limit_s)
        return _serve(home, folder, stopping, limit_s)
    except Refused as refused:
        _log.error("%s", refused)
        folder.write("refused", str(refused))
        return supervisor.REFUSED
    except (FedcometError, OSError) as error:
        _log.error("%s", error)
        folder.write("refused", str(error))
        return supervisor.BAD_CONFIG


def _serve(home: SiteHome, folder: NodeFolder, stopping: threading.Event, limit_s: float) -> int:
    settings, secret = home.settings, secrets.token_bytes(32)
    trusted = _Trusted(home)
    pki.pair(home.key, home.certificate)  # puts a renewed key in its place where a crash came in between
    key = pki.read_key(home.key)
    told = NodeOptions(
        superlink=f"{settings.coordinator.address}:{settings.coordinator.fleet_port}",
        authority=home.authority.read_bytes(),
        key=key,
        config=home.files.node_config(),
        coordinators=trusted.now,
        runtime_port=settings.daemon.runtime_port,
        secret=secret,
        memory=folder.memory,
        objects=folder.objects,
    )
    node = Node(told, folder.write)
    node.open_runtime()
    come = threading.Event()
    port = settings.daemon.runtime_port
    environment = {handover.FOLDER: str(folder.objects.absolute())}
    options = TaskOptions("site", port, secret, None, environment, home.state / "app.log", APP_MODULES)
    tasks = Tasks(options, crashed=node.crashed, come=come)
    home.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    tasks.start()
    try:
        node.serve(stopping, limit_s, come, worked=lambda: tasks.alive)
    except Refused:
        if pki.read_key(home.key).public_key() == key.public_key():
            raise
        _log.info("the site has a new key; the node starts again with it")
        return 0
    finally:
        folder.write("stopping")
        tasks.stop()
    return 0 if stopping.is_set() else 1


def _stop_on_signals(stopping: threading.Event, folder: NodeFolder, limit_s: float) -> None:
    def stop(*_: object) -> None:
        if not stopping.is_set():
            stopping.set()
            threading.Thread(target=_end_late, args=(folder, limit_s), daemon=True).start()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)


def _end_late(folder: NodeFolder, limit_s: float) -> None:
    """End this process, should Flower be waiting for a coordinator that is away, which nothing else ends."""
    time.sleep(_LATE_S)
    if folder.read().state == "working":
        time.sleep(limit_s)
    os._exit(0)


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    # Not sys.exit: threads of Flower's that wait for a coordinator would keep the process.
    os._exit(code)
