"""Nothing in the memory, databases or events of a coordinator's process tells one site's counts in a masked run.

The coordinator is a process of its own that is stopped in the middle of a sum, after it and at the end, and read from
outside. Sites are given counts of 34 to 50 random bits, so that a find is never chance, and every form that such
a number takes is searched for: machine integers and floats of either byte order, Python's own integers, the variable
lengths of protobuf, and decimal text.
"""

import dataclasses
import os
import secrets
import signal
import struct
from collections.abc import Iterator
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from flwr.app import Message

from client import local
from federation.masking import MaskingOptions
from federation.messages import TrainReply
from server.app import coordinate
from server.journal import Journal
from server.plan import FederationPlan
from server.rounds import Event
from tests import tiny
from tests.masked import dumped, plan

STOPS = ("asked query.mask_open", "round.aggregated ", "round.evaluated ", "update.malformed ")


def forms(number: int) -> dict[str, bytes]:
    """A count of more than 30 bits as memory, wires and files may hold it."""
    varint, rest = b"", number
    while rest:
        varint += bytes([(rest & 0x7F) | (0x80 if rest > 0x7F else 0)])
        rest >>= 7
    encoded = {
        "int64": struct.pack("<q", number),
        "int64 from the top": struct.pack(">q", number),
        "float64": struct.pack("<d", number),
        "float64 from the top": struct.pack(">d", number),
        "Python's digits": struct.pack("<II", number & (2**30 - 1), number >> 30),
        **({"varint": varint} if len(varint) > 6 else {}),  # five bytes are too few to be no chance
    }
    return {**encoded, "text": str(number).encode()}


def holds(data: bytes, form: str, searched: bytes) -> bool:
    """Whether data holds a form; a text only where it isn't a part of a longer number or digest."""
    at = data.find(searched)
    while at >= 0 and form.endswith("text"):
        around = data[max(0, at - 1) : at] + data[at + len(searched) : at + len(searched) + 1]
        if not set(around) & set(b"0123456789abcdef."):
            break
        at = data.find(searched, at + 1)
    return at >= 0


def regions(pid: int) -> Iterator[bytes]:
    """All that a process may write to and has touched."""
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        span = ""
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            first, second, *_ = line.split()
            if "-" in first and not first.endswith(":"):
                span = first if second.startswith("rw") else ""
            elif span and first == "Rss:" and second != "0":
                start, end = (int(edge, 16) for edge in span.split("-"))
                try:
                    memory.seek(start)
                    yield memory.read(end - start)
                except (OSError, ValueError, OverflowError):
                    continue


