"""Plans, sites and coordinators of small federations with secure aggregation."""

import re
import shutil
import sqlite3
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from client.files import SiteFiles
from federation.manifest import SecureAggregation
from federation.masking import MaskingOptions
from federation.messages import TrainReply
from server.app import Outcome, coordinate
from server.plan import FederationPlan
from server.rounds import Event
from simulation.engine import roster_of
from tests import tiny


def plan(
    files: Sequence[SiteFiles], threshold: int = 3, min_sites: int | None = None, **changes: Any
) -> FederationPlan:
    masking = MaskingOptions(threshold, clip=1.0, max_weight=1024)
    chosen = SecureAggregation(min_sites or threshold, masking, roster_of(files))
    return tiny.plan(**{"secure_aggregation": chosen, "stage_deadline_s": 50.0, **changes})


class Federation:
    """Masked sites in this process behind a grid of functions, under a clock of their own."""

    def __init__(self, root: Path, count: int = 4, **changes: Any) -> None:
        files = tiny.sites(root, count)
        self._place(root, files, plan(files, **changes))

    def copy(self, root: Path) -> "Federation":
        """Give the same sites and coordinator in another folder, as they are now."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        copied = Federation.__new__(Federation)
        moved = [replace(f, data=root / "data" / f.name, state=root / "state" / f.name) for f in self.files]
        copied._place(root, moved, self.plan)
        return copied

    def _place(self, root: Path, files: list[SiteFiles], chosen: FederationPlan) -> None:
        self.root, self.files, self.plan = root, files, chosen
        self.events: list[Event] = []
        self.now = time.time()
        self.nodes = dict(enumerate(map(tiny.honest, self.files), 1))
        self.grid = tiny.FunctionGrid(self.nodes)

    def meddle(self, number: int, kind: str, instead: Callable[[tiny.Node, Message], Message | None]) -> None:
        """Have a site's node do something else when it is asked a kind of question."""
        honest = self.grid.nodes[number]
        self.grid.nodes[number] = lambda m: instead(honest, m) if m.metadata.message_type == kind else honest(m)

    def silence(self, number: int, kind: str) -> None:
        """Have a site vanish when it is asked a kind of question, for the rest of the run."""
        gone: list[bool] = []
        honest = self.grid.nodes[number]

        def node(message: Message) -> Message | None:
            gone.extend([True] if message.metadata.message_type == kind else [])
            return None if gone else honest(message)

        self.grid.nodes[number] = node

    def lead(self, listen: Callable[[Event], None] = lambda event: None) -> Outcome:
        def watch(event: Event) -> None:
            self.events.append(event)
            listen(event)

        def pause(seconds: float) -> None:
            self.now += seconds

        return coordinate(self.grid, self.root / "run", self.plan, listen=watch, clock=lambda: self.now, pause=pause)


def wire_bytes(message: Message) -> bytes:
    """All bytes of a message's content, as Flower sends them."""
    return b"".join(part.deflate() for part in get_all_nested_objects(message.content).values())


def dumped(folder: Path) -> bytes:
    """The bytes of all files of a folder, and all databases as text."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    parts = [path.read_bytes() for path in files]
    parts += [as_text(path) for path, data in zip(files, parts, strict=True) if data.startswith(b"SQLite format 3")]
    return b"\n".join(parts)


def as_text(database: Path) -> bytes:
    """A database as SQL text, in which numbers can be read."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    text = "\n".join(connection.iterdump()).encode()
    connection.close()
    return text


def needles(reply: TrainReply) -> dict[str, bytes]:
    """Patterns of what must not be known of one site: parts of its update, its tokens, its loss."""
    middle = reply.update[reply.update.size // 2 :]
    part = middle[np.flatnonzero(middle)[0] :][:8]
    assert reply.tokens > 9999, "a count must be rare enough to be searched for"
    return {
        "update": re.escape(part.tobytes()),
        "tokens": rb"(?<![0-9a-f.])%d(?![0-9a-f.])" % reply.tokens,
        "loss": re.escape(repr(reply.loss).encode()),
        "loss in binary": re.escape(struct.pack(">d", reply.loss)),
    }
