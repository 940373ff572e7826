"""The coordinator: it leads a run from the first hello to the last checkpoint, over any Flower `Grid`.

survey → merge → codebook → manifest → prepare → rounds (train → aggregate → evaluate → commit). Everything that was
reached is in the run directory before the next thing begins; the same call on the same directory goes on where the
last one stopped. Replies are pulled one at a time, checked, written to disk and dropped. Nothing is drawn or printed:
a listener is told what happens.

The Flower ServerApp reads its plan from `$FEDCOMET_RUNS/<run>/plan.json`, where `run` is its only configuration, so
that nobody who can start runs can point the coordinator at other files.
"""

import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federation import canonical, flower
from federation.manifest import Manifest
from federation.messages import (
    DeliveryError,
    PrepareReply,
    PrepareRequest,
    ProtocolError,
    Refusal,
    Request,
    SurveyReply,
    SurveyRequest,
    is_site_name,
)
from federation.update import Layout
from server.journal import Journal, SiteEntry, Status
from server.plan import FederationPlan
from server.rounds import TUNING, Answer, Event, Listener, Rounds
from server.spool import Spool
from tokenizer import durable
from tokenizer.codebook import Codebook, Survey, merge
from tokenizer.errors import ConfigError, DataError, FedcometError

_POLL_S = 1.0
_GRACE_S = 60.0

app = ServerApp()


class TooFewSites(FedcometError):
    """Fewer sites than agreed are there or take part; the run can be started again when they are."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: the last checkpoint, the best by tuning loss, and what they belong to."""

    checkpoint: Path
    best_checkpoint: Path
    codebook: Path
    manifest: Manifest
    ledger_fingerprint: str


