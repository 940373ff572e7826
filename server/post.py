"""How the coordinator reaches its sites: one question to many, answers one at a time, and who is behind which node."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from federation import canonical, flower, masking
from federation.identity import Identity
from federation.manifest import Manifest
from federation.messages import (
    PRINTABLE,
    AssessReply,
    AssessRequest,
    DeliveryError,
    EvaluateReply,
    EvaluateRequest,
    Kept,
    Lacking,
    PrepareReply,
    PrepareRequest,
    ProtocolError,
    Refusal,
    Request,
    Weighted,
    printable,
)
from federation.polls import Polls
from server.journal import Journal, SiteEntry, Status
from server.plan import FederationPlan
from server.reasons import gathered
from server.rounds import Answer, Event, Listener
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError, FedcometError
from tokenizer.wording import several

W = TypeVar("W", bound=Weighted)

_POLL_S = 1.0
_POLLS = Polls(0.05, _POLL_S)
_GRACE_S = 60.0
_RARELY = 8


class TooFewSites(FedcometError):
    """Fewer sites than agreed are there or take part; the run can be started again when they are."""


class Post:
    """Asks many nodes one question and hands their answers over one at a time."""

    def __init__(
        self,
        grid: Grid,
        plan: FederationPlan,
        listen: Listener,
        clock: Callable[[], float],
        pause: Callable[[float], None],
        identity: Identity | None = None,
    ) -> None:
        self._grid, self._plan, self._clock, self._pause = grid, plan, clock, pause
        self._identity = identity
        self._has: dict[int, str] = {}
        self.tell = listen

    def now(self) -> float:
        """Give the time, in seconds since the epoch."""
        return self._clock()

    def rest(self) -> None:
        """Wait a little."""
        self._pause(_POLL_S)

    def deadline(self) -> float:
        """Give the time, in seconds since the epoch, until which a question that is asked now may be answered."""
        return self._clock() + self._plan.deadline_s

    def nodes(self) -> list[int]:
        """Give the nodes that are there; at the beginning, wait until enough are."""
        wanted = max(self._plan.expect_sites, self._plan.min_sites)
        until = self._clock() + self._plan.join_s
        nodes = sorted(self._grid.get_node_ids())
        while len(nodes) < wanted and self._clock() < until:
            self._pause(_POLL_S)
            nodes = sorted(self._grid.get_node_ids())
        if len(nodes) < self._plan.min_sites:
            raise too_few(nodes, ("site is connected", "sites are connected"), self._plan.min_sites)
        return nodes

    def present(self) -> list[int]:
        """Give the nodes that are there now."""
        return sorted(self._grid.get_node_ids())

    def stage_deadline(self) -> float:
        """Give the same for a question of a masked sum, which needs no work."""
        return self._clock() + min(self._plan.stage_deadline_s, self._plan.deadline_s)

    def ask(self, nodes: list[int], request: Request, group: str) -> Iterator[tuple[int, Answer]]:
        """Send a request to nodes, signed if there is a key, and give each answer as it comes.

        Nodes that miss the deadline give none. Where Flower reports that a site's process broke down over a question
        that needs no weights, the site is asked once more: what it must not forget is on its disk.
        """
        return self.ask_each(dict.fromkeys(nodes, request), group)

    def ask_each(self, requests: Mapping[int, Request | masking.Request], group: str) -> Iterator[tuple[int, Answer]]:
        """Send every node its own request, all of one kind; see `ask`. Equal ones are signed and packed once.

        Weights that a node evaluated last are not sent to it again, unless it says that it lacks them.
        """
        if not requests:
            return
        packed: dict[tuple[int, bool], RecordDict] = {}
        pending: dict[str, int] = {}
        broken: set[int] = set()
        kind, deadline_s = next((request.kind, request.deadline_s) for request in requests.values())

        def knows(request: Request | masking.Request, node: int) -> bool:
            return isinstance(request, Weighted) and request.weights_sha256 == self._has.get(node)

        def send(node: int) -> bool:
            request = requests[node]
            known = knows(request, node)
            if (id(request), known) not in packed:
                packed[id(request), known] = self._packed(_light(request) if known else request)
            record, ttl_s = packed[id(request), known], deadline_s - self._clock() + _GRACE_S
            message = flower.request(record, request.kind, node, group=group, ttl_s=ttl_s)
            sent = [name for name in self._grid.push_messages([message]) if name]
            pending.update(dict.fromkeys(sent, node))
            return bool(sent)

        self.tell(Event("asked", text=kind, values={"sites": len(requests)}))
        for node in requests:
            if not send(node):
                yield node, DeliveryError("Flower did not take the request.")
        if not any(knows(request, node) for node, request in requests.items()):
            # Nobody will ask for the weights again: they need not lie in memory until the last site has answered.
            requests = {node: _light(request) for node, request in requests.items()}
            packed.clear()
        last = self._clock()
        while pending:
            arrived = False
            for name in list(pending):
                if (answer := self._pull(name)) is not None:
                    arrived = True
                    node = pending.pop(name)
                    if isinstance(answer, Lacking) and self._has.pop(node, "") and send(node):
                        continue
                    if isinstance(answer, DeliveryError) and self._may_ask_again(requests[node], node in broken):
                        broken.add(node)
                        if send(node):
                            continue
                    self._note_weights(node, requests[node], answer)
                    yield node, answer
                    del answer  # or it would lie in memory beside the next one
            if arrived:
                last = self._clock()
            elif self._clock() >= deadline_s:
                return
            else:
                self._pause(_POLLS.after(self._clock() - last))

    def _may_ask_again(self, request: Request | masking.Request, broke: bool) -> bool:
        return not broke and not isinstance(request, Weighted) and self._clock() < request.deadline_s

    def _packed(self, request: Request | masking.Request) -> RecordDict:
        return flower.to_record(request if self._identity is None else self._identity.sign_request(request))

    def _note_weights(self, node: int, request: Request | masking.Request, answer: Answer) -> None:
        """Remember which weights a node keeps: those that it evaluated last."""
        if isinstance(request, EvaluateRequest | AssessRequest) and isinstance(
            answer, EvaluateReply | AssessReply | Kept
        ):
            self._has[node] = request.weights_sha256

    def _pull(self, name: str) -> Answer | None:
        try:
            for message in self._grid.pull_messages([name]):
                content = flower.read(message)
                if isinstance(content, Request | masking.Request):
                    return ProtocolError(f"A {content.kind} came in the place of an answer.")
                return content
        except ProtocolError as error:
            return error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            # Flower itself could not make a message of what the site sent.
            return ProtocolError(f"The answer can't be read ({type(error).__name__}).")
        return None


@dataclass(frozen=True)
class _Refused:
    """In which round a node that takes no part is asked again, after how many, and why if the ledger doesn't say it."""

    until: int
    pause: int
    why: str


