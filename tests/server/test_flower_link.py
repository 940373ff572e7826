"""An answer of which a part is missing is held back while its site is there, and given up when it has signed off."""

from pathlib import Path

import sqlalchemy
from flwr.supercore.date import now
from sqlalchemy.orm import Session

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