def coordinate(
    grid: Grid,
    run_dir: Path,
    plan: FederationPlan,
    *,
    listen: Listener = lambda event: None,
    clock: Callable[[], float] = time.time,
    pause: Callable[[float], None] = time.sleep,
) -> Outcome:
    """Lead a run to its end, from wherever the run directory says it is.

    Args:
        grid: how sites are reached.
        run_dir: this run's directory; empty or new when the run begins.
        plan: the settings; a directory in which a run began with others is refused.
        listen: told of every step after it is durable.
        clock: gives seconds since the epoch.
        pause: called with a number of seconds when nothing has arrived; may return as soon as something does.

    Raises:
        ConfigError: the directory is in use, or belongs to a run with other settings.
        TooFewSites: not enough sites came or take part.
        RoundFailed: not enough usable updates in a round.
        DataError: files of the run directory are damaged.
    """
    with _locked(run_dir):
        for left_over in run_dir.glob("*.partial"):
            left_over.unlink()
        _remember_plan(run_dir, plan)
        post = _Post(grid, plan, listen, clock, pause)
        codebook = _codebook(run_dir, plan, post)
        manifest = plan.manifest(codebook)
        with Journal(run_dir / "ledger.sqlite") as journal:
            journal.begin(manifest)
            listen(Event("run.begun", journal.committed(), text=manifest.hash))
            spool = Spool(run_dir, manifest)
            rounds = Rounds(manifest, Layout.of_config(manifest.model).size, journal, spool, listen)
            roster = _Roster(post, journal, manifest, codebook)
            while not rounds.finished:
                _lead_round(rounds, roster, post, plan)
            last, best = rounds.number - 1, rounds.best()
            outcome = Outcome(
                checkpoint=spool.checkpoint_path(last),
                best_checkpoint=spool.checkpoint_path(best),
                codebook=run_dir / "codebook.json",
                manifest=manifest,
                ledger_fingerprint=journal.fingerprint(),
            )
        listen(Event("run.finished", last, text=outcome.ledger_fingerprint))
    return outcome


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run as a Flower ServerApp, see the top of this module.

    Raises:
        ConfigError: no such run, or it has no usable plan.
    """
    root, run = os.environ.get("FEDCOMET_RUNS"), context.run_config.get("run")
    if not root or not isinstance(run, str) or not is_site_name(run):
        raise ConfigError("Name the runs' folder in FEDCOMET_RUNS and the run's folder in it as run-config 'run'.")
    run_dir = Path(root, run)
    plan_path, codebook_path = run_dir / "plan.json", run_dir / "codebook.json"
    if not plan_path.exists():
        raise ConfigError(f"{plan_path} is missing; write the federation plan there.")
    fixed = codebook_path.read_bytes() if codebook_path.exists() else None
    plan = FederationPlan.from_bytes(plan_path.read_bytes(), fixed)
    log = logging.getLogger("flwr")
    coordinate(grid, run_dir, plan, listen=lambda event: log.info("%s round %d", event.kind, event.round))


class _Post:
    """Asks many nodes one question and hands their answers over one at a time."""

    def __init__(
        self,
        grid: Grid,
        plan: FederationPlan,
        listen: Listener,
        clock: Callable[[], float],
        pause: Callable[[float], None],
    ) -> None:
        self._grid, self._plan, self._clock, self._pause = grid, plan, clock, pause
        self.tell = listen

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
            raise TooFewSites(f"{len(nodes)} sites are connected, at least {self._plan.min_sites} are needed.")
        return nodes

    def present(self) -> list[int]:
        """Give the nodes that are there now."""
        return sorted(self._grid.get_node_ids())

    def ask(self, nodes: list[int], request: Request, group: str) -> Iterator[tuple[int, Answer]]:
        """Send a request to nodes and give each answer as it comes; nodes that miss the deadline give none."""
        self.tell(Event("asked", text=request.kind, values={"sites": len(nodes)}))
        pending: dict[str, int] = {}
        ttl_s = request.deadline_s - self._clock() + _GRACE_S
        for node in nodes:
            message = flower.request(request, node, group=group, ttl_s=ttl_s)
            sent = [name for name in self._grid.push_messages([message]) if name]
            if sent:
                pending[sent[0]] = node
            else:
                yield node, DeliveryError("Flower did not take the request.")
        while pending and self._clock() < request.deadline_s:
            arrived = False
            for name in list(pending):
                if (answer := self._pull(name)) is not None:
                    arrived = True
                    yield pending.pop(name), answer
            if not arrived:
                self._pause(_POLL_S)

    def _pull(self, name: str) -> Answer | None:
        try:
            for message in self._grid.pull_messages([name]):
                content = flower.read(message)
                if isinstance(content, Request):
                    return ProtocolError(f"A {content.kind} came in the place of an answer.")
                return content
        except ProtocolError as error:
            return error
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            # Flower itself could not make a message of what the site sent.
            return ProtocolError(f"The answer can't be read ({type(error).__name__}).")
        return None


class _Roster:
    """Which site is behind which node, and whether it takes part."""

    def __init__(self, post: _Post, journal: Journal, manifest: Manifest, codebook: Codebook) -> None:
        self._post, self._journal, self._manifest, self._codebook = post, journal, manifest, codebook
        self._names: dict[int, str] = {}
        self._known: set[int] = set()

    def sites(self) -> dict[str, int]:
        """Give the nodes of the sites that take part; nodes that are new are asked to prepare first.

        Raises:
            ConfigError: two nodes call themselves by one name.
            TooFewSites: fewer than `min_sites` take part.
        """
        nodes = self._post.present() if self._known else self._post.nodes()
        if fresh := [node for node in nodes if node not in self._known]:
            self._prepare(fresh)
        if len(self._names) < self._manifest.min_sites:
            told = "; ".join(f"{e.site}: {e.reason}" for e in self._journal.sites() if e.reason) or "none answered"
            raise TooFewSites(
                f"{len(self._names)} sites take part, at least {self._manifest.min_sites} are needed ({told})."
            )
        return {name: node for node, name in self._names.items()}

    def name(self, node: int) -> str:
        """Give the name of the site behind a node."""
        return self._names[node]

    def _prepare(self, nodes: list[int]) -> None:
        request = PrepareRequest(self._manifest.to_bytes(), self._codebook.to_bytes(), self._post.deadline())
        answers = dict(self._post.ask(nodes, request, "prepare"))
        for node in nodes:
            answer = answers.get(node)
            if answer is not None:
                self._known.add(node)
                self._admit(node, answer)

    def _admit(self, node: int, answer: Answer) -> None:
        name = getattr(answer, "site", f"node-{node}")
        if isinstance(answer, PrepareReply) and answer.manifest_hash == self._manifest.hash:
            present = self._post.present()
            self._names = {n: other for n, other in self._names.items() if other != name or n in present}
            if name in self._names.values():
                raise ConfigError(f"Two nodes call themselves {name}; give every site a name of its own.")
            self._names[node] = name
            counts = {"splits": answer.splits, "fallbacks": answer.fallbacks}
            self._journal.note_site(SiteEntry(name, Status.ACCEPTED, "", canonical.encode(counts).decode()))
            train = answer.splits.get("train")
            values = {"patients": train.patients, "tokens": train.tokens} if train else {}
            self._post.tell(Event("site.ready", site=name, values=values))
            return
        reason = _reason(answer)
        status = Status.REFUSED if isinstance(answer, Refusal) else Status.MALFORMED
        self._journal.note_site(SiteEntry(name, status, reason))
        self._post.tell(Event("site.refused", site=name, text=reason))


def _lead_round(rounds: Rounds, roster: _Roster, post: _Post, plan: FederationPlan) -> None:
    rounds.open()
    nodes = roster.sites()
    if rounds.collecting:
        missing = rounds.missing(nodes)
        request = rounds.request(post.deadline())
        for node, answer in post.ask([nodes[site] for site in missing], request, str(rounds.number)):
            rounds.receive(roster.name(node), answer)
        for site in rounds.missing(nodes):
            rounds.late(site)
    rounds.aggregate()
    every = plan.evaluate_every
    due = every > 0 and (rounds.number % every == 0 or rounds.number == plan.rounds)
    evaluation = rounds.evaluation(TUNING, post.deadline()) if due else None
    answers: dict[str, Answer | None] = {}
    if evaluation is not None:
        answers = dict.fromkeys(nodes)
        for node, answer in post.ask(list(nodes.values()), evaluation, str(rounds.number)):
            answers[roster.name(node)] = answer
    rounds.score(evaluation, answers)
    rounds.commit()


def _codebook(run_dir: Path, plan: FederationPlan, post: _Post) -> Codebook:
    """Give the run's codebook: that of the run directory, the fixed one, or one from the sites' surveys."""
    path = run_dir / "codebook.json"
    if path.exists():
        codebook = Codebook.load(path)
        if plan.codebook is None or plan.codebook == codebook.to_bytes():
            return codebook
        raise ConfigError(f"{path} is not the codebook that the plan fixes; take another run directory.")
    if plan.codebook is not None:
        codebook = Codebook.from_bytes(plan.codebook)
    else:
        codebook = Codebook.build(merge(_surveys(run_dir, plan, post)))
    codebook.save(path)
    post.tell(Event("codebook.built", text=codebook.hash, values={"tokens": len(codebook)}))
    return codebook


def _surveys(run_dir: Path, plan: FederationPlan, post: _Post) -> list[Survey]:
    """Collect surveys, and keep them as they came; a site without a usable one is told about and left out."""
    request = SurveyRequest(plan.split, plan.tokenizer, post.deadline())
    surveys: list[Survey] = []
    refusals: list[str] = []
    for node, answer in post.ask(post.nodes(), request, "survey"):
        site = getattr(answer, "site", f"node-{node}")
        try:
            if not isinstance(answer, SurveyReply):
                raise ProtocolError(_reason(answer))
            survey = Survey.from_bytes(answer.survey)
            if survey.options != plan.tokenizer:
                raise ProtocolError("its survey was taken with other options")
        except (DataError, ProtocolError) as error:
            refusals.append(f"{site}: {error}")
            post.tell(Event("survey.refused", site=site, text=str(error)))
        else:
            durable.write_bytes(run_dir / "surveys" / f"{site}.json", answer.survey)
            surveys.append(survey)
            post.tell(Event("survey.received", site=site, values={"patients": survey.patients}))
    if len(surveys) < plan.min_sites:
        told = "; ".join(sorted(refusals)) or "none answered in time"
        raise TooFewSites(f"{len(surveys)} sites gave a survey, at least {plan.min_sites} are needed ({told}).")
    return surveys


def _reason(answer: Answer) -> str:
    if isinstance(answer, Refusal):
        return answer.reason
    return str(answer) if isinstance(answer, ProtocolError) else f"a {answer.kind} came in the place of the answer"


def _remember_plan(run_dir: Path, plan: FederationPlan) -> None:
    path = run_dir / "plan.json"
    if not path.exists():
        durable.write_bytes(path, plan.to_bytes())
        return
    known = path.read_bytes()
    if known != plan.to_bytes():
        names = ", ".join(plan.differences(known)) or "their form"
        raise ConfigError(
            f"{run_dir} holds a run with other settings ({names}); take another directory or its settings."
        )


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run_dir} is in use by another process; wait for it or take another directory."
            ) from None
        yield
    finally:
        os.close(descriptor)
