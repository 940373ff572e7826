"""The SuperLink: contents of messages in files; half an answer waits as long as its site is there; keys come back."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Metadata, RecordDict
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.server.superlink.linkstate import sql_linkstate
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from sqlalchemy.orm import Session

from federation.front import Front
from federation.handover import handed
from server.flower_link import _PARTIAL, Control, LinkError, LinkRefusal, SuperLink, node_key
from server.superlink import _listener
from tests.field import until
from tests.superlink import free_ports

NODE, OTHER = 7, 8


def fill(session: Session) -> None:
    rows = {
        "INSERT INTO message_res (message_id, reply_to_message_id, src_node_id, delivered_at) VALUES (?, ?, ?, '')": [
            ("half", "asked", NODE),
            ("whole", "asked too", OTHER),
        ],
        "INSERT INTO objects (object_id, is_available, ref_count) VALUES (?, ?, 1)": [
            ("half", 1),
            ("record", 1),
            ("chunk", 0),
            ("whole", 1),
        ],
        "INSERT INTO object_children (parent_id, child_id) VALUES (?, ?)": [("half", "record"), ("record", "chunk")],
    }
    for statement, values in rows.items():
        for row in values:
            session.connection().exec_driver_sql(statement, row)


def test_the_superlink_keeps_contents_in_files_and_takes_handed_over_ones_from_its_own_side_only(
    tmp_path: Path,
) -> None:
    link = SuperLink(tmp_path / "link.sqlite", tmp_path / "objects", b"secret")
    state, record = link._state, RecordDict({"x": ConfigRecord({"a": 1})})
    contents = {name: part.deflate() for name, part in get_all_nested_objects(record).items()}
    node = state.create_node("aid", "name", b"key", 30.0)
    assert state.object_store.preregister(1, get_object_tree(record))
    for name, content in contents.items():
        handed(tmp_path / "objects", name).write_bytes(content)
        request = PushObjectRequest(node=Node(node_id=node), run_id=1, object_id=name, session_id="s")
        answer = link.fleet_doors()["/v1/fleet/push-object"].answer
        assert answer is not None
        told = answer(node, request.SerializeToString())
        assert told is not None
        assert not PushObjectResponse.FromString(told[1]).stored
        assert state.object_store.get(name) == b""
        state.object_store.put(name, b"")
        assert (tmp_path / "objects" / name).read_bytes() == content


def test_a_half_answer_is_held_back_only_while_its_node_is_online(tmp_path: Path) -> None:
    state = SuperLink(tmp_path / "link.sqlite", tmp_path / "objects", b"secret")._state
    first, second = (state.create_node("aid", "name", key, 30.0) for key in (b"one", b"two"))
    for node in (first, second):
        assert state.activate_node(node, 30.0)
    with state.session() as session:
        fill(session)
        for number, place in ((first, NODE), (second, OTHER)):
            signed = number - 2**64 if number >= 2**63 else number
            session.execute(
                sqlalchemy.text("UPDATE message_res SET src_node_id = :node WHERE src_node_id = :place"),
                {"node": signed, "place": place},
            )

    def held() -> set[str]:
        told = {"asked": ["asked", "asked too", "never"], "now": now().timestamp()}
        with state.session() as session:
            return set(session.scalars(_PARTIAL, told))

    assert held() == {"asked"}
    assert state.deactivate_node(second)
    assert held() == {"asked"}
    assert state.deactivate_node(first)
    assert held() == set()


def test_a_whole_answer_counts_though_its_node_has_signed_off_but_not_of_one_that_was_put_out(tmp_path: Path) -> None:
    state = SuperLink(tmp_path / "link.sqlite", tmp_path / "objects", b"secret")._state
    with state.session() as session:
        fill(session)
    with state.session() as session:
        session.execute(sqlalchemy.text("INSERT INTO node (node_id, online_until) VALUES (7, 0), (8, 0)"))
    places = {"asked": NODE, "asked too": OTHER, "never": OTHER}
    found = {
        name: SimpleNamespace(metadata=Metadata(1, name, 1, node, "", "", 0.0, 1e12, "train"))
        for name, node in places.items()
    }

    def told(there: set[int]) -> tuple[set[str], set[str]]:
        asked = set(places)
        refused = sql_linkstate.check_node_availability_for_in_message(
            inquired_in_message_ids=asked,
            found_in_message_dict=found,
            node_id_to_online_until=dict.fromkeys(there, 0.0),
            current_time=now().timestamp(),
        )
        return asked, set(refused)

    assert told({NODE, OTHER}) == ({"asked too"}, {"asked", "never"})
    assert told({NODE}) == (set(), set(places))


def test_a_key_that_was_put_out_is_the_same_node_again_and_one_that_is_in_is_refused(tmp_path: Path) -> None:
    link = SuperLink(tmp_path / "link.sqlite", tmp_path / "objects", b"secret")
    (port,) = free_ports(1)
    server = _listener(Front(link.application, link.own_doors("token")), "127.0.0.1", port)
    control = Control(port, "token")
    with pytest.raises(LinkError, match="can't be reached") as away:
        control.nodes()
    assert not isinstance(away.value, LinkRefusal)
    thread = threading.Thread(target=server.run)
    thread.start()
    until(lambda: server.started, "it listens", 60)
    try:
        keys = [node_key(ec.generate_private_key(ec.SECP384R1()).public_key()) for _ in range(2)]
        first, other = (control.register(key, name) for key, name in zip(keys, ("icu", "ward"), strict=True))
        assert link._state.activate_node(first, 30.0)
        with pytest.raises(LinkRefusal, match=r"refuses RegisterNodeRequest: .*already in use"):
            control.register(keys[0], "icu")
        control.unregister(first)
        assert link._state.get_node_id_by_public_key(keys[0]) is None
        assert not link._state.activate_node(first, 30.0)
        assert [node.number for node in control.nodes()] == [other]
        with pytest.raises(LinkRefusal, match="refuses UnregisterNodeRequest"):
            control.unregister(first)

        assert control.register(keys[0], "icu") == first
        assert {node.key: node.number for node in control.nodes()} == {keys[0]: first, keys[1]: other}
        assert link._state.activate_node(first, 30.0)
        assert [node.name for node in control.nodes() if node.online] == ["icu"]
    finally:
        server.should_exit = True
        thread.join()
        control.close()
