"""The report of one file of predictions: the same page as a study's, for one model's answers.

Whom was asked, and which model and records it is about, comes from the file itself where `fedcomet evaluate` wrote it.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from federation.manifest import software_version
from model.cohort import Counts
from server.about import About, Asked, read_about
from server.results import Codebook, Question, Report, Scorecard, measure
from tokenizer.errors import DataError

_MODEL = "model"


def report_of_file(
    path: Path, cards: Sequence[Scorecard], *, title: str = "", seed: int = 0, resamples: int = 500, command: str = ""
) -> Report:
    """Make the report of a file of predictions.

    Args:
        path: the Parquet file, as `server.scorecard` takes it.
        cards: its scorecards.
        title: of the page; the file's name when empty.
        seed, resamples: of the bootstrap.
        command: what was typed, to be shown.

    Raises:
        DataError: what the file says of itself can't be read, or a task has no scorecard.
    """
    table, about = pl.read_parquet(path), read_about(path)
    by_task = {card.task: card for card in cards}
    questions = []
    for (name,), part in table.partition_by("task", as_dict=True, maintain_order=True).items():
        if str(name) not in by_task:
            raise DataError(f"{path}: there is no scorecard of task {name!r}; measure the same file")
        questions.append(_question(str(name), part, by_task[str(name)], about, seed, resamples))
    facts = about or About({}, (), ())
    return Report(
        title=title or path.name,
        name=path.name,
        introduction="A model's simulated timelines answered questions about patients whom it had not been trained on."
        if about
        else "Predictions and what came of them. The file doesn't say whose they are, or who was left out.",
        settings=facts.facts,
        sites=(),
        questions=tuple(questions),
        training=(),
        rounds=(),
        outbound=(),
        codebook=Codebook("", {}),
        command=command,
        versions=(("fedcomet", software_version()),),
        hashes=(("Predictions, sha256", hashlib.sha256(path.read_bytes()).hexdigest()), *facts.hashes),
    )


def horizons_of(path: Path) -> dict[str, float]:
    """The horizons of a file's tasks in days, as far as it says."""
    about = read_about(path)
    asked = about.questions if about else {}
    return {name: each.horizon_days for name, each in asked.items() if each.horizon_days is not None}


def _question(
    name: str, part: pl.DataFrame, card: Scorecard, about: About | None, seed: int, resamples: int
) -> Question:
    known = part.filter(pl.col("label") >= 0)
    labels, answers = known["label"].to_numpy(), known["label"].value_counts()
    count = {int(row[0]): int(row[1]) for row in answers.rows()}
    patients = part["subject_id"].n_unique()
    plain = Counts(patients, part.height, count.get(1, 0), count.get(0, 0), part.height - known.height, {})
    asked = about.questions.get(name) if about else None
    asked = asked or Asked(f"Task {name}", (), plain, None)
    hashes = part["task_hash"].drop_nulls().unique().to_list() if "task_hash" in part.columns else []
    return measure(
        name,
        asked.question,
        labels,
        {_MODEL: known["risk"].to_numpy().astype(np.float64)},
        {_MODEL: "federated"},
        subjects=known["subject_id"].to_numpy(),
        seed=seed,
        resamples=resamples,
        definition=asked.definition,
        counts=asked.counts,
        notes=(*asked.notes, *card.notes),
        score=card,
        hashes=tuple(("Task, sha256", str(each)) for each in hashes),
    )
