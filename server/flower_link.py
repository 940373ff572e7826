"""The coordinator's adapter to the inside of Flower's SuperLink: the application, who its nodes are, and its control.

Beside `federation.flower` (records), `federation.flower_tasks` and `federation.nursery` (processes) and
`client.flower_node` (a SuperNode) nothing touches Flower's inside. Checked against flwr 1.41; the version is pinned.
"""

import base64
import binascii
import datetime as dt
import hmac
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.config import get_app_presentation_metadata, get_fab_config
from flwr.common.constant import NOOP_FLWR_AID, TIMESTAMP_HEADER, TRANSPORT_TYPE_GRPC_RERE, Status, SubStatus
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab as ProtoFab
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PullObjectRequest, PushObjectRequest, PushObjectResponse
from flwr.proto.transport_pb2 import Scalar
from flwr.server.superlink.linkstate import sql_linkstate
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    MAX_TIMESTAMP_DIFF_SECONDS,
    MIN_TIMESTAMP_DIFF_SECONDS,
    NOOP_FEDERATION_ID,
    TASK_TOKEN_HEADER,
    NodeStatus,
    TaskType,
)
from flwr.supercore.control.control_http_client import ControlHttpClient
from flwr.supercore.corestate import sql_corestate
from flwr.supercore.date import now
from flwr.supercore.error import FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes, verify_signature
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.state.schema.corestate_models import ObjectPushSession
from flwr.supercore.state.schema.linkstate_models import Node
from flwr.supercore.utils import int64_to_uint64
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.main import create_app
from flwr.superlink.servicer.fleet import fleet_handlers
from google.protobuf.message import DecodeError

from federation import bundle
from federation.flower_tasks import RUNTIME, TASK_HEARTBEAT_S
from federation.front import Application, Door, Headers, telling_to_come_again
from server.news import News
from server.objects import FileObjectStore
from tokenizer.errors import FedcometError

TOKEN_HEADER = "fedcomet-control-token"

_log = logging.getLogger(__name__)

