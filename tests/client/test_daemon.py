"""Claims about a site's daemon that need no coordinator: its settings, whom it trusts, and that it is alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from client import daemon, flower_node
from client.flower_node import Node, NodeOptions
from client.home import SiteHome
from client.supernode import NodeFolder, trusted_coordinators
from federation import flower
from federation.identity import Identity
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

    monkeypatch.setattr(flower_node, "http_request_response", as_flower_does)
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
