"""A SuperLink and SuperNodes as real processes on loopback, with TLS and node authentication; all end with a test."""

import contextlib
import os
import random
import select
import signal
import socket
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from client.files import SiteFiles
from simulation.engine_processes import write_certificates, write_node_key
from tests import tiny

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
MARK = "FEDCOMET_TEST_RUN"


class Machine:
    """Processes that share an environment and leave nothing behind."""

    def __init__(self, root: Path) -> None:
        self.root, self.mark = root, uuid.uuid4().hex
        self.env = {
            **os.environ,
            MARK: self.mark,
            "PYTHONPATH": str(REPOSITORY),
            "FLWR_HOME": str(root / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FEDCOMET_RUNS": str(root / "runs"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }
        self.services: list[Service] = []

    def call(self, *command: str) -> str:
        done = subprocess.run(
            command,
            env=self.env,
            cwd=self.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def start(self, *command: str) -> "Service":
        service = Service(command, self)
        self.services.append(service)
        return service

    def stop(self) -> None:
        for service in reversed(self.services):
            service.stop()

    def processes(self) -> list[int]:
        """Find every process that was started from here, at whatever depth."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue
        return found


class Service:
    """A process whose output can be waited for."""

    def __init__(self, command: tuple[str, ...], machine: Machine) -> None:
        self._process = subprocess.Popen(
            command, env=machine.env, cwd=machine.root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines: list[str] = []
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._more:
                self.lines.append(line)
                self._more.notify_all()

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        with self._more:
            found = self._more.wait_for(lambda: any(text in line for line in self.lines), timeout_s)
        assert found, "".join(self.lines)

    def wait(self, timeout_s: float = 300) -> int:
        code = self._process.wait(timeout_s)
        self._reader.join(60)
        return code

    def kill(self) -> None:
        """Kill it with all that it started, as when a machine loses its power."""
        doomed = [self._process.pid]
        for pid in doomed:
            for task in Path(f"/proc/{pid}/task").glob("*/children"):
                doomed += map(int, task.read_text().split())
        for pid in doomed:
            tiny.kill(pid)

    def terminate(self) -> None:
        """Tell it to end."""
        self._process.terminate()

    def signal(self, number: int) -> None:
        """Send it, and it alone, a signal."""
        self._process.send_signal(number)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            self._reader.join(60)
            if self._process.stdout is not None:
                self._process.stdout.close()


@contextmanager
def machine(root: Path) -> Iterator[Machine]:
    place = Machine(root)
    try:
        yield place
    finally:
        place.stop()
        left = {pid: f"/proc/{pid}/cmdline" for pid in place.processes()}
        told = {pid: Path(path).read_bytes() for pid, path in left.items() if not gone(pid)}
        for pid in told:
            os.kill(pid, signal.SIGKILL)
    assert not told


def gone(pid: int) -> bool:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(descriptor):
        return bool(select.select([descriptor], [], [], 30)[0])


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, from below those that the system gives to outgoing connections in the meantime."""
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        with contextlib.suppress(OSError):
            sockets.append(socket.create_server(("127.0.0.1", random.randrange(10_000, 32_768))))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def start_superlink(place: Machine, port: int) -> Service:
    root = place.root
    write_certificates(root)
    (root / "flwr").mkdir()
    (root / "flwr/config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{root / "ca.crt"}"\n'
    )
    tls = ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--database", str(root / "state.db")]
    rules = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    superlink = place.start(str(BIN / "flower-superlink"), *tls, *where, *rules)
    superlink.wait_for("running on")
    return superlink


def start_supernode(place: Machine, files: SiteFiles, superlink: int, port: int) -> Service:
    key = place.root / f"{files.name}-key"
    write_node_key(key)
    place.call(str(BIN / "flwr"), "supernode", "register", str(key.with_suffix(".pub")), "test")
    config = f'name="{files.name}" data="{files.data}" state="{files.state}" policy="{files.policy}"'
    link = ["--superlink", f"127.0.0.1:{superlink}", "--root-certificates", "ca.crt"]
    own = ["--auth-supernode-private-key", str(key), "--node-config", config, "--port", str(port)]
    return place.start(str(BIN / "flower-supernode"), *link, *own)


def kill_coordinator(place: Machine) -> None:
    killed = 0
    for pid in place.processes():
        if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes():
            tiny.kill(pid)
            killed += 1
    assert killed