class Roster:
    """Which site is behind which node, and whether it takes part.

    A site that does not may have had no room, or nobody may have approved the run yet: it is asked to prepare again at
    the next round, then after 2 more, 4, and so on up to `_RARELY`.
    """

    def __init__(self, post: Post, journal: Journal, manifest: Manifest, codebook: Codebook) -> None:
        self._post, self._journal, self._manifest, self._codebook = post, journal, manifest, codebook
        self._names: dict[int, str] = {}
        self._refused: dict[int, _Refused] = {}

    def sites(self, number: int) -> dict[str, int]:
        """Give the nodes of the sites that take part in a round; the others are asked to prepare first, if it is time.

        Raises:
            ConfigError: two nodes call themselves by one name.
            TooFewSites: fewer than `min_sites` take part.
        """
        nodes = self._post.present() if self._names or self._refused else self._post.nodes()
        if fresh := [node for node in nodes if node not in self._names and self._is_due(node, number)]:
            self._prepare(fresh, number)
        if len(self._names) < self._manifest.min_sites:
            why = {entry.site: entry.reason for entry in self._journal.sites() if entry.reason}
            why |= {f"node-{node}": refused.why for node, refused in self._refused.items() if refused.why}
            raise too_few(self._names, ("site takes part", "sites take part"), self._manifest.min_sites, why)
        return {name: node for node, name in self._names.items()}

    def name(self, node: int) -> str:
        """Give the name of the site behind a node."""
        return self._names[node]

    def _prepare(self, nodes: list[int], number: int) -> None:
        request = PrepareRequest(self._manifest.to_bytes(), self._codebook.to_bytes(), self._post.deadline())
        answers = dict(self._post.ask(nodes, request, "prepare"))
        for node in nodes:
            answer = answers.get(node)
            if answer is not None:
                self._admit(node, answer, number)

    def _is_due(self, node: int, number: int) -> bool:
        return node not in self._refused or number >= self._refused[node].until

    def _admit(self, node: int, answer: Answer, number: int) -> None:
        name = site_name(node, answer)
        if isinstance(answer, PrepareReply) and answer.manifest_hash == self._manifest.hash:
            present = self._post.present()
            self._names = {n: other for n, other in self._names.items() if other != name or n in present}
            if name in self._names.values():
                raise ConfigError(f"Two nodes call themselves {name}; give every site a name of its own.")
            self._names[node] = name
            self._refused.pop(node, None)
            counts = {"splits": answer.splits, "fallbacks": answer.fallbacks}
            self._journal.note_site(SiteEntry(name, Status.ACCEPTED, "", canonical.encode(counts).decode()))
            train = answer.splits.get("train")
            values = {"patients": train.patients, "tokens": train.tokens} if train else {}
            self._post.tell(Event("site.ready", site=name, values=values))
            return
        told, broke = reason(answer), isinstance(answer, DeliveryError)
        pause = min(2 * self._refused[node].pause, _RARELY) if node in self._refused else 1
        self._refused[node] = _Refused(number + pause, pause, told if broke else "")
        if not broke:  # else nobody has said anything, not even a name
            status = Status.REFUSED if isinstance(answer, Refusal) else Status.MALFORMED
            self._journal.note_site(SiteEntry(name, status, told))
        self._post.tell(Event("site.refused", site=name, text=told))


