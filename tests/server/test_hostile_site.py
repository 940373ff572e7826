"""A hostile site, with a node's valid key, against everything that is not its own; real sockets, TLS, Flower behind."""

import asyncio
import base64
import datetime as dt
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.proto.control_pb2 import ListNodesRequest, StartRunRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, GetNodesRequest
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.primitives.asymmetric import sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from federation import bundle
from federation.identity import Identity
from server.flower_link import Control, LinkError, node_key
from server.superlink import LinkFolder, LinkOptions, serve
from tests.superlink import free_ports, write_certificates

FLEET = {
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
}


@dataclass
class Site:
    """A registered node, and what it can say with its key."""

    key: ec.EllipticCurvePrivateKey
    number: int
    client: httpx.Client

    def headers(self, age_s: float = 0.0) -> dict[str, str]:
        time = (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=age_s)).isoformat()
        return {
            FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(node_key(self.key.public_key())).decode(),
            TIMESTAMP_HEADER: time,
            FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(self.key, time.encode())).decode(),
            "content-type": PROTOBUF_MEDIA_TYPE,
        }

    def post(self, path: str, body: bytes = b"", **more: str) -> int:
        return self.client.post(path, content=body, headers={**self.headers(), **more}).status_code


@dataclass
class Link:
    folder: LinkFolder
    fleet: int
    runtime: int
    root: Path
    control: Control

    def client(self) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(self.root / "ca.crt"))
        return httpx.Client(base_url=f"https://127.0.0.1:{self.fleet}", verify=context)

    def site(self, name: str) -> Site:
        key = ec.generate_private_key(ec.SECP384R1())
        return Site(key, self.control.register(node_key(key.public_key()), name), self.client())

    def raw(self, request: bytes) -> bytes:
        """Send bytes as they are, and give all that comes back."""
        context = ssl.create_default_context(cafile=str(self.root / "ca.crt"))
        with (
            socket.create_connection(("127.0.0.1", self.fleet), 20) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as channel,
        ):
            channel.sendall(request)
            channel.settimeout(3)
            given = b""
            try:
                while data := channel.recv(65536):
                    given += data
            except (TimeoutError, ssl.SSLError):
                pass
            return given


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    root = tmp_path_factory.mktemp("link")
    write_certificates(root)
    fleet, runtime = free_ports(2)
    identity = root / "coordinator.key"
    Identity.at(identity)
    folder = LinkFolder(root / "flower")
    certificate, key = str(root / "server.pem"), str(root / "server.key")
    folder.write(LinkOptions("127.0.0.1", fleet, runtime, certificate, key, str(identity)))
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    ended: list[BaseException] = []

    def run() -> None:
        try:
            loop.run_until_complete(serve(folder, stop))
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        for _ in range(600):
            assert not ended, ended
            try:
                httpx.get(f"http://127.0.0.1:{runtime}/health")
                httpx.get(
                    f"https://127.0.0.1:{fleet}/health", verify=ssl.create_default_context(cafile=str(root / "ca.crt"))
                )
                break
            except httpx.HTTPError:
                threading.Event().wait(0.1)
        control = Control(runtime, folder.token())
        yield Link(folder, fleet, runtime, root, control)
        control.close()
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()


@pytest.fixture
def site(link: Link) -> Iterator[Site]:
    made = link.site("icu")
    yield made
    made.client.close()


def test_of_all_that_flower_answers_a_site_reaches_its_own_paths_only(link: Link, site: Site) -> None:
    known = {path for _, path in PROTOBUF_REQUEST_TYPES} | {"/docs", "/openapi.json", "/v1/runtime/responses", "/"}
    assert len(known) > 60
    assert known > FLEET
    for path in sorted(known - FLEET):
        for method in ("POST", "GET", "PUT", "HEAD", "OPTIONS"):
            answer = site.client.request(method, path, headers=site.headers(), content=b"")
            assert (answer.status_code, answer.content) == (404, b""), (method, path)
    token = link.folder.token()  # what no site knows would not even help it
    assert site.post("/v1/control/list-nodes", **{"fedcomet-control-token": token}) == 404


