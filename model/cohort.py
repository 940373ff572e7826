"""Whom a task asks about: every prediction, the history known by then, and the answer as far as the record tells it.

Notable choices:
- The future begins where knowledge ends: with `known = "before"` an outcome at the prediction itself is still to come,
  else it is decided. Within any one time the outcome comes before competing events: a death and a discharge recorded at
  the same moment are a death.
- What is counted, measured or listed is asked for from the prediction on, whatever came before: there only competing
  events decide. (Else nobody who had a laboratory test in the first hours could be asked about those of the rest.)
- Nobody is dropped in silence: every patient or start that isn't asked about is counted with its reason, and
  `decisions` tells it patient by patient.
- Patients who train are never asked about (`refuse_trained`).

Reads tokens, not events: what the codebook couldn't name it can't find, and `Cohort.notes` says so. Values are the
medians of their bins.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from model.history import Bools, Ints, Timeline, age_at, known_prompt, moved_to, retimed, timeline
from model.rollout import Prompt
from model.tasks import Eligible, Known, Task, TaskTokens, matching, task_tokens
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError, DataError
from tokenizer.labels import Labels
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import TokenSplit

_HOUR_US = 3_600_000_000
_DAY_US = 24 * _HOUR_US
_NEVER = np.iinfo(np.int64).max

NO_TRIGGER = "no trigger in the record"
TOO_SHORT = "record ends before the prediction time"
DECIDED = "outcome or competing event by the prediction time"
UNKNOWN = "nothing is recorded before the prediction time"
REPEAT = "had the outcome before"
LACKS = "lacks what is required"
EXCLUDED = "has what is excluded"
AGE = "not of the age, or age unknown"
NEW = "history too short"
ABSENT = "not in this store"

# Kinds of task that outcomes don't end.
_GOES_ON = ("count", "value", "set")

# Codes that are often dated at admission though they are assigned for billing, when a stay is over.
_BILLED = ("ICD10CM", "ICD9CM", "DIAGNOSIS", "DRG", "ICD10PCS", "ICD9Proc", "HCPCS")
_STAYS = (("HOSPITAL_ADMISSION", "ENCOUNTER_START"), ("HOSPITAL_DISCHARGE", "ENCOUNTER_END"))


@dataclass(frozen=True)
class Counts:
    """How a cohort came about.

    `patients` were looked at; `predictions` are asked about, of which `positive` + `negative` + `censored`; `excluded`
    counts patients (`NO_TRIGGER`) and starts (all other reasons) that aren't.
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
        notes: what the codebook couldn't tell apart, and what leaks may lurk.
        told: more of the answers, columns [P] by name: `time_days` float64, time to the outcome, the competing event,
            or the end of what is known; `event` int8, which of them: 1, 2, 0; `repeat` bool, whether the history holds
            the outcome; by the kind of task `count` and `value` float64 (nan: unknown), `codes` int8 [P, C] (-1:
            unknown), one for each outcome prefix.
    """

    subject_ids: NDArray[np.int64]
    prediction_us: NDArray[np.int64]
    prompts: tuple[Prompt, ...]
    labels: NDArray[np.int8]
    patients: int
    excluded: dict[str, int]
    notes: tuple[str, ...] = ()
    told: Mapping[str, NDArray] = ()  # type: ignore[assignment]

    def __post_init__(self) -> None:
        object.__setattr__(self, "told", dict(self.told))

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
            told={name: column[rows] for name, column in self.told.items()},
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
        told={name: np.concatenate([c.told[name] for c in cohorts]) for name in cohorts[0].told},
    )


def refuse_trained(split: TokenSplit, rule: SplitRule) -> None:
    """See that nobody in a split trains, at whichever site, by the keyed rule of the model's run.

    Raises:
        DataError: some do.
    """
    trained = rule.assign(np.asarray(split.subject_ids)) == SPLITS.index("train")
    if trained.any():
        raise DataError(
            f"{int(trained.sum())} of {len(split)} patients train by the split rule {rule}, so what the model says "
            "of them is no evidence; ask about tuning or held_out patients of a store with the run's own split"
        )


@dataclass(frozen=True)
class Decision:
    """What became of one possible prediction.

    Attributes:
        subject_id: the patient.
        start_us: the trigger, day or label that it starts from; None where a patient has none.
        asked_us: the prediction; None as well.
        reason: why it isn't made; "" if it is.
        prompt: what is known, where it is made.
        label, told: the answer, as in `Cohort`.
    """

    subject_id: int
    start_us: int | None
    asked_us: int | None
    reason: str = ""
    prompt: Prompt | None = None
    label: int = -1
    told: Mapping[str, float | int | bool | NDArray[np.int8]] = ()  # type: ignore[assignment]


def cohort(task: Task, split: TokenSplit, codebook: Codebook, *, given: Labels | None = None) -> Cohort:
    """Find the predictions that `task` asks for among the patients of `split`.

    Args:
        task: the question.
        split: tokens and times of whole timelines.
        codebook: the one that wrote them.
        given: predictions and answers of a task that has them in a file.

    Returns:
        The cohort, by patient and time.

    Raises:
        ConfigError: `given` is missing, or not asked for.
    """
    finder = Finder(task, codebook, given)
    made: list[Decision] = []
    excluded = {NO_TRIGGER: 0, TOO_SHORT: 0, DECIDED: 0}
    for patient in range(len(split)):
        for decision in finder.decisions(split, patient):
            if decision.reason:
                excluded[decision.reason] = excluded.get(decision.reason, 0) + 1
            else:
                made.append(decision)
    if given is not None:
        absent = int((~np.isin(given.subject_ids, split.subject_ids)).sum())
        excluded |= {ABSENT: absent} if absent else {}
    return Cohort(
        subject_ids=np.array([each.subject_id for each in made], np.int64),
        prediction_us=np.array([each.asked_us for each in made], np.int64),
        prompts=tuple(each.prompt for each in made if each.prompt is not None),
        labels=np.array([each.label for each in made], np.int8),
        patients=len(split),
        excluded=excluded,
        notes=finder.notes(),
        told=_columns(task, made),
    )


def _columns(task: Task, made: Sequence[Decision]) -> dict[str, NDArray]:
    kinds: dict[str, type] = {"time_days": np.float64, "event": np.int8, "repeat": np.bool_}
    kinds |= {"count": np.float64} if task.kind == "count" else {}
    kinds |= {"value": np.float64} if task.kind == "value" else {}
    columns: dict[str, NDArray] = {
        name: np.array([each.told[name] for each in made], kind) for name, kind in kinds.items()
    }
    if task.kind == "set":
        codes = [np.asarray(each.told["codes"]) for each in made]
        columns["codes"] = np.array(codes, np.int8).reshape(len(made), len(task.outcome))
    return columns


class Finder:
    """Decides about one patient after the other.

    Args:
        task: the question.
        codebook: the one that wrote the timelines.
        given: see `cohort`.

    Raises:
        ConfigError: `given` is missing, or not asked for.
    """

    def __init__(self, task: Task, codebook: Codebook, given: Labels | None = None) -> None:
        if task.given != (given is not None):
            need = "needs a label file (--labels)" if task.given else "makes its own predictions; leave the labels out"
            raise ConfigError(f"task {task.name!r} {need}")
        self.task, self._codebook, self._given = task, codebook, given
        self.tokens: TaskTokens = task_tokens(task, codebook)
        eligible, late = task.eligible, task.late
        self._require, self._exclude = (matching(codebook, part) for part in (eligible.require, eligible.exclude))
        self._late = None if late is None else tuple(matching(codebook, p) for p in (late.codes, late.begin, late.end))
        self._billed, self._begins, self._ends = (matching(codebook, part) for part in (_BILLED, *_STAYS))
        self._suspicious = 0

    def notes(self) -> tuple[str, ...]:
        """What the codebook couldn't tell apart, and what may have leaked so far."""
        notes = list(self.tokens.notes)
        if self._suspicious and self._late is None:
            notes.append(
                f"{self._suspicious} prompts hold diagnoses or billing codes of a stay that has not ended by then; "
                "where they are assigned at its end, name them in [late] codes, or the prompts tell the future"
            )
        if self.task.after_hours < 0:
            notes.append("predictions are placed before their trigger, which nobody knows in advance: for looking back")
        return tuple(notes)

    def text(self, token: int) -> str:
        """What a token reads as."""
        told = self._codebook.tokens[token]
        return told.text if not told.bin else f"{told.text} (bin {told.bin})"

    def answer(self, name: str, value: float | int | bool | NDArray[np.int8]) -> str:
        """A column of an answer for people."""
        if name == "codes" and isinstance(value, np.ndarray):
            return ", ".join(np.array(self.task.outcome)[value == 1].tolist()) or "none"
        if name == "event":
            return ("censored", "outcome", "competing event")[int(np.asarray(value))]
        return str(value) if isinstance(value, bool) else f"{value:.4g}"

    def decisions(self, split: TokenSplit, patient: int) -> Iterator[Decision]:
        """What becomes of each possible prediction about the patient at a place of the split, by time."""
        line, goes_on = timeline(split, patient, self._codebook), self.task.kind in _GOES_ON
        if self._late is not None and len(line.places):
            codes, begins, ends = (mask[line.nodes] for mask in self._late)
            line = retimed(line, moved_to(line.at, codes, begins, ends))
        story = _Story.of(line, self.tokens, goes_on)
        asked = self._asked(story)
        if not asked:
            # A label file is about those in it.
            if not self.task.given:
                yield Decision(line.subject_id, None, None, NO_TRIGGER)
            return
        for start, at, answer in asked:
            # Repeated predictions are made at no trigger.
            known: Known = "before" if self.task.knows == "trigger" and at != start else self.task.knows
            future = at if known == "before" else at + 1
            if reason := self._unfit(story, start, at, future):
                yield Decision(line.subject_id, start, at, reason)
                continue
            prompt = known_prompt(line, at, known, self.tokens.trigger)
            self._suspicious += self._tells_of_an_open_stay(story, at)
            label, told = _answer(story, self.task, at, future, self.tokens)
            if answer is not None:
                label, told = _given_answer(self.task, answer, told)
            yield Decision(line.subject_id, start, at, "", prompt, label, told)

    def _asked(self, story: "_Story") -> list[tuple[int, int, float | None]]:
        """Starts, predictions and, if they are given, answers; by time."""
        task, line = self.task, story.line
        if self._given is not None:
            mine = np.flatnonzero(self._given.subject_ids == line.subject_id)
            rows = sorted((int(self._given.prediction_us[n]), float(self._given.answers[n])) for n in mine)
            return [(at, at, answer) for at, answer in rows]
        if task.calendar:
            days = [datetime.fromisoformat(day).replace(tzinfo=UTC) for day in sorted(task.calendar)]
            starts = np.array([round(day.timestamp()) * 1_000_000 for day in days], np.int64)
        else:
            starts = np.unique(story.triggers)
        starts = {"first": starts[:1], "last": starts[-1:]}.get(task.occurrence, starts) if task.trigger else starts
        asked: list[tuple[int, int, float | None]] = []
        for start in starts.tolist():
            first = start + round(task.after_hours * _HOUR_US)
            step = None if task.every_days is None else round(task.every_days * _DAY_US)
            # Later ones stop with the record; that the first one has none to go on with is told.
            room = 0 if step is None else max(0, (line.end_us - first) // step)
            most = 1 + min(room, room if task.times is None else task.times - 1)
            asked += [(start, first + n * (step or 0), None) for n in range(most)]
        return asked

    def _unfit(self, story: "_Story", start: int, at: int, future: int) -> str | None:
        task, line = self.task, story.line
        own = start < future and (story.others == start).any()
        ending = (story.competing,) if task.kind in _GOES_ON else (story.outcomes, story.competing)
        between = any(((events > start) & (events < future)).any() for events in ending)
        past = line.at < future
        checks = (
            (not task.given and (own or between), DECIDED),
            (line.end_us < at, TOO_SHORT),
            (not past.any(), UNKNOWN),
            (task.onset == "new" and (story.outcomes < future).any(), REPEAT),
        )
        reason = next((reason for bad, reason in checks if bad), None)
        return reason or _ineligible(line, at, past, task.eligible, self._require, self._exclude)

    def _tells_of_an_open_stay(self, story: "_Story", at: int) -> bool:
        """Whether billing codes of a stay that ends only later are known."""
        line = story.line
        begun, ended = (line.at[mask[line.nodes]] for mask in (self._begins, self._ends))
        begun = begun[begun < at]
        if not len(begun) or ((ended > begun[-1]) & (ended <= at)).any() or not (ended > at).any():
            return False
        return bool((self._billed[line.nodes] & (line.at >= begun[-1]) & (line.at < at)).any())


def _ineligible(line: Timeline, at: int, past: Bools, who: Eligible, require: Bools, exclude: Bools) -> str | None:
    nodes = line.nodes[past]
    if who.require and not require[nodes].any():
        return LACKS
    if who.exclude and exclude[nodes].any():
        return EXCLUDED
    if who.min_age is not None or who.max_age is not None:
        age = age_at(line, at)
        least = -np.inf if who.min_age is None else who.min_age
        most = np.inf if who.max_age is None else who.max_age
        if age is None or age[0] < least or (age[1] > most and np.isfinite(most)):
            return AGE
    short = past.any() and at - int(line.at[0]) < round(who.min_history_days * _DAY_US)
    return NEW if short or int(past.sum()) < who.min_events else None


@dataclass(frozen=True)
class _Story:
    """One patient, and when what decides the question happened.

    An event that comes again is trigger and outcome at once and decides nothing at its own time; `others` are the
    deciding events that are no triggers.
    """

    line: Timeline
    triggers: Ints
    outcomes: Ints
    competing: Ints
    others: Ints

    @classmethod
    def of(cls, line: Timeline, tokens: TaskTokens, goes_on: bool) -> "_Story":
        nodes, at = line.nodes, line.at
        deciding = (tokens.competing if goes_on else tokens.outcome | tokens.competing) & ~tokens.trigger
        masks = (tokens.trigger, tokens.outcome, tokens.competing, deciding)
        return cls(line, *(at[mask[nodes]] for mask in masks))


def _answer(
    story: _Story, task: Task, at: int, future: int, tokens: TaskTokens
) -> tuple[int, dict[str, float | int | bool | NDArray[np.int8]]]:
    """The label of a prediction, and the other columns of `Cohort.told`."""
    line = story.line
    outcome = int(story.outcomes[story.outcomes >= future].min(initial=_NEVER))
    competing = int(story.competing[story.competing >= future].min(initial=_NEVER))
    horizon = _NEVER if task.horizon_us is None else at + task.horizon_us
    end = min(horizon, line.end_us)
    if outcome < _NEVER and outcome <= min(competing, horizon):
        label, event, time = 1, 1, outcome
    elif competing <= min(horizon, line.end_us):
        label, event, time = 0, 2, competing
    else:
        label, event, time = 0 if horizon <= line.end_us else -1, 0, end
    told: dict[str, float | int | bool | NDArray[np.int8]] = {
        "time_days": (time - at) / _DAY_US,
        "event": event,
        "repeat": bool((story.outcomes < future).any()),
    }
    if label < 0 and task.censored == "no":
        label = 0
    # What is counted ends with the competing event; an outcome of its very moment came before it.
    last = min(competing, end)
    complete = competing < _NEVER or horizon <= line.end_us or task.censored == "no"
    inside = (line.at >= future) & (line.at <= last)
    if task.kind == "count":
        told["count"] = float(len(np.unique(line.at[inside & tokens.outcome[line.nodes]]))) if complete else np.nan
    elif task.kind == "value":
        told["value"] = _first_value(line, inside & tokens.outcome[line.nodes])
    elif task.kind == "set":
        found = np.array([(inside & member[line.nodes]).any() for member in tokens.members])
        told["codes"] = np.where(found, 1, 0 if complete else -1).astype(np.int8)
    return label, told


def _first_value(line: Timeline, wanted: Bools) -> float:
    """The first value of the wanted events, nan if there is none."""
    for event in np.flatnonzero(wanted):
        if not np.isnan(value := value_at(line.tokens, int(line.places[event]), int(line.nodes[event]), line.codebook)):
            return value
    return float("nan")


def value_at(tokens: NDArray[np.int32], place: int, node: int, codebook: Codebook) -> float:
    """The median of the bin of the value of the event at a place of a timeline; nan if it tells none."""
    bin_ = codebook.tokens[node].bin if node < len(codebook) else 0
    if place + 1 < len(tokens) and codebook.kinds[tokens[place + 1]] == "value":
        bin_ = int(codebook.tokens[int(tokens[place + 1])].text[1:])
    return codebook.value_of(codebook.event(node), bin_)


def _given_answer(
    task: Task, answer: float, told: dict[str, float | int | bool | NDArray[np.int8]]
) -> tuple[int, dict[str, float | int | bool | NDArray[np.int8]]]:
    """Put a file's answer in the place of the record's."""
    if np.isnan(answer):
        return -1, told
    column = {"count": "count", "value": "value", "time": "time_days"}.get(task.kind)
    if column is not None:
        return int(answer > 0), {**told, column: answer, **({"event": 1} if column == "time_days" else {})}
    if answer not in (0.0, 1.0):
        raise DataError(f"task {task.name!r}: the label file answers {answer:g}; an event is 1 (true) or 0 (false)")
    return int(answer), told