def too_few(
    there: Sized, does: tuple[str, str], least: int, why: Mapping[str, str] | None = None, none: str = "none answered"
) -> TooFewSites:
    """Give the error that says how many there are, how many are needed, and why the others are not there.

    Args:
        there: the sites that are there.
        does: what one of them does, and what several do.
        least: how many are needed.
        why: why each of the others is missing, if that can be known.
        none: what is told where no site has said why.
    """
    begin = f"{several(len(there), *does)}, at least {least} {'is' if least == 1 else 'are'} needed"
    if why is None:
        return TooFewSites(f"{begin}.")
    return TooFewSites(f"{begin} ({gathered(why, PRINTABLE - len(begin) - len(' ().')) or none}).")


def _light(request: Request | masking.Request) -> Request | masking.Request:
    return without_weights(request) if isinstance(request, Weighted) else request


def without_weights(request: W) -> W:
    """Give a request that names its weights only; its digest is the same."""
    return dataclasses.replace(request, weights=np.zeros(0, np.float32), known=request.weights_sha256)


def site_name(node: int, answer: Answer) -> str:
    """Give the name that an answer bears; an answer without one is known by its node."""
    return str(getattr(answer, "site", f"node-{node}"))


def reason(answer: Answer) -> str:
    """Say why an answer is not the one that was wanted."""
    if isinstance(answer, Refusal):
        return printable(answer.reason)
    if isinstance(answer, ProtocolError):
        return printable(str(answer))
    return f"a {answer.kind} came in the place of the answer"
