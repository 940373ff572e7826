"""An application on a socket: uvicorn with as little as possible, by TLS where there is a certificate."""

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from tokenizer.errors import ConfigError

_LOOK_S = 30.0

_log = logging.getLogger(__name__)


def serve(app: ASGIApp, host: str, port: int, pair: tuple[Path, Path] | None, ready: Callable[[str], None]) -> None:
    """Serve an application until SIGTERM or SIGINT.

    Args:
        app: what is served.
        host, port: where; port 0 lets the system choose.
        pair: the private key's and the certificate's file, for TLS; what they hold is taken up when it changes.
        ready: is told the address once it is served.

    Raises:
        ConfigError: the port is taken, or not for this user.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(128)
        except OSError as problem:
            raise ConfigError(f"{host}, port {port}: {problem.strerror}; choose another one with --port.") from None
        options: dict[str, Any] = {}
        if pair is not None:
            options = {"ssl_keyfile": str(pair[0]), "ssl_certfile": str(pair[1])}
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            http="h11",
            ws="none",
            lifespan="off",
            limit_concurrency=200,
            timeout_keep_alive=15,
            timeout_graceful_shutdown=2,
            **options,
        )
        config.load()
        server = uvicorn.Server(config)

        def end(*_: object) -> None:
            server.should_exit = True

        # Before uvicorn listens to signals, and after: what it caught, it raises again at its end.
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, end)
        shown = f"[{host}]" if ":" in host else host
        ready(f"{'https' if pair else 'http'}://{shown}:{listener.getsockname()[1]}/")
        asyncio.run(_serve(server, listener, config.ssl, pair))


async def _serve(
    server: uvicorn.Server, listener: socket.socket, context: ssl.SSLContext | None, pair: tuple[Path, Path] | None
) -> None:
    async with _renewed(context, pair):
        await server.serve(sockets=[listener])


@asynccontextmanager
async def _renewed(context: ssl.SSLContext | None, pair: tuple[Path, Path] | None) -> AsyncIterator[None]:
    """Take up a new certificate for new connections, as other services of the house do."""

    async def watch(context: ssl.SSLContext, key: Path, certificate: Path) -> None:
        seen = certificate.stat().st_mtime_ns
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                if (now := certificate.stat().st_mtime_ns) != seen:
                    context.load_cert_chain(certificate, key)
                    seen = now
            except (OSError, ValueError) as problem:
                _log.warning("the new certificate can't be used yet: %s", problem)

    task = asyncio.create_task(watch(context, *pair)) if pair and context else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
