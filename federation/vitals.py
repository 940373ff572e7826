"""How a daemon tells that it lives: `/health` and Prometheus' `/metrics` on loopback, and systemd's notifications.

`/health` is 200 with a JSON object when all is well, and 503 with the same object, which then says what is wrong.
`python -m federation.vitals PORT` asks, prints the answer, and exits with 0 or 1: a probe for containers, from which
nothing has to be reachable from outside.
"""

import http.client
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Gauge, generate_latest

from tokenizer.errors import ConfigError

Health = Callable[[], tuple[bool, Mapping[str, Any]]]
"""Gives whether all is well, and figures and words on it."""

_LOOPBACK = "127.0.0.1"


class Vitals:
    """Serves health and metrics on loopback until closed."""

    def __init__(self, port: int, health: Health, prefix: str) -> None:
        """Begin.

        Args:
            port: on loopback; 0 lets the system choose.
            health: asked at every request; must be quick.
            prefix: of the metrics' names.

        Raises:
            ConfigError: the port is taken.
        """
        self.registry = CollectorRegistry()
        self._health, self._prefix = health, prefix
        self._gauges: dict[str, Gauge] = {}
        try:
            self._server = _Server((_LOOPBACK, port), _handler(self))
        except OSError as error:
            raise ConfigError(
                f"Port {port} on {_LOOPBACK}, for health and metrics, can't be used ({error.strerror}); "
                "end what holds it, or name another port in the settings."
            ) from None
        threading.Thread(target=self._server.serve_forever, name="vitals", daemon=True).start()

    @property
    def port(self) -> int:
        """The port on loopback."""
        return int(self._server.server_address[1])

    def set(self, name: str, value: float, help_text: str, **labels: str) -> None:
        """Set a figure; its labels are the same every time."""
        if name not in self._gauges:
            self._gauges[name] = Gauge(f"{self._prefix}_{name}", help_text, list(labels), registry=self.registry)
        gauge = self._gauges[name]
        (gauge.labels(**labels) if labels else gauge).set(value)

    def drop(self, name: str, **labels: str) -> None:
        """Tell one of a figure's values no more."""
        self._gauges[name].remove(*labels.values())

    def health(self) -> tuple[bool, bytes]:
        """Give whether all is well, and that as JSON."""
        well, told = self._health()
        return well, json.dumps({"healthy": well, **told}).encode()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of who didn't wait for the answer; the standard way prints a traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


def _handler(vitals: Vitals) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if self.path == "/health":
                well, body = vitals.health()
                self._answer(200 if well else 503, "application/json", body)
            elif self.path == "/metrics":
                self._answer(200, CONTENT_TYPE_LATEST, generate_latest(vitals.registry))
            else:
                self._answer(404, "text/plain", b"/health and /metrics are here.\n")

        def _answer(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing: monitoring asks every few seconds."""

    return Handler


def notify(state: str) -> None:
    """Tell systemd, if it started this process and wants to know: READY=1, STOPPING=1, WATCHDOG=1, STATUS=... ."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.sendto(state.encode(), "\0" + address[1:] if address.startswith("@") else address)


def ask(port: int, patience_s: float = 5.0) -> tuple[bool, str]:
    """Ask the daemon at a port on loopback whether all is well; gives that, and what it says."""
    channel = http.client.HTTPConnection(_LOOPBACK, port, timeout=patience_s)
    try:
        channel.request("GET", "/health")
        answer = channel.getresponse()
        return answer.status == 200, answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as problem:
        return False, f"nothing answers on port {port} ({problem})"
    finally:
        channel.close()


if __name__ == "__main__":
    good, words = ask(int(sys.argv[1]))
    print(words)
    sys.exit(0 if good else 1)
