"""The site's adapter to the inside of Flower's SuperNode, which ends in good order and comes back at once.

Flower's own command takes the site's configuration on its command line, where the URL of a budget's database may hold a
password; it exits when the coordinator still believes its killed predecessor alive, for up to a minute; and it takes
any code that a trusted key signed. This one notes its node's number and signs its predecessor off first, and takes only
the bundle of the installed fedcomet. Checked against flwr 1.41.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import DeactivateNodeRequest
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supernode import fleet_http_connection as connections
from flwr.supernode import start_client_internal as inside
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.nodestate.in_memory_nodestate import CLIENT_APP_CRASHED_ERROR

from client.objects import FileContents
from client.reads import read_more_at_a_time
from federation import bundle
from federation.flower_tasks import RUNTIME, TASK_HEARTBEAT_S
from federation.front import Door, Front, telling_to_come_again
from federation.handover import push_in_turn
from federation.polls import Polls
from tokenizer import durable

_LOOPBACK = "127.0.0.1"
_POLLS = Polls(0.02, 0.2)  # the coordinator lets a node that asks wait until there is something (`server.news`)
_ANSWER_S = 0.02
_UNHEARD_S = 60.0  # for how long the coordinator takes a node that it doesn't hear to be there
_HEARD_S = 5.0  # some times what a coordinator lets pass between two looks (`server.post`)

_log = logging.getLogger(__name__)


class Refused(Exception):
    """The coordinator does not let this node in, or not any more."""


@dataclass(frozen=True)
class NodeOptions:
    """What a node is told.

    Attributes:
        superlink: host and port of the coordinator's Fleet listener.
        authority: the federation's certificate, PEM.
        key: the site's key, by which the coordinator knows it.
        config: what `client.app` reads (`SiteFiles.node_config`).
        coordinators: gives the public keys of those whose bundles are taken, anew each time.
        runtime_port: for app processes, on loopback.
        secret: what whoever starts them must sign with.
        memory: a file for the node's number.
        objects: a folder of its own for contents of messages.
    """

    superlink: str
    authority: bytes
    key: ec.EllipticCurvePrivateKey
    config: Mapping[str, bool | float | int | str]
    coordinators: Callable[[], Sequence[str]]
    runtime_port: int
    secret: bytes
    memory: Path
    objects: Path


class _Heart(HeartbeatSender):
    """Flower's heartbeat, which an error that may pass doesn't end: the node would ask for work, and count as gone."""

    def __init__(self, beat: Callable[[], bool]) -> None:
        super().__init__(lambda: self._try(beat))
        self._failing_since: float | None = None

    def _try(self, beat: Callable[[], bool]) -> bool:
        """Try; False is tried again, an error ends it, and the node with it, which is then started anew."""
        try:
            heard = beat()
        except Exception as error:
            now = time.monotonic()
            self._failing_since = self._failing_since or now
            if _unknown_here(error) or now - self._failing_since >= _UNHEARD_S:
                raise
            _log.warning("the coordinator does not take this node's heartbeat (%s); it is tried again", error)
            return False
        self._failing_since = None
        return heard


class Node:
    """A SuperNode in this process: its runtime for app processes, and its connection to the coordinator."""

    def __init__(self, options: NodeOptions, told: Callable[[str], None] = lambda state: None) -> None:
        """Set up a node.

        Args:
            options: see there.
            told: called with "connecting", "waiting" and "working" as it goes.
        """
        self._options, self._told = options, told
        # A process that starts on a busy machine may take longer to say a word than the half minute that Flower gives
        # it; one that died is noticed by whoever started it.
        vars(in_memory_corestate)["HEARTBEAT_DEFAULT_INTERVAL"] = TASK_HEARTBEAT_S
        vars(inside)["push_object_contents_from_iterable"] = push_in_turn
        read_more_at_a_time()
        self._store, factory = FileContents(options.objects), ObjectStoreFactory()
        factory.store_instance = self._store
        self._states = NodeStateFactory(factory)
        self._state: Any = self._states.state()
        self._heart: _Heart | None = None

    def open_runtime(self) -> None:
        """Serve app processes, in a thread.

        Raises:
            OSError: the port is taken.
        """
        # Every path asks for a task's token or the secret's signature by itself; the front keeps the others away.
        doors = {f"/v1/runtime/{name}": Door(lambda headers: "runtime") for name in RUNTIME}
        application: Any = telling_to_come_again(create_app(self._states, self._options.secret))
        server = uvicorn.Server(
            uvicorn.Config(
                Front(application, doors, at_once=64, threads=2),
                _LOOPBACK,
                self._options.runtime_port,
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
            )
        )
        thread = threading.Thread(target=server.run, name="runtime", daemon=True)
        thread.start()
        while thread.is_alive() and not server.started:
            time.sleep(0.05)
        if not server.started:
            raise OSError(
                f"Port {self._options.runtime_port} on {_LOOPBACK} can't be used; site.toml can name another."
            )

    def crashed(self, run: int) -> None:
        """Answer in the place of an app process that died, also of one that had not yet fetched its message."""
        for name in self._replies():
            if not self._is_whole(self._store.get_object_tree(name)):  # the rest of it will never come
                self._state.delete_messages(message_ids=[name])
                self._store.delete(name)
        self._state.get_messages_legacy(run_ids=[run], is_reply=False)  # Flower answers only what was fetched
        self._state._store_error_replies({run}, CLIENT_APP_CRASHED_ERROR)

    def serve(
        self, stopping: threading.Event, limit_s: float, come: threading.Event, worked: Callable[[], bool]
    ) -> None:
        """Take part until told to stop; a message in work is finished first, for at most `limit_s`, or handed back.

        Handed back: the node signs off, so the coordinator hears at once that no answer comes. It also ends where
        Flower can't use the connection any more, its heartbeat has ended, or nobody does the work; starting again is
        the remedy.

        Args:
            stopping: set when it is to stop.
            limit_s: see above.
            come: set here when a message is there, whole.
            worked: tells whether whoever does the work is there.

        Raises:
            Refused: the coordinator does not let it in.
        """
        options = self._options
        keys = options.key, options.key.public_key()
        self._told("connecting")
        self._sign_off_predecessor(keys)
        problem: list[Exception] = []
        with self._connection(keys) as connection:
            node, receive, send, get_run, get_fab, pull, push, confirm = connection
            self._state.set_node_id(node)
            durable.write_bytes(options.memory, json.dumps({"node": node}).encode())
            self._told("waiting")
            last = time.monotonic()
            try:
                while not stopping.is_set() and not self._lost(worked):
                    run = inside._pull_and_store_message(
                        state=self._state,
                        object_store=self._store,
                        node_config=dict(options.config),
                        receive=receive,
                        get_run=get_run,
                        get_fab=lambda name, run: self._checked(get_fab(name, run)),
                        # As it comes: Flower holds all of a message before it stores any of it.
                        pull_object=lambda run, name: self._store.lay_aside(name, pull(run, name)),
                        confirm_message_received=confirm,
                        trusted_entities=bundle.trusted_entities(options.coordinators()),
                    )
                    if run is None:
                        stopping.wait(_POLLS.after(time.monotonic() - last))
                        continue
                    self._told("working")
                    come.set()
                    if self._answered(stopping, limit_s, worked):
                        inside._push_messages(self._state, self._store, send, push)
                    self._told("waiting")
                    last = time.monotonic()
                if lost := self._lost(worked):
                    _log.error("%s; this node ends, to be started again", lost)
            except httpx.HTTPStatusError as error:  # kept, for the connection swallows what is raised inside
                problem.append(error)
        if problem:
            raise Refused(_said(problem[0]))
        options.memory.unlink(missing_ok=True)  # it has signed off by itself

    def _answered(self, stopping: threading.Event, limit_s: float, worked: Callable[[], bool]) -> bool:
        """Wait until there is an answer to send; False if the time to stop came first, or it comes to nothing."""
        until: float | None = None
        while not self._has_reply():
            if self._lost(worked):
                return False
            if stopping.is_set():
                until = until or time.monotonic() + limit_s
                if time.monotonic() >= until:
                    _log.warning(
                        "the work is not done within %g s and is handed back; what is done of it is kept", limit_s
                    )
                    return False
            time.sleep(_ANSWER_S)
        return True

    def _has_reply(self) -> bool:
        """Tell whether an answer waits, whole: Flower's own way to look takes it, and then waits for its parts."""
        names = self._replies()
        return bool(names) and all(self._is_whole(self._store.get_object_tree(name)) for name in names)

    def _replies(self) -> list[str]:
        with self._state.lock_msg_store:
            entries = list(self._state.msg_store.values())
        return [
            entry.message.metadata.message_id
            for entry in entries
            if entry.message.metadata.reply_to_message_id and not entry.is_retrieved
        ]

    def _is_whole(self, tree: Any) -> bool:
        return self._store.has(tree.object_id) and all(map(self._is_whole, tree.children))

    def _checked(self, fab: Fab) -> Fab:
        """Give a bundle to Flower; without its signatures, so that it refuses, if this site must not take it."""
        objection = bundle.objection(fab.content, fab.verifications, self._options.coordinators())
        if objection is None:
            return fab
        _log.error("the coordinator's bundle is refused: %s", objection)
        return Fab(fab.hash_str, fab.content, {})

    def _lost(self, worked: Callable[[], bool]) -> str:
        """Say what has ended that this node can't do without; nothing if all is there."""
        if self._heart is None or not self._heart.is_running:
            return "the coordinator does not hear this node any more"
        return "" if worked() else "nothing starts app processes any more"

    def _hearten(self, beat: Callable[[], bool]) -> _Heart:
        self._heart = _Heart(beat)
        return self._heart

    @contextlib.contextmanager
    def _connection(self, keys: Any) -> Any:
        vars(connections)["HeartbeatSender"] = self._hearten
        try:
            with connections.http_request_response(
                self._options.superlink, False, self._options.authority, keys
            ) as connection:
                yield connection
        except SystemExit as ended:  # Flower has logged why, and lets a timer end this process soon
            raise Refused(_said(ended.__context__)) from None

    def _sign_off_predecessor(self, keys: Any) -> None:
        """Tell the coordinator that the node of a killed process is gone; else it lets no other in for a minute."""
        try:
            number = int(json.loads(self._options.memory.read_bytes())["node"])
        except (OSError, KeyError, TypeError, ValueError):
            return
        interceptors: list[Any] = [
            RuntimeVersionHttpInterceptor(component_name="SuperNode"),
            NodeAuthHttpInterceptor(*keys),
        ]
        with (
            contextlib.suppress(httpx.HTTPError, RuntimeError),
            FleetHttpClient.from_server_address(
                self._options.superlink, False, self._options.authority, interceptors=interceptors
            ) as client,
        ):
            client.DeactivateNode(DeactivateNodeRequest(node_id=number))
            # What the predecessor had taken, nobody answers any more. Whoever waits for it is told so while no node is
            # there, and would else wait until its deadline.
            time.sleep(_HEARD_S)


def _unknown_here(error: BaseException | None) -> bool:
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.UNAUTHORIZED


def _said(error: BaseException | None) -> str:
    if _unknown_here(error):
        return (
            "the coordinator does not know this site (any more), or the clocks differ by more than five minutes; "
            "it is tried again and again; if that lasts, ask the coordinator, or join again"
        )
    return f"the coordinator refuses the connection ({error or 'the log has why'}); it is tried again and again"
