"""What is known of some patients and what a model believes may come, laid out for people to look at.

For each patient and task one prediction: the events up to it, the simulated futures as the task sees them (they end
where its question is answered), the risk by day with its standard error, and what the record says came of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from model.cohort import Cohort, cohort
from model.estimate import Told, tell
from model.rollout import Prompt, Reason
from model.tasks import Task, writings
from server.futures import Model, events_of, history_of
from tokenizer.codebook import STATIC, Codebook
from tokenizer.encode import decode
from tokenizer.errors import ConfigError, DataError
from tokenizer.store import TokenSplit, TokenStore

_DAY_US = 86_400_000_000
_ENDS = {
    Reason.HORIZON: "nothing to the horizon",
    Reason.END: "the record ends",
    Reason.CAP: "stopped at the most tokens",
}
_KINDS = (
    ("stays", ("HOSPITAL", "ENCOUNTER", "ICU", "ED_", "TRANSFER", "VISIT")),
    ("diagnoses", ("DIAGNOSIS", "ICD10CM", "ICD9CM", "CONDITION", "DRG")),
    ("measurements", ("LAB", "VITAL", "MEASUREMENT", "LOINC", "OBSERVATION")),
    ("treatments", ("MEDICATION", "ATC", "RXNORM", "PROCEDURE", "ICD10PCS", "ICD9Proc", "DRUG", "INFUSION", "HCPCS")),
)
KINDS = (*(name for name, _ in _KINDS), "other")
"""Rows of a timeline."""


@dataclass(frozen=True)
class Happening:
    """An event: `day` counts from the prediction, below 0 before it; `answers` marks the outcome."""

    day: float
    code: str
    name: str
    kind: str
    value: float | None
    unit: str
    answers: bool = False


@dataclass(frozen=True)
class Future:
    """A trajectory: its events, how it ends ("outcome", "competing", or other words), and on which day."""

    events: tuple[Happening, ...]
    end: str
    day: float


@dataclass(frozen=True)
class Lifeline:
    """A patient at a prediction.

    Attributes:
        patient: subject_id.
        at: the prediction, UTC.
        facts: what is known without a time.
        history: events up to the prediction.
        futures: the first few trajectories.
        trajectories: how many the risk comes from.
        risk, se: with its standard error over trajectories, None where one trajectory tells nothing of it.
        days, curve, curve_se: risk by day; empty without a horizon.
        truth: what the record says came of it.
    """

    patient: int
    at: str
    facts: tuple[str, ...]
    history: tuple[Happening, ...]
    futures: tuple[Future, ...]
    trajectories: int
    risk: float
    se: float | None
    days: tuple[float, ...]
    curve: tuple[float, ...]
    curve_se: tuple[float, ...]
    truth: str


@dataclass(frozen=True)
class Book:
    """The lifelines of one task."""

    task: Task
    lifelines: tuple[Lifeline, ...]


def lifelines(
    model: Model,
    store: TokenStore,
    tasks: Sequence[Task],
    *,
    split: str = "held_out",
    patients: Sequence[int] = (),
    most: int = 6,
    trajectories: int = 32,
    shown: int = 8,
    max_tokens: int = 256,
    seed: int = 0,
    names: Mapping[str, str] | None = None,
) -> tuple[Book, ...]:
    """Roll out the futures of a few patients.

    Args:
        model: checkpoint and codebook.
        store: where the patients are; made with the model's codebook.
        tasks: the questions; each is asked at a patient's first prediction.
        split: train, tuning or held_out.
        patients: whom to show; when none are named, `most` of those whom most tasks ask about.
        most: see `patients`.
        trajectories: of each prediction; the first `shown` of them are kept to be looked at.
        max_tokens, seed: of the rollouts.
        names: what codes are called.

    Raises:
        ConfigError: no task, nothing to show, or a task that takes its predictions from a file.
        DataError: a store of another codebook, or no task asks about these patients.
    """
    if not tasks or trajectories < 1 or shown < 1 or most < 1:
        raise ConfigError("name at least one task, patient and trajectory to look at")
    codebook = Codebook.load(model.codebook)
    people = TokenStore.open(store.path, codebook.hash).split(split)
    asked = [_firsts(cohort(task, people, codebook)) for task in tasks]
    chosen = _chosen(asked, patients, most)
    decoder = model.decoder(codebook.hash)
    teller = _Teller(codebook, people, names or {}, shown)
    books = []
    for task, whole in zip(tasks, asked, strict=True):
        part = whole.part(np.flatnonzero(np.isin(whole.subject_ids, chosen)))
        if len(part):
            options = {"trajectories": trajectories, "seed": seed, "max_tokens": max_tokens}
            told = tell(decoder, codebook, part, task, **options)
            books.append(Book(task, tuple(teller.lifeline(task, part, told, row) for row in range(len(part)))))
    return tuple(books)


def names_of(path: Path) -> dict[str, str]:
    """Read what codes are called from a MEDS dataset's `metadata/codes.parquet`, if it says.

    Raises:
        DataError: a file that can't be read.
    """
    try:
        table = pl.read_parquet(path / "metadata" / "codes.parquet", columns=["code", "description"])
    except (OSError, pl.exceptions.PolarsError) as problem:
        raise DataError(f"{path}: no names of codes ({problem}); name a MEDS dataset with them") from None
    return {code: text for code, text in table.drop_nulls().rows() if text}


def readable(code: str, names: Mapping[str, str]) -> tuple[str, str]:
    """Give what a code is called, and its unit.

    >>> readable("LAB//CREATININE//mg/dL", {}), readable("HOSPITAL_ADMISSION//EMERGENCY", {})
    (('Creatinine', 'mg/dL'), ('Hospital admission: emergency', ''))
    >>> readable("DIAGNOSIS//ICD10CM//I21.4", {"DIAGNOSIS//ICD10CM//I21.4": "Infarct"})
    ('Infarct (I21.4)', '')
    >>> readable("DIAGNOSIS//ICD10CM//I21.4", {})
    ('Diagnosis: ICD10CM I21.4', '')
    """
    head, *rest = code.split("//")
    measured = kind_of(code) == "measurements" and len(rest) > 1
    unit = rest.pop() if measured else ""
    if code in names:
        short = "" if measured or not rest else f" ({rest[-1]})"
        return names[code] + short, "" if unit == "UNK" else unit
    if measured or (kind_of(code) == "measurements" and rest):
        return _words(" ".join(rest)), "" if unit == "UNK" else unit
    told = " ".join(rest)
    coded = len(told) < 3 or any(letter.isdigit() for letter in told)
    told = told if coded else told.replace("_", " ").lower()
    return _words(head) + (f": {told}" if told else ""), unit


def kind_of(code: str) -> str:
    """Tell which row of the timeline a code stands in."""
    return next((name for name, heads in _KINDS if code.startswith(heads)), "other")


def _words(text: str) -> str:
    # Short ones and those with a hyphen are abbreviations.
    plain = " ".join(
        word if len(word) < 4 or not word.isalpha() or not word.isupper() else word.lower()
        for word in text.replace("_", " ").split()
    )
    return plain[:1].upper() + plain[1:]


def _firsts(whole: Cohort) -> Cohort:
    """The first prediction of every patient."""
    return whole.part(np.unique(whole.subject_ids, return_index=True)[1])


def _chosen(asked: Sequence[Cohort], wanted: Sequence[int], most: int) -> np.ndarray:
    subjects, times = np.unique(np.concatenate([part.subject_ids for part in asked]), return_counts=True)
    if missing := sorted(set(wanted) - set(subjects.tolist())):
        raise DataError(f"no task asks about patient {missing[0]}; `fedcomet tasks explain` says why")
    if not len(subjects):
        raise DataError("no task asks about anybody in this split; try another one")
    if len(wanted):
        return np.array(sorted(set(wanted)))
    often = subjects[times == times.max()]
    came = np.unique(np.concatenate([part.subject_ids[part.labels == 1] for part in asked]))
    # Half of them with an outcome, as far as there are any: futures without one look all the same.
    with_, without = often[np.isin(often, came)], often[~np.isin(often, came)]
    half = min(len(with_), max(most // 2, most - len(without)))
    return np.sort(np.concatenate([_spread(with_, half), _spread(without, most - half)]))


def _spread(subjects: np.ndarray, count: int) -> np.ndarray:
    """So many of the subjects, at even distances."""
    places = np.linspace(0, len(subjects) - 1, min(count, len(subjects))) if len(subjects) else np.zeros(0)
    return subjects[np.unique(places.round().astype(int))]


class _Teller:
    """Turns tokens into what people read."""

    def __init__(self, codebook: Codebook, people: TokenSplit, names: Mapping[str, str], shown: int) -> None:
        self._codebook, self._people, self._names, self._shown = codebook, people, names, shown
        self._place = {int(subject): place for place, subject in enumerate(people.subject_ids)}

    def lifeline(self, task: Task, part: Cohort, told: Told, row: int) -> Lifeline:
        found, at = told.estimates, int(part.prediction_us[row])
        prompt = part.prompts[row]
        known = self._history(int(part.subject_ids[row]), prompt, at)
        facts = known.filter(pl.col("time").is_null())["code"].to_list()
        ages = [word.text for word in (self._codebook.tokens[token] for token in prompt.tokens) if word.kind == "age"]
        run = min(self._shown, told.rolled.reason.shape[1])
        grid = len(found.grid_days) and not np.isnan(found.curve[row]).any()
        return Lifeline(
            patient=int(part.subject_ids[row]),
            at=_moment(at),
            facts=(*(readable(fact, self._names)[0] for fact in facts), *(f"age {age}" for age in ages[-1:])),
            history=self._happenings(known.filter(pl.col("time").is_not_null()), at),
            futures=tuple(self._future(task, told, (row, place), prompt.elapsed_us, at) for place in range(run)),
            trajectories=int(found.trajectories[row]),
            risk=float(found.risk[row]),
            se=None if np.isnan(found.se[row]) or task.kind in ("count", "time", "value") else float(found.se[row]),
            days=tuple(found.grid_days.tolist()) if grid else (),
            curve=tuple(found.curve[row].tolist()) if grid else (),
            curve_se=tuple(np.nan_to_num(told.curve_se[row]).tolist()) if grid else (),
            truth=_truth(part, row),
        )

    def _history(self, subject: int, prompt: Prompt, at: int) -> pl.DataFrame:
        timeline, times = self._people.timeline(self._place[subject])
        size = len(prompt.tokens)
        if np.array_equal(timeline[:size], prompt.tokens) and (times[:size] != STATIC).any():
            return history_of(timeline[:size], times[:size], self._codebook)
        # Codes that were moved to when they were known: their times follow from the intervals.
        told = events_of(decode(prompt.tokens, self._codebook, start_us=0))
        last = told["time"].to_physical().max()
        shift = at - prompt.elapsed_us - (int(last) if isinstance(last, int) else 0)
        return told.with_columns(pl.col("time") + pl.duration(microseconds=shift))

    def _future(self, task: Task, told: Told, where: tuple[int, int], elapsed_us: int, at: int) -> Future:
        rolled, horizon = told.rolled, task.horizon_days
        events = events_of(
            decode(rolled.trajectory(*where), self._codebook, start_us=at - elapsed_us, passed_us=rolled.passed(*where))
        )
        reason = Reason(int(rolled.reason[where]))
        end = _ENDS.get(reason, "outcome" if rolled.event[where] == 0 else "competing")
        day = max(float(rolled.elapsed_us[where]) / _DAY_US, 0.0)
        if reason is Reason.HORIZON and horizon is not None:
            day = min(day, horizon)  # the interval that passed it may be a long one
        found = self._happenings(events, at, tuple(each for code in task.outcome for each in writings(code)))
        return Future(tuple(event for event in found if horizon is None or event.day <= horizon), end, day)

    def _happenings(self, events: pl.DataFrame, at: int, answers: tuple[str, ...] = ()) -> tuple[Happening, ...]:
        found = []
        columns = events["time"].to_physical(), events["code"], events["numeric_value"]
        for time, code, value in zip(*columns, strict=True):
            name, unit = readable(code, self._names)
            number = None if value is None or not np.isfinite(value) else float(value)
            day = (int(time) - at) / _DAY_US
            found.append(Happening(day, code, name, kind_of(code), number, unit, code.startswith(answers)))
        return tuple(found)


def _truth(part: Cohort, row: int) -> str:
    days, event = float(part.told["time_days"][row]), int(part.told["event"][row])
    if part.labels[row] == 1:
        return f"The outcome came, on day {days:.1f}."
    if part.labels[row] == 0:
        return f"A competing event came first, on day {days:.1f}." if event == 2 else "The outcome did not come."
    return f"The record ends on day {days:.1f}, before the answer."


def _moment(time_us: int) -> str:
    return str(np.datetime64(time_us, "us").astype("datetime64[m]")).replace("T", " ")
