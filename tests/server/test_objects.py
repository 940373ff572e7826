"""Contents of messages lie in files beside the database, and come and go with its rows."""

import threading
from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store.object_store import NoObjectInStoreError

from federation.handover import handed
from server.objects import FileObjectStore

RUN = 3


def parts(fill: int = 1) -> tuple[RecordDict, dict[str, bytes]]:
    record = RecordDict({"payloads": ArrayRecord({"x": Array("uint8", (1000,), "raw", bytes([fill]) * 1000)})})
    return record, {name: part.deflate() for name, part in get_all_nested_objects(record).items()}


def stored(folder: Path) -> tuple[FileObjectStore, str, dict[str, bytes]]:
    store = FileObjectStore(folder / "link.sqlite", folder / "objects")
    record, contents = parts()
    assert set(store.preregister(RUN, get_object_tree(record))) == set(contents)
    for name, content in contents.items():
        assert store.get(name) == b""
        store.put(name, content)
    return store, record.object_id, contents


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "objects").iterdir()}


def test_contents_are_kept_beside_the_database_and_survive_a_restart(tmp_path: Path) -> None:
    store, root, contents = stored(tmp_path)
    (tmp_path / "objects" / f"{root}.7.partial").write_bytes(b"half")
    again = FileObjectStore(tmp_path / "link.sqlite", tmp_path / "objects")
    assert files(tmp_path) == set(contents)
    assert {name: again.get(name) for name in contents} == contents
    assert all(content not in (tmp_path / "link.sqlite").read_bytes() for content in contents.values())
    assert store.get("0" * 64) is None


def test_what_is_dropped_is_swept_and_what_is_there_stays(tmp_path: Path) -> None:
    store, root, contents = stored(tmp_path)
    store.sweep()
    assert files(tmp_path) == set(contents)
    store.delete(root)
    assert files(tmp_path) == set(contents)
    store.sweep()
    assert files(tmp_path) == set()
    assert store.get(root) is None


def test_a_content_that_is_announced_again_while_others_sweep_is_not_lost(tmp_path: Path) -> None:
    store, root, contents = stored(tmp_path)
    record, _ = parts()
    stop = threading.Event()

    def sweep() -> None:
        while not stop.is_set():
            store.sweep()

    sweeping = threading.Thread(target=sweep)
    sweeping.start()
    try:
        for _ in range(20):
            store.delete(root)
            store.preregister(RUN, get_object_tree(record))
            for name, content in contents.items():
                store.put(name, content)
            assert {name: store.get(name) for name in contents} == contents
    finally:
        stop.set()
        sweeping.join()


def test_a_file_that_is_lost_or_cut_short_is_no_content(tmp_path: Path) -> None:
    store, _root, contents = stored(tmp_path)
    first, second = list(contents)[:2]
    (tmp_path / "objects" / first).unlink()
    (tmp_path / "objects" / second).write_bytes(contents[second][:-1])
    assert store.get(first) is None
    assert store.get(second) is None


@pytest.mark.parametrize("name", ["../outside", "/outside", "", "0" * 64])
def test_a_content_under_a_false_name_is_not_written(tmp_path: Path, name: str) -> None:
    store, _, contents = stored(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match="does not match"):
        store.put(name, next(iter(contents.values())))
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} <= {
        "objects",
        "link.sqlite",
        "link.sqlite-wal",
        "link.sqlite-shm",
    }


def test_a_file_that_was_handed_over_is_taken_if_it_is_what_its_name_says(tmp_path: Path) -> None:
    store = FileObjectStore(tmp_path / "link.sqlite", tmp_path / "objects")
    record, contents = parts()
    store.preregister(RUN, get_object_tree(record))
    for name, content in contents.items():
        with pytest.raises(ValueError, match="does not match"):
            store.put(name, b"")
        handed(tmp_path / "objects", name).write_bytes(content + b"x")
        with pytest.raises(ValueError, match="does not match"):
            store.put(name, b"")
        assert store.get(name) == b""
        handed(tmp_path / "objects", name).write_bytes(content)
        store.put(name, b"")
        assert store.get(name) == content
    assert files(tmp_path) == set(contents)


def test_what_nobody_announced_is_refused(tmp_path: Path) -> None:
    store, _, _ = stored(tmp_path)
    before = files(tmp_path)
    _, contents = parts(2)
    name, content = next(iter(contents.items()))
    with pytest.raises(NoObjectInStoreError):
        store.put(name, content)
    assert files(tmp_path) == before