_FLEET = (
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
"""What a SuperNode whose key is registered asks. (Registering by itself is for nodes without keys.)"""

_RUNTIME = (*RUNTIME, "get-nodes")
"""What a ServerApp and whoever starts it ask; each bears a task's token or the signature of SuperExec's secret."""

_PUSHES = ("push-messages", "push-object")

_PARTIAL = sqlalchemy.text("""
    WITH RECURSIVE part (request, id) AS (
        SELECT reply_to_message_id, message_id FROM message_res JOIN node ON node_id = src_node_id
        WHERE reply_to_message_id IN :asked AND delivered_at = '' AND online_until >= :now
        UNION
        SELECT part.request, child_id FROM part JOIN object_children ON parent_id = part.id
    )
    SELECT DISTINCT part.request FROM part JOIN objects ON object_id = part.id WHERE is_available = 0
""").bindparams(sqlalchemy.bindparam("asked", expanding=True))
"""The requests of which an answer is on its way, but not all of its objects have arrived.

Of a node that has signed off the rest will never come: Flower's own error takes the answer's place.
"""

_CAME = sqlalchemy.text("""
    SELECT reply_to_message_id FROM message_res WHERE reply_to_message_id IN :asked AND delivered_at = ''
""").bindparams(sqlalchemy.bindparam("asked", expanding=True))
"""The requests of which an answer has come, or a part of it."""

_check = vars(sql_linkstate)["check_node_availability_for_in_message"]

_CONTROL = ("start-run", "stop-run", "list-runs", "register-node", "unregister-node", "list-nodes")


class LinkError(FedcometError):
    """The SuperLink can't be reached, or does not do what it is asked."""


class LinkRefusal(LinkError):
    """The SuperLink answers, and does not do what it is asked."""


class SuperLink:
    """Flower's SuperLink as an application without listeners of its own, on one database."""

    def __init__(self, database: Path, objects: Path, secret: bytes) -> None:
        """Open it.

        Args:
            database: its SQLite file; made when missing.
            objects: the folder of messages' contents.
            secret: what whoever starts ServerApps must sign with.
        """
        # A run outlives a SuperLink that is away for minutes; a process that died is noticed by whoever started it.
        vars(sql_corestate)["HEARTBEAT_DEFAULT_INTERVAL"] = TASK_HEARTBEAT_S
        config = SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host="",
            port=0,
            insecure=False,
            certificates=None,
            superexec_auth_secret=secret,
            authn_plugin=NoOpControlAuthnPlugin(),
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=True,
            fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            database=str(database),
            isolation="process",
            runtime_dependency_install=False,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of alembic, about Flower's own migrations
            self._app = telling_to_come_again(create_app(config, SuperLinkLifespan))
        self._objects = FileObjectStore(database, objects)
        self._requests, self._answers = News(), News()
        factory = self._app.state.linkstate_factory
        factory.objectstore_factory.store_instance = self._objects
        self._state = factory.state()
        vars(self._state)["_object_store"] = self._objects  # the application has made its state with Flower's own
        self._give_whole_answers_only()
        self._stage_objects()
        self._take_back_keys()

    @property
    def application(self) -> Application:
        """The whole of it; only to stand behind `fleet_doors` or `own_doors`."""
        return self._app

    def sweep(self) -> None:
        """Remove what delivered messages left on the disk."""
        self._objects.sweep()

    def store(self, content: bytes, verifications: Mapping[str, str]) -> str:
        """Keep a signed bundle, so that runs can be started by its hash; gives that."""
        config = get_fab_config(content)
        metadata = get_app_presentation_metadata(config)
        name: str = self._state.store_app(
            fab=Fab(bundle.digest(content), content, dict(verifications)),
            federation_id=NOOP_FEDERATION_ID,
            app_id=bundle.APP,
            app_type=TaskType.SERVER_APP,
            added_by=NOOP_FLWR_AID,
            display_name=metadata.display_name,
            description=metadata.description,
        )
        return name

    def fleet_doors(self) -> dict[str, Door]:
        """Give the paths of sites: for registered nodes, and each for itself only."""
        doors = {f"/v1/fleet/{name}": Door(self._node) for name in _FLEET}
        doors["/v1/fleet/push-messages"] = Door(self._node, _own_messages, told=self._answers.tell)
        doors["/v1/fleet/pull-messages"] = Door(self._node, hold=lambda node, body: self._requests.hold(node))
        doors["/v1/fleet/push-object"] = Door(self._node, answer=self._take_object)
        doors["/v1/fleet/pull-object"] = Door(self._node, answer=self._give_object)
        return doors

    def _take_object(self, node: int, body: bytes) -> tuple[bytes, bytes] | None:
        def take(request: Any, state: Any) -> Any:
            if not request.object_content:  # what is handed over in files comes from our own processes alone
                return PushObjectResponse(stored=False)
            told = fleet_handlers.push_object(request, state)
            with state.session() as session:
                if session.get(ObjectPushSession, request.session_id) is None:  # it was the last one of its message
                    self._answers.tell_from_thread()
            return told

        return self._bulk(PushObjectRequest, take, node, body)

    def _give_object(self, node: int, body: bytes) -> tuple[bytes, bytes] | None:
        return self._bulk(PullObjectRequest, fleet_handlers.pull_object, node, body)

    def _bulk(self, kind: Any, handler: Any, node: int, body: bytes) -> tuple[bytes, bytes] | None:
        """Let Flower's own handler answer, without its web framework; where it objects, the framework says so."""
        try:
            request = kind.FromString(body)
            if request.node.node_id != node:
                return None
            answer: bytes = handler(request, self._state).SerializeToString()
        except (DecodeError, FlowerError):
            return None
        return PROTOBUF_MEDIA_TYPE.encode(), answer

    def own_doors(self, token: str) -> dict[str, Door]:
        """Give the paths of the coordinator's own processes: the runtime, and control for who has the token.

        A process that leads a run and pulls no message by name waits until an answer has come.
        """

        async def hold(who: Any, body: bytes) -> None:
            if not body:
                await self._answers.hold(who)

        def leader(headers: Headers) -> Any:
            return headers.get(TASK_TOKEN_HEADER, "runtime")

        runtime = dict.fromkeys(_RUNTIME, Door(leader))
        runtime |= dict.fromkeys(_PUSHES, Door(leader, told=self._requests.tell))
        runtime["pull-messages"] = Door(leader, hold=hold)
        control = Door(lambda headers: "control" if _has_token(headers, token) else None)
        return {
            **{f"/v1/runtime/{name}": door for name, door in runtime.items()},
            **{f"/v1/control/{name}": control for name in _CONTROL},
        }

    def _stage_objects(self) -> None:
        """Write contents down before Flower begins a transaction for them, which locks all others out."""
        given = self._state.store_object

        def store(run_id: int, session_id: str, object_id: str, object_content: bytes) -> Any:
            try:
                with self._objects.staged(object_id, object_content):
                    return given(run_id, session_id, object_id, object_content)
            except ValueError as problem:
                _log.warning("an object is refused: %s", problem)
                return False

        self._state.store_object = store

    def _take_back_keys(self) -> None:
        """Let a key that was put out be a node again: Flower never does, and here the ledger alone says who is one."""
        given = self._state.create_node

        def create(owner_aid: str, owner_name: str, public_key: bytes, heartbeat_interval: float, **more: Any) -> int:
            back = (
                sqlalchemy.update(Node)
                .where(Node.public_key == public_key, Node.status == NodeStatus.UNREGISTERED)
                .values(status=NodeStatus.REGISTERED, unregistered_at=None)
                .returning(Node.node_id)
            )
            with self._state.session() as session:
                number = session.scalar(back)
            if number is not None:
                return int(int64_to_uint64(number))
            return int(given(owner_aid, owner_name, public_key, heartbeat_interval, **more))

        self._state.create_node = create

    def _give_whole_answers_only(self) -> None:
        """Tell of an answer when all of it is there: Flower tells at once, and a slow site would hold up the others."""
        given = self._state.get_message_res

        def give(message_ids: set[str], run_id: int) -> Any:
            with self._state.session() as session:
                told = {"asked": list(message_ids), "now": now().timestamp()}
                partial = set(session.scalars(_PARTIAL, told)) if message_ids else set()
            return given(message_ids - partial, run_id)

        self._state.get_message_res = give

        def check(
            inquired_in_message_ids: set[str],
            found_in_message_dict: dict[str, Any],
            node_id_to_online_until: dict[int, float],
            **more: Any,
        ) -> dict[str, Any]:
            # Flower looks for answers only after this, of nodes that are still there. A site that is told to stop sends
            # what it has finished and signs off at once; what came whole counts, but of a node that was put out.
            there = {
                name
                for name in self._whole(inquired_in_message_ids)
                if found_in_message_dict[name].metadata.dst_node_id in node_id_to_online_until
            }
            others = inquired_in_message_ids - there
            told: dict[str, Any] = _check(others, found_in_message_dict, node_id_to_online_until, **more)
            inquired_in_message_ids.intersection_update(others | there)
            return told

        vars(sql_linkstate)[_check.__name__] = check

    def _whole(self, asked: set[str]) -> set[str]:
        """Give those of some requests whose answers are there, whole, whether their nodes are or not."""
        with self._state.session() as session:
            told = {"asked": list(asked), "now": -1.0}
            return set(session.scalars(_CAME, told)) - set(session.scalars(_PARTIAL, told))

    def _node(self, headers: Headers) -> int | None:
        """Give the registered node that a request's headers prove; Flower looks again, at the request too."""
        try:
            (key,), (signature,), (timestamp,) = (
                headers.get(name, ())
                for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, TIMESTAMP_HEADER)
            )
            public = base64.b64decode(key, validate=True)
            age_s = (dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(timestamp)).total_seconds()
            if not MIN_TIMESTAMP_DIFF_SECONDS < age_s < MAX_TIMESTAMP_DIFF_SECONDS:
                return None
            node: int | None = self._state.get_node_id_by_public_key(public)
            if node is None:  # looked up first: it is cheaper than the signature
                return None
            made = base64.b64decode(signature, validate=True)
            if not verify_signature(bytes_to_public_key(public), timestamp.encode("ascii"), made):
                return None
        except (TypeError, UnicodeError, ValueError, binascii.Error):
            return None
        return node


