"""A federation on one machine: the real coordinator and the real sites, without ports and without Ray.

`LocalGrid` is a Flower `Grid` whose nodes are sites played by a pool of worker processes. Several federations may run
at the same time, each in a thread of its own, over one pool. The result doesn't depend on the number of workers.

In a scenario (`simulation.scenario`) some answers come late or never. The grid keeps a clock of its own, by which the
coordinator counts its deadlines: while no site is working, waiting costs no time, the clock just goes on.
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from client.app import play
from client.approval import site_key
from client.files import SiteFiles
from federation import flower
from federation.identity import Identity
from server.app import Outcome, coordinate
from server.plan import FederationPlan
from server.rounds import Event
from simulation.pool import Pool
from simulation.scenario import Fate, Scenario
from tokenizer.errors import ConfigError

Player: TypeAlias = Callable[[SiteFiles, int, Message], "Future[Message]"]
"""Who answers a message as a site: its files, the number of its node, and the message."""


def run_federation(
    plan: FederationPlan,
    sites: Sequence[SiteFiles],
    run_dir: Path,
    pool: Pool | None,
    on_event: Callable[[Event], None] = lambda event: None,
    scenario: Scenario | None = None,
    answer: Player | None = None,
) -> Outcome:
    """Run a federation to its end; after a crash or a kill, the same call goes on where it stopped.

    Args:
        plan: the settings.
        sites: who takes part; the order makes no difference.
        run_dir: this run's directory.
        pool: who plays the sites; not needed if `answer` is given.
        on_event: told of every step after it is durable, in the calling thread.
        scenario: what goes wrong; nothing, if left out.
        answer: plays the sites in the pool's place (`simulation.engine_ray`).

    Raises:
        ConfigError: the scenario names a site that isn't there.
        FedcometError: see `server.app.coordinate`.
    """
    if scenario is not None and (strange := sorted({*scenario.absent} - {site.name for site in sites})):
        raise ConfigError(
            f"scenario.absent: there is no site {strange[0]!r}; there are {', '.join(sorted(s.name for s in sites))}."
        )
    grid = LocalGrid(answer or _by(pool), sites, scenario, plan.deadline_s)
    waits = replace(plan, expect_sites=0, join_s=0.0)
    return coordinate(grid, run_dir, waits, listen=on_event, clock=grid.now, pause=grid.wait)


def roster_of(sites: Sequence[SiteFiles]) -> dict[str, str]:
    """Give the public keys of sites by name, for a run with secure aggregation; keys are made where there are none."""
    return {site.name: Identity.at(site_key(site.state)).public for site in sites}


def _by(pool: Pool | None) -> Player:
    """Let the workers of a pool play sites."""
    if pool is None:
        raise ConfigError("A federation on one machine needs a pool of workers, or somebody else who plays its sites.")
    return lambda site, node, message: pool.submit(site.name, play, site, node, message)


_LEAP_S = 600.0


class LocalGrid(Grid):
    """A grid whose nodes 1, 2, … are the sites in the order of their names."""

    def __init__(
        self,
        answer: Player,
        sites: Sequence[SiteFiles],
        scenario: Scenario | None = None,
        deadline_s: float = math.inf,
    ) -> None:
        flower.assume_identity()
        self._scenario = scenario or Scenario()
        self._deadline_s = deadline_s
        self._skipped_s = 0.0
        self._due: dict[str, float] = {}
        self._answer = answer
        self._sites = dict(enumerate(sorted(sites, key=lambda site: site.name), 1))
        self._pending: dict[str, tuple[Message, Future[Message]]] = {}
        self._numbers = itertools.count(1)
        self._arrival = threading.Condition()
        self._arrived = 0
        self._seen = 0

    def set_run(self, run: Run) -> None:
        """Do nothing: there is one run."""

    @property
    def run(self) -> Run:
        """An empty run."""
        return Run.create_empty(0)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message to a site."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Give the nodes: all sites are always there."""
        return list(self._sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages to the pool and give their ids."""
        names = []
        for message in messages:
            name = str(next(self._numbers))
            names.append(name)
            flower.number_(message, name)
            node = message.metadata.dst_node_id
            fate = self._fate(message)
            if not fate.answers:
                continue
            future = self._answer(self._sites[node], node, message)
            self._pending[name] = (message, future)
            # Lost is what comes after the deadline, however far the clock leaps.
            self._due[name] = self.now() + fate.late_s if fate.late_s < self._deadline_s else math.inf
            future.add_done_callback(self._note_arrival)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give the answers that are there, each one once."""
        done = [name for name in message_ids if name in self._pending and self._pending[name][1].done()]
        return [self._take(name) for name in done if self._due[name] <= self.now()]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for all answers, at most `timeout` seconds for each."""
        names = list(self.push_messages(messages))
        for name in names:
            if name in self._pending:
                self._pending[name][1].exception(timeout)
        return self.pull_messages(names)

    def now(self) -> float:
        """Give the time by which deadlines count, in seconds since the epoch: the clock's, and what was skipped."""
        return time.time() + self._skipped_s

    def wait(self, timeout_s: float) -> None:
        """Return when an answer has arrived since the last call, or after the timeout.

        In a scenario, while no site is working, the timeout passes at once.
        """
        if self._scenario != Scenario() and all(future.done() for _, future in self._pending.values()):
            # Nothing happens until the next late answer, or some deadline: straight there, in leaps of minutes.
            late = [self._due[name] - self.now() for name in self._pending]
            self._skipped_s += max(timeout_s, min([*late, _LEAP_S]))
            return
        with self._arrival:
            self._arrival.wait_for(lambda: self._arrived > self._seen, timeout_s)
            self._seen = self._arrived

    def _fate(self, message: Message) -> Fate:
        """Decide what becomes of a request: only those to train, whose group is the round's number, go astray."""
        metadata = message.metadata
        if metadata.message_type != MessageType.TRAIN:
            return Fate()
        return self._scenario.fate(self._sites[metadata.dst_node_id].name, int(metadata.group_id))

    def _take(self, name: str) -> Message:
        message, future = self._pending.pop(name)
        error = future.exception()
        if error is not None:
            return flower.failure(str(error), message)
        return future.result()

    def _note_arrival(self, _: Future[Message]) -> None:
        with self._arrival:
            self._arrived += 1
            self._arrival.notify_all()
