"""The simulated futures of many patients, written as a MEDS dataset with what was asked and how each one ended.

Notable choices:
- A trajectory is a subject of its own, as MEDS knows no other unit: `subject_id = prediction * R + trajectory` with R
  trajectories for each prediction. Patients' ids may be any int64, so they can't be packed in beside a number;
  `trajectories.parquet` names patient, prediction time and trajectory of every subject.
- Times are absolute. They count from the last event known at the prediction, by the intervals' representative
  durations, and no event lies before the prediction.
- Births are left out: what an age tells is a span, not a day.
- Predictions are rolled out in parts, each a shard, so memory doesn't grow with the patients.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from model.cohort import Cohort, cohort
from model.decoder import Decoder
from model.estimate import Estimates, read_off, stop_of
from model.history import prompt_at
from model.predictions import prediction_table
from model.rollout import Reason, Rollouts, Stop, rollout
from model.tasks import Task, task_tokens
from server.futures import Model, events_of, history_of
from tokenizer import durable
from tokenizer.codebook import STATIC, Codebook
from tokenizer.encode import decode
from tokenizer.errors import ConfigError, DataError
from tokenizer.events import write_meds
from tokenizer.split import SPLITS
from tokenizer.store import TokenSplit, TokenStore

# Predictions in one part and shard.
_PART = 64
_DAY_US = 86_400_000_000
NO_EVENT = "no event with a time by the prediction"


@dataclass(frozen=True)
class Moment:
    """A prediction for every patient, with no question but what comes next.

    Attributes:
        at: the time of all predictions, UTC; None takes the end of each record.
        days: how far to look; None as far as it goes.
        until: code prefixes; an event under any of them ends a trajectory.
    """

    at: datetime | None = None
    days: float | None = None
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How trajectories are drawn: see `model.rollout.rollout`."""

    trajectories: int = 25
    max_tokens: int = 256
    seed: int = 0
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Written:
    """What was simulated.

    Attributes:
        predictions: how many times trajectories were rolled out.
        events: simulated ones.
        reasons: how many trajectories ended for each reason.
        excluded: who was not asked about, counted by reason.
        notes: what the codebook can't tell apart.
    """

    predictions: int
    events: int
    reasons: dict[str, int]
    excluded: dict[str, int]
    notes: tuple[str, ...]


