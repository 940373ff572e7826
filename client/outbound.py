"""The list of all that has left the site: append-only, hash-chained, signed, written before a message goes out.

    outbound/000000000001.jsonl   entries from number 1 on, one canonical JSON object per line
             000000004217.jsonl   the next file, named by its first entry; begun when the last one was full
             head.json            where the list ends: written after every entry, and only then its message leaves

Every entry holds the sha256 of the line before it and a signature of the site's key, so none can be changed, left out
or put in between by anybody who hasn't that key; `head.json` tells where the end is missing. Who has the key and the
folder can write the whole list anew: note the head that `fedcomet site audit` prints somewhere else, and ask for it
later (--expect).

What a crash left behind the noted end, a cut-off line or one entry, belongs to a message that never left: it is
dropped, and the next entry says how many bytes. Anything else that doesn't fit is damage, and nothing leaves any more.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from federation import canonical, masking
from federation.identity import Identity, verify
from federation.messages import Reply, SurveyReply, TrainReply, sha256_of_payload, to_wire
from tokenizer import durable
from tokenizer.codebook import Survey
from tokenizer.errors import DataError
from tokenizer.wording import several

FIRST = "0" * 64
"""What stands for the line before the first one."""

_PURPOSE = "outbound"
_UPDATES = (TrainReply.kind, masking.Masked.kind)
_HEAD = "head.json"
_FULL_BYTES = 4 << 20
_SHORT_BYTES = 4096
_LINE_BYTES = 16384  # more than most lines have
_DAMAGED = "nothing may leave before `fedcomet site audit` says what is wrong and the list is restored from a copy."


@dataclass(frozen=True)
class Leaving:
    """A message that is about to leave.

    Attributes:
        kind: the message's kind, as `federation.messages` names it.
        bytes: what Flower sends of it, as Flower lays it out; sha256 names exactly these bytes (Flower's object id).
        answers: the kind of the request.
        run, round: what it belongs to, where the message says so.
        epsilon, delta: what it costs a patient, if it has differential privacy.
        content: every plain field; of every payload its size and sha256, and itself where it is a short text.
        policy: sha256 of the policy in force; None if the site has none.
    """

    kind: str
    bytes: int
    sha256: str
    answers: str
    run: str | None = None
    round: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    content: Mapping[str, Any] = field(default_factory=dict)
    policy: str | None = None


@dataclass(frozen=True)
class Entry:
    """A line of the list: its place, when, and the message; `dropped_bytes` is what a crash had left in its place."""

    sequence: int
    previous: str
    time: str
    message: Leaving
    dropped_bytes: int = 0
    signature: str = ""

    def line(self) -> bytes:
        """Give the line, without its end."""
        return canonical.encode(self)

    def signed(self, identity: Identity) -> "Entry":
        """Give the entry with a signature."""
        return replace(self, signature=identity.sign(_PURPOSE, self._unsigned()))

    def is_signed_by(self, public: str) -> bool:
        """Tell whether the owner of a public key signed it."""
        return verify(public, _PURPOSE, self._unsigned(), self.signature)

    def _unsigned(self) -> bytes:
        return replace(self, signature="").line()


@dataclass(frozen=True)
class Head:
    """Where the list ends: number and sha256 of its last entry, and where in which file its line ends."""

    sequence: int = 0
    sha256: str = FIRST
    file: str = ""
    bytes: int = 0


class Outbound:
    """A site's list, which grows."""

    def __init__(self, folder: Path, identity: Identity, full_bytes: int = _FULL_BYTES) -> None:
        """Open or begin a list; a file that has `full_bytes` is not written to any more."""
        self.folder, self._identity, self._full = folder, identity, full_bytes

    def note(self, message: Leaving, now: datetime) -> Entry:
        """Write a message down; when this returns it is on the disk, and the message may leave.

        Args:
            message: what is about to leave.
            now: the time, with its zone.

        Raises:
            DataError: the list is damaged, or can't be written; the message must not leave.
        """
        try:
            with alone(self.folder):
                return self._append(message, now)
        except OSError as cause:
            raise DataError(
                f"{self.folder}: the list of what leaves can't be written ({cause.strerror}); nothing may leave."
            ) from None

    def bytes_since(self, moment: datetime) -> int:
        """Count the bytes of the messages that were written down since a moment."""
        total = 0
        head = read_head(self.folder) if files(self.folder) else Head()
        for place, line in reversed(list(lines(self.folder, head))):
            entry = read_entry(line, place)
            if datetime.fromisoformat(entry.time) < moment:
                break
            total += entry.message.bytes
        return total

    def _append(self, message: Leaving, now: datetime) -> Entry:
        head, dropped = self._mend()
        time = now.astimezone(UTC).isoformat(timespec="milliseconds")
        entry = Entry(head.sequence + 1, head.sha256, time, message, dropped).signed(self._identity)
        line = entry.line()
        name, size = head.file, head.bytes
        if not name or size >= self._full:
            name, size = f"{entry.sequence:012d}.jsonl", 0
        with open(self.folder / name, "ab", buffering=0) as file:
            left = memoryview(line + b"\n")
            while left:  # a disk that fills up takes a part, and refuses the rest only when asked again
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        if not size:
            durable.sync_directory(self.folder)
        end = Head(entry.sequence, hashlib.sha256(line).hexdigest(), name, size + len(line) + 1)
        durable.write_bytes(self.folder / _HEAD, canonical.encode(end))
        return entry

    def _mend(self) -> tuple[Head, int]:
        """Give the end of the list, and how many bytes lay behind it; they are dropped.

        Raises:
            DataError: the list doesn't end where it was noted to end.
        """
        paths = files(self.folder)
        if not paths and not (self.folder / _HEAD).exists():
            durable.write_bytes(self.folder / _HEAD, canonical.encode(Head()))
        head = read_head(self.folder)
        if head.file and _last_hash(self.folder / head.file, head.bytes) != head.sha256:
            raise DataError(f"{self.folder}: does not end where {_HEAD} says; {_DAMAGED}")
        tail = behind(self.folder, head)
        if tail.count(b"\n") > 1:
            raise DataError(f"{self.folder}: more than one entry stands behind the end in {_HEAD}; {_DAMAGED}")
        for path in paths:
            if path.name > head.file:
                path.unlink()
            elif path.name == head.file and path.stat().st_size > head.bytes:
                os.truncate(path, head.bytes)
        return head, len(tail)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the right to a list, which one process has at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def content_of(reply: Reply | masking.Reply) -> dict[str, Any]:
    """Give what a person can read of a message: see `Leaving.content`; of a survey also how much it tells."""
    wire = to_wire(reply)
    content: dict[str, Any] = json.loads(wire.header)
    for name, part in wire.payloads.items():
        size = part.nbytes if isinstance(part, np.ndarray) else len(part)
        content[name] = {"bytes": size, "sha256": sha256_of_payload(part)}
        if isinstance(part, bytes) and len(part) <= _SHORT_BYTES:
            content[name]["text"] = part.decode(errors="backslashreplace")
    if isinstance(reply, SurveyReply):
        survey = Survey.from_bytes(reply.survey)
        content["survey"]["patients"] = survey.patients
        for name in ("codes", "prefixes", "statics", "static_prefixes", "values", "gaps"):
            content["survey"][name] = len(getattr(survey, name))
    return content


def without_privacy(messages: Iterable[Leaving]) -> list[str]:
    """Give the runs whose updates left without differential privacy, in the order in which they began to.

    A masked sum's message doesn't say whether it is an update, but of a private run each update has its cost.
    """
    private: dict[str, bool] = {}
    for message in messages:
        if message.run is not None and message.kind in _UPDATES:
            private[message.run] = private.get(message.run, False) or message.epsilon is not None
    return [run for run, has_cost in private.items() if not has_cost]


def runs_without_privacy(folder: Path) -> list[str]:
    """Give those of a list (`without_privacy`), without a look at the many entries that are no updates.

    Raises:
        DataError: an entry can't be read.
    """
    if not folder.is_dir():
        return []
    marks = [f'"{kind}"'.encode() for kind in _UPDATES]
    found = ((place, line) for place, line in lines(folder, read_head(folder)) if any(mark in line for mark in marks))
    return without_privacy(read_entry(line, place).message for place, line in found)


def told_without_privacy(runs: Sequence[str]) -> str:
    """Say that the runs' updates left without differential privacy; empty where there is none."""
    if not runs:
        return ""
    return f"updates of {several(len(runs), 'run')} left without differential privacy: no epsilon is claimed for them"


def files(folder: Path) -> list[Path]:
    """Give the files of a list, in its order."""
    return sorted(folder.glob("[0-9]*.jsonl"))


def read_head(folder: Path) -> Head:
    """Read where a list was noted to end.

    Raises:
        DataError: nothing is noted.
    """
    path = folder / _HEAD
    try:
        return canonical.decode(Head, path.read_bytes(), str(path), DataError)
    except OSError as cause:
        raise DataError(f"{path} can't be read ({cause.strerror}); {_DAMAGED}") from None


def sha256_at(folder: Path, head: Head, sequence: int) -> str | None:
    """Give the sha256 of an entry's line by its number, `FIRST` for 0; None behind the end."""
    if not 0 < sequence <= head.sequence:
        return None if sequence else FIRST
    path = max(path for path in files(folder) if int(path.stem) <= sequence)
    data = path.read_bytes()
    data = data[: head.bytes] if path.name == head.file else data
    return hashlib.sha256(data.split(b"\n")[sequence - int(path.stem)]).hexdigest()


def behind(folder: Path, head: Head) -> bytes:
    """Give what stands behind the noted end: at most one entry, whose message never left."""
    parts = []
    for path in files(folder):
        if path.name >= head.file:
            with path.open("rb") as file:
                file.seek(head.bytes if path.name == head.file else 0)
                parts.append(file.read())
    return b"".join(parts)


def lines(folder: Path, head: Head) -> Iterator[tuple[str, bytes]]:
    """Walk through the lines up to the noted end, each with the place that it stands at."""
    for path in files(folder):
        if path.name > head.file:
            return
        data = path.read_bytes()
        data = data[: head.bytes] if path.name == head.file else data
        for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), 1):
            yield f"{path.name}, line {number}", line


def read_entry(line: bytes, place: str) -> Entry:
    """Read a line.

    Raises:
        DataError: it is none.
    """
    return canonical.decode(Entry, line, place, DataError)


def _last_hash(path: Path, size: int) -> str:
    """The sha256 of the last line of a file's first `size` bytes; empty if there is none."""
    if not path.exists() or not 0 < size <= path.stat().st_size:
        return ""
    data, back = b"", _LINE_BYTES
    with path.open("rb") as file:
        while len(data) < size and b"\n" not in data[:-1]:
            start = max(0, size - back)
            file.seek(start)
            data, back = file.read(size - start), 4 * back
    return hashlib.sha256(data[:-1].rpartition(b"\n")[2]).hexdigest() if data.endswith(b"\n") else ""
