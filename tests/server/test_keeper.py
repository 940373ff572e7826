"""Claims about runs that are kept going, and about who is a node: a real ledger, with Flower's part played here."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from federation import pki
from federation.pki import Role
from server import nodes
from server.flower_link import FlowerNode, FlowerRun, LinkRefusal, node_key
from server.keeper import Keeper
from server.ledger import Ledger
from server.tables import RunState, SiteStatus
from tokenizer import durable

BUNDLE = "b" * 64


@dataclass
class Flower:
    """What the SuperLink would know: its runs, and nodes; a key that is out keeps its number, and may come back."""

    all: list[FlowerRun] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    registered: list[FlowerNode] = field(default_factory=list)
    refused: list[bytes] = field(default_factory=list)
    stopped: list[int] = field(default_factory=list)

    def runs(self) -> list[FlowerRun]:
        return list(reversed(self.all))

    def start(self, run: str, bundle_sha256: str) -> int:
        assert bundle_sha256 == BUNDLE
        self.all.append(FlowerRun(len(self.all) + 1, run, going=True, completed=False, details=""))
        return len(self.all)

    def stop(self, number: int) -> None:
        self.stopped.append(number)
        self.die(number, "stopped")

    def die(self, number: int, details: str = "killed") -> None:
        self.all[number - 1] = FlowerRun(number, self.all[number - 1].run, False, False, details)

    def nodes(self) -> list[FlowerNode]:
        return list(self.registered)

    def register(self, key: bytes, name: str) -> int:
        if key in self.refused or key in [node.key for node in self.registered]:
            raise LinkRefusal("The SuperLink refuses RegisterNodeRequest: Public key already in use.")
        if key not in self.keys:
            self.keys.append(key)
        number = self.keys.index(key) + 1
        self.registered.append(FlowerNode(number, key, name, True, 0.0))
        return number

    def unregister(self, number: int) -> None:
        if self.keys[number - 1] in self.refused:
            raise LinkRefusal("The SuperLink refuses UnregisterNodeRequest: Node ID not found for account.")
        self.registered = [node for node in self.registered if node.number != number]


class Table:
    """A coordinator's ledger, Flower, the keeper between them, and a clock."""

    def __init__(self, ledger: Ledger, folder: Path) -> None:
        self.ledger, self.flower, self.now, self.committed = ledger, Flower(), 0.0, 0
        self.keeper = Keeper(ledger, self.flower, lambda run: self.committed, folder, lambda: self.now)

    def look(self, later_s: float = 0.0) -> None:
        self.now += later_s
        self.keeper.look(BUNDLE)

    @property
    def state(self) -> RunState:
        return self.ledger.run("first").state


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        ledger.propose("first", b"{}")
        yield Table(ledger, tmp_path / "runs")


def test_only_runs_that_should_run_are_started_and_each_once(table: Table) -> None:
    table.look()
    assert not table.flower.all
    table.ledger.start("first")
    table.look()
    table.look(100)
    assert [run.run for run in table.flower.all] == ["first"]
    assert table.ledger.run("first").flower_run == "1"


def test_a_run_whose_process_died_is_taken_up_after_a_while(table: Table) -> None:
    table.ledger.start("first")
    table.look()
    table.flower.die(1)
    table.look(0.1)
    assert len(table.flower.all) == 1
    table.look(5)
    assert [run.going for run in table.flower.all] == [False, True]
    assert table.ledger.run("first").flower_run == "2"


def test_a_run_that_dies_without_a_round_in_between_fails_in_the_end_and_says_why(table: Table) -> None:
    table.ledger.start("first")
    for number in range(1, 7):
        table.look(100)
        assert len(table.flower.all) == number
        table.flower.die(number, f"no luck {number}")
    table.look(100)
    assert len(table.flower.all) == 6
    assert table.state == RunState.FAILED
    assert "ended 6 times" in table.ledger.run("first").reason
    assert "no luck 6" in table.ledger.run("first").reason
    table.look(100)
    assert len(table.flower.all) == 6
    table.ledger.start("first")
    table.look(100)
    assert len(table.flower.all) == 7


def test_a_run_that_makes_rounds_between_its_deaths_goes_on_for_ever(table: Table) -> None:
    table.ledger.start("first")
    for number in range(1, 30):
        table.committed = number
        table.look(100)
        table.flower.die(number)
    assert table.state == RunState.READY


