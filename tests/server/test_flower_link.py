"""Contents of messages at the SuperLink: in files; half an answer waits as long as its site is there."""

from pathlib import Path

import sqlalchemy
from flwr.app import ConfigRecord, RecordDict
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from sqlalchemy.orm import Session

from federation.handover import handed
from server.flower_link import _PARTIAL, SuperLink

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
