"""The coordinator: it leads a run from the first hello to the last checkpoint, over any Flower `Grid`.

survey → merge → codebook → manifest → prepare → rounds (train → aggregate → evaluate → commit). Everything that was
reached is in the run directory before the next thing begins; the same call on the same directory goes on where the
last one stopped. Replies are pulled one at a time, checked, written to disk and dropped. Nothing is drawn or printed:
a listener is told what happens.

The Flower ServerApp reads its plan from `$FEDCOMET_RUNS/<run>/plan.json`, where `run` is its only configuration, so
that nobody who can start runs can point the coordinator at other files. Its requests are signed with the key in
`$FEDCOMET_RUNS/coordinator.key`; `fedcomet coordinator key` shows the public half, which sites' policies list. The
manifest lies in the run directory as `manifest.json`, for sites that want to see it before. Where $FEDCOMET_LEDGER is a
database's URL, the run is written down in that federation's ledger, under the lease whose token is $FEDCOMET_LEASE.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federation.identity import Identity
from federation.manifest import Manifest
from federation.masking import MaskingError
from federation.messages import Kept, ProtocolError, SurveyReply, SurveyRequest, TrainRequest, is_site_name, printable
from federation.update import Layout
from server import assessment
from server.central_cohort import Central
from server.home import CoordinatorHome
from server.journal import GIVEN_UP, Journal, Phase
from server.ledger import Ledger
from server.opening import open_sum
from server.plan import FederationPlan
from server.post import Post, Roster, reason, site_name, too_few, without_weights
from server.rounds import TUNING, Answer, Event, Listener, Rounds
from server.spool import Spool
from server.tables import RunState
from server.transactions import LeaseLost, LedgerUnreachable
from server.unmask import Opening
from server.wishes import RunHalted, Wishes
from tokenizer import durable
from tokenizer.codebook import Codebook, Survey, merge
from tokenizer.errors import ConfigError, FedcometError

_AT_ONCE_S, _LOOK_S = 0.01, 0.1

app = ServerApp()


class OutOfRoom(FedcometError):
    """The disk is full: the run goes on when there is room."""


@dataclass(frozen=True)
class Outcome:
    """What a finished run leaves: the last checkpoint, the best one, and what they belong to."""

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
    identity: Identity | None = None,
    journal: Journal | None = None,
) -> Outcome:
    """Lead a run to its end, from wherever the run directory says it is.

    Args:
        grid: how sites are reached.
        run_dir: this run's directory; empty or new when the run begins.
        plan: the settings; a directory in which a run began with others is refused.
        listen: told of every step after it is durable.
        clock: gives seconds since the epoch.
        pause: called with a number of seconds when nothing has arrived; may return as soon as something does.
        identity: the key that requests are signed with; sites whose policy lists coordinators answer no others.
        journal: the run in its federation's ledger; without, a ledger of its own in the run directory.

    Raises:
        ConfigError: the directory is in use, or belongs to a run with other settings.
        TooFewSites: not enough sites came or take part.
        RoundFailed: not enough usable updates in a round; `SumWaits` where the sites that signed a sum have left.
        RunHalted: somebody wished that the run pauses or stops.
        DataError: files of the run directory are damaged.
        LedgerUnreachable, LeaseLost: the ledger can't be written to.
    """
    with _locked(run_dir), journal or Journal(run_dir / "ledger.sqlite") as book:
        for left_over in run_dir.glob("*.partial"):
            left_over.unlink()
        _remember_plan(run_dir, plan)
        book.start(plan.name, plan.to_bytes())
        with _told_to_the_end(book):
            wishes = Wishes(book, pause)
            post = Post(grid, plan, listen, clock, wishes.pause, identity)
            return _lead(run_dir, plan, post, book, wishes)


def _lead(run_dir: Path, plan: FederationPlan, post: Post, journal: Journal, wishes: Wishes) -> Outcome:
    """Go through all that is left of a run."""
    wishes.between_rounds()
    codebook = _codebook(run_dir, plan, post, journal)
    manifest = plan.manifest(codebook)
    durable.write_bytes(run_dir / "manifest.json", manifest.to_bytes())
    journal.begin(manifest)
    post.tell(Event("run.begun", journal.committed(), text=manifest.hash))
    spool = Spool(run_dir, manifest)
    rounds = Rounds(manifest, Layout.of_config(manifest.model).size, journal, spool, post.tell, plan.central)
    tester = _tester(run_dir, plan, codebook)
    roster = Roster(post, journal, manifest, codebook)
    while not rounds.finished:
        wishes.between_rounds()
        _lead_round(rounds, roster, post, plan, wishes, tester)
    if rounds.early:
        post.tell(Event("run.early", rounds.number - 1, text=f"no better than round {rounds.best()}"))
    last, best = rounds.number - 1, rounds.best()
    outcome = Outcome(
        checkpoint=spool.checkpoint_path(last),
        best_checkpoint=spool.checkpoint_path(best),
        codebook=run_dir / "codebook.json",
        manifest=manifest,
        ledger_fingerprint=journal.fingerprint(),
    )
    journal.end(RunState.FINISHED)
    post.tell(Event("run.finished", last, text=outcome.ledger_fingerprint))
    return outcome


@contextmanager
def _told_to_the_end(journal: Journal) -> Iterator[None]:
    """Let the ledger say how the run ended. A process that is told to end says nothing: its run goes on later."""
    try:
        yield
    except RunHalted as halted:
        journal.end(halted.state)
        raise
    except (LeaseLost, LedgerUnreachable):
        raise  # it is another's run now, or nobody's to write about
    except Exception as problem:
        if durable.out_of_room(problem):
            raise  # it goes on when there is room
        kind = "" if isinstance(problem, FedcometError) else f"{type(problem).__name__}: "
        with contextlib.suppress(FedcometError):
            journal.end(RunState.FAILED, printable(f"{kind}{problem}"))
        raise


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run as a Flower ServerApp, see the top of this module. A run that was paused or stopped ends well.

    Raises:
        ConfigError: no such run, or it has no usable plan.
        OutOfRoom: the disk is full; Flower notes that, and `server.keeper` reads it.
        FedcometError: the run failed; Flower notes that, too.
    """
    from federation import handover  # it needs Flower's databases, which no simulation does

    handover.hand_over()
    try:
        _main(grid, context)
    except Exception as problem:
        if not durable.out_of_room(problem):
            raise
        raise OutOfRoom(f"{durable.OUT_OF_ROOM}{printable(durable.lacking(problem))}") from problem


