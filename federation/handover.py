"""App processes and the program beside them hand each other contents of messages in files, not over loopback HTTP.

Flower's app processes push and pull every object of a message in an HTTP request: some ten copies of each byte, in both
processes. Here the side that has a content lays it into a folder that both can read, for their owner only, under its
sha256; what goes over HTTP is the name. Whoever takes a content checks it against its name. Where a file can't be
written or isn't there, the content goes over HTTP as before.
"""

import contextlib
import os
import threading
import time
from pathlib import Path

from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest, PushObjectResponse
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.object_store.object_store import NoObjectInStoreError
from flwr.supercore.runtime import RuntimeHttpClient

FOLDER = "FEDCOMET_OBJECTS"
"""Of an app process's environment: where contents are."""

PARTIAL, _HANDED = ".partial", ".handed"
_IN_FILE = b"\0"


def handed(folder: Path, name: str) -> Path:
    """Give the file of a content that was pushed without its bytes."""
    return folder / f"{name}{_HANDED}"


def clear(folder: Path, older_s: float = 0.0) -> None:
    """Remove what killed processes left, and nobody will ask for: files that are in no place yet, from some age on."""
    for left in (*folder.glob(f"*{PARTIAL}"), *folder.glob(f"*{_HANDED}")):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - left.stat().st_mtime >= older_s:
                left.unlink()


def hand_over() -> None:
    """Let this app process, if it was told of a folder, hand over files."""
    if FOLDER not in os.environ or hasattr(RuntimeHttpClient.PushObject, "folder"):
        return
    folder = Path(os.environ[FOLDER])
    push, pull = RuntimeHttpClient.PushObject, RuntimeHttpClient.PullObject

    def push_object(client: RuntimeHttpClient, request: PushObjectRequest) -> PushObjectResponse:
        if _lay(handed(folder, request.object_id), request.object_content):
            only_name = PushObjectRequest(
                node=request.node, run_id=request.run_id, object_id=request.object_id, session_id=request.session_id
            )
            answer = push(client, only_name)
            if answer.stored:
                return answer
        return push(client, request)  # also after the other side has begun anew, and cleared the folder

    def pull_object(client: RuntimeHttpClient, request: PullObjectRequest) -> PullObjectResponse:
        content = _read(folder / request.object_id)
        if content is None or get_object_id(content) != request.object_id:
            return pull(client, request)
        return PullObjectResponse(object_found=True, object_available=True, object_content=content)

    vars(push_object)["folder"] = folder
    for name, method in {"PushObject": push_object, "PullObject": pull_object}.items():
        setattr(RuntimeHttpClient, name, method)


class FileContents(InMemoryObjectStore):
    """Flower's object store in memory, with contents in files where the disk has room."""

    def __init__(self, folder: Path) -> None:
        """Begin, with an empty folder."""
        # Objects come over TLS or from a process of ours, and the SuperLink checks what it is given: no need to hash
        # all of it twice more here. What a request asks for is signed, weights included.
        super().__init__(verify=False)
        self._folder = folder
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in folder.iterdir():
            left.unlink()

    def put(self, object_id: str, object_content: bytes) -> None:
        """Keep the content of an object that was announced; of an empty one, the file that was handed over.

        Raises:
            NoObjectInStoreError: nobody announced it.
            ValueError: no file was handed over.
        """
        path = self._folder / object_id
        if object_id not in self:
            raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
        if object_content:
            super().put(object_id, _IN_FILE if _lay(path, object_content) else object_content)
            return
        try:
            handed(self._folder, object_id).replace(path)
        except FileNotFoundError:
            raise ValueError(f"No content of object {object_id} was handed over") from None
        super().put(object_id, _IN_FILE)

    def get(self, object_id: str) -> bytes | None:
        """Give an object's content: empty if it is still to come, None if there is no such object."""
        content = super().get(object_id)
        return _read(self._folder / object_id) if content == _IN_FILE else content

    def delete(self, object_id: str) -> None:
        """Drop an object that no other holds, and what it alone holds."""
        super().delete(object_id)
        if object_id not in self:
            (self._folder / object_id).unlink(missing_ok=True)

    def has(self, object_id: str) -> bool:
        """Tell whether an object's content is there."""
        with self.lock_store:
            return object_id in self.store and self.store[object_id].is_available


def _lay(path: Path, content: bytes) -> bool:
    """Write a content down, whole or not at all; tells whether it is there."""
    aside = path.parent / f"{path.name}.{os.getpid()}.{threading.get_ident()}{PARTIAL}"
    try:
        aside.write_bytes(content)
        aside.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        return False
    return True


def _read(path: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return None