def write_trajectories(
    model: Model,
    store: TokenStore,
    split: str,
    asked: Moment | Sequence[Task],
    out: Path,
    *,
    sampling: Sampling | None = None,
    history: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Roll out the futures of a split's patients and write them to a folder, which appears whole or not at all.

    The folder is a MEDS dataset (`MedsDataset.open` reads it) with the codebook and two more tables:
    `trajectories.parquet` (subject_id, task, patient, prediction_time, trajectory, reason, event, elapsed_days, tokens;
    `event` is the place of the outcome that ended it, -1 for none) and, when tasks are asked, `estimates.parquet` with
    the answer that each task's kind asks for (columns of `model.predictions`; label is -1 where the record doesn't
    tell). What is counted, measured or listed goes on to the horizon; other trajectories end with the outcome.

    Args:
        model: checkpoint and codebook.
        store: where the patients are; made with the model's codebook.
        split: train, tuning or held_out.
        asked: one prediction for each patient, or the predictions of each task with its horizon and outcomes.
        out: the folder to make.
        sampling: how trajectories are drawn; None draws 25 for each prediction.
        history: write what was known before the prediction, too, with the times that were recorded.
        progress: called with trajectories done and to do.

    Raises:
        ConfigError: settings out of range; tasks together with a temperature or top_p that would bias their estimates.
        DataError: a store made with another codebook, or no patient to ask about.
    """
    if split not in SPLITS:
        raise ConfigError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    sampling = sampling or Sampling()
    altered = (sampling.temperature, sampling.top_p) != (1.0, 1.0)
    if altered and not isinstance(asked, Moment):
        raise ConfigError("a temperature or top_p other than 1 would bias the tasks' estimates; leave both at 1")
    codebook = Codebook.load(model.codebook)
    patients = TokenStore.open(store.path, codebook.hash).split(split)
    if isinstance(asked, Moment):
        questions = [_at_moment(asked, patients, codebook, sampling)]
    else:
        questions = [_of_task(task, patients, codebook, sampling) for task in asked]
    excluded: dict[str, int] = {}
    for question in questions:
        for reason, count in question.cohort.excluded.items():
            excluded[reason] = excluded.get(reason, 0) + count
    total = sum(len(question.cohort) for question in questions)
    if not total:
        raise DataError(f"{store.path}, {split}: nobody to ask about ({excluded}); try another split or time")
    decoder = model.decoder(codebook.hash)
    run = _Run(decoder, codebook, patients, sampling, history)

    def finish(folder: Path) -> None:
        _write_table(folder / "trajectories.parquet", run.endings)
        codebook.save(folder / "codebook.json")
        if run.estimates:
            _write_table(folder / "estimates.parquet", run.estimates)

    def told(done: int) -> None:
        if progress is not None:
            progress(done, total * sampling.trajectories)

    write_meds(out, run.shards(questions, told), name=f"{split} futures", finish=finish)
    notes = tuple(dict.fromkeys(note for question in questions for note in question.cohort.notes))
    return Written(total, run.events, run.reasons, excluded, notes)


@dataclass(frozen=True)
class _Question:
    name: str
    cohort: Cohort
    stop: Stop
    task: Task | None = None


class _Run:
    """Rolls questions out part by part, and keeps the small tables."""

    def __init__(
        self, decoder: Decoder, codebook: Codebook, patients: TokenSplit, sampling: Sampling, history: bool
    ) -> None:
        self._decoder, self._codebook, self._sampling = decoder, codebook, sampling
        self._patients, self._history = patients, history
        self._place = {int(subject): place for place, subject in enumerate(patients.subject_ids)}
        self.endings: list[pl.DataFrame] = []
        self.estimates: list[pl.DataFrame] = []
        self.reasons = {reason.name.lower(): 0 for reason in Reason}
        self.events = 0

    def shards(self, questions: Sequence[_Question], told: Callable[[int], None]) -> Iterator[tuple[str, pl.DataFrame]]:
        """Each part's events."""
        sampling, first, shard = self._sampling, 0, 0
        for question in questions:
            for begin in range(0, len(question.cohort), _PART):
                part = question.cohort.part(slice(begin, begin + _PART))
                rolled = rollout(
                    self._decoder,
                    self._codebook,
                    part.prompts,
                    trajectories=sampling.trajectories,
                    stop=question.stop,
                    seed=sampling.seed,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    keep_tokens=True,
                )
                self._note(question, part, rolled, first)
                yield str(shard), self._events(part, rolled, first)
                first, shard = first + len(part), shard + 1
                told(first * sampling.trajectories)

    def _note(self, question: _Question, part: Cohort, rolled: Rollouts, first: int) -> None:
        runs = self._sampling.trajectories
        for reason in Reason:
            self.reasons[reason.name.lower()] += int((rolled.reason == reason).sum())
        times = pl.Series(part.prediction_us).cast(pl.Datetime("us"))
        names = np.array([reason.name.lower() for reason in Reason])
        self.endings.append(
            pl.DataFrame(
                {
                    "subject_id": first * runs + np.arange(rolled.reason.size),
                    "task": [question.name] * rolled.reason.size,
                    "patient": np.repeat(part.subject_ids, runs),
                    "prediction_time": times.gather(np.repeat(np.arange(len(part)), runs)),
                    "trajectory": np.tile(np.arange(runs, dtype=np.int32), len(part)),
                    "reason": names[rolled.reason.ravel()],
                    "event": rolled.event.ravel(),
                    "elapsed_days": rolled.elapsed_us.ravel() / _DAY_US,
                    "tokens": rolled.tokens_sampled.ravel(),
                }
            )
        )
        if question.task is not None:
            elapsed = [prompt.elapsed_us for prompt in part.prompts]
            found = read_off(rolled, question.task, self._codebook, elapsed)
            self.estimates.append(prediction_frame(question.task, part, found))

    def _events(self, part: Cohort, rolled: Rollouts, first: int) -> pl.DataFrame:
        runs = self._sampling.trajectories
        frames = []
        for place, prompt in enumerate(part.prompts):
            last_us = int(part.prediction_us[place]) - prompt.elapsed_us
            known = self._known(part, place) if self._history else None
            for trajectory in range(runs):
                subject = (first + place) * runs + trajectory
                found = decode(
                    rolled.trajectory(place, trajectory),
                    self._codebook,
                    start_us=last_us,
                    passed_us=rolled.passed(place, trajectory),
                )
                future = events_of(found)
                self.events += future.height
                told = future if known is None else pl.concat([known, future])
                frames.append(told.select(pl.lit(subject, pl.Int64).alias("subject_id"), pl.all()))
        return pl.concat(frames)

    def _known(self, part: Cohort, place: int) -> pl.DataFrame:
        """What the prompt tells, with the times that were recorded.

        Where a task moved late codes to the end of their stay, times are those that the intervals' classes stand for.
        """
        timeline, times = self._patients.timeline(self._place[int(part.subject_ids[place])])
        tokens, at = part.prompts[place].tokens, int(part.prediction_us[place])
        before = min(int(np.searchsorted(times, at, side="left")), len(tokens))
        if not np.array_equal(tokens[:before], timeline[:before]):
            begun = at - part.prompts[place].elapsed_us - int(self._codebook.advance_us[tokens].sum())
            return events_of(decode(tokens, self._codebook, start_us=begun))
        # Of the prediction's own moment a prompt may hold a part only, such as the trigger.
        recorded = np.concatenate([times[:before], np.full(len(tokens) - before, at)])
        return history_of(tokens, recorded, self._codebook)


