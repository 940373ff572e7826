"""A study: make or split the records, train every arm, put the same questions to all of them, and report.

Arms:
- federated: all sites, through the round engine; it builds the codebook that all arms share.
- alone: each site by itself, as a federation of one, with as many passes over its own patients.
- pooled: the records of all sites in one place, which a real federation can't have: the ceiling. It trains on as many
  tokens as the federated arm.
- ensemble: the mean of the risks that the sites' own models give; nothing is trained.

Every arm ends with its best round by the loss of its own tuning patients. The questions are put to the held-out
patients of all sites, who trained nothing and chose nothing. In a real federation the server has a public, synthetic or
consented cohort instead; in a simulation it may read these.

Everything lies under one folder, and the same call on the same folder goes on where the last one stopped:
`study.json`, `sites/<name>/{records,state}`, `pooled/`, `arms/<arm>/` (a run directory of `server.app` each),
`answers/`, `report.json`, `report.html`.
"""

import fcntl
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from client.archive import Archive
from client.site import SiteFiles
from federation.manifest import LocalWork, Manifest, OuterOptions
from model import checkpoint
from model.estimate import estimate
from model.tasks import Cohort, Task, cohort, join
from model.train import TrainOptions
from server.app import Outcome
from server.plan import FederationPlan
from server.rounds import Event
from simulation.config import Study
from simulation.engine import run_federation
from simulation.hospital import PROFILES, write_hospital
from simulation.partition import partition
from simulation.pool import Pool
from tokenizer import durable
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.errors import ConfigError, DataError, FedcometError
from tokenizer.events import MedsDataset, write_meds
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore

FEDERATED, POOLED, ENSEMBLE, TRUTH = "federated", "pooled", "ensemble", "true risk"

_CHUNK = 64
"""Predictions that one job rolls out."""


@dataclass(frozen=True)
class Step:
    """How far something is; `label` names it for people, `note` says what is worth knowing now."""

    label: str
    done: int
    total: int
    note: str = ""


Watch = Callable[[Step], None]


@dataclass(frozen=True)
class Arm:
    """A trained arm: where its ledger and checkpoints are, or why there are none."""

    name: str
    folder: Path
    sites: tuple[SiteFiles, ...]
    outcome: Outcome | None = None
    failure: str = ""


@dataclass(frozen=True)
class Answers:
    """A question, whom it was put to, and every arm's risks (float64 [P]) for the P predictions of `cohort`.

    `sites` int64 [P] is the index of the site that each prediction comes from.
    """

    task: Task
    cohort: Cohort
    sites: NDArray[np.int64]
    censored: int
    risks: Mapping[str, NDArray[np.float64]]
    unresolved: Mapping[str, float]


@dataclass(frozen=True)
class Result:
    """What a finished study knows; `simulation.findings` turns it into a report."""

    study: Study
    folder: Path
    sites: tuple[SiteFiles, ...]
    arms: tuple[Arm, ...]
    answers: tuple[Answers, ...]
    notes: tuple[str, ...] = field(default=())


def run_study(study: Study, folder: Path, *, workers: int | None = None, watch: Watch = lambda step: None) -> Result:
    """Run a study to its end; after a crash or a kill, the same call goes on where it stopped.

    Args:
        study: what to do.
        folder: where all of it lies.
        workers: processes that play sites and roll out; as many as there are cores when not given.
        watch: told how far the work is, from any thread.

    Raises:
        ConfigError: the folder is in use, or belongs to another study.
        FedcometError: records can't be read, or the federation can't go on.
    """
    with _claimed(folder, study):
        sites, notes = _sites(study, folder, watch)
        with Pool(workers) as pool:
            arms = _train(study, sites, folder, pool, watch)
            answers = _answer(study, sites, arms, folder, pool, watch)
        return Result(study, folder, sites, arms, answers, notes)


def tasks(study: Study) -> tuple[Task, ...]:
    """Give the questions of a study as `model.tasks` puts them.

    Raises:
        ConfigError: a question that contradicts itself.
    """
    return tuple(Task(**question.model_dump()) for question in study.task)


