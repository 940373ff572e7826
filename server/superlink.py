"""Flower's SuperLink as a process of ours: `python -m server.superlink FOLDER`, started by the coordinator's daemon.

Two listeners, one application. Sites reach the first, over TLS 1.3: the Fleet paths of registered nodes, nothing else.
The second is on loopback, for the coordinator's own processes: the runtime, whose callers bear secrets, and control,
which has no authentication in Flower 1.41, for whoever has the token. Both secrets lie in FOLDER, for its owner only.

It keeps all that it knows in its database, and the ServerApp is no child of it (process isolation): killed at any
moment and started again, runs go on. A renewed certificate is taken up without a restart.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import signal
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from sqlalchemy.exc import SQLAlchemyError

from federation import bundle, supervisor
from federation.front import Front
from federation.identity import Identity
from server.flower_link import SuperLink
from tokenizer import durable
from tokenizer.errors import ConfigError

_LOOPBACK = "127.0.0.1"
_LOOK_S = 2.0
_MOST_CONNECTIONS = 1024

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinkOptions:
    """What the process is told, in FOLDER/options.json.

    Attributes:
        host, fleet: where sites reach it.
        runtime: the port on loopback.
        certificate, key: files of the server's certificate (with what it was issued by, if that isn't the CA) and key.
        identity: file of the coordinator's Ed25519 key, which signs the bundle.
    """

    host: str
    fleet: int
    runtime: int
    certificate: str
    key: str
    identity: str


class LinkFolder:
    """The folder of a SuperLink: its options, database and secrets."""

    def __init__(self, root: Path) -> None:
        """Take a folder; it is made, for its owner only, when something is written."""
        self.root = root
        self.database, self.bundle = root / "superlink.sqlite", root / "bundle.sha256"
        self.objects = root / "objects"

    def write(self, options: LinkOptions) -> None:
        """Write the options down for the process."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.write_bytes(self.root / "options.json", json.dumps(asdict(options)).encode())

    def options(self) -> LinkOptions:
        """Read the options.

        Raises:
            ConfigError: there are none.
        """
        try:
            return LinkOptions(**json.loads((self.root / "options.json").read_bytes()))
        except (OSError, TypeError, ValueError) as error:
            raise ConfigError(f"{self.root}/options.json can't be read ({error}); the daemon writes it.") from None

    def secret(self) -> bytes:
        """Give the secret of whoever starts ServerApps."""
        return self._made_once("superexec.secret").encode()

    def token(self) -> str:
        """Give the token of the control paths."""
        return self._made_once("control.token")

    def _made_once(self, name: str) -> str:
        path = self.root / name
        if not path.exists():
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with supervisor.private_files():
                durable.write_bytes(path, secrets.token_hex(32).encode())
        if path.stat().st_mode & 0o077:
            raise ConfigError(f"{path}: others than its owner may read this secret; run chmod 600 on it.")
        return path.read_text()


async def serve(folder: LinkFolder, stop: asyncio.Event) -> None:
    """Serve both listeners until `stop` is set.

    Raises:
        ConfigError: the options, certificate or key can't be used.
    """
    options = folder.options()
    link = SuperLink(folder.database, folder.objects, folder.secret())
    content = bundle.build()
    link.store(content, bundle.sign(content, Identity.at(Path(options.identity))))
    durable.write_bytes(folder.bundle, bundle.digest(content).encode())
    context = tls_context(options)
    sites = _listener(
        Front(link.application, link.fleet_doors()), options.host, options.fleet, lifespan="off", context=context
    )
    own = _listener(
        Front(link.application, link.own_doors(folder.token()), at_once=64, threads=4), _LOOPBACK, options.runtime
    )
    tasks = [asyncio.create_task(server.serve()) for server in (own, sites)]
    watches = [asyncio.create_task(_keep_certificate(context, options)), asyncio.create_task(_sweep(link))]
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([*tasks, stopped], return_when=asyncio.FIRST_COMPLETED)
    for server in (own, sites):
        server.should_exit = True
    for watch in watches:
        watch.cancel()
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    stopped.cancel()
    for problem in ended:
        if isinstance(problem, BaseException):
            raise problem


def tls_context(options: LinkOptions) -> ssl.SSLContext:
    """Give the TLS of the sites' listener: 1.3 only, no client certificates (nodes sign every request).

    Raises:
        ConfigError: certificate and key can't be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(options.certificate, options.key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{options.certificate} and {options.key} can't be used ({error}); run fedcomet coordinator rotate."
        ) from None
    return context


async def _sweep(link: SuperLink) -> None:
    """Remove what delivered messages left on the disk, now and then."""
    while True:
        try:
            await asyncio.to_thread(link.sweep)
        except (OSError, SQLAlchemyError) as problem:
            _log.warning("delivered messages can't be removed from the disk (%s); trying again", problem)
        await asyncio.sleep(_LOOK_S)


async def _keep_certificate(context: ssl.SSLContext, options: LinkOptions) -> None:
    """Load a renewed certificate: connections from then on get it."""
    known = _stamp(options)
    while True:
        await asyncio.sleep(_LOOK_S)
        if (now := _stamp(options)) != known:
            # Key and certificate are renamed one after the other: until both are there they don't fit.
            with contextlib.suppress(OSError, ssl.SSLError):
                context.load_cert_chain(options.certificate, options.key)
                known = now
                _log.info("the certificate was renewed")


def _stamp(options: LinkOptions) -> tuple[int, ...]:
    with contextlib.suppress(OSError):
        return tuple(Path(path).stat().st_mtime_ns for path in (options.certificate, options.key))
    return ()


class _Server(uvicorn.Server):
    """A listener that leaves signals to the process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _listener(
    front: Front, host: str, port: int, lifespan: Any = "on", context: ssl.SSLContext | None = None
) -> _Server:
    config = uvicorn.Config(
        front,
        host,
        port,
        lifespan=lifespan,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        ssl_context_factory=None if context is None else lambda config, default: context,
    )
    return _Server(config)


def main(root: str) -> None:
    """Run the process until SIGTERM."""
    supervisor.begin_child(quiet=("flwr",))

    async def run() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await serve(LinkFolder(Path(root)), stop)

    try:
        uvloop.run(run())
    except ConfigError as error:
        print(f"ERROR: {error}", flush=True)
        sys.exit(supervisor.BAD_CONFIG)


if __name__ == "__main__":
    main(sys.argv[1])