def _at_moment(moment: Moment, patients: TokenSplit, codebook: Codebook, sampling: Sampling) -> _Question:
    """One prediction for each patient of whom anything is known by then."""
    if moment.days is not None and moment.days <= 0:
        raise ConfigError(f"days is {moment.days}; it must be more than 0")
    at = None if moment.at is None else round(moment.at.replace(tzinfo=UTC).timestamp() * 1e6)
    subjects, times_us, prompts = [], [], []
    for place in range(len(patients)):
        timeline, times = patients.timeline(place)
        if len(timeline) and timeline[-1] == codebook.eot:
            timeline, times = timeline[:-1], times[:-1]
        asked = at if at is not None else int(times.max(initial=STATIC))
        if not ((times != STATIC) & (times <= asked)).any():
            continue
        subject = int(patients.subject_ids[place])
        subjects.append(subject)
        times_us.append(asked)
        prompts.append(prompt_at(timeline, times, subject, asked))
    found = Cohort(
        subject_ids=np.array(subjects, np.int64),
        prediction_us=np.array(times_us, np.int64),
        prompts=tuple(prompts),
        labels=np.full(len(prompts), -1, np.int8),
        patients=len(patients),
        excluded={NO_EVENT: len(patients) - len(prompts)},
    )
    horizon_us = None if moment.days is None else round(moment.days * _DAY_US)
    return _Question("", found, Stop(_ends(moment.until, codebook), horizon_us, sampling.max_tokens))


def _ends(until: tuple[str, ...], codebook: Codebook) -> list[NDArray[np.bool_]]:
    masks = [codebook.matching((prefix,)) for prefix in until]
    for prefix, mask in zip(until, masks, strict=True):
        if not mask.any():
            raise ConfigError(f"no event of the codebook is {prefix} or lies below it, so it would end no trajectory")
    return masks


def _of_task(task: Task, patients: TokenSplit, codebook: Codebook, sampling: Sampling) -> _Question:
    stop = stop_of(task, task_tokens(task, codebook), sampling.max_tokens)
    return _Question(task.name, cohort(task, patients, codebook), stop, task)


def prediction_frame(task: Task, asked: Cohort, found: Estimates) -> pl.DataFrame:
    """Answers and estimates of a cohort as a table; its columns are those of `model.predictions`, curves as lists."""
    table = pl.DataFrame(listed(prediction_table(task, asked, found)))
    return table.with_columns(pl.col("prediction_time").cast(pl.Datetime("us")))


def listed(columns: Mapping[str, NDArray]) -> dict[str, pl.Series]:
    """Make columns of polars of arrays [P], and lists of those [P, K]."""
    return {
        name: pl.Series(name, column.tolist()) if column.ndim > 1 else pl.Series(name, column)
        for name, column in columns.items()
    }


def _write_table(path: Path, parts: Sequence[pl.DataFrame]) -> None:
    buffer = io.BytesIO()
    pl.concat(parts, how="diagonal_relaxed").write_parquet(buffer)
    durable.write_bytes(path, buffer.getvalue())