@contextmanager
def _claimed(folder: Path, study: Study) -> Iterator[None]:
    """Hold the folder for this process and this study."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{folder}: another process is working here; wait for it, or take another --out") from None
        known = folder / "study.json"
        mine = study.model_dump(mode="json")
        if known.exists():
            other = json.loads(known.read_bytes())
            if changed := sorted(key for key in {*mine, *other} if mine.get(key) != other.get(key)):
                raise ConfigError(
                    f"{folder} holds a study with other settings ({', '.join(changed)}); take another --out, "
                    "or remove the folder to begin anew"
                )
        else:
            durable.write_bytes(known, json.dumps(mine, indent=1, sort_keys=True).encode())
        yield


def _sites(study: Study, folder: Path, watch: Watch) -> tuple[tuple[SiteFiles, ...], tuple[str, ...]]:
    """Give every site its records."""
    data, home = study.data, folder / "sites"
    notes: tuple[str, ...] = ()
    if data.kind == "sites":
        records = dict(data.sites)
    elif data.kind == "synthetic":
        records = {}
        names = data.hospitals or tuple(PROFILES)
        if unknown := [name for name in names if name not in PROFILES]:
            raise ConfigError(f"data.hospitals: there is no profile {unknown[0]!r}; there are {', '.join(PROFILES)}")
        for done, name in enumerate(names, 1):
            records[name] = home / name / "records"
            if not (home / name / "truth.parquet").exists():
                write_hospital(home / name, PROFILES[name], data.patients, study.seed)
            watch(Step("records", done, len(names), f"{name}: {data.patients} patients"))
    else:
        assert data.path is not None and data.partition is not None  # noqa: S101 - the config has checked
        records, notes = partition(data.path, data.partition, home, seed=study.seed)
        watch(Step("records", len(records), len(records), f"{len(records)} sites"))
    sites = tuple(SiteFiles(name, records[name], home / name / "state") for name in sorted(records))
    return sites, notes


def _plan(study: Study, name: str, **changes: object) -> FederationPlan:
    """Translate a study's settings for one arm."""
    train = study.training
    outer = OuterOptions()
    if train.outer == "nesterov":
        outer = OuterOptions.nesterov(train.outer_learning_rate or 0.7, train.outer_momentum)
    elif train.outer_learning_rate is not None:
        outer = OuterOptions(lr=train.outer_learning_rate)
    plan = FederationPlan(
        name=f"{study.name}/{name}",
        rounds=train.rounds,
        split=SplitRule(study.split.key, study.split.tuning, study.split.held_out),
        local=LocalWork(
            steps=train.local_steps,
            epochs=train.local_epochs,
            batch_tokens=train.batch_tokens,
            warmup_share=train.warmup_share,
            optimizer_state=train.optimizer_state,
        ),
        model=study.model.preset,
        context=study.model.context,
        dropout=study.model.dropout,
        train=TrainOptions(
            lr=train.learning_rate,
            min_lr_ratio=train.min_learning_rate_ratio,
            weight_decay=train.weight_decay,
            clip=train.clip,
        ),
        outer=outer,
        tokenizer=TokenizerOptions(**study.tokenizer.model_dump()),
        seed=study.seed,
        min_sites=train.min_sites,
        deadline_s=60 * train.round_deadline_minutes,
        purposes=tuple(question.question for question in study.task),
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


def _train(
    study: Study, sites: tuple[SiteFiles, ...], folder: Path, pool: Pool, watch: Watch
) -> tuple[Arm, ...]:
    """Train the federated arm first as far as its codebook, then all arms side by side."""
    home = folder / "arms"
    names = {"alone": [f"{site.name} alone" for site in sites], "pooled": [POOLED]}
    wanted = [name for key in ("alone", "pooled") if key in study.arms for name in names[key]]
    with ThreadPoolExecutor(max_workers=len(wanted) + 1) as threads:
        ready: Future[bytes] = Future()
        futures = {
            threads.submit(_train_federated, study, sites, home / FEDERATED, pool, watch, ready): FEDERATED,
        }
        codebook = ready.result()
        for site in sites if "alone" in study.arms else ():
            arm = Arm(f"{site.name} alone", home / f"alone-{site.name}", (site,))
            futures[threads.submit(_train_single, study, arm, codebook, 1, pool, watch)] = arm.name
        if "pooled" in study.arms:
            pooled = SiteFiles(POOLED, _pool_records(study, sites, folder), folder / "pooled" / "state")
            arm = Arm(POOLED, home / POOLED, (pooled,))
            futures[threads.submit(_train_single, study, arm, codebook, len(sites), pool, watch)] = arm.name
        trained = {futures[future]: future.result() for future in as_completed(futures)}
    return tuple(trained[name] for name in [FEDERATED, *wanted])


def _train_federated(
    study: Study, sites: tuple[SiteFiles, ...], folder: Path, pool: Pool, watch: Watch, ready: "Future[bytes]"
) -> Arm:
    """Train over all sites; `ready` gets the codebook once every site has encoded its records with it."""

    def listen(event: Event) -> None:
        if event.kind == "round.announced" and not ready.done():
            ready.set_result((folder / "codebook.json").read_bytes())
        progress(event)

    progress = _Progress(FEDERATED, study.training.rounds, len(sites), watch)
    try:
        outcome = run_federation(_plan(study, FEDERATED), sites, folder, pool, listen)
        if not ready.done():  # every round was committed before
            ready.set_result((folder / "codebook.json").read_bytes())
    except BaseException as error:
        if not ready.done():
            ready.set_exception(error)
        raise
    return Arm(FEDERATED, folder, sites, outcome)


def _train_single(study: Study, arm: Arm, codebook: bytes, share: int, pool: Pool, watch: Watch) -> Arm:
    """Train one site by itself; `share` times the local steps, where steps are the measure, for equal tokens."""
    plan = _plan(study, arm.name, codebook=codebook, outer=OuterOptions(), min_sites=1)
    if plan.local.steps is not None:
        plan = replace(plan, local=replace(plan.local, steps=plan.local.steps * share))
    progress = _Progress(arm.name, study.training.rounds, 1, watch)
    try:
        return replace(arm, outcome=run_federation(plan, arm.sites, arm.folder, pool, progress))
    except FedcometError as error:
        if arm.name == POOLED:
            raise
        # A site that can't train by itself (no patients, broken records) takes nothing from the others.
        return replace(arm, failure=str(error))


class _Progress:
    """Turns a run's events into steps: one for every update that arrived."""

    def __init__(self, label: str, rounds: int, sites: int, watch: Watch) -> None:
        self._label, self._rounds, self._sites, self._watch = label, rounds, sites, watch
        self._note = ""
        self._round = 0
        self._arrived = 0

    def __call__(self, event: Event) -> None:
        if event.kind == "run.begun":
            self._round = event.round
        elif event.kind.startswith("update."):
            self._arrived += 1
        elif event.kind == "round.evaluated":
            self._note = f"tuning loss {event.values['loss']:.3f}"
        elif event.kind == "round.committed":
            self._round, self._arrived = event.round, 0
        else:
            return
        done = self._round * self._sites + min(self._arrived, self._sites)
        self._watch(Step(self._label, done, self._rounds * self._sites, self._note))


def _pool_records(study: Study, sites: Sequence[SiteFiles], folder: Path) -> Path:
    """Put the records of all sites in one place."""
    if study.data.kind == "meds" and study.data.path is not None:
        return study.data.path
    path = folder / "pooled" / "records"
    if not path.exists():
        shards = (
            (f"{site.name}-{number}", dataset.read(shard))
            for site in sites
            for dataset in [MedsDataset.open(site.data)]
            for number, shard in enumerate(dataset.shards)
        )
        write_meds(path, shards, name="the records of all sites")
    return path


def _answer(
    study: Study, sites: tuple[SiteFiles, ...], arms: tuple[Arm, ...], folder: Path, pool: Pool, watch: Watch
) -> tuple[Answers, ...]:
    """Put every question to every arm."""
    federated = next(arm for arm in arms if arm.name == FEDERATED)
    assert federated.outcome is not None  # noqa: S101 - a federated arm that fails raises
    codebook = Codebook.load(federated.outcome.codebook)
    asked = [_ask(task, sites, federated.outcome.manifest, codebook, study, folder) for task in tasks(study)]
    trained = [arm for arm in arms if arm.outcome is not None]
    total = sum(len(question.cohort) for question in asked) * len(trained)
    tally = _Tally("rollouts", total, watch)
    jobs = [
        [_Roll.start(arm, question, study, codebook, folder, pool, tally) for arm in trained] for question in asked
    ]
    answers = []
    for question, rolls in zip(asked, jobs, strict=True):
        found = {roll.arm: roll.finish() for roll in rolls}
        risks = {name: risk for name, (risk, _) in found.items()}
        alone = [risks[arm.name] for arm in trained if arm.name.endswith(" alone")]
        if ENSEMBLE in study.arms and alone:
            risks[ENSEMBLE] = np.mean(alone, axis=0)
        unresolved = {name: float(1 - resolved.mean()) if len(resolved) else 0.0 for name, (_, resolved) in found.items()}
        answers.append(replace(question, risks={**risks, **question.risks}, unresolved=unresolved))
    return tuple(answers)


def _ask(
    task: Task, sites: tuple[SiteFiles, ...], manifest: Manifest, codebook: Codebook, study: Study, folder: Path
) -> Answers:
    """Find whom to ask: the held-out patients of every site that takes part."""
    cohorts, origin = [], []
    for number, site in enumerate(sites):
        archive = Archive(site.state)
        agreement = archive.run(manifest.hash).agreement()
        if agreement is None:
            continue
        store = TokenStore.open(archive.store_path(agreement.store), codebook.hash)
        cohorts.append(cohort(task, store.split("held_out"), codebook))
        origin.append(np.full(len(cohorts[-1]), number))
    whole, places = join(cohorts), np.concatenate(origin)
    labelled = whole.labels >= 0
    censored = int((~labelled).sum())
    whole, places = whole.labelled(), places[labelled]
    if study.data.kind != "synthetic":
        return Answers(task, whole, places, censored, {}, {})
    return _with_truth(Answers(task, whole, places, censored, {}, {}), sites)


def _with_truth(answers: Answers, sites: Sequence[SiteFiles]) -> Answers:
    """Add the true risks, and keep the predictions that the records follow to the horizon.

    Of a record that ends earlier only early outcomes have a label: to keep those would overstate the risk.
    """
    truth = pl.concat([pl.read_parquet(site.data.parent / "truth.parquet") for site in sites])
    keys = pl.DataFrame(
        {
            "subject_id": answers.cohort.subject_ids,
            "prediction_time": pl.Series(answers.cohort.prediction_us).cast(pl.Datetime("us")),
        }
    )
    known = keys.join(
        truth.filter(pl.col("task") == answers.task.name),
        on=["subject_id", "prediction_time"],
        how="left",
        maintain_order="left",
    )
    if known.height != len(answers.cohort):
        raise DataError("truth.parquet has a prediction twice; remove the study's folder and begin anew")
    if known["risk"].null_count() == known.height:
        return answers  # a question that the hospitals' maker doesn't know the answer to
    rows = np.flatnonzero(known["complete"].fill_null(value=False).to_numpy())
    part = answers.cohort
    kept = replace(
        part,
        subject_ids=part.subject_ids[rows],
        prediction_us=part.prediction_us[rows],
        prompts=tuple(part.prompts[row] for row in rows),
        labels=part.labels[rows],
    )
    return replace(
        answers,
        cohort=kept,
        sites=answers.sites[rows],
        censored=answers.censored + len(part) - len(kept),
        risks={TRUTH: known["risk"].to_numpy()[rows]},
    )


class _Tally:
    """Counts what is done, from whatever thread."""

    def __init__(self, label: str, total: int, watch: Watch) -> None:
        self._label, self._total, self._watch = label, total, watch
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        self._watch(Step(self._label, self._done, self._total))


@dataclass(frozen=True)
class _Roll:
    """The rollouts of one question by one arm, under way or read from the disk."""

    arm: str
    path: Path
    parts: Sequence["Future[tuple[NDArray[np.float64], NDArray[np.float64]]]"]

    @classmethod
    def start(
        cls, arm: Arm, question: Answers, study: Study, codebook: Codebook, folder: Path, pool: Pool, tally: _Tally
    ) -> "_Roll":
        assert arm.outcome is not None  # noqa: S101 - only trained arms are asked
        best = arm.outcome.best_checkpoint
        spec = {
            "checkpoint": hashlib.sha256(best.read_bytes()).hexdigest(),
            "task": study.model_dump(mode="json")["task"],
            "name": question.task.name,
            "evaluation": study.evaluation.model_dump(),
            "seed": study.seed,
            "predictions": hashlib.sha256(
                question.cohort.subject_ids.tobytes() + question.cohort.prediction_us.tobytes()
            ).hexdigest(),
        }
        digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:20]
        path = folder / "answers" / f"{digest}.npz"
        if path.exists():
            tally.add(len(question.cohort))
            return cls(arm.name, path, ())
        prompts = [replace(prompt, key=key) for key, prompt in enumerate(question.cohort.prompts)]
        parts = []
        for begin in range(0, len(prompts), _CHUNK):
            part = prompts[begin : begin + _CHUNK]
            future = pool.submit(
                f"{arm.name}'s rollouts",
                roll_out,
                best,
                arm.outcome.codebook,
                question.task,
                replace(question.cohort, prompts=tuple(part)),
                study.evaluation.trajectories,
                study.evaluation.max_tokens,
                study.seed,
            )
            future.add_done_callback(lambda _, count=len(part): tally.add(count))
            parts.append(future)
        return cls(arm.name, path, parts)

    def finish(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Wait for the risks and the resolved shares, float64 [P] each, and keep them."""
        if self.parts:
            found = [part.result() for part in self.parts]
            risk, resolved = (np.concatenate(columns) for columns in zip(*found, strict=True))
            buffer = io.BytesIO()
            np.savez(buffer, risk=risk, resolved=resolved)
            durable.write_bytes(self.path, buffer.getvalue())
            return risk, resolved
        if not self.path.exists():
            return np.zeros(0), np.zeros(0)
        with np.load(self.path) as kept:
            return kept["risk"], kept["resolved"]


def roll_out(
    model: Path, codebook: Path, task: Task, part: Cohort, trajectories: int, max_tokens: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Answer a question for some predictions, in a worker process: risks and resolved shares, float64 [P] each."""
    words = Codebook.load(codebook)
    decoder = checkpoint.load(model, words.hash).decoder
    found = estimate(decoder, words, part, task, trajectories=trajectories, seed=seed, max_tokens=max_tokens)
    return found.risk, found.resolved
