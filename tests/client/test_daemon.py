"""Claims about a site's daemon that need no coordinator: its settings, whom it trusts, and that it is alone."""

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore import heartbeat

from client import daemon, flower_node, supernode
from client.flower_node import Node, NodeOptions
from client.home import SiteHome
from client.supernode import NodeFolder, trusted_coordinators
from federation import flower
from federation.identity import Identity
from federation.messages import SiteRefusal
from federation.supervisor import Condition
from tokenizer.errors import ConfigError

SETTINGS = """
[site]
name = "icu"
data = "records"
settings = "standard"
processes = 2
[coordinator]
address = "coordinator.example.org"
fleet_port = 8443
control_port = 8444
key = "{key}"
"""


@pytest.fixture
def key(tmp_path: Path) -> str:
    return Identity.at(tmp_path / "coordinator.key").public


def home(path: Path, key: str, more: str = "", policy: str = "version = 1\n") -> Path:
    path.mkdir()
    (path / "site.toml").write_text(SETTINGS.format(key=key) + more)
    (path / "policy.toml").write_text(policy)
    return path


def test_a_sites_settings_become_what_the_site_is_told(tmp_path: Path, key: str) -> None:
    path = home(tmp_path / "icu", key, "[daemon]\nhealth_port = 9000\nstop_seconds = 5\n")
    opened = SiteHome.open(path)
    files = opened.files
    assert (files.name, files.data, files.settings) == ("icu", path / "records", "standard")
    assert files.machine.processes == 2
    assert files.policy == path / "policy.toml"
    daemon_ = opened.settings.daemon
    assert (daemon_.health_port, daemon_.runtime_port, daemon_.stop_seconds) == (9000, 8452, 5.0)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("[daemon]\nhealth_prot = 1\n", "daemon.health_prot is not a known key; did you mean health_port"),
        ("[daemon]\nstop_seconds = -1\n", "daemon.stop_seconds = -1"),
        ("[daemon]\nruntime_port = 70000\n", "daemon.runtime_port = 70000"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(tmp_path: Path, key: str, more: str, named: str) -> None:
    path = home(tmp_path / "icu", key, more)
    with pytest.raises(ConfigError) as told:
        daemon.run(path)
    assert str(told.value).startswith(f"{path / 'site.toml'}: ")
    assert named in str(told.value)


def test_a_wrong_setting_of_its_records_is_named_before_anything_starts(tmp_path: Path, key: str) -> None:
    path = home(tmp_path / "icu", key)
    rules = path / "records.toml"
    rules.write_text("[prepare]\nicd10 = true\n")
    text = (path / "site.toml").read_text()
    (path / "site.toml").write_text(text.replace('settings = "standard"', f'settings = "{rules}"'))
    with pytest.raises(ConfigError, match=r"records\.toml: prepare\.icd10 is not a known key"):
        daemon.run(path)


def test_bundles_are_taken_from_whom_the_policy_lists_or_else_from_whom_the_site_enrolled_with(
    tmp_path: Path, key: str
) -> None:
    other = Identity.at(tmp_path / "other.key").public
    assert trusted_coordinators(SiteHome.open(home(tmp_path / "a", key))) == (key,)
    listed = f'version = 1\n[runs]\ncoordinators = ["{other}"]\n'
    assert trusted_coordinators(SiteHome.open(home(tmp_path / "b", key, policy=listed))) == (other,)
    with pytest.raises(ConfigError, match=r"policy\.toml"):
        trusted_coordinators(SiteHome.open(home(tmp_path / "c", key, policy="version = 2\n")))


def test_a_daemon_that_has_just_begun_starts_and_one_that_can_not_says_why(tmp_path: Path, key: str) -> None:
    path = home(tmp_path / "icu", key)
    (path / "state").mkdir()
    begun = daemon._Daemon(SiteHome.open(path))
    well, told = begun._health()
    assert (well, told["starting"]) == (False, True)
    begun._line.asked.set()
    assert begun._health()[1]["reason"] == "the node is about to connect"
    begun._folder.write("refused", "the coordinator does not know this site")
    assert begun._health()[1]["reason"] == "the coordinator does not know this site"
    assert "starting" not in begun._health()[1]
    begun._folder.write("waiting")
    begun._began -= 120
    assert not begun._health()[1]["starting"], "it should have connected by now"


class Waits:
    """In the place of a line's event to stop: it notes how long is waited, and stops after some waits."""

    def __init__(self, most: int) -> None:
        self.seconds: list[float] = []
        self._most = most

    def is_set(self) -> bool:
        return len(self.seconds) >= self._most

    def wait(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.fixture
def begun(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A daemon whose node runs and waits."""
    path = home(tmp_path / "icu", key)
    (path / "state").mkdir()
    made = daemon._Daemon(SiteHome.open(path))
    running = Condition(running=True, pid=os.getpid(), ends=0, code=None)
    monkeypatch.setattr(made._supervisor, "conditions", lambda: {"supernode": running})
    made._folder.write("waiting")
    made._line.asked.set()
    return made


def test_a_killed_nodes_last_words_are_not_those_of_the_next_one(begun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert begun._health()[1]["node"] == "waiting"
    assert begun._health()[0]
    next_one = Condition(running=True, pid=os.getpid() + 1, ends=1, code=-9)
    monkeypatch.setattr(begun._supervisor, "conditions", lambda: {"supernode": next_one})
    well, told = begun._health()
    assert (well, told["node"], told["reason"]) == (False, "starting", "the node is about to connect")
    gauges: dict[str, float] = {}
    board: Any = SimpleNamespace(set=lambda name, value, *_: gauges.update({name: value}))
    begun._folder.write("working")
    begun._measure(board, well)
    assert not gauges["working"]


def test_the_line_to_the_control_service_outlives_every_error_and_says_which(
    begun: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(home: SiteHome) -> Any:
        raise RuntimeError("of a library")

    monkeypatch.setattr(daemon, "Link", broken)
    begun._line._stopping = Waits(3)
    begun._line.run()
    assert begun._health() == (True, {**begun._health()[1], "control": "unexpected RuntimeError: of a library"})
    assert [record.message for record in caplog.records] == ["unexpected RuntimeError: of a library"]


@pytest.mark.parametrize("refusal", [SiteRefusal("restored"), ConfigError("The coordinator can't be reached")])
def test_a_coordinator_is_asked_again_soon_and_then_each_minute(
    begun: Any, monkeypatch: pytest.MonkeyPatch, refusal: Exception
) -> None:
    """Each try is an entry on the list of what leaves: every five seconds, a day has 17,000."""

    def refuse(home: SiteHome) -> Any:
        raise refusal

    monkeypatch.setattr(daemon, "Link", refuse)
    begun._line.asked.clear()
    begun._line._stopping = waits = Waits(6)
    begun._line.run()
    assert waits.seconds == [5, 10, 20, 40, 60, 60]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_site_whose_line_to_the_control_service_has_ended_is_not_well(
    begun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(home: SiteHome) -> Any:
        raise SystemExit

    monkeypatch.setattr(daemon, "Link", end)
    assert begun._health()[0], "it has not begun"
    begun._line.start()
    begun._line.join()
    well, told = begun._health()
    assert not well
    assert told["reason"].endswith("the certificate is not renewed; start this site again")


def test_what_an_answer_lacked_is_the_reason_until_one_of_its_kind_is_given(
    tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = home(tmp_path / "icu", key)
    (path / "state").mkdir()
    begun = daemon._Daemon(SiteHome.open(path))
    begun._line.asked.set()
    begun._folder.write("waiting")
    begun._files.note_trouble("train", "found too little room (disk full); make room, and all goes on by itself")
    told = "an answer to train found too little room (disk full); make room, and all goes on by itself; this is told"
    well, health = begun._health()
    assert not well
    assert health["reason"].startswith(told)
    begun._log_trouble()
    begun._log_trouble()
    assert caplog.text.count(told) == 1
    begun._files.note_trouble("evaluate", "")
    assert begun._health()[1]["reason"].startswith(told)
    begun._files.note_trouble("train", "")
    assert "room" not in begun._health()[1]["reason"]
    begun._files.note_trouble("train", "found too little room")
    assert "room" not in daemon._Daemon(SiteHome.open(path))._health()[1]["reason"]


def test_records_that_are_not_there_are_named_before_anything_starts(tmp_path: Path, key: str) -> None:
    path = home(tmp_path / "icu", key)
    with pytest.raises(ConfigError, match=rf"site\.toml: site\.data: there is no folder {path / 'records'}; say where"):
        daemon.run(path)


def test_a_policy_that_becomes_unusable_is_told_and_ends_neither_node_nor_reports(tmp_path: Path, key: str) -> None:
    path = home(tmp_path / "icu", key)
    (path / "state").mkdir()
    opened = SiteHome.open(path)
    trusted = supernode._Trusted(opened)
    begun = daemon._Daemon(opened)
    begun._line.asked.set()
    reports: list[str] = []
    link: Any = SimpleNamespace(
        renew_if_due=lambda: False,
        warning=lambda: None,
        wrong_clock=lambda: None,
        report_health=lambda: reports.append("health"),
        report_budget=lambda: reports.append("budget"),
    )
    (path / "policy.toml").write_text('version = 1\n[runs]\nmanifests = "aks"\n')
    assert trusted.now() == (key,)
    begun._line._tell(link)
    well, told = begun._health()
    assert not well
    assert told["reason"] == (
        f"{path / 'policy.toml'}: runs.manifests = 'aks': Input should be 'ask' or 'any' or Input should be a valid "
        "list. Nothing is answered until the policy is mended"
    )
    (path / "policy.toml").write_text("version = 1\n")
    begun._line._tell(link)
    assert "policy" not in begun._health()[1].get("reason", "")
    assert reports == ["health", "health", "budget"]


def test_two_daemons_do_not_share_a_home(tmp_path: Path) -> None:
    with (
        daemon._alone(tmp_path),
        pytest.raises(ConfigError, match="another `fedcomet site run` uses this home"),
        daemon._alone(tmp_path),
    ):
        pass


def test_what_the_node_does_is_told_to_the_daemon(tmp_path: Path) -> None:
    folder = NodeFolder(tmp_path)
    assert folder.read().state == "starting"
    folder.write("refused", "the coordinator does not know this site")
    told = folder.read()
    assert (told.state, told.reason) == ("refused", "the coordinator does not know this site")
    for again in ("starting", "connecting"):
        folder.write(again)
        assert folder.read().reason == told.reason, "who looks between two tries sees why, too"
    folder.write("waiting")
    folder.write("connecting")
    assert folder.read().reason == ""
    (folder.root / "node.json").write_text("{")
    assert folder.read().state == "starting"


def test_why_flower_gave_up_a_connection_is_told(tmp_path: Path, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def as_flower_does(*_: Any) -> Iterator[None]:
        try:
            raise httpx.HTTPStatusError("no", request=httpx.Request("POST", "https://x"), response=httpx.Response(401))
        except Exception:
            raise SystemExit(1)  # noqa: B904  (Flower's exit, which ends this process some seconds later)
        yield

    monkeypatch.setattr(flower_node.connections, "http_request_response", as_flower_does)
    own = ec.generate_private_key(ec.SECP384R1())
    options = NodeOptions("127.0.0.1:1", b"", own, {}, lambda: (key,), 0, b"s", tmp_path / "m", tmp_path / "o")
    with pytest.raises(flower_node.Refused, match="does not know this site"), Node(options)._connection((own, None)):
        pass


def test_a_process_that_died_is_answered_for_once_whether_it_had_its_message_or_not(tmp_path: Path, key: str) -> None:
    from flwr.app import ConfigRecord, Message, RecordDict

    flower.assume_identity()
    own = ec.generate_private_key(ec.SECP384R1())
    memory, objects = tmp_path / "memory", tmp_path / "objects"
    options = NodeOptions("127.0.0.1:1", b"", own, {}, lambda: (key,), 0, b"s", memory, objects)
    for fetched in (False, True):
        node: Any = Node(options)
        node._state.set_node_id(1)
        message = Message(RecordDict({"header": ConfigRecord({"json": "{}"})}), 1, "train")
        message.metadata.__dict__.update(_message_id="m", _run_id=7, _src_node_id=0, _ttl=60.0)
        node._state.store_message(message)
        if fetched:
            node._state.get_messages_legacy(run_ids=[7], is_reply=False)
        assert not node._has_reply()
        node.crashed(7)
        node.crashed(7)
        assert node._has_reply()
        (reply,) = node._state.get_messages_legacy(is_reply=True)
        assert reply.has_error()
        assert reply.metadata.reply_to_message_id == "m"


class Fleet:
    """In the place of Flower's client: a coordinator that has no work, and answers heartbeats as it is told."""

    def __init__(self, statuses: Iterator[int]) -> None:
        self.statuses = statuses
        self.beats, self.heard, self.signed_off = 0, threading.Event(), False

    def from_server_address(self, *_: Any, **__: Any) -> Any:
        return contextlib.nullcontext(self)

    def ActivateNode(self, _: Any) -> Any:  # noqa: N802  (Flower's names)
        return SimpleNamespace(node_id=7)

    def PullMessages(self, _: Any) -> Any:  # noqa: N802
        return SimpleNamespace(messages_list=[])

    def DeactivateNode(self, _: Any) -> None:  # noqa: N802
        self.signed_off = True

    def SendNodeHeartbeat(self, _: Any) -> Any:  # noqa: N802
        self.beats += 1
        status = next(self.statuses)
        if status != 200:
            request, response = httpx.Request("POST", "https://x"), httpx.Response(status)
            raise httpx.HTTPStatusError(f"error {status}", request=request, response=response)
        self.heard.set()
        return SimpleNamespace(success=True)


def node_at(fleet: Fleet, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setattr(flower_node.connections, "FleetHttpClient", fleet)
    monkeypatch.setattr(heartbeat, "exponential", lambda **_: itertools.repeat(0.01))
    own = ec.generate_private_key(ec.SECP384R1())
    return Node(NodeOptions("127.0.0.1:1", b"", own, {}, list, 0, b"s", folder / "m", folder / "o"))


def test_a_heartbeat_that_fails_is_tried_again_and_the_node_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet, stopping = Fleet(iter([500, 403, 500, 200])), threading.Event()
    node = node_at(fleet, tmp_path, monkeypatch)
    serving = threading.Thread(target=node.serve, args=(stopping, 0.0, threading.Event(), lambda: True))
    serving.start()
    try:
        assert fleet.heard.wait(20)
        assert serving.is_alive()
        assert not node._lost(lambda: True)
    finally:
        stopping.set()
        serving.join(20)
    assert fleet.signed_off
    told = [record.message for record in caplog.records if "heartbeat" in record.message]
    assert told[0] == "the coordinator does not take this node's heartbeat (error 500); it is tried again"
    assert len(told) == 3


@pytest.mark.parametrize(("status", "patience_s", "most"), [(500, 0.1, 1000), (401, 60.0, 1)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_node_that_the_coordinator_does_not_hear_any_more_ends_and_hands_back_its_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int,
    patience_s: float,
    most: int,
) -> None:
    """It would ask for work for ever, and be given none."""
    monkeypatch.setattr(flower_node, "_UNHEARD_S", patience_s)
    monkeypatch.setattr(flower_node.connections.os, "kill", lambda *_: None)  # Flower's own stop, at 401
    fleet, never = Fleet(itertools.repeat(status)), threading.Event()
    node = node_at(fleet, tmp_path, monkeypatch)
    node.serve(never, 0.0, threading.Event(), lambda: True)
    assert 1 <= fleet.beats <= most
    assert fleet.signed_off
    assert "the coordinator does not hear this node any more; this node ends, to be started again" in caplog.messages
    assert not node._answered(never, 60.0, lambda: True)


def test_a_node_for_which_nobody_works_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = Fleet(itertools.repeat(200))
    node_at(fleet, tmp_path, monkeypatch).serve(threading.Event(), 0.0, threading.Event(), lambda: False)
    assert fleet.signed_off
    assert "nothing starts app processes any more; this node ends, to be started again" in caplog.messages


@pytest.mark.parametrize(("state", "seconds"), [("connecting", [10]), ("waiting", [10]), ("working", [10, 60])])
def test_a_node_that_waits_for_a_coordinator_ends_soon_when_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, seconds: list[float]
) -> None:
    slept: list[float] = []
    codes: list[int] = []
    monkeypatch.setattr(supernode.time, "sleep", slept.append)
    monkeypatch.setattr(supernode.os, "_exit", codes.append)
    folder = NodeFolder(tmp_path)
    folder.write(state)
    supernode._end_late(folder, 60)
    assert (slept, codes) == (seconds, [0])
