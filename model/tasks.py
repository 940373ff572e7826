"""Questions asked of the model, and the cohorts they are asked about.

A `Task` names codes: when a prediction is made, what happens if the answer is yes, and what ends the question without
it. `cohort` reads a token split and finds every prediction time, the history known by then, and the answer, as far as
the record tells it. Notable choices:

- Codes are prefixes (`HOSPITAL_DISCHARGE` covers `HOSPITAL_DISCHARGE//HOME`, `ICD10CM//E11` covers `ICD10CM//E11.65`).
  Where several prefixes of a task cover a code, the longest wins: with `HOSPITAL_DISCHARGE//DIED` as outcome and
  `HOSPITAL_DISCHARGE` as competing event, a fatal discharge is the outcome; and a code that an outcome or competing
  prefix covers more closely is no trigger.
- What is known at time t includes everything recorded at t. So an outcome at exactly t is no prediction but an
  exclusion, and within any one time the outcome comes before competing events: a death and a discharge recorded at the
  same moment are a death.
- Nobody is dropped in silence: every patient or trigger that isn't asked about is counted with its reason.

Reads tokens, not events: what the codebook couldn't name it can't find, and `Cohort.notes` says so.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.rollout import Prompt
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError, DataError
from tokenizer.spelling import canonical
from tokenizer.store import TokenSplit

_HOUR_US = 3_600_000_000
_NEVER = np.iinfo(np.int64).max

NO_TRIGGER = "no trigger in the record"
TOO_SHORT = "record ends before the prediction time"
DECIDED = "outcome or competing event by the prediction time"


@dataclass(frozen=True)
class Task:
    """A question about the time after a trigger.

    Attributes:
        name: short, unique in a study.
        question: for people.
        trigger: code prefixes; each trigger event is a possible start.
        outcome: code prefixes; any of them answers yes.
        competing: code prefixes; any of them before the outcome answers no.
        after_hours: the prediction is made this long after the trigger, with all that is recorded by then.
        horizon_days: the outcome counts within this time after the prediction; None: whichever event comes first.
        occurrence: which triggers of a patient count.

    Raises:
        ConfigError: an empty or contradictory definition.
    """

    name: str
    question: str
    trigger: tuple[str, ...]
    outcome: tuple[str, ...]
    competing: tuple[str, ...] = ()
    after_hours: float = 0.0
    horizon_days: float | None = None
    occurrence: Literal["first", "last", "each"] = "first"

    def __post_init__(self) -> None:
        for field in ("trigger", "outcome"):
            if not getattr(self, field):
                raise ConfigError(f"task {self.name!r}: {field} is empty; name at least one code prefix")
        if both := sorted(set(self.outcome) & set(self.competing)):
            raise ConfigError(f"task {self.name!r}: {both[0]} is both outcome and competing; it can be only one")
        if self.after_hours < 0:
            raise ConfigError(f"task {self.name!r}: after_hours is {self.after_hours}; it must be 0 or more")
        if self.horizon_days is not None and self.horizon_days <= 0:
            raise ConfigError(f"task {self.name!r}: horizon_days is {self.horizon_days}; it must be more than 0")
        if self.horizon_days is None and not self.competing:
            raise ConfigError(
                f"task {self.name!r}: without horizon_days and without competing events the answer could never be no; "
                "give one of them"
            )
        if self.occurrence not in ("first", "last", "each"):
            raise ConfigError(f"task {self.name!r}: occurrence is {self.occurrence!r}; it must be first, last or each")

    @property
    def horizon_us(self) -> int | None:
        """The horizon in microseconds."""
        return None if self.horizon_days is None else round(self.horizon_days * 24 * _HOUR_US)


@dataclass(frozen=True)
class TaskTokens:
    """Which events play a part in a task: bool [M] each, over the nodes of the codebook's grammar.

    `outcome` and `competing` share none. `notes` name the prefixes that a codebook can't tell apart from rarer or
    commoner codes.
    """

    trigger: NDArray[np.bool_]
    outcome: NDArray[np.bool_]
    competing: NDArray[np.bool_]
    notes: tuple[str, ...]


def task_tokens(task: Task, codebook: Codebook) -> TaskTokens:
    """Find the events of a task in a codebook: the longest prefix wins, as the module says."""
    trigger = _closeness(task.trigger, codebook)
    outcome = _closeness(task.outcome, codebook)
    competing = _closeness(task.competing, codebook)
    is_outcome = (outcome > 0) & (outcome >= competing)
    is_competing = (competing > 0) & ~is_outcome
    is_trigger = (trigger > 0) & (trigger >= np.maximum(outcome, competing))
    notes = []
    for part, prefixes in (("trigger", task.trigger), ("outcome", task.outcome), ("competing", task.competing)):
        for prefix in prefixes:
            if not codebook.matching((prefix,)).any():
                notes.append(f"{part} {prefix}: no token of the codebook; {_shelter(prefix, codebook)}")
    return TaskTokens(is_trigger, is_outcome, is_competing, tuple(notes))


@dataclass(frozen=True)
class Counts:
    """How a cohort came about.

    `patients` were looked at; `predictions` are asked about, of which `positive` + `negative` + `censored`; `excluded`
    counts patients (`NO_TRIGGER`) and triggers (all other reasons) that aren't.
    """

    patients: int
    predictions: int
    positive: int
    negative: int
    censored: int
    excluded: dict[str, int]


@dataclass(frozen=True)
class Cohort:
    """P predictions to make.

    Attributes:
        subject_ids: int64 [P]; a patient stands as often as they are asked about.
        prediction_us: int64 [P], microseconds since the epoch.
        prompts: what is known at each prediction time.
        labels: int8 [P]: 1 outcome first and within the horizon; 0 a competing event first, or the horizon passed
            with the record going on; -1 the record ends before either (censored).
        patients: how many were looked at.
        excluded: counts by reason.
        notes: what the codebook couldn't tell apart.
    """

    subject_ids: NDArray[np.int64]
    prediction_us: NDArray[np.int64]
    prompts: tuple[Prompt, ...]
    labels: NDArray[np.int8]
    patients: int
    excluded: dict[str, int]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def counts(self) -> Counts:
        """Count the predictions by answer, and the exclusions by reason."""
        positive, negative, censored = (int((self.labels == label).sum()) for label in (1, 0, -1))
        return Counts(self.patients, len(self), positive, negative, censored, dict(self.excluded))

    def labelled(self) -> "Cohort":
        """Return the cohort without censored predictions."""
        return self.part(np.nonzero(self.labels >= 0)[0])

    def part(self, which: slice | NDArray[np.int64]) -> "Cohort":
        """Return some of the predictions, in the order given."""
        rows = np.arange(len(self))[which]
        return replace(
            self,
            subject_ids=self.subject_ids[rows],
            prediction_us=self.prediction_us[rows],
            prompts=tuple(self.prompts[row] for row in rows),
            labels=self.labels[rows],
        )


def join(cohorts: Sequence[Cohort]) -> Cohort:
    """Put the cohorts of one task at several sites together, in the order given."""
    if not cohorts:
        raise DataError("no cohorts to join; at least one site is needed")
    excluded: dict[str, int] = {}
    for cohort_ in cohorts:
        for reason, count in cohort_.excluded.items():
            excluded[reason] = excluded.get(reason, 0) + count
    return Cohort(
        subject_ids=np.concatenate([c.subject_ids for c in cohorts]),
        prediction_us=np.concatenate([c.prediction_us for c in cohorts]),
        prompts=tuple(prompt for c in cohorts for prompt in c.prompts),
        labels=np.concatenate([c.labels for c in cohorts]),
        patients=sum(c.patients for c in cohorts),
        excluded=excluded,
        notes=tuple(dict.fromkeys(note for c in cohorts for note in c.notes)),
    )


def cohort(task: Task, split: TokenSplit, codebook: Codebook) -> Cohort:
    """Find the predictions that `task` asks for among the patients of `split`.

    Args:
        task: the question.
        split: tokens and times of whole timelines.
        codebook: the one that wrote them.

    Returns:
        The cohort, by patient and time; prompts are views of the split's tokens.
    """
    tokens = task_tokens(task, codebook)
    found = _Found([], [], [], [])
    excluded = {NO_TRIGGER: 0, TOO_SHORT: 0, DECIDED: 0}
    for patient in range(len(split)):
        timeline, times = split.timeline(patient)
        at, events = codebook.grammar.events(timeline)
        at = times[at]
        starts = _starts(task, at[tokens.trigger[events]])
        if not len(starts):
            excluded[NO_TRIGGER] += 1
            continue
        story = _Story(
            timeline=timeline[:-1] if len(timeline) and timeline[-1] == codebook.eot else timeline,
            times=times,
            outcomes=at[tokens.outcome[events]],
            competing=at[tokens.competing[events]],
            others=at[((tokens.outcome | tokens.competing) & ~tokens.trigger)[events]],
        )
        for start in starts:
            asked = int(start) + round(task.after_hours * _HOUR_US)
            if reason := _unfit(story, int(start), asked):
                excluded[reason] += 1
                continue
            subject_id = int(split.subject_ids[patient])
            found.subject_ids.append(subject_id)
            found.prediction_us.append(asked)
            found.prompts.append(prompt_at(story.timeline, story.times, subject_id, asked))
            found.labels.append(_label(story, asked, task.horizon_us))
    return Cohort(
        subject_ids=np.array(found.subject_ids, np.int64),
        prediction_us=np.array(found.prediction_us, np.int64),
        prompts=tuple(found.prompts),
        labels=np.array(found.labels, np.int8),
        patients=len(split),
        excluded=excluded,
        notes=tokens.notes,
    )


@dataclass
class _Found:
    subject_ids: list[int]
    prediction_us: list[int]
    prompts: list[Prompt]
    labels: list[int]


@dataclass(frozen=True)
class _Story:
    """One patient: tokens without the end of timeline, times of all tokens, and times of what decides the question.

    An event that comes again is trigger and outcome at once and decides nothing at its own time; `others` are the
    deciding events that are no triggers.
    """

    timeline: NDArray[np.int32]
    times: NDArray[np.int64]
    outcomes: NDArray[np.int64]
    competing: NDArray[np.int64]
    others: NDArray[np.int64]


def _starts(task: Task, times: NDArray[np.int64]) -> NDArray[np.int64]:
    distinct = np.unique(times)
    match task.occurrence:
        case "first":
            return distinct[:1]
        case "last":
            return distinct[-1:]
        case _:
            return distinct


def _unfit(story: _Story, start: int, at: int) -> str | None:
    for events in (story.outcomes, story.competing):
        if ((events > start) & (events <= at)).any():
            return DECIDED
    if (story.others == start).any():
        return DECIDED
    return TOO_SHORT if story.times[-1] < at else None


def prompt_at(timeline: NDArray[np.int32], times: NDArray[np.int64], subject_id: int, at: int) -> Prompt:
    """What is known of a patient at a time: the tokens up to it, and a key that follows from patient and time.

    Args:
        timeline: int32 [T], without the end of the timeline.
        times: int64, microseconds, of at least those tokens.
        subject_id: the patient.
        at: the prediction, microseconds since the epoch; an event with a time lies before or at it.
    """
    length = int(np.searchsorted(times[: len(timeline)], at, side="right"))
    # The draws follow from patient and time: the same in every arm, and whoever else is in the cohort.
    digest = hashlib.blake2b(f"{subject_id} {at}".encode(), digest_size=8).digest()
    return Prompt(
        tokens=timeline[:length],
        elapsed_us=at - int(times[length - 1]),
        key=int.from_bytes(digest, "little", signed=True),
    )


def _label(story: _Story, at: int, horizon_us: int | None) -> int:
    outcome = int(story.outcomes[story.outcomes > at].min(initial=_NEVER))
    competing = int(story.competing[story.competing > at].min(initial=_NEVER))
    end = _NEVER if horizon_us is None else at + horizon_us
    if outcome < _NEVER and outcome <= min(competing, end):
        return 1
    if min(competing, end) <= int(story.times[-1]):
        return 0
    return -1


def _closeness(prefixes: Sequence[str], codebook: Codebook) -> NDArray[np.int64]:
    """Length of the longest prefix that covers each event: int64 [M], 0 where none does."""
    closeness = np.zeros(codebook.grammar.nodes, np.int64)
    for prefix in prefixes:
        # Prefixes that cover one code lie on one line of ancestors: the closer, the longer.
        length = len(canonical(prefix.removesuffix("//")))
        closeness = np.maximum(closeness, np.where(codebook.matching((prefix,)), length, 0))
    return closeness


def _shelter(prefix: str, codebook: Codebook) -> str:
    told = codebook.tell(prefix)
    return (
        f"if it occurs, it is told as {told.text} and counted as that" if told.text else "if it occurs, it is not seen"
    )
