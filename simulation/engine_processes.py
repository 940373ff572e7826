"""A federation of real processes on loopback: a SuperLink, a SuperNode for each site, TLS and node authentication.

What a real federation runs, on one machine: to see what processes, sockets and certificates cost, and that results
don't change. Certificates and keys are made for this run and lie in a temporary folder; all processes end with it.
"""

import contextlib
import datetime as dt
import ipaddress
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import IO

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from flwr.app import Message

from client.files import SiteFiles
from server.app import Outcome, coordinate
from server.plan import FederationPlan
from server.rounds import Event
from simulation.engine import LocalGrid
from tokenizer import durable
from tokenizer.errors import FedcometError

_CODE = Path(__file__).parents[1]
_BIN = Path(sys.executable).parent
_READY_S = 300.0
_TOLD = re.compile(r"([a-z]+\.[a-z_]+) round (\d+)")


class EngineFailed(FedcometError):
    """A process of the federation ended, or didn't become ready."""


def run_as_processes(
    plan: FederationPlan,
    sites: Sequence[SiteFiles],
    run_dir: Path,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Outcome:
    """Run a federation to its end over real processes; the same call goes on where one was stopped.

    Args:
        plan: the settings.
        sites: who takes part.
        run_dir: this run's directory, whose name may have letters, digits, '.', '_' and '-'.
        on_event: told of every step's kind and round, in the calling thread.

    Raises:
        EngineFailed: a process ended or isn't ready after some minutes; the message has its last lines.
        FedcometError: see `server.app.coordinate`.
    """
    if plan.codebook is not None:
        durable.write_bytes(run_dir / "codebook.json", plan.codebook)
    waiting = replace(plan, expect_sites=len(sites), join_s=_READY_S, codebook=None)
    durable.write_bytes(run_dir / "plan.json", waiting.to_bytes())
    with tempfile.TemporaryDirectory(prefix="fedcomet-") as home, contextlib.ExitStack() as running:
        place = _Place(Path(home), run_dir.absolute().parent, running)
        port, *ports = _free_ports(1 + len(sites))
        _start_superlink(place, port)
        for site, own in zip(sites, ports, strict=True):
            _start_supernode(place, site, port, own)
        run: list[str | Path] = [_BIN / "flwr", "run", _CODE / "federation/flower_app", "here", "--stream"]
        leading = place.start("coordinator", *run, "--run-config", f'run="{run_dir.name}"')
        for line in leading.lines():
            if told := _TOLD.search(line):
                on_event(Event(told[1], int(told[2])))
        if code := leading.wait():
            raise EngineFailed(f"The coordinator ended with code {code}: {leading.last()}")
    # All is durable: the result is read off the run's directory, without asking anybody.
    fixed = (run_dir / "codebook.json").read_bytes() if (run_dir / "codebook.json").exists() else None
    return coordinate(LocalGrid(_nobody, ()), run_dir, FederationPlan.from_bytes(waiting.to_bytes(), fixed))


def _nobody(site: SiteFiles, node: int, message: Message) -> Future[Message]:
    raise EngineFailed("The run did not come to its end; its log lines say why.")


class _Process:
    """A process whose lines can be read or waited for."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, environment: dict[str, str]) -> None:
        self._name = name
        self._process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._lines: list[str] = []
        self._more = threading.Condition()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        output: IO[str] | None = self._process.stdout
        assert output is not None
        for line in output:
            with self._more:
                self._lines.append(line)
                self._more.notify_all()
        with self._more:
            self._ended = True
            self._more.notify_all()

    def wait_for(self, text: str) -> None:
        """Return when a line with this text was written.

        Raises:
            EngineFailed: it ended before, or took too long.
        """
        with self._more:
            done = self._more.wait_for(lambda: self._ended or any(text in line for line in self._lines), _READY_S)
            if not done or not any(text in line for line in self._lines):
                raise EngineFailed(f"{self._name} did not become ready: {self.last()}")

    def lines(self) -> Iterator[str]:
        """Give every line as it comes, until the process ends."""
        given = 0
        while fresh := self._after(given):
            yield from fresh
            given += len(fresh)

    def _after(self, given: int) -> list[str]:
        """Wait for more lines than so many; none means that the process has ended."""
        with self._more:
            self._more.wait_for(lambda: self._ended or len(self._lines) > given)
            return self._lines[given:]

    def wait(self) -> int:
        """Wait for its end and give its exit code."""
        return self._process.wait()

    def last(self) -> str:
        """Give its last lines."""
        return " | ".join(line.strip() for line in self._lines[-5:]) or "it said nothing"

    def stop(self) -> None:
        """Ask it to end; a minute later, end it."""
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(60)
        if self._process.stdout is not None:
            self._process.stdout.close()


class _Place:
    """Where the processes of one run live; what is started ends with the stack."""

    def __init__(self, folder: Path, runs: Path, running: contextlib.ExitStack) -> None:
        self.folder, self._running = folder, running
        # Nothing of a federation that this shell may be set up for reaches them.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDCOMET_")}
        self._environment = {
            **kept,
            "PYTHONPATH": str(_CODE),
            "FLWR_HOME": str(folder / "flwr"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FEDCOMET_RUNS": str(runs),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{_BIN}:{os.environ.get('PATH', '')}",
        }

    def start(self, name: str, *command: str | Path) -> _Process:
        process = _Process(name, [str(part) for part in command], self.folder, self._environment)
        self._running.callback(process.stop)
        return process

    def call(self, name: str, *command: str | Path) -> None:
        process = self.start(name, *command)
        if code := process.wait():
            raise EngineFailed(f"{name} ended with code {code}: {process.last()}")


def _start_superlink(place: _Place, port: int) -> None:
    folder = place.folder
    write_certificates(folder)
    (folder / "flwr").mkdir()
    (folder / "flwr/config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{port}"\n'
        f'root-certificates = "{folder / "ca.crt"}"\n'
    )
    tls = ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key", "--ssl-ca-certfile", "ca.crt"]
    where = ["--host", "127.0.0.1", "--port", str(port), "--database", str(folder / "state.db")]
    rules = ["--enable-supernode-auth", "--disable-runtime-dependency-installation"]
    place.start("SuperLink", _BIN / "flower-superlink", *tls, *where, *rules).wait_for("running on")


def _start_supernode(place: _Place, site: SiteFiles, superlink: int, port: int) -> None:
    key = place.folder / f"{site.name}-key"
    write_node_key(key)
    place.call("flwr supernode register", _BIN / "flwr", "supernode", "register", key.with_suffix(".pub"), "here")
    config = " ".join(f"{name}={_toml(value)}" for name, value in site.node_config().items())
    link = ["--superlink", f"127.0.0.1:{superlink}", "--root-certificates", "ca.crt"]
    own = ["--auth-supernode-private-key", str(key), "--node-config", config, "--port", str(port)]
    place.start(f"SuperNode of {site.name}", _BIN / "flower-supernode", *link, *own)


def _toml(value: bool | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def write_certificates(folder: Path) -> None:
    """Write an authority (`ca.crt`) and its certificate for loopback (`server.pem`, `server.key`), good for a week."""
    now = dt.datetime.now(dt.UTC)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "simulated federation")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])

    def builder(subject: x509.Name, public: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=7))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
        )

    basic = x509.BasicConstraints(ca=True, path_length=0)
    usage = x509.KeyUsage(True, False, False, False, False, True, True, False, False)
    authority = builder(issuer, authority_key.public_key()).add_extension(basic, critical=True)
    authority = authority.add_extension(usage, critical=True)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))])
    server = builder(name, key.public_key()).add_extension(names, critical=False)
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "ca.crt").write_bytes(authority.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    (folder / "server.pem").write_bytes(server.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    (folder / "server.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))


def write_node_key(path: Path) -> None:
    """Write a SuperNode's key pair as `ssh-keygen -t ecdsa -b 384` does."""
    key = ec.generate_private_key(ec.SECP384R1())
    private = serialization.PrivateFormat.OpenSSH
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption()))
    path.chmod(0o600)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public + b"\n")