def _main(grid: Grid, context: Context) -> None:
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

    def listen(event: Event) -> None:
        # What is asked, who refuses and why, who dropped out of a sum; other texts are in the ledger, and may be long.
        telling = event.kind == "asked" or event.kind.startswith("sum.") or event.kind.endswith(".refused")
        number = f"round {event.round}" if event.round else ""
        log.info("%s", " ".join(filter(None, (event.kind, number, event.site, event.text if telling else ""))))

    identity = Identity.at(coordinator_key(Path(root)))
    with _ledger(Path(root)) as ledger:
        journal = None if ledger is None else ledger.journal(run)
        try:
            coordinate(
                grid, run_dir, plan, listen=listen, pause=partial(_hear, grid), identity=identity, journal=journal
            )
        except RunHalted as halted:
            log.info("%s", halted)


def _hear(grid: Grid, seconds: float) -> None:
    """Wait until an answer may have come: the coordinator's SuperLink holds a question for nothing back till then."""
    began = time.monotonic()
    grid.pull_messages([])
    if time.monotonic() - began < _AT_ONCE_S:  # there is news already, or it is another runtime
        time.sleep(min(seconds, _LOOK_S))


@contextmanager
def _ledger(root: Path) -> Iterator[Ledger | None]:
    """Open the federation's ledger, if there is one, under the lease of whoever started this process, or its own."""
    url, token = os.environ.get("FEDCOMET_LEDGER"), os.environ.get("FEDCOMET_LEASE", "")
    if not url:
        yield None
        return
    with Ledger.open(url, backups=root) as ledger:
        if token.isdecimal():
            ledger.join(int(token))
            yield ledger
        else:
            with ledger.lead():
                yield ledger


def coordinator_key(root: Path) -> Path:
    """Tell where the key of the coordinator with this runs' folder is; it is made on first use."""
    return root / "coordinator.key"


