"""Put the same questions to every arm, on the held-out patients of all sites.

Those patients trained nothing and chose nothing. In a real federation the server has a public, synthetic or consented
cohort instead; in a simulation it may read these.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from client.archive import Archive
from client.files import SiteFiles
from federation.manifest import Manifest
from model import checkpoint
from model.cohort import Cohort, Counts, cohort, join, refuse_trained
from model.estimate import Estimates, estimate
from model.people import groups_of
from model.predictions import joined, prediction_table
from model.tasks import Task
from server.about import About, flow_of, write_table
from server.futures import Model
from server.trajectories import listed, prediction_frame
from simulation.arms import FEDERATED, Arm
from simulation.baselines import METHOD, baselines
from simulation.config import Study
from simulation.pool import Pool
from tokenizer import durable
from tokenizer.codebook import Codebook
from tokenizer.errors import DataError
from tokenizer.labels import Labels
from tokenizer.progress import Step, Watch
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore

ENSEMBLE, TRUTH, MODEL = "ensemble", "true risk", "model"

_CHUNK = 64
"""Predictions that one job rolls out."""


@dataclass(frozen=True)
class Answers:
    """A question, whom it was put to, and every arm's risks (float64 [P]) for the P predictions of `cohort`.

    `sites` int64 [P] is the index of the site that each prediction comes from; `estimates` is all that each model
    says, of which the risk is a part. `lost` are those whose record ends before the answer, of the sites `lost_sites`:
    nobody was asked about them, but how long they were followed says how many others go unseen.
    """

    task: Task
    cohort: Cohort
    sites: NDArray[np.int64]
    censored: int
    risks: Mapping[str, NDArray[np.float64]]
    unresolved: Mapping[str, float]
    estimates: Mapping[str, Estimates] = field(default_factory=dict)
    lost: Cohort | None = None
    lost_sites: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def answer(
    study: Study, sites: tuple[SiteFiles, ...], arms: tuple[Arm, ...], folder: Path, pool: Pool, watch: Watch
) -> tuple[Answers, ...]:
    """Put every question to every trained arm.

    Args:
        study: the settings.
        sites: whose held-out patients are asked about.
        arms: who answers; their sites' stores are read.
        folder: of the study; answers are kept in `answers/`, so a killed study rolls none out twice.
        pool: who rolls out.
        watch: told of every part, from several threads.
    """
    federated = next(arm for arm in arms if arm.name == FEDERATED)
    assert federated.outcome is not None
    codebook = Codebook.load(federated.outcome.codebook)
    asked = [_ask(task, sites, federated.outcome.manifest, codebook, study, folder) for task in study.task]
    trained = [arm for arm in arms if arm.outcome is not None]
    total = sum(len(question.cohort) for question in asked) * len(trained)
    tally = _Tally("rollouts", total, watch)
    jobs = [[_Roll.start(arm, question, study, codebook, folder, pool, tally) for arm in trained] for question in asked]
    answers = []
    for question, rolls in zip(asked, jobs, strict=True):
        found = {roll.arm: roll.finish() for roll in rolls}
        risks = {name: each.risk for name, each in found.items()}
        alone = [risks[arm.name] for arm in trained if arm.name.endswith(" alone")]
        if ENSEMBLE in study.arms and alone:
            risks[ENSEMBLE] = np.mean(alone, axis=0)
        unresolved = {name: _unresolved(each) for name, each in found.items()}
        if "supervised" in study.arms:
            risks |= _supervised(question, sites, federated.outcome.manifest, codebook, study, folder)
        answers.append(replace(question, risks={**risks, **question.risks}, unresolved=unresolved, estimates=found))
    return tuple(answers)


def _supervised(
    question: Answers, sites: tuple[SiteFiles, ...], manifest: Manifest, codebook: Codebook, study: Study, folder: Path
) -> dict[str, NDArray[np.float64]]:
    """What models trained for the question only answer; trained once for the same question, records and settings."""
    stores = {}
    for site in sites:
        archive = Archive(site.state)
        if (agreement := archive.run(manifest.hash).agreement()) is not None:
            stores[site.name] = TokenStore.open(archive.store_path(agreement.store), codebook.hash)
    spec = {
        "method": METHOD,
        "task": question.task.hash,
        "codebook": codebook.hash,
        "seed": study.seed,
        "predictions": _predictions(question.cohort),
        "stores": {name: store.manifest for name, store in stores.items()},
    }
    path = folder / "answers" / f"supervised-{_digest(spec)}.npz"
    if path.exists():
        with np.load(path) as kept:
            return {str(name): risk for name, risk in zip(kept["arms"], kept["risks"], strict=True)}
    found = baselines(question.task, stores, codebook, question.cohort, study.seed)
    buffer = io.BytesIO()
    risks = np.array(list(found.values()), np.float64).reshape(len(found), len(question.cohort))
    np.savez(buffer, arms=np.array(list(found), np.str_), risks=risks)
    durable.write_bytes(path, buffer.getvalue())
    return found


def _digest(spec: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:20]


def _predictions(asked: Cohort) -> str:
    """Whom a cohort asks about, and when."""
    return hashlib.sha256(asked.subject_ids.tobytes() + asked.prediction_us.tobytes()).hexdigest()


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
        held_out = store.split("held_out")
        refuse_trained(held_out, manifest.split)
        cohorts.append(cohort(task, held_out, codebook))
        origin.append(np.full(len(cohorts[-1]), number))
    whole, places = join(cohorts), np.concatenate(origin)
    labelled = whole.labels >= 0
    lost = np.flatnonzero(~labelled)
    asked = Answers(
        task, whole.labelled(), places[labelled], len(lost), {}, {}, lost=whole.part(lost), lost_sites=places[lost]
    )
    return asked if study.data.kind != "synthetic" else _with_truth(asked, sites)


def _with_truth(answers: Answers, sites: Sequence[SiteFiles]) -> Answers:
    """Add the true risks, and keep the predictions that the records follow to the horizon.

    Of a record that ends earlier only early outcomes have a label: to keep those would overstate the risk.
    """
    truth = pl.concat([pl.read_parquet(site.data.parent / "truth.parquet") for site in sites]).unique()
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
    kept = part.part(rows)
    return replace(
        answers,
        cohort=kept,
        sites=answers.sites[rows],
        censored=answers.censored + len(part) - len(kept),
        # Those who are left are followed to the end, whoever they are: none of them stands for another.
        lost=None,
        risks={TRUTH: known["risk"].to_numpy()[rows]},
    )


def evaluate(
    model: Model, store: TokenStore, study: Study, split: str, pool: Pool, watch: Watch, *, given: Labels | None = None
) -> tuple[Answers, ...]:
    """Put a study's questions to one trained model, about the patients of a store.

    Args:
        model: who answers.
        store: made with the model's codebook.
        study: its questions, its evaluation and its seed are used.
        split: whom to ask about.
        pool: who rolls out.
        watch: told of every part, from several threads.
        given: predictions and answers of the tasks that have them in a file.

    Raises:
        DataError: the store was made with another codebook, or some of the patients train by the study's split.
    """
    codebook = Codebook.load(model.codebook)
    patients = TokenStore.open(store.path, codebook.hash).split(split)
    refuse_trained(patients, SplitRule(**study.split.model_dump()))
    cohorts = [(task, cohort(task, patients, codebook, given=given if task.given else None)) for task in study.task]
    tally = _Tally("rollouts", sum(int((found.labels >= 0).sum()) for _, found in cohorts), watch)
    asked = []
    for task, found in cohorts:
        labelled = found.labelled()
        parts = _start(model, task, labelled, study, pool, tally)
        nowhere = np.zeros(len(labelled), np.int64)
        lost = found.part(np.flatnonzero(found.labels < 0))
        asked.append((Answers(task, labelled, nowhere, len(lost), {}, {}, lost=lost), parts))
    answers = []
    for question, parts in asked:
        told = _collect(parts)
        answers.append(
            replace(question, risks={MODEL: told.risk}, unresolved={MODEL: _unresolved(told)}, estimates={MODEL: told})
        )
    return tuple(answers)


def _unresolved(found: Estimates) -> float:
    return float(1 - found.resolved.mean()) if len(found.resolved) else 0.0


def table_of(found: Answers, arm: str) -> pl.DataFrame:
    """Lay out one arm's predictions and answers as `model.predictions` says, all that an arm without rollouts has.

    Those who were lost from sight follow, without a risk.
    """
    table = pl.DataFrame(listed(_columns_of(found, arm)))
    if found.lost is None or not len(found.lost):
        return table
    lost = {
        "subject_id": found.lost.subject_ids,
        "prediction_time": found.lost.prediction_us,
        "task": np.full(len(found.lost), found.task.name),
        "label": found.lost.labels,
        **found.lost.told,
    }
    return pl.concat([table, pl.DataFrame(listed(lost))], how="diagonal")


def _columns_of(found: Answers, arm: str) -> dict[str, NDArray]:
    if arm in found.estimates:
        return dict(prediction_table(found.task, found.cohort, found.estimates[arm]))
    return {
        "subject_id": found.cohort.subject_ids,
        "prediction_time": found.cohort.prediction_us,
        "task": np.full(len(found.cohort), found.task.name),
        "label": found.cohort.labels,
        **found.cohort.told,
        "risk": found.risks[arm],
    }


def write(
    path: Path,
    answers: Sequence[Answers],
    about: About | None = None,
    *,
    groups: Sequence[str] = (),
    codebook: Codebook | None = None,
) -> None:
    """Write every prediction to a Parquet file: the answers, and each arm's risks in a column of its own.

    Where one model answers, its column is called `risk`, and all its estimates are there, as `model.predictions` says.

    Args:
        path: the file.
        answers: of one model, or of all arms of a study.
        about: what goes with it.
        groups: columns of `model.people.groups_of` to add, as far as the prompts tell.
        codebook: what the prompts' tokens mean, for the groups.
    """
    tables = []
    for found in answers:
        table = prediction_frame(found.task, found.cohort, next(iter(found.estimates.values())))
        if len(found.risks) > 1 or MODEL not in found.risks:
            kept = ("subject_id", "prediction_time", "task", "task_hash", "label", *found.cohort.told)
            table = table.select(kept).with_columns(pl.Series(arm, risk) for arm, risk in found.risks.items())
        columns = {} if codebook is None else groups_of(found.cohort, codebook)
        table = table.with_columns(pl.Series(name, columns[name], pl.String) for name in groups if name in columns)
        tables.append(table)
    write_table(path, pl.concat(tables, how="diagonal_relaxed"), about)


def about(model: Model, store: TokenStore, split: str, answers: Sequence[Answers]) -> About:
    """Tell what the answers of one model about the patients of a store are of."""
    kept = checkpoint.load(model.checkpoint)
    facts = checkpoint.describe(kept)
    wanted = {"parameters": "Parameters", "trained on": "Trained on", "round": "Round", "privacy": "Privacy"}
    return About(
        {found.task.name: flow_of(found.task, counts_of(found), found.cohort.notes) for found in answers},
        (("Patients", f"{split} of {store.manifest['dataset']}"), *((wanted[key], facts[key]) for key in wanted)),
        (
            ("Model, sha256", hashlib.sha256(model.checkpoint.read_bytes()).hexdigest()),
            ("Run manifest", facts["manifest"]),
            ("Codebook", str(store.codebook_hash)),
            ("Data", str(store.manifest["dataset_fingerprint"])),
        ),
    )


def counts_of(found: Answers) -> Counts:
    """Count a cohort, with those who were lost from sight: they were left out before the rollouts."""
    counts = found.cohort.counts()
    return replace(counts, predictions=counts.predictions + found.censored, censored=found.censored)


class _Tally:
    """Counts what is done, from whatever thread."""

    def __init__(self, label: str, total: int, watch: Watch) -> None:
        self._label, self._total, self._watch = label, total, watch
        self._done = 0

    def note(self, count: int, _: "Future[Any]") -> None:
        self.add(count)

    def add(self, count: int) -> None:
        self._done += count
        self._watch(Step(self._label, self._done, self._total))


@dataclass(frozen=True)
class _Roll:
    """The rollouts of one question by one arm, under way or read from the disk."""

    arm: str
    path: Path
    parts: Sequence["Future[Estimates]"]

    @classmethod
    def start(
        cls, arm: Arm, question: Answers, study: Study, codebook: Codebook, folder: Path, pool: Pool, tally: _Tally
    ) -> "_Roll":
        assert arm.outcome is not None
        best = arm.outcome.best_checkpoint
        spec = {
            "checkpoint": hashlib.sha256(best.read_bytes()).hexdigest(),
            "task": question.task.hash,
            "trajectories": study.trajectories(question.task.name),
            "target_se": question.task.target_se,
            "evaluation": study.evaluation.model_dump(exclude={"central"}),
            "seed": study.seed,
            "predictions": _predictions(question.cohort),
        }
        path = folder / "answers" / f"{_digest(spec)}.npz"
        if path.exists():
            tally.add(len(question.cohort))
            return cls(arm.name, path, ())
        model = Model(best, arm.outcome.codebook)
        parts = _start(model, question.task, question.cohort, study, pool, tally)
        return cls(arm.name, path, parts)

    def finish(self) -> Estimates:
        """Wait for the estimates, and keep them."""
        if self.parts:
            found = _collect(self.parts)
            buffer = io.BytesIO()
            columns: dict[str, Any] = {name: np.asarray(_kept(column)) for name, column in asdict(found).items()}
            np.savez(buffer, **columns)
            durable.write_bytes(self.path, buffer.getvalue())
            return found
        if not self.path.exists():
            return _nothing()
        with np.load(self.path) as kept:
            columns = {name: kept[name] for name in kept.files}
        reasons, sampled = json.loads(str(columns.pop("reasons"))), int(columns.pop("tokens_sampled"))
        return Estimates(**columns, reasons=reasons, tokens_sampled=sampled)


def _kept(column: Any) -> Any:
    return json.dumps(column) if isinstance(column, dict) else column


def _nothing() -> Estimates:
    none = np.zeros(0)
    return Estimates(none, none, {}, np.zeros(0, np.int64), 0, none)


def _start(
    model: Model, task: Task, cohort: Cohort, study: Study, pool: Pool, tally: _Tally
) -> list["Future[Estimates]"]:
    """Give the predictions of a cohort to the pool, in parts that don't depend on the number of workers."""
    parts = []
    for begin in range(0, len(cohort), _CHUNK):
        part = cohort.part(slice(begin, begin + _CHUNK))
        future = pool.submit(
            "rollouts",
            roll_out,
            model,
            task,
            part,
            study.trajectories(task.name),
            study.evaluation.max_tokens,
            study.seed,
        )
        future.add_done_callback(partial(tally.note, len(part)))
        parts.append(future)
    return parts


def _collect(parts: Sequence["Future[Estimates]"]) -> Estimates:
    return joined([part.result() for part in parts]) if parts else _nothing()


def roll_out(model: Model, task: Task, part: Cohort, trajectories: int, max_tokens: int, seed: int) -> Estimates:
    """Answer a question for some predictions, in a worker process."""
    words = Codebook.load(model.codebook)
    decoder = checkpoint.load(model.checkpoint, words.hash).decoder
    return estimate(
        decoder,
        words,
        part,
        task,
        trajectories=trajectories,
        seed=seed,
        max_tokens=max_tokens,
        target_se=task.target_se,
    )
