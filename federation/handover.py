"""App processes and the program beside them hand each other contents of messages in files, not over loopback HTTP.

Flower's app processes push and pull every object of a message in an HTTP request: some ten copies of each byte, in both
processes. Here the side that has a content lays it into a folder that both can read, for their owner only, under its
sha256; what goes over HTTP is the name. Whoever takes a content checks it against its name. Where a file can't be
written or isn't there, the content goes over HTTP as before.
"""

import contextlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse, PushObjectRequest, PushObjectResponse
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.runtime import RuntimeHttpClient

FOLDER = "FEDCOMET_OBJECTS"
"""Of an app process's environment: where contents are."""

_AT_ONCE = 2
PARTIAL, _HANDED = ".partial", ".handed"


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
        if lay(handed(folder, request.object_id), request.object_content):
            only_name = PushObjectRequest(
                node=request.node, run_id=request.run_id, object_id=request.object_id, session_id=request.session_id
            )
            answer = push(client, only_name)
            if answer.stored:
                return answer
        return push(client, request)  # also after the other side has begun anew, and cleared the folder

    def pull_object(client: RuntimeHttpClient, request: PullObjectRequest) -> PullObjectResponse:
        content = _mapped(folder / request.object_id)
        if content is None or get_object_id(content) != request.object_id:  # type: ignore[arg-type]
            return pull(client, request)
        return _Content(content)  # type: ignore[return-value]

    vars(push_object)["folder"] = folder
    vars(inflatable_utils)["push_object_contents_from_iterable"] = push_in_turn
    for name, method in {"PushObject": push_object, "PullObject": pull_object}.items():
        setattr(RuntimeHttpClient, name, method)


def push_in_turn(
    object_contents: Iterable[tuple[str, bytes]], push_object_fn: Callable[[str, bytes], None], **how: Any
) -> None:
    """Do what Flower's `push_object_contents_from_iterable` does, which has all contents in memory at a time."""
    turns, failed = threading.Semaphore(_AT_ONCE), threading.Event()

    def push(name: str, content: bytes) -> None:
        try:
            push_object_fn(name, content)
        except BaseException:
            failed.set()
            raise
        finally:
            turns.release()

    begun = []
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        for name, content in object_contents:
            turns.acquire()
            if failed.is_set():
                break
            begun.append(threads.submit(push, name, content))
            del content
    for one in begun:
        one.result()


@dataclass(frozen=True)
class _Content:
    """What `PullObjectResponse` says of a content that is there, without the copies that a protobuf message makes."""

    object_content: mmap.mmap
    object_found: bool = True
    object_available: bool = True


def _mapped(path: Path) -> mmap.mmap | None:
    """What a file holds, without a copy; whoever lays files here never changes one, so what is mapped stays."""
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return None


def lay(path: Path, content: bytes) -> bool:
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


def read(path: Path) -> bytes | None:
    """Give what a file holds; None if it can't be read."""
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return None
