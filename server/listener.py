"""The coordinator's gRPC sockets: enrolment under TLS, control under mutual TLS, with health and reflection.

Who calls is what the client's certificate says and the ledger confirms, at every call and, in streams, at every tick.
The server's certificate is read anew when its file changes, so a rotation needs no restart.
"""

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, NoReturn
from urllib.parse import unquote

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from federation import pki
from federation.calls import CONTROL, CONTROL_SERVICE, ENROLMENT, ENROLMENT_SERVICE, MOST_BYTES, MOST_ENROL_BYTES, Call
from federation.identity import Identity
from federation.pki import CertificateError
from server.authority import Authority
from server.control import Caller, Control, Forbidden, RunStarter, Unknown, Wrong
from server.enrolment import Enrolment, MembershipError, TooMany, Welcome
from server.home import CoordinatorHome
from server.ledger import Ledger
from server.ledger_entries import MemberEntry
from server.transactions import LedgerUnreachable
from tokenizer.errors import ConfigError, FedcometError

# Its stubs forget that "no change" is told by None.
_credentials: Callable[..., grpc.ServerCredentials] = grpc.dynamic_ssl_server_credentials
_LOG = logging.getLogger("fedcomet.control")
_CODES: tuple[tuple[type[FedcometError], grpc.StatusCode], ...] = (
    (Forbidden, grpc.StatusCode.PERMISSION_DENIED),
    (MembershipError, grpc.StatusCode.UNAUTHENTICATED),
    (CertificateError, grpc.StatusCode.INVALID_ARGUMENT),
    (Wrong, grpc.StatusCode.INVALID_ARGUMENT),
    (Unknown, grpc.StatusCode.NOT_FOUND),
    (LedgerUnreachable, grpc.StatusCode.UNAVAILABLE),
    (TooMany, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (FedcometError, grpc.StatusCode.FAILED_PRECONDITION),
)
_MOST_STREAMS, _MOST_CALLS = 64, 32
_PER_MINUTE, _SEEN_S = 120, 30.0
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # or a second coordinator would share the port
    ("grpc.max_metadata_size", 8 << 10),
    ("grpc.max_concurrent_streams", 16),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
)


def listener_of(
    home: CoordinatorHome,
    ledger: Ledger,
    authority: Authority,
    starter: RunStarter,
    revoked: Callable[[MemberEntry], None] = lambda _: None,
    clock: Callable[[], float] = time.time,
) -> "Listener":
    """Put a coordinator's control and enrolment together.

    Args:
        home: its settings and certificates.
        ledger: of the federation; callers wait while it is away, so give it little patience.
        authority: issues certificates.
        starter: starts runs.
        revoked: is told of every member that is put out by a call, to end what it has elsewhere (its Flower node).
        clock: gives seconds since the epoch.
    """
    stopping, ports = threading.Event(), home.settings.ports
    key = Identity.at(home.signing_key).public
    welcome = Welcome(home.settings.federation.name, ports.fleet, ports.control, key)
    enrolment = Enrolment(ledger, authority, welcome, clock)
    control = Control(ledger, enrolment, starter, stopping.wait, revoked)
    return Listener(home, ledger, control, enrolment, stopping, clock)