def give_up_sum(run_dir: Path, *, really: bool) -> tuple[int, str]:
    """Give up the sum that a run waits for: a set of sites has signed it, and too few of them are left to open it.

    One note in the ledger, which holds from the run's next start on. What sites were promised stays true: they sign one
    set in a round, and the sum of this one is never opened.

    Args:
        run_dir: the run's directory; no coordinator may be at work on it.
        really: whether to note it, or only to tell what would be.

    Returns:
        The round, and what it waits for.

    Raises:
        ConfigError: the directory is in use, holds no run, or its run waits for no such sum.
    """
    with _book_of(run_dir) as journal, _locked(run_dir):
        number = journal.committed() + 1
        entry, state = journal.sum(number, "train"), journal.round(number)
        signed = entry is not None and entry.collected_sha256 and not entry.sites
        if entry is None or not signed or state is None or state.phase is not Phase.UNMASKING:
            raise ConfigError(f"Round {number} of {run_dir} waits for no sum that was signed: start the run again.")
        if really:
            journal.note_sum(replace(entry, stage=GIVEN_UP))
        return number, entry.reason or "no site has been asked to open it yet"


@contextmanager
def _book_of(run_dir: Path) -> Iterator[Journal]:
    """Open what the ledger has of a run: a file of its own, or the ledger of the home that the folder lies in."""
    path, home = run_dir / "ledger.sqlite", run_dir.absolute().parent.parent
    if path.exists():
        with Journal(path) as journal:
            yield journal
    elif (home / "coordinator.toml").exists() and run_dir.is_dir():
        opened = CoordinatorHome.open(home)
        with Ledger.open(opened.ledger_url, backups=opened.backups, begin=False, patience_s=10.0) as ledger:
            yield ledger.journal(run_dir.name)
    else:
        raise ConfigError(f"{run_dir} holds no run that has begun: there is no ledger of it.")


Tester = Callable[[int, Callable[[], None]], Mapping[str, float]]
"""Asks the checkpoint of a round the coordinator's own questions; what it is given is called now and then."""


def _tester(run_dir: Path, plan: FederationPlan, codebook: Codebook) -> Tester | None:
    """Make ready what the coordinator asks by itself; what is wrong with its records shows before the first round."""
    if plan.central is None:
        return None
    central = Central.open(run_dir, plan.central, codebook, plan.split, plan.seed)
    return lambda number, watch: central.figures(run_dir / "checkpoints" / f"{number:04d}.safetensors", watch)


def _lead_round(
    rounds: Rounds, roster: Roster, post: Post, plan: FederationPlan, wishes: Wishes, tester: Tester | None
) -> None:
    if rounds.given_up:
        rounds.open()
        rounds.pass_over()
        rounds.commit()
        return
    rounds.open()
    nodes = rounds.drawn(roster.sites(rounds.number))
    request = rounds.request(post.deadline())
    if rounds.collecting:
        missing = rounds.missing(nodes)
        answers_to = post.ask([nodes[site] for site in missing], request, str(rounds.number))
        request = without_weights(request)  # what is left to do with it needs none, and they are large
        for node, answer in answers_to:
            rounds.receive(roster.name(node), answer)
            del answer  # or it would lie in memory beside the next one
            wishes.between_answers()
        for site in rounds.missing(nodes):
            rounds.late(site)
    opening = None
    if rounds.masked and rounds.phase in (Phase.COLLECTING, Phase.TRAINING, Phase.UNMASKING):
        opening = _opened(rounds, request, roster, post, plan.signed_wait_s)
    rounds.aggregate(opening)
    evaluation = rounds.evaluation(TUNING, post.deadline()) if plan.evaluates(rounds.number) else None
    answers: dict[str, Answer | None] = {}
    if evaluation is not None:
        answers = dict.fromkeys(nodes)
        answers_to = post.ask(list(nodes.values()), evaluation, str(rounds.number))
        evaluation = without_weights(evaluation)
        for node, answer in answers_to:
            answers[roster.name(node)] = answer
    if rounds.masked and evaluation is not None:
        kept = [site for site, answer in answers.items() if isinstance(answer, Kept)]
        losses = rounds.sum_of(evaluation)
        # An evaluation that fails costs a figure, not the round; the reason is in the ledger.
        with contextlib.suppress(MaskingError):
            open_sum(losses, nodes, kept, post)
        rounds.score_sum(losses.entry)
    else:
        rounds.score(evaluation, answers)
    if tester is not None and rounds.to_test:
        rounds.tested(tester(rounds.number, wishes.between_answers))
    _assess(rounds, nodes, post)
    rounds.commit()