class Coordinator:
    """A coordinator in a process of its own, whose sites are here; it stops itself at `STOPS`."""

    def __init__(self, run_dir: Path, chosen: FederationPlan, nodes: dict[int, tiny.Node]) -> None:
        self.run_dir, self.nodes = run_dir, nodes
        self.here, there = Pipe()
        # Not forked: torch's threads would not be there after a fork, but the locks that they hold.
        process = get_context("spawn").Process(target=_coordinate, args=(run_dir, chosen, there, list(nodes)))
        process.start()
        assert process.pid is not None
        self.pid = process.pid
        there.close()

    def stops(self) -> Iterator[str]:
        """Play the sites until the coordinator stands still, again and again until it has ended."""
        while True:
            try:
                kind, *told = self.here.recv()
            except EOFError:
                os.waitpid(self.pid, 0)
                return
            if kind == "ask":
                node, message = told
                self.here.send(self.nodes[node](message))
                continue
            _, status = os.waitpid(self.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            yield told[0]
            os.kill(self.pid, signal.SIGCONT)

    def finds(self, forms: dict[str, bytes]) -> set[str]:
        """Which forms are in its memory."""
        found: set[str] = set()
        for region in regions(self.pid):
            found |= {name for name, data in forms.items() if name not in found and holds(region, name, data)}
        return found


def _coordinate(run_dir: Path, chosen: FederationPlan, there: Connection, nodes: list[int]) -> None:
    def ask(node: int, message: Message) -> Message | None:
        there.send(("ask", node, message))
        reply: Message | None = there.recv()
        return reply

    def listen(event: Event) -> None:
        name = f"{event.kind} {event.text if event.kind == 'asked' else ''}"
        if name in STOPS:
            there.send(("stop", name))
            os.kill(os.getpid(), signal.SIGSTOP)

    grid = tiny.FunctionGrid({node: lambda message, node=node: ask(node, message) for node in nodes})  # type: ignore[misc]
    coordinate(grid, run_dir, chosen, listen=listen)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Give every site's training and evaluation a count that is a number like no other; filled as they are told."""
    told: dict[str, int] = {}
    reply, evaluate = local.LocalRound.reply, local.Work.evaluate

    def replied(self: local.LocalRound, site: str) -> TrainReply:
        told[f"trained on at {site}"] = 2**49 + secrets.randbits(49)
        return dataclasses.replace(reply(self, site), tokens=told[f"trained on at {site}"])

    def evaluated(self: local.Work, *asked: object) -> tuple[float, int]:
        told[f"evaluated on at {self._site}"] = count = 2**33 + secrets.randbits(33)
        mean, _ = evaluate(self, *asked)  # type: ignore[arg-type]
        return mean, count

    monkeypatch.setattr(local.LocalRound, "reply", replied)
    monkeypatch.setattr(local.Work, "evaluate", evaluated)
    return told


def wanted(counts: dict[str, int]) -> dict[str, bytes]:
    return {f"{what}, {form}": data for what, n in counts.items() for form, data in forms(n).items()}


def test_no_site_s_counts_are_in_the_memory_databases_or_events_of_a_masked_run(
    ram_path: Path, counts: dict[str, int]
) -> None:
    files = tiny.sites(ram_path, 3)
    chosen = plan(files, rounds=1)
    assert chosen.secure_aggregation is not None
    wide = MaskingOptions(threshold=3, clip=1.0, max_weight=2**50)
    chosen = dataclasses.replace(
        chosen, secure_aggregation=dataclasses.replace(chosen.secure_aggregation, masking=wide)
    )
    coordinator = Coordinator(ram_path / "run", chosen, dict(enumerate(map(tiny.honest, files), 1)))
    stopped, sums = [], set()
    for name in coordinator.stops():
        stopped.append(name)
        total = sum(count for what, count in counts.items() if what.startswith("trained"))
        assert coordinator.finds(wanted(counts)) == set(), name
        sums |= coordinator.finds(forms(total)) if name == "round.aggregated " else set()
    assert stopped == [*STOPS[:2], STOPS[0], STOPS[2]]
    assert len(counts) == 6
    assert "Python's digits" in sums  # what the sum tells is found
    stored = dumped(ram_path / "run")
    assert {name for name, data in wanted(counts).items() if holds(stored, name, data)} == set()
    with Journal(ram_path / "run/ledger.sqlite") as journal:
        (trained,), (scored,) = journal.sums("train"), journal.sums("evaluate tuning")
    assert trained.tokens == total
    assert scored.tokens == sum(count for what, count in counts.items() if what.startswith("evaluated"))
    assert holds(stored, "text", forms(trained.tokens)["text"])


def test_in_a_run_in_clear_they_are_found(ram_path: Path, counts: dict[str, int]) -> None:
    """The negative control; a count of so many tokens is refused, but told."""
    files = tiny.sites(ram_path, 2)
    coordinator = Coordinator(ram_path / "run", tiny.plan(rounds=1), dict(enumerate(map(tiny.honest, files), 1)))
    found: set[str] = set()
    for _ in coordinator.stops():
        found |= coordinator.finds(wanted(counts))
    assert {name.split(",")[0] for name in found} == {"trained on at site-0", "trained on at site-1"}
    stored = dumped(ram_path / "run")
    assert all(holds(stored, "text", forms(count)["text"]) for count in counts.values())
