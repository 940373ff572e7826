"""Plans, sites and coordinators of small federations with secure aggregation."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message

from client.site import SiteFiles
from federation.manifest import SecureAggregation
from federation.masking import MaskingOptions
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
        self.root = root
        self.files = tiny.sites(root, count)
        self.plan = plan(self.files, **changes)
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
