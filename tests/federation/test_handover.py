"""Contents go from process to process in files, and over HTTP where files can't be had."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest, PushObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.object_store import NoObjectInStoreError
from flwr.supercore.runtime import RuntimeHttpClient

from client.objects import FileContents
from federation.handover import FOLDER, clear, hand_over, handed, push_in_turn

RUN = 3
RECORD = RecordDict({"x": ConfigRecord({"a": 1})})
CONTENTS = {name: part.deflate() for name, part in get_all_nested_objects(RECORD).items()}
NAME, CONTENT = next(iter(CONTENTS.items()))


class Wire:
    """What goes over HTTP, and a store at its other end."""

    def __init__(self, store: FileContents) -> None:
        self.store, self.pushed, self.pulled = store, list[bytes](), list[str]()
        self.deaf = 0

    def push(self, client: Any, request: PushObjectRequest) -> PushObjectResponse:
        self.pushed.append(request.object_content)
        if self.deaf:
            self.deaf -= 1
            return PushObjectResponse(stored=False)
        try:
            self.store.put(request.object_id, request.object_content)
        except (NoObjectInStoreError, ValueError):
            return PushObjectResponse(stored=False)
        return PushObjectResponse(stored=True)

    def pull(self, client: Any, request: PullObjectRequest) -> PullObjectResponse:
        self.pulled.append(request.object_id)
        content = self.store.get(request.object_id) or b""
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)


@pytest.fixture
def wire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wire:
    folder = tmp_path / "objects"
    store = FileContents(folder)
    store.preregister(RUN, get_object_tree(RECORD))
    wire = Wire(store)
    monkeypatch.setattr(RuntimeHttpClient, "PushObject", wire.push)
    monkeypatch.setattr(RuntimeHttpClient, "PullObject", wire.pull)
    monkeypatch.setenv(FOLDER, str(folder))
    hand_over()
    hand_over()  # a second time changes nothing
    return wire


def push(name: str = NAME, content: bytes = CONTENT) -> bool:
    request = PushObjectRequest(run_id=RUN, object_id=name, object_content=content, session_id="s")
    return bool(RuntimeHttpClient.PushObject(None, request).stored)  # type: ignore[arg-type]


def pull(name: str = NAME) -> bytes:
    return bytes(RuntimeHttpClient.PullObject(None, PullObjectRequest(object_id=name)).object_content)  # type: ignore[arg-type]


def test_only_names_go_over_http(wire: Wire, tmp_path: Path) -> None:
    assert push()
    assert pull() == CONTENT
    assert wire.pushed == [b""]
    assert wire.pulled == []
    assert wire.store.get(NAME) == CONTENT
    assert [path.name for path in (tmp_path / "objects").iterdir()] == [NAME]


def test_a_side_that_has_begun_anew_gets_the_whole_content(wire: Wire) -> None:
    wire.deaf = 1
    assert push()
    assert wire.pushed == [b"", CONTENT]
    assert wire.store.get(NAME) == CONTENT


def test_without_a_folder_to_write_to_contents_go_over_http_and_stay_in_memory(wire: Wire, tmp_path: Path) -> None:
    (tmp_path / "objects").rmdir()
    assert push()
    assert pull() == CONTENT
    assert wire.pushed == [CONTENT]
    assert wire.pulled == [NAME]
    assert wire.store.get(NAME) == CONTENT


@pytest.mark.parametrize("wrong", [CONTENT[:-1], b"", CONTENT + b"x"])
def test_a_file_that_is_not_what_its_name_says_is_not_taken(wire: Wire, tmp_path: Path, wrong: bytes) -> None:
    assert push()
    (tmp_path / "objects" / NAME).write_bytes(wrong)
    pull()
    assert wire.pulled == [NAME]


def test_what_nobody_announced_or_handed_over_is_refused(wire: Wire, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="handed over"):
        wire.store.put(NAME, b"")
    assert not wire.store.has(NAME)
    with pytest.raises(NoObjectInStoreError):
        wire.store.put("0" * 64, CONTENT)
    assert list((tmp_path / "objects").iterdir()) == []


def test_files_go_with_their_objects_and_with_whoever_kept_them(wire: Wire, tmp_path: Path) -> None:
    for name, content in CONTENTS.items():
        assert push(name, content)
        assert wire.store.has(name)
    wire.store.delete(RECORD.object_id)
    assert list((tmp_path / "objects").iterdir()) == []
    handed(tmp_path / "objects", NAME).write_bytes(CONTENT)
    clear(tmp_path / "objects", older_s=60)
    assert handed(tmp_path / "objects", NAME).exists()
    FileContents(tmp_path / "objects")
    assert list((tmp_path / "objects").iterdir()) == []


def test_what_comes_down_is_laid_aside_and_goes_with_a_message_that_never_became_whole(
    wire: Wire, tmp_path: Path
) -> None:
    told = wire.store.lay_aside(NAME, CONTENT)
    assert told == b""
    wire.store.put(NAME, told)
    assert wire.store.get(NAME) == CONTENT
    other = next(name for name in CONTENTS if name != NAME)
    wire.store.lay_aside(other, CONTENTS[other])
    wire.store.delete(RECORD.object_id)
    assert list((tmp_path / "objects").iterdir()) == []
    (tmp_path / "objects").rmdir()
    assert wire.store.lay_aside(NAME, CONTENT) == CONTENT


def test_contents_leave_before_all_of_them_are_made_and_an_error_ends_it() -> None:
    made, pushed = list[str](), list[str]()

    def contents() -> Iterator[tuple[str, bytes]]:
        for number in range(20):
            assert len(made) - len(pushed) <= 2
            made.append(str(number))
            yield str(number), b""

    push_in_turn(contents(), lambda name, content: pushed.append(name))
    assert sorted(pushed) == sorted(made)

    def refuse(name: str, content: bytes) -> None:
        raise ValueError(name)

    many = iter([(str(number), b"") for number in range(20)])
    with pytest.raises(ValueError, match="0"):
        push_in_turn(many, refuse)
    assert len(list(many)) > 10