def test_no_spelling_of_a_path_and_no_trick_of_http_reaches_control(link: Link, site: Site) -> None:
    body = StartRunRequest(app_spec=bundle.APP).SerializeToString()
    fleet = PullMessagesRequest(node=Node(node_id=site.number)).SerializeToString()
    lines = "".join(f"{name}: {value}\r\n" for name, value in site.headers().items())

    def post(target: str, content: bytes = body, extra: str = "", length: int | None = None) -> bytes:
        size = len(content) if length is None else length
        head = f"POST {target} HTTP/1.1\r\nhost: x\r\n{lines}{extra}content-length: {size}\r\n\r\n"
        return head.encode() + content

    for target in (
        "//v1/control/start-run",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/pull-messages/../../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/..%2fcontrol/start-run",
        "/%76%31/control/start-run",
        "/v1/control/start-run?/v1/fleet/pull-messages",
        "/v1/control/start-run#/v1/fleet/pull-messages",
        "/v1/fleet/pull-messages?path=/v1/control/start-run",
        "/v1/fleet/pull%2dmessages",
        "https://127.0.0.1/v1/control/start-run",
        "/v1/control/start-run\\",
        "/v1\\control\\start-run",
        "*",
    ):
        status = link.raw(post(target, extra="connection: close\r\n")).split(b" ")[1:2]
        assert status in ([b"404"], [b"400"]), target
    smuggled = post("/v1/control/start-run")
    for trick in (
        post("/v1/fleet/pull-messages", fleet) + smuggled,
        post("/v1/fleet/pull-messages", b"0\r\n\r\n" + smuggled, "transfer-encoding: chunked\r\n", 5),
        post("/v1/fleet/pull-messages", smuggled, "content-length: 0\r\n"),
        post(
            "/v1/control/start-run",
            extra="connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n",
        ),
        post(
            "/v1/control/start-run", extra="connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
        ),
        post("/v1/control/start-run", extra="x-http-method-override: GET\r\nx-original-url: /v1/fleet/get-run\r\n"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST /v1/control/start-run HTTP/0.9\r\n\r\n",
        b"\x00" * 100,
    ):
        assert b" 101 " not in link.raw(trick)
    assert link.control.runs() == []


def test_a_site_cannot_speak_for_another_site(link: Link, site: Site) -> None:
    other = link.site("ward")
    key = node_key(site.key.public_key())
    assert (
        site.post(
            "/v1/fleet/activate-node", ActivateNodeRequest(public_key=key, heartbeat_interval=30).SerializeToString()
        )
        == 200
    )
    for path, request in (
        ("pull-messages", PullMessagesRequest(node=Node(node_id=other.number))),
        ("deactivate-node", DeactivateNodeRequest(node_id=other.number)),
        ("activate-node", ActivateNodeRequest(public_key=node_key(other.key.public_key()), heartbeat_interval=30)),
    ):
        assert site.post(f"/v1/fleet/{path}", request.SerializeToString()) == 401, path
    forged = Message(metadata=Metadata(run_id=1, src_node_id=other.number, dst_node_id=1, message_type="train"))
    push = PushMessagesRequest(
        node=Node(node_id=site.number), messages_list=[forged], message_object_trees=[ObjectTree()]
    )
    assert site.post("/v1/fleet/push-messages", push.SerializeToString()) == 403
    assert site.post("/v1/fleet/push-messages", b"\xff\xff") == 403
    other.client.close()


def test_strangers_old_words_and_wrong_signatures_are_refused(link: Link, site: Site) -> None:
    path, body = "/v1/fleet/pull-messages", PullMessagesRequest(node=Node(node_id=site.number)).SerializeToString()
    assert site.client.post(path, content=body).status_code == 401
    assert site.client.post(path, content=body, headers=site.headers(age_s=400)).status_code == 401
    assert site.client.post(path, content=body, headers=site.headers(age_s=-60)).status_code == 401
    stranger = Site(ec.generate_private_key(ec.SECP384R1()), site.number, site.client)
    assert stranger.post(path, body) == 401
    mixed = {**site.headers(), FLEET_HTTP_SIGNATURE_HEADER: stranger.headers()[FLEET_HTTP_SIGNATURE_HEADER]}
    assert site.client.post(path, content=body, headers=mixed).status_code == 401
    assert site.client.post(path, content=body, headers={**site.headers(), TIMESTAMP_HEADER: "now"}).status_code == 401
    assert site.post(path, body) == 200


def test_bodies_are_bounded(site: Site) -> None:
    assert site.post("/v1/fleet/push-object", b"\0" * ((16 << 20) + 1)) == 413


def test_a_site_that_is_put_out_is_out_with_its_next_request(link: Link, site: Site) -> None:
    body = PullMessagesRequest(node=Node(node_id=site.number)).SerializeToString()
    assert site.post("/v1/fleet/pull-messages", body) == 200
    link.control.unregister(site.number)
    assert site.post("/v1/fleet/pull-messages", body) == 401
    # By itself it never comes back; the coordinator, whose ledger alone says who is a node, can let it.
    again = ActivateNodeRequest(public_key=node_key(site.key.public_key()), heartbeat_interval=30.0)
    assert site.post("/v1/fleet/activate-node", again.SerializeToString()) == 401
    assert link.control.register(node_key(site.key.public_key()), "icu") == site.number
    assert site.post("/v1/fleet/activate-node", again.SerializeToString()) == 200


def test_the_coordinators_own_paths_ask_for_secrets_on_loopback_too(link: Link) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{link.runtime}") as client:

        def post(path: str, body: bytes = b"", **headers: str) -> int:
            return client.post(path, content=body, headers={"content-type": PROTOBUF_MEDIA_TYPE, **headers}).status_code

        assert post("/v1/control/list-nodes", ListNodesRequest().SerializeToString()) == 401
        assert post("/v1/control/list-nodes", **{"fedcomet-control-token": "0" * 64}) == 401
        assert post("/v1/control/list-nodes", **{"fedcomet-control-token": link.folder.token()}) == 200
        assert post("/v1/control/stream-logs", **{"fedcomet-control-token": link.folder.token()}) == 404
        assert post("/v1/runtime/acquire-task", AcquireTaskRequest().SerializeToString()) == 401
        assert post("/v1/runtime/get-nodes", GetNodesRequest().SerializeToString()) == 401
        assert post("/v1/fleet/pull-messages") == 404
        assert client.get("/docs").status_code == 404


def test_only_a_signed_bundle_is_there_to_start(link: Link) -> None:
    with pytest.raises(LinkError, match="StartRunRequest"):
        link.control.start("first", "0" * 64)
    number = link.control.start("first", link.folder.bundle.read_text())
    (run,) = link.control.runs()
    assert (run.number, run.run, run.going) == (number, "first", True)
    link.control.stop(number)
    assert not link.control.runs()[0].going


def test_the_listener_of_sites_speaks_tls_1_3_and_nothing_else(link: Link) -> None:
    context = ssl.create_default_context(cafile=str(link.root / "ca.crt"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        socket.create_connection(("127.0.0.1", link.fleet), 20) as plain,
        pytest.raises((ssl.SSLError, ConnectionError)),
        context.wrap_socket(plain, server_hostname="127.0.0.1"),
    ):
        pass