class Listener:
    """Both sockets, from `start` to `stop`."""

    def __init__(
        self,
        home: CoordinatorHome,
        ledger: Ledger,
        control: Control,
        enrolment: Enrolment,
        stopping: threading.Event,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare them.

        Args:
            home: ports, addresses and certificates.
            ledger: notes who was seen.
            control, enrolment: what is served.
            stopping: is set by `stop`; `Control`'s waiting should end with it.
            clock: gives seconds since the epoch.
        """
        self._home, self._control, self._enrolment, self._stopping = home, control, enrolment, stopping
        self._gate = _Gate(ledger, enrolment, clock)
        self._health = health.HealthServicer()
        self._streams = threading.BoundedSemaphore(_MOST_STREAMS)
        self._servers: list[grpc.Server] = []
        self.control_port = self.enrol_port = 0

    def start(self) -> None:
        """Listen.

        Raises:
            ConfigError: a port is in use, or a certificate can't be used.
        """
        pair = _Pair(self._home)
        mutual = _credentials(pair.mutual(), pair.next_mutual, True)
        plain = _credentials(pair.plain(), pair.next_plain, False)
        ports = self._home.settings.ports
        self.control_port = self._open(self._control_server(), ports.control, mutual, "control")
        self._enrolment.welcome = replace(self._enrolment.welcome, control_port=self.control_port)
        self.enrol_port = self._open(self._enrol_server(), ports.enrol, plain, "enrol")
        self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        self._health.set(CONTROL_SERVICE.full_name, health_pb2.HealthCheckResponse.SERVING)

    def stop(self, grace_s: float = 5.0) -> None:
        """Take no more calls, and end those that run after a while."""
        self._stopping.set()
        self._health.enter_graceful_shutdown()
        for ended in [server.stop(grace_s) for server in self._servers]:
            ended.wait()
        self._servers = []

    def _open(self, server: grpc.Server, port: int, credentials: grpc.ServerCredentials, key: str) -> int:
        host = self._home.settings.listen.host
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = server.add_secure_port(place, credentials)
        except RuntimeError:
            bound = 0
        if not bound:
            self.stop(0)
            raise ConfigError(
                f"{place} can't be listened on: another program uses it, or the system forbids it. End that program or "
                f"change ports.{key} in coordinator.toml."
            )
        server.start()
        self._servers.append(server)
        return bound

    def _control_server(self) -> grpc.Server:
        server = grpc.server(
            ThreadPoolExecutor(_MOST_CALLS + _MOST_STREAMS, "control"),
            interceptors=[_MembersOnly(self._gate)],
            options=[*_OPTIONS, ("grpc.max_receive_message_length", MOST_BYTES)],
            maximum_concurrent_rpcs=_MOST_CALLS + _MOST_STREAMS,
        )
        handlers = {name: self._handler(name, call) for name, call in CONTROL.items()}
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(CONTROL_SERVICE.full_name, handlers)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (CONTROL_SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _enrol_server(self) -> grpc.Server:
        server = grpc.server(
            ThreadPoolExecutor(4, "enrol"),
            options=[*_OPTIONS, ("grpc.max_receive_message_length", MOST_ENROL_BYTES)],
            maximum_concurrent_rpcs=16,
        )
        call = ENROLMENT["Enrol"]

        def enrol(request: Any, context: grpc.ServicerContext) -> Any:
            with _Told(context, "Enrol"):
                return self._enrolment.enrol(_address(context.peer()), request)

        handler = grpc.unary_unary_rpc_method_handler(enrol, call.request.FromString, _encode)
        services = grpc.method_handlers_generic_handler(ENROLMENT_SERVICE.full_name, {"Enrol": handler})
        server.add_generic_rpc_handlers([services])
        return server

    def _handler(self, name: str, call: Call) -> grpc.RpcMethodHandler:
        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            with _Told(context, name):
                return self._control.call(name, self._gate.caller(context), request)

        def answers(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with _Told(context, name):
                if not self._streams.acquire(blocking=False):
                    raise TooMany("Too many streams are open here; try again later.")
                if not context.add_callback(self._streams.release):
                    self._streams.release()  # it is over already
                    return
                for each in self._control.call(name, self._gate.caller(context), request):
                    if not context.is_active():
                        return
                    yield each

        if call.streams:
            return grpc.unary_stream_rpc_method_handler(answers, call.request.FromString, _encode)
        return grpc.unary_unary_rpc_method_handler(answer, call.request.FromString, _encode)


class _Gate:
    """Tells who calls, and lets nobody call too often."""

    def __init__(self, ledger: Ledger, enrolment: Enrolment, clock: Callable[[], float]) -> None:
        self._ledger, self._enrolment, self._clock = ledger, enrolment, clock
        self._seen: dict[str, float] = {}
        self._recent: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def caller(self, context: grpc.ServicerContext) -> Caller:
        """Give the caller.

        Raises:
            MembershipError: it is no member (any more).
            TooMany: it called too often.
        """
        pem = bytes(next(iter(context.auth_context().get("x509_pem_cert", ())), b""))
        try:
            member = pki.read_member(pem)
        except CertificateError:
            raise MembershipError("This certificate is no member's; join with an invitation.") from None
        now = self._clock()
        entry = self._enrolment.admit(member, pem)
        with self._lock:
            recent = [at for at in self._recent.pop(member.name, []) if now - at < 60]
            self._recent[member.name] = [*recent[-_PER_MINUTE:], now]
        if len(recent) >= _PER_MINUTE:
            raise TooMany(f"{member.name} may make {_PER_MINUTE} calls a minute; try again in a minute.")
        if now - self._seen.get(member.name, 0.0) >= _SEEN_S:
            self._seen[member.name] = now
            self._ledger.members.seen(member.name)
        return Caller(member, pem, entry)


class _MembersOnly(grpc.ServerInterceptor):
    """Health and reflection are for members, too; calls of `Control` see to it themselves."""

    def __init__(self, gate: _Gate) -> None:
        self._gate = gate

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """Wrap whatever answers a call."""
        handler = continuation(details)
        if handler is None or details.method.startswith(f"/{CONTROL_SERVICE.full_name}/"):
            return handler
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        inner, make = getattr(handler, kind), getattr(grpc, f"{kind}_rpc_method_handler")

        def guarded(request: Any, context: grpc.ServicerContext) -> Any:
            with _Told(context, details.method):
                self._gate.caller(context)
            return inner(request, context)

        made: grpc.RpcMethodHandler = make(guarded, handler.request_deserializer, handler.response_serializer)
        return made


class _Told:
    """Turns errors of a call into what its caller is told; what is unexpected stays in the log."""

    def __init__(self, context: grpc.ServicerContext, name: str) -> None:
        self._context, self._name = context, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: Any) -> None:
        if isinstance(error, FedcometError):
            code = next(code for kind_, code in _CODES if isinstance(error, kind_))
            _LOG.info("%s from %s: %s: %s", self._name, self._context.peer(), code.name, error)
            self._end(code, str(error))
        if isinstance(error, Exception) and self._context.is_active():
            _LOG.error("%s failed", self._name, exc_info=error)
            self._end(grpc.StatusCode.INTERNAL, f"{self._name} failed at the coordinator; its log says why.")

    def _end(self, code: grpc.StatusCode, text: str) -> NoReturn:
        self._context.abort(code, text)


class _Pair:
    """The server's key and certificate, read again when they change."""

    def __init__(self, home: CoordinatorHome) -> None:
        self._home = home
        self._seen = {"mutual": self._stamp(), "plain": self._stamp()}

    def mutual(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([self._home.server_pair()], self._home.authority.read_bytes())

    def plain(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([self._home.server_pair()])

    def next_mutual(self) -> grpc.ServerCertificateConfiguration | None:
        return self.mutual() if self._changed("mutual") else None

    def next_plain(self) -> grpc.ServerCertificateConfiguration | None:
        return self.plain() if self._changed("plain") else None

    def _changed(self, which: str) -> bool:
        stamp = self._stamp()
        changed, self._seen[which] = stamp != self._seen[which], stamp
        return changed

    def _stamp(self) -> tuple[int, int]:
        found = self._home.server_certificate.stat()
        return found.st_mtime_ns, found.st_ino


def _address(peer: str) -> str:
    """The network address of "ipv4:10.0.0.1:5000"; of IPv6 its /64, which is one customer's."""
    family, _, rest = unquote(peer).partition(":")
    host = rest.rpartition(":")[0].strip("[]")
    if family == "ipv6":
        try:
            return str(ip_network((ip_address(host.partition("%")[0]), 64), strict=False))
        except ValueError:
            return host
    return host or peer


def _encode(message: Any) -> bytes:
    return message.SerializeToString()