def _own_messages(node: int, body: bytes) -> bool:
    """Tell whether all that is pushed says that it comes from the node that pushes it; Flower doesn't look."""
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError:
        return False
    return request.node.node_id == node and all(m.metadata.src_node_id == node for m in request.messages_list)


def _has_token(headers: Headers, token: str) -> bool:
    given = headers.get(TOKEN_HEADER, ())
    return len(given) == 1 and hmac.compare_digest(given[0].encode("latin-1"), token.encode())


def node_key(public: ec.EllipticCurvePublicKey) -> bytes:
    """Give a key in the form in which Flower knows its owner's node."""
    return public_key_to_bytes(public)


@dataclass(frozen=True)
class FlowerNode:
    """A registered node: its number, key, name, whether it is online, and when its last word stops counting."""

    number: int
    key: bytes
    name: str
    online: bool
    online_until: float


@dataclass(frozen=True)
class FlowerRun:
    """A run as Flower sees it: its number, what it was told to lead, whether it goes on, and how it ended."""

    number: int
    run: str
    going: bool
    completed: bool
    details: str


class _Token:
    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Any) -> httpx.Response:
        add_headers(context.request, {TOKEN_HEADER: self._token})
        response: httpx.Response = call_next(context)
        return response


class Control:
    """What the coordinator asks its own SuperLink, over loopback.

    Every method raises LinkError if the SuperLink is away, and LinkRefusal, which is one, if it refuses.
    """

    def __init__(self, port: int, token: str) -> None:
        self._client = ControlHttpClient.from_server_address(
            f"127.0.0.1:{port}",
            insecure=True,
            root_certificates=None,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="fedcomet"), _Token(token)],
        )

    def close(self) -> None:
        """End its connections."""
        self._client.close()

    def start(self, run: str, bundle_sha256: str) -> int:
        """Start the coordinator's part of a run; gives Flower's number of it."""
        override = {"run": Scalar(string=run)}
        request = StartRunRequest(
            fab=ProtoFab(hash_str=bundle_sha256), app_spec=bundle.APP, override_config=override, federation=""
        )
        response = self._ask(self._client.StartRun, request)
        if not response.HasField("run_id") or not response.run_id:
            raise LinkError("The SuperLink did not start the run; its log says why.")
        return int(response.run_id)

    def stop(self, number: int) -> None:
        """End one of Flower's runs."""
        self._ask(self._client.StopRun, StopRunRequest(run_id=number))

    def runs(self, most: int = 100) -> list[FlowerRun]:
        """Give the latest runs, newest first; Flower drops what finished ones left."""
        found = self._ask(self._client.ListRuns, ListRunsRequest(limit=most)).run_dict.values()
        return [
            FlowerRun(
                number=run.run_id,
                run=run.override_config["run"].string if "run" in run.override_config else "",
                going=run.status.status != Status.FINISHED,
                completed=run.status.sub_status == SubStatus.COMPLETED,
                details=run.status.details,
            )
            for run in sorted(found, key=lambda run: run.pending_at, reverse=True)
        ]

    def nodes(self) -> list[FlowerNode]:
        """Give the nodes that are registered."""
        found = self._ask(self._client.ListNodes, ListNodesRequest()).nodes_info
        return [
            FlowerNode(n.node_id, n.public_key, n.name, n.status == NodeStatus.ONLINE, n.online_until)
            for n in found
            if n.status != NodeStatus.UNREGISTERED
        ]

    def register(self, key: bytes, name: str) -> int:
        """Let the owner of a key be a node; gives its number, which is the one that it had if it was one before."""
        return int(self._ask(self._client.RegisterNode, RegisterNodeRequest(public_key=key, name=name)).node_id)

    def unregister(self, number: int) -> None:
        """Let a node be none any more: its next request is refused."""
        self._ask(self._client.UnregisterNode, UnregisterNodeRequest(node_id=number))

    def _ask(self, method: Any, request: Any) -> Any:
        try:
            return method(request)
        except httpx.HTTPStatusError as error:
            told = " ".join(error.response.text.split())[:300]
            raise LinkRefusal(f"The SuperLink refuses {type(request).__name__}: {told or error}") from None
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise LinkError(
                f"The SuperLink can't be reached ({error}); is `fedcomet coordinator serve` running?"
            ) from None
