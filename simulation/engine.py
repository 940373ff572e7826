"""A federation on one machine: the real coordinator and the real sites, without ports and without Ray.

`LocalGrid` is a Flower `Grid` whose nodes are sites played by a pool of worker processes. Several federations may run
at the same time, each in a thread of its own, over one pool. The result doesn't depend on the number of workers.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from client.approval import site_key
from client.site import SiteFiles
from federation import flower
from federation.identity import Identity
from server.app import Outcome, coordinate
from server.plan import FederationPlan
from server.rounds import Event
from simulation.pool import Pool


def run_federation(
    plan: FederationPlan,
    sites: Sequence[SiteFiles],
    run_dir: Path,
    pool: Pool,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Outcome:
    """Run a federation to its end; after a crash or a kill, the same call goes on where it stopped.

    Args:
        plan: the settings.
        sites: who takes part; the order makes no difference.
        run_dir: this run's directory.
        pool: who plays the sites.
        on_event: told of every step after it is durable, in the calling thread.

    Raises:
        FedcometError: see `server.app.coordinate`.
    """
    grid = LocalGrid(pool, sites)
    waits = replace(plan, expect_sites=0, join_s=0.0)
    return coordinate(grid, run_dir, waits, listen=on_event, pause=grid.wait)


def roster_of(sites: Sequence[SiteFiles]) -> dict[str, str]:
    """Give the public keys of sites by name, for a run with secure aggregation; keys are made where there are none."""
    return {site.name: Identity.at(site_key(site.state)).public for site in sites}


def play(site: SiteFiles, node: int, message: Message) -> Message:
    """Answer a message as a site: through the ClientApp that runs at real sites, in a worker process."""
    from client.app import app

    return app(message, Context(0, node, site.node_config(), RecordDict(), {}))


class LocalGrid(Grid):
    """A grid whose nodes 1, 2, … are the sites in the order of their names."""

    def __init__(self, pool: Pool, sites: Sequence[SiteFiles]) -> None:
        flower.assume_identity()
        self._pool = pool
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
            flower.number_(message, name)
            node = message.metadata.dst_node_id
            future = self._pool.submit(self._sites[node].name, play, self._sites[node], node, message)
            self._pending[name] = (message, future)
            future.add_done_callback(self._note_arrival)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give the answers that are there, each one once."""
        done = [name for name in message_ids if name in self._pending and self._pending[name][1].done()]
        return [self._take(name) for name in done]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for all answers, at most `timeout` seconds for each."""
        names = list(self.push_messages(messages))
        for name in names:
            self._pending[name][1].exception(timeout)
        return self.pull_messages(names)

    def wait(self, timeout_s: float) -> None:
        """Return when an answer has arrived since the last call, or after the timeout."""
        with self._arrival:
            self._arrival.wait_for(lambda: self._arrived > self._seen, timeout_s)
            self._seen = self._arrived

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