NO_ROOM = "ServerApp failed with exception: Out of room: [Errno 28] No space left on device: 'runs/first/x'"


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes are free."""
    free = [200_000_000]
    monkeypatch.setattr(durable, "free_bytes", lambda path: free[0])
    return free


def first_lack(table: Table) -> None:
    """Start a run whose process ends once for want of room, and is started again soon: there may be some by now."""
    table.ledger.start("first")
    table.look()
    table.flower.die(1, NO_ROOM)
    table.look(25)
    table.look(25)
    assert len(table.flower.all) == 1
    table.look(10)
    assert len(table.flower.all) == 2


def test_a_run_that_ends_for_want_of_room_is_no_failed_one_and_goes_on_when_there_is_more(
    table: Table, free: list[int]
) -> None:
    first_lack(table)
    for number in range(2, 30):
        table.flower.die(number, NO_ROOM)
        table.look(100)
        table.look(100)
        assert len(table.flower.all) == number
        assert re.fullmatch(
            r"run first had too little room \(\[Errno 28\] No space left on device: 'runs/first/x'\), and [\d,]+ bytes "
            r"are free now; make room, and all goes on by itself: this is told until the run's next round is done",
            table.keeper.trouble,
        )
        free[0] += 5_000_000
        table.look(1)
        assert len(table.flower.all) == number + 1
        assert table.keeper.trouble
    assert table.state == RunState.READY
    table.committed = 1
    table.look(1)
    assert table.keeper.trouble == ""


def test_a_run_without_room_is_tried_now_and_then_as_not_every_quota_shows(table: Table, free: list[int]) -> None:
    first_lack(table)
    for number in range(2, 10):
        table.flower.die(number, NO_ROOM)
        table.look(100)
        table.look(590)
        assert len(table.flower.all) == number
        table.look(20)
        assert len(table.flower.all) == number + 1
    assert table.state == RunState.READY


def test_a_run_is_not_led_while_its_next_checkpoint_finds_no_room(
    table: Table, free: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tmp_path / "runs/first/checkpoints/0003.safetensors"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"x" * 1000)
    table.committed, free[0] = 3, 999
    table.ledger.start("first")
    table.look()
    table.look(100)
    assert not table.flower.all
    told = (
        f"run first needs 1,000 bytes for its next checkpoint, and the disk of {tmp_path}/runs/first has 999; make room"
    )
    assert told in table.keeper.trouble
    assert caplog.text.count(told) == 1
    table.committed = 2  # it is there already
    table.look()
    assert len(table.flower.all) == 1
    assert table.keeper.trouble == ""
    table.committed = 3
    table.look()
    assert told in table.keeper.trouble
    free[0] = 1000
    table.look()
    assert table.keeper.trouble == ""


@pytest.mark.parametrize("wish", ["pause", "stop"])
def test_a_wish_comes_true_though_the_process_has_died(table: Table, wish: str) -> None:
    table.ledger.start("first")
    table.look()
    table.ledger.journal("first").start("first")
    getattr(table.ledger, wish)("first")
    table.look(100)
    assert table.state == (RunState.PAUSING if wish == "pause" else RunState.STOPPING)
    table.flower.die(1)
    table.look(100)
    assert table.state == (RunState.PAUSED if wish == "pause" else RunState.STOPPED)
    assert len(table.flower.all) == 1


def test_a_process_that_was_started_before_a_crash_is_known_again_and_twins_end(table: Table) -> None:
    table.ledger.start("first")
    table.flower.start("first", BUNDLE)
    table.flower.start("first", BUNDLE)
    table.look()
    assert table.ledger.run("first").flower_run == "2"
    assert table.flower.stopped == [1]
    assert len(table.flower.all) == 2


def test_what_an_earlier_coordinator_led_is_taken_up_at_once(table: Table) -> None:
    table.ledger.start("first")
    table.flower.start("first", BUNDLE)
    table.keeper.begin()
    table.look()
    assert [run.going for run in table.flower.all] == [False, True]


@dataclass(frozen=True)
class Member:
    name: str
    node_key: str
    role: Role = Role.SITE
    status: SiteStatus = SiteStatus.ENROLLED
    expires_at: float | None = None


def test_enrolled_sites_are_nodes_and_nobody_else_is() -> None:
    flower = Flower()
    keys = [ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(5)]
    lines = [pki.node_key(key) for key in keys]
    members = [
        Member("icu", lines[0]),
        Member("ward", lines[1]),
        Member("viewer", lines[2], role=Role.VIEWER),
        Member("gone", lines[3], status=SiteStatus.REVOKED),
        Member("invited", "", status=SiteStatus.INVITED),
    ]
    assert set(nodes.follow(members, flower)[0]) == {"icu", "ward"}
    assert {node.key for node in flower.registered} == {node_key(keys[0]), node_key(keys[1])}
    nodes.follow(members, flower)
    assert len(flower.registered) == 2
    out = [Member("icu", lines[0], status=SiteStatus.REVOKED), Member("ward", lines[4])]
    assert set(nodes.follow(out, flower)[0]) == {"ward"}
    assert [node.key for node in flower.registered] == [node_key(keys[4])]


def test_a_site_whose_certificate_has_expired_is_no_node_until_it_has_another() -> None:
    flower = Flower()
    key = pki.node_key(ec.generate_private_key(ec.SECP384R1()).public_key())
    for expires_at, there in ((2000.0, {"icu"}), (1000.0, set()), (3000.0, {"icu"})):
        found, refused = nodes.follow([Member("icu", key, expires_at=expires_at)], flower, clock=lambda: 1500.0)
        assert set(found) == there
        assert len(flower.registered) == len(there)
        assert refused == []


def test_a_site_that_the_superlink_refuses_holds_up_no_other() -> None:
    flower = Flower()
    keys = [ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(3)]
    old, bad, good = map(pki.node_key, keys)
    nodes.follow([Member("old", old)], flower)
    flower.refused = [node_key(key) for key in keys[:2]]
    found, refused = nodes.follow([Member("bad", bad), Member("good", good)], flower)
    assert set(found) == {"good"}
    assert refused == [
        "old should be no node any more, and still is: "
        "The SuperLink refuses UnregisterNodeRequest: Node ID not found for account.",
        "bad can't be made a node, and takes part in no round: "
        "The SuperLink refuses RegisterNodeRequest: Public key already in use. "
        "If this stays, its people give it another key with fedcomet site renew --new-key.",
    ]
    flower.refused = []
    found, refused = nodes.follow([Member("bad", bad), Member("good", good)], flower)
    assert (set(found), refused) == ({"bad", "good"}, [])
