"""Small hospitals, a small plan and a grid of plain functions, for tests that need a whole federation in seconds."""

import datetime as dt
import os
import select
import signal
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from client import app as client_app
from client.files import SiteFiles
from federation import flower
from federation.manifest import LocalWork
from model.settings import DecoderConfig
from server.plan import FederationPlan
from tokenizer.codebook import TokenizerOptions
from tokenizer.events import write_meds
from tokenizer.split import SplitRule

MODEL = DecoderConfig(vocab=8, layers=1, width=16, heads=2, kv_heads=2, ff=32, context=64)
SCHEMA: dict[str, Any] = {
    "subject_id": pl.Int64,
    "time": pl.Datetime("us"),
    "code": pl.String,
    "numeric_value": pl.Float32,
}

Node = Callable[[Message], Message | None]


def records(seed: int, patients: int) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    rows: list[tuple[int, dt.datetime | None, str, float | None]] = []
    for patient in range(patients):
        subject = seed * 100_000 + patient
        time = dt.datetime(2020, 1, 1) + dt.timedelta(days=int(rng.integers(300)))
        rows += [(subject, None, f"GENDER//{'MF'[rng.integers(2)]}", None)]
        rows += [(subject, dt.datetime(1960, 1, 1), "MEDS_BIRTH", None)]
        for _ in range(int(rng.integers(3, 12))):
            time += dt.timedelta(minutes=int(rng.integers(1, 3000)))
            rows.append((subject, time, f"LAB//{rng.integers(6)}", float(rng.normal())))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def site(root: Path, name: str, seed: int, patients: int = 40) -> SiteFiles:
    write_meds(root / "data" / name, [("train/0", records(seed, patients))] if patients else [], name=name)
    return SiteFiles(name, root / "data" / name, root / "state" / name)


def sites(root: Path, count: int = 3) -> list[SiteFiles]:
    return [site(root, f"site-{n}", n + 1) for n in range(count)]


def plan(**changes: Any) -> FederationPlan:
    settings: dict[str, Any] = {
        "name": "tiny",
        "rounds": 2,
        "split": SplitRule("key"),
        "local": LocalWork(steps=2, batch_tokens=512),
        "model": MODEL,
        "tokenizer": TokenizerOptions(min_patients=5),
        "min_sites": 2,
        "join_s": 0.0,
    }
    return FederationPlan(**{**settings, **changes})


def honest(files: SiteFiles) -> Node:
    """A node that runs the real ClientApp in this process."""
    config = files.node_config()
    return lambda message: client_app.app(message, Context(0, message.metadata.dst_node_id, config, RecordDict(), {}))


class FunctionGrid(Grid):
    """A grid whose nodes are functions; one that gives None never answers."""

    def __init__(self, nodes: Mapping[int, Node]) -> None:
        flower.assume_identity()
        self.nodes = dict(nodes)
        self.asked: list[tuple[int, str]] = []
        self._answers: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        pass

    @property
    def run(self) -> Run:
        return Run.create_empty(0)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return Message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            node = message.metadata.dst_node_id
            self.asked.append((node, message.metadata.message_type))
            name = str(len(self.asked))
            flower.number_(message, name)
            answer = self.nodes[node](message)
            if answer is not None:
                self._answers[name] = answer
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answers.pop(name) for name in message_ids if name in self._answers]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


def kill(pid: int) -> None:
    """Kill a process and wait until it is gone."""
    descriptor = os.pidfd_open(pid)
    with os.fdopen(descriptor):
        os.kill(pid, signal.SIGKILL)
        select.select([descriptor], [], [])
