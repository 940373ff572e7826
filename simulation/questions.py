"""Put the same questions to every arm, on the held-out patients of all sites.

Those patients trained nothing and chose nothing. In a real federation the server has a public, synthetic or consented
cohort instead; in a simulation it may read these.
"""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from client.archive import Archive
from client.site import SiteFiles
from federation.manifest import Manifest
from model import checkpoint
from model.estimate import estimate
from model.tasks import Cohort, Task, cohort, join
from server.futures import Model
from simulation.arms import FEDERATED, Arm
from simulation.baselines import baselines
from simulation.config import Study
from simulation.pool import Pool
from tokenizer import durable
from tokenizer.codebook import Codebook
from tokenizer.errors import DataError
from tokenizer.progress import Step, Watch
from tokenizer.store import TokenStore

ENSEMBLE, TRUTH, MODEL = "ensemble", "true risk", "model"

_Part: TypeAlias = tuple[NDArray[np.float64], NDArray[np.float64]]

_CHUNK = 64
"""Predictions that one job rolls out."""


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


def tasks(study: Study) -> tuple[Task, ...]:
    """Give the questions of a study as `model.tasks` puts them.

    Raises:
        ConfigError: a question that contradicts itself.
    """
    return tuple(Task(**question.model_dump(exclude={"trajectories"})) for question in study.task)


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
    asked = [_ask(task, sites, federated.outcome.manifest, codebook, study, folder) for task in tasks(study)]
    trained = [arm for arm in arms if arm.outcome is not None]
    total = sum(len(question.cohort) for question in asked) * len(trained)
    tally = _Tally("rollouts", total, watch)
    jobs = [[_Roll.start(arm, question, study, codebook, folder, pool, tally) for arm in trained] for question in asked]
    answers = []
    for question, rolls in zip(asked, jobs, strict=True):
        found = {roll.arm: roll.finish() for roll in rolls}
        risks = {name: risk for name, (risk, _) in found.items()}
        alone = [risks[arm.name] for arm in trained if arm.name.endswith(" alone")]
        if ENSEMBLE in study.arms and alone:
            risks[ENSEMBLE] = np.mean(alone, axis=0)
        unresolved = {
            name: float(1 - resolved.mean()) if len(resolved) else 0.0 for name, (_, resolved) in found.items()
        }
        if "supervised" in study.arms:
            risks |= _supervised(question, sites, federated.outcome.manifest, codebook, study)
        answers.append(replace(question, risks={**risks, **question.risks}, unresolved=unresolved))
    return tuple(answers)


def _supervised(
    question: Answers, sites: tuple[SiteFiles, ...], manifest: Manifest, codebook: Codebook, study: Study
) -> dict[str, NDArray[np.float64]]:
    """What models trained for the question only answer."""
    stores = {}
    for site in sites:
        archive = Archive(site.state)
        if (agreement := archive.run(manifest.hash).agreement()) is not None:
            stores[site.name] = TokenStore.open(archive.store_path(agreement.store), codebook.hash)
    return baselines(question.task, stores, codebook, question.cohort, study.seed)


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


def evaluate(
    model: Model, store: TokenStore, study: Study, split: str, pool: Pool, watch: Watch
) -> tuple[Answers, ...]:
    """Put a study's questions to one trained model, about the patients of a store.

    Args:
        model: who answers.
        store: made with the model's codebook.
        study: its questions, its evaluation and its seed are used.
        split: whom to ask about.
        pool: who rolls out.
        watch: told of every part, from several threads.

    Raises:
        DataError: the store was made with another codebook.
    """
    codebook = Codebook.load(model.codebook)
    patients = TokenStore.open(store.path, codebook.hash).split(split)
    cohorts = [(task, cohort(task, patients, codebook)) for task in tasks(study)]
    tally = _Tally("rollouts", sum(int((found.labels >= 0).sum()) for _, found in cohorts), watch)
    asked = []
    for task, found in cohorts:
        labelled = found.labelled()
        parts = _start(model, task, labelled, study, pool, tally)
        nowhere = np.zeros(len(labelled), np.int64)
        asked.append((Answers(task, labelled, nowhere, len(found) - len(labelled), {}, {}), parts))
    answers = []
    for question, parts in asked:
        risk, resolved = _collect(parts)
        unresolved = {MODEL: float(1 - resolved.mean()) if len(resolved) else 0.0}
        answers.append(replace(question, risks={MODEL: risk}, unresolved=unresolved))
    return tuple(answers)


def write(path: Path, answers: Sequence[Answers]) -> None:
    """Write every prediction to a Parquet file: task, subject_id, prediction_time, label, and a risk column per arm."""
    tables = [
        pl.DataFrame(
            {
                "task": [found.task.name] * len(found.cohort),
                "subject_id": found.cohort.subject_ids,
                "prediction_time": pl.Series(found.cohort.prediction_us).cast(pl.Datetime("us")),
                "label": found.cohort.labels,
                **found.risks,
            }
        )
        for found in answers
    ]
    buffer = io.BytesIO()
    pl.concat(tables, how="diagonal").write_parquet(buffer)
    durable.write_bytes(path, buffer.getvalue())


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
    parts: Sequence["Future[_Part]"]

    @classmethod
    def start(
        cls, arm: Arm, question: Answers, study: Study, codebook: Codebook, folder: Path, pool: Pool, tally: _Tally
    ) -> "_Roll":
        assert arm.outcome is not None
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
        model = Model(best, arm.outcome.codebook)
        parts = _start(model, question.task, question.cohort, study, pool, tally)
        return cls(arm.name, path, parts)

    def finish(self) -> _Part:
        """Wait for the risks and the resolved shares, float64 [P] each, and keep them."""
        if self.parts:
            risk, resolved = _collect(self.parts)
            buffer = io.BytesIO()
            np.savez(buffer, risk=risk, resolved=resolved)
            durable.write_bytes(self.path, buffer.getvalue())
            return risk, resolved
        if not self.path.exists():
            return np.zeros(0), np.zeros(0)
        with np.load(self.path) as kept:
            return kept["risk"], kept["resolved"]


def _start(model: Model, task: Task, cohort: Cohort, study: Study, pool: Pool, tally: _Tally) -> list["Future[_Part]"]:
    """Give the predictions of a cohort to the pool, in parts that don't depend on the number of workers."""
    trajectories = study.trajectories(task.name)
    parts = []
    for begin in range(0, len(cohort.prompts), _CHUNK):
        part = replace(cohort, prompts=cohort.prompts[begin : begin + _CHUNK])
        future = pool.submit(
            "rollouts", roll_out, model, task, part, trajectories, study.evaluation.max_tokens, study.seed
        )
        future.add_done_callback(partial(tally.note, len(part.prompts)))
        parts.append(future)
    return parts


def _collect(parts: Sequence["Future[_Part]"]) -> _Part:
    if not parts:
        return np.zeros(0), np.zeros(0)
    risk, resolved = (np.concatenate(columns) for columns in zip(*(part.result() for part in parts), strict=True))
    return risk, resolved


def roll_out(model: Model, task: Task, part: Cohort, trajectories: int, max_tokens: int, seed: int) -> _Part:
    """Answer a question for some predictions, in a worker process: risks and resolved shares, float64 [P] each."""
    words = Codebook.load(model.codebook)
    decoder = checkpoint.load(model.checkpoint, words.hash).decoder
    found = estimate(decoder, words, part, task, trajectories=trajectories, seed=seed, max_tokens=max_tokens)
    return found.risk, found.resolved