def _assess(rounds: Rounds, nodes: Mapping[str, int], post: Post) -> None:
    """Put the run's questions to the sites, where they are due; without their answers the run goes on."""
    request = rounds.assessment(post.deadline())
    if request is None:
        return
    names = {node: site for site, node in nodes.items()}
    answers: dict[str, Answer | None] = dict.fromkeys(nodes)
    for node, answer in post.ask(list(nodes.values()), request, f"{rounds.number}/tasks"):
        answers[names[node]] = answer
    if not rounds.masked:
        rounds.assessed(assessment.of_answers(rounds.manifest, request, answers))
        return
    kept = [site for site, answer in answers.items() if isinstance(answer, Kept)]
    try:
        opening = open_sum(rounds.sum_of(request), nodes, kept, post)
    except MaskingError as problem:
        rounds.assessed(assessment.Assessment(rounds.number, (), reason=printable(str(problem))))
    else:
        rounds.assessed(assessment.of_opening(rounds.manifest, rounds.number, opening))


def _opened(rounds: Rounds, request: TrainRequest, roster: Roster, post: Post, wait_s: float) -> Opening:
    """Open the round's sum; once a set of sites is signed, wait so many seconds for those of them that have left."""
    until: float | None = None
    while True:
        masked = rounds.sum_of(request)
        try:
            # All sites that are there, not those drawn now: no newcomer may take the place of one that has signed.
            return open_sum(masked, roster.sites(rounds.number), rounds.ready(), post, rounds.unmask)
        except MaskingError as problem:
            until = post.now() + wait_s if until is None else until
            if not masked.signing or post.now() >= until:
                raise rounds.fail(str(problem)) from None
            post.rest()


def _codebook(run_dir: Path, plan: FederationPlan, post: Post, journal: Journal) -> Codebook:
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
        plan.check()
        codebook = Codebook.build(merge(_surveys(run_dir, plan, post, journal)))
    codebook.save(path)
    post.tell(Event("codebook.built", text=codebook.hash, values={"tokens": len(codebook)}))
    return codebook


def _surveys(run_dir: Path, plan: FederationPlan, post: Post, journal: Journal) -> list[Survey]:
    """Collect surveys, and keep them as they came; a site without a usable one is told about and left out."""
    request = SurveyRequest(plan.split, plan.tokenizer, post.deadline())
    surveys: list[Survey] = []
    refusals: dict[str, str] = {}
    for node, answer in post.ask(post.nodes(), request, "survey"):
        site = site_name(node, answer)
        try:
            survey = _read_survey(answer, plan)
        except FedcometError as error:
            reason = printable(str(error))
            refusals[site] = reason
            journal.note_refusal(site, "survey", reason)
            post.tell(Event("survey.refused", site=site, text=reason))
        else:
            durable.write_bytes(run_dir / "surveys" / f"{site}.json", survey.to_bytes())
            surveys.append(survey)
            post.tell(Event("survey.received", site=site, values={"patients": survey.patients}))
    if len(surveys) < plan.min_sites:
        why = dict(sorted(refusals.items()))
        does = "site gave a survey", "sites gave a survey"
        raise too_few(surveys, does, plan.min_sites, why, "none answered in time")
    return surveys


def _read_survey(answer: Answer, plan: FederationPlan) -> Survey:
    """Read a survey, and see that a codebook can be made of it.

    Raises:
        FedcometError: it is none, or was taken with other options.
    """
    if not isinstance(answer, SurveyReply):
        raise ProtocolError(reason(answer))
    try:
        survey = Survey.from_bytes(answer.survey)
        Codebook.build(survey).to_bytes()
    except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ProtocolError(f"no codebook can be made of its survey ({type(error).__name__})") from None
    if survey.options != plan.tokenizer:
        raise ProtocolError("its survey was taken with other options")
    return survey


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
