"""Questions asked of the model: whom, when, what may happen, and what is known by then.

A `Task` is data, read from TOML (docs/tasks.md) and known by the hash of its canonical JSON. Notable choices:

- Codes are prefixes (`HOSPITAL_DISCHARGE` covers `HOSPITAL_DISCHARGE//HOME`, `ICD10CM//E11` covers `ICD10CM//E11.65`).
  A prefix that begins with the name of a system of codes covers them behind any head, `DIAGNOSIS//ICD10CM//E11.65` and
  MIMIC's `DIAGNOSIS//ICD//10//E1165` too, so that one task suits many sources.
- Where several prefixes of a task cover a code, the longest wins: with `HOSPITAL_DISCHARGE//DIED` as outcome and
  `HOSPITAL_DISCHARGE` as competing event, a fatal discharge is the outcome; and a code that an outcome or competing
  prefix covers more closely is no trigger.
- What is dated at or after the prediction is not known (`known`); only a trigger at the prediction itself is.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from datetime import date
from difflib import get_close_matches
from types import UnionType
from typing import Any, Literal, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError
from tokenizer.spelling import canonical

VERSION = 1
"""Of the schema of task files."""

Kind: TypeAlias = Literal["event", "count", "time", "value", "set"]
Known: TypeAlias = Literal["before", "trigger", "at"]

_HOUR_US = 3_600_000_000
_T = TypeVar("_T")

# How codes of a system are written by the sources that fedcomet reads.
_HEADS = {
    "ICD10CM": ("ICD10CM", "DIAGNOSIS//ICD10CM", "DIAGNOSIS//ICD//10"),
    "ICD9CM": ("ICD9CM", "DIAGNOSIS//ICD9CM", "DIAGNOSIS//ICD//9"),
    "ICD10PCS": ("ICD10PCS", "PROCEDURE//ICD10PCS", "PROCEDURE//ICD//10"),
    "ICD9Proc": ("ICD9Proc", "PROCEDURE//ICD9Proc", "PROCEDURE//ICD//9"),
    "ATC": ("ATC", "MEDICATION//ATC"),
}


@dataclass(frozen=True)
class Eligible:
    """Who is asked about, judged by what is known at the prediction.

    Attributes:
        require: code prefixes; at least one of them is in the history.
        exclude: code prefixes; none of them is.
        min_age, max_age: completed years, as far as age tokens tell: they are of whole buckets, and who may be too
            young or too old isn't asked about.
        min_history_days: between the first event with a time and the prediction.
        min_events: known events with a time.
    """

    require: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    min_age: float | None = None
    max_age: float | None = None
    min_history_days: float = 0.0
    min_events: int = 0

    def __post_init__(self) -> None:
        _make_floats(self)


@dataclass(frozen=True)
class Late:
    """Codes that records date within a stay but that are known only when it ends, as those for billing.

    They count, and stand in prompts, from the end of the stay on; of a stay without an end in the record they never do.

    Attributes:
        codes: prefixes of them.
        begin, end: code prefixes of what begins and ends a stay.
    """

    codes: tuple[str, ...]
    begin: tuple[str, ...] = ("HOSPITAL_ADMISSION", "ENCOUNTER_START//INPATIENT")
    end: tuple[str, ...] = ("HOSPITAL_DISCHARGE", "ENCOUNTER_END//INPATIENT")


@dataclass(frozen=True)
class Task:
    """A question about the time after a prediction.

    Attributes:
        name: short, unique in a study.
        question: for people.
        trigger: code prefixes; each such event is a possible start.
        outcome: code prefixes; what is asked about.
        competing: code prefixes; any of them before the outcome ends the question, as death does.
        after_hours: the prediction is made so long after the trigger; below 0 before it, which is of use only in
            looking back, as nobody knows then that the trigger will come.
        horizon_days: the outcome counts within this time after the prediction; None: whichever event comes first.
        occurrence: which triggers of a patient count.
        kind: what is asked of the outcome: whether it comes (`event`), how often (`count`; what happens at one
            moment counts once), after how many days (`time`), its first value (`value`), or which of its prefixes come
            (`set`).
        known: what of the moment of prediction is known: nothing (`before`), only the trigger (`trigger`), or all that
            is dated so (`at`, for records whose order within a moment is told otherwise). Not given: `trigger` where a
            prediction is made at it, else `before`.
        every_days: ask again after so many days, as long as the record goes on and the question is open.
        times: most predictions from one start.
        calendar: days (2020-01-31, midnight UTC) that are starts, instead of a trigger.
        given: predictions and answers come from a MEDS label file; codes and horizon say what rollouts look for.
        onset: `new` leaves those out whose history holds the outcome; `any` asks about both and tells them apart.
        censored: whose record ends too early is `unknown`, or a `no` where records are known to be complete.
        unit: `value`: the last part of codes that count (`mmol/L`); values in other units are no answers.
        family: where it stands in lists.
        eligible: who is asked about.
        late: codes to date honestly.
        trajectories: as many as the question needs, where the evaluation's number doesn't suit it.
        target_se: or: as many as it takes for this standard error of a prediction's estimate.
        version: of the schema.

    Raises:
        ConfigError: an empty or contradictory definition.
    """

    name: str
    question: str
    trigger: tuple[str, ...] = ()
    outcome: tuple[str, ...] = ()
    competing: tuple[str, ...] = ()
    after_hours: float = 0.0
    horizon_days: float | None = None
    occurrence: Literal["first", "last", "each"] = "first"
    kind: Kind = "event"
    known: Known | None = None
    every_days: float | None = None
    times: int | None = None
    calendar: tuple[str, ...] = ()
    given: bool = False
    onset: Literal["any", "new"] = "any"
    censored: Literal["unknown", "no"] = "unknown"
    unit: str = ""
    family: str = ""
    eligible: Eligible = field(default_factory=Eligible)
    late: Late | None = None
    trajectories: int | None = None
    target_se: float | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        _make_floats(self)
        if problem := next((text for bad, text in _problems(self) if bad), None):
            raise ConfigError(f"task {self.name!r}: {problem}")

    @property
    def horizon_us(self) -> int | None:
        """The horizon in microseconds."""
        return None if self.horizon_days is None else round(self.horizon_days * 24 * _HOUR_US)

    @property
    def knows(self) -> Known:
        """What of the moment of prediction is known."""
        if self.known is not None:
            return self.known
        return "trigger" if self.trigger and self.after_hours == 0 else "before"

    @property
    def codes(self) -> tuple[str, ...]:
        """All prefixes that the answer depends on, as sources may write them."""
        late = () if self.late is None else (*self.late.codes, *self.late.begin, *self.late.end)
        own = (*self.trigger, *self.outcome, *self.competing, *self.eligible.require, *self.eligible.exclude, *late)
        return tuple(dict.fromkeys(text for prefix in own for text in writings(prefix)))

    def to_json(self) -> bytes:
        """Canonical JSON of what is asked; how many trajectories answer it is no part of that."""
        plain = {name: value for name, value in asdict(self).items() if name not in ("trajectories", "target_se")}
        return json.dumps(_floats(plain), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    @property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return hashlib.sha256(self.to_json()).hexdigest()


def _make_floats(made: "Task | Eligible") -> None:
    """30 and 30.0 mean the same, so they must be the same bytes in a manifest."""
    for name, hint in get_type_hints(type(made)).items():
        value = getattr(made, name)
        if type(value) is int and float in (hint, *get_args(hint)):
            object.__setattr__(made, name, float(value))


def _floats(value: Any) -> Any:
    """Numbers as floats, so that 30 and 30.0 are the same task."""
    if isinstance(value, dict):
        return {key: _floats(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_floats(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _problems(task: Task) -> list[tuple[bool, str]]:
    both = sorted(set(task.outcome) & set(task.competing))
    starts = [bool(task.trigger), bool(task.calendar), task.given]
    eligible = task.eligible
    chosen = {"occurrence": task.occurrence, "kind": task.kind, "onset": task.onset, "censored": task.censored}
    choices = {
        "occurrence": ("first", "last", "each"),
        "kind": get_args(Kind),
        "onset": ("any", "new"),
        "censored": ("unknown", "no"),
    }
    wrong = next((name for name, value in chosen.items() if value not in choices[name]), "")
    words = choices.get(wrong, ("",))
    counted = task.kind in ("count", "value", "set")
    positive = ("horizon_days", "every_days", "times", "trajectories", "target_se")
    small = next((name for name in positive if getattr(task, name) is not None and getattr(task, name) <= 0), "")
    return [
        (task.version != VERSION, f"version is {task.version}; this software reads version {VERSION}"),
        (sum(starts) == 0, "trigger is empty; name at least one code prefix, or days in calendar"),
        (sum(starts) > 1, "trigger, calendar and given exclude one another; keep one"),
        (not task.outcome, "outcome is empty; name at least one code prefix"),
        (bool(both), f"{both[0] if both else ''} is both outcome and competing; it can be only one"),
        (bool(wrong), f"{wrong} is {chosen.get(wrong)!r}; it must be {', '.join(words[:-1])} or {words[-1]}"),
        (task.known not in (None, *get_args(Known)), f"known is {task.known!r}; it must be before, trigger or at"),
        (
            task.known == "trigger" and (not task.trigger or task.after_hours != 0),
            'known = "trigger" needs a prediction at the trigger: leave after_hours at 0, or take known = "before"',
        ),
        (bool(small), f"{small} is {getattr(task, small or 'name')}; it must be more than 0"),
        (
            not task.trigger and task.after_hours != 0,
            f"after_hours is {task.after_hours:g} but there is no trigger; leave it out",
        ),
        (task.times is not None and task.every_days is None, "times needs every_days; give it, or leave times out"),
        (task.given and task.every_days is not None, "every_days has no meaning for given predictions; leave it out"),
        (
            task.horizon_days is None and counted,
            f'kind = "{task.kind}" needs horizon_days: how far to look',
        ),
        (
            task.horizon_days is None and not task.competing and task.kind == "event",
            "without horizon_days and without competing events the answer could never be no; give one of them",
        ),
        (
            task.target_se is not None and task.trajectories is not None,
            "trajectories and target_se exclude one another; keep one",
        ),
        (bool(task.unit) and task.kind != "value", 'unit belongs to kind = "value"; leave it out'),
        (any(not _is_day(day) for day in task.calendar), f"calendar is {task.calendar}; write days as 2020-01-31"),
        (
            (eligible.min_age or 0) > (float("inf") if eligible.max_age is None else eligible.max_age),
            "eligible.min_age is above eligible.max_age; nobody could be asked about",
        ),
        (eligible.min_history_days < 0 or eligible.min_events < 0, "eligible: least history and events are 0 or more"),
        (task.late is not None and not task.late.codes, "late.codes is empty; name a code prefix, or leave late out"),
    ]


def _is_day(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


def parse(table: Mapping[str, Any], place: str) -> Task:
    """Make a task of a TOML table.

    Args:
        table: what the file says.
        place: file and table, for messages.

    Raises:
        ConfigError: unknown, missing or wrong fields, all of them named, or a contradiction.
    """
    problems: list[str] = []
    values = _fields_of(Task, table, "", problems)
    if problems:
        raise ConfigError("\n".join(f"{place}{'.' if problem[0] != ' ' else ''}{problem}" for problem in problems))
    try:
        return Task(**values)
    except ConfigError as problem:
        raise ConfigError(f"{place}: {problem}") from None


def _fields_of(kind: type, table: Mapping[str, Any], above: str, problems: list[str]) -> dict[str, Any]:
    hints, known = get_type_hints(kind), {each.name: each for each in fields(kind)}
    values: dict[str, Any] = {}
    for name, raw in table.items():
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"
            problems.append(f"{above}{name} is not a known key; {hint}")
        else:
            values[name] = _value_of(hints[name], raw, f"{above}{name}", problems)
    for name, each in known.items():
        needed = each.default is MISSING and each.default_factory is MISSING
        if name not in table and needed:
            problems.append(f"{above}{name} is missing")
    return values


def _value_of(hint: Any, raw: Any, name: str, problems: list[str]) -> Any:
    """A value as its field's type has it; what doesn't fit is noted, with what would."""
    if get_origin(hint) in (Union, UnionType):
        hint = next(each for each in get_args(hint) if each is not type(None))
    if hint in (Eligible, Late) and isinstance(raw, Mapping):
        inside: list[str] = []
        values = _fields_of(hint, raw, f"{name}.", inside)
        problems.extend(inside)
        return None if inside else hint(**values)
    if get_origin(hint) is Literal:
        if raw in get_args(hint):
            return raw
        wanted = f"one of {', '.join(get_args(hint))}"
    elif get_origin(hint) is tuple:
        if isinstance(raw, str | date):
            raw = [raw]
        if isinstance(raw, list | tuple) and all(isinstance(each, str | date) and str(each) for each in raw):
            return tuple(str(each) for each in raw)
        wanted = "a list of texts"
    else:
        numbers = {float: (int, float), int: (int,)}
        if isinstance(raw, numbers.get(hint, hint)) and (hint is bool or not isinstance(raw, bool)):
            return hint(raw)
        wanted = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}.get(hint, "a table")
    problems.append(f"{name} = {raw!r}: it must be {wanted}")
    return None


def writings(prefix: str) -> tuple[str, ...]:
    """How sources may write a prefix: a system's codes stand behind several heads; any other prefix stands for itself.

    >>> writings("ICD10CM//E11.6")
    ('ICD10CM//E11.6', 'DIAGNOSIS//ICD10CM//E11.6', 'DIAGNOSIS//ICD//10//E11.6')
    """
    prefix = prefix.removesuffix("//")
    system, slashes, rest = prefix.partition("//")
    return tuple(f"{head}{slashes}{rest}" for head in _HEADS.get(system, (system,)))


@dataclass(frozen=True)
class TaskTokens:
    """Which events play a part in a task: bool [M] each, over the nodes of the codebook's grammar.

    `outcome` and `competing` share none. `members` bool [C, M] are the events of each outcome prefix (`set`). `notes`
    name the prefixes that a codebook can't tell apart from rarer or commoner codes.
    """

    trigger: NDArray[np.bool_]
    outcome: NDArray[np.bool_]
    competing: NDArray[np.bool_]
    members: NDArray[np.bool_]
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
        missing: dict[str, list[str]] = {}
        for prefix in prefixes:
            if not matching(codebook, (prefix,)).any():
                missing.setdefault(_shelter(prefix, codebook), []).append(prefix)
        notes += [f"{part} {', '.join(told)}: no token of the codebook; {where}" for where, told in missing.items()]
    if task.unit:
        units = np.array([_unit(codebook.event(node)) for node in range(codebook.grammar.nodes)])
        if (other := sorted(set(units[is_outcome & (units != task.unit)]) - {""})) or not is_outcome.any():
            notes.append(f"outcome in other units than {task.unit} is no answer: {', '.join(other)}")
        is_outcome = is_outcome & (units == task.unit)
    members = np.stack([matching(codebook, (prefix,)) for prefix in task.outcome]) & is_outcome
    return TaskTokens(is_trigger, is_outcome, is_competing, members, tuple(notes))


def matching(codebook: Codebook, prefixes: Sequence[str]) -> NDArray[np.bool_]:
    """Which nodes of the grammar stand for events under any of the prefixes, however they are written: bool [M]."""
    return codebook.matching([text for prefix in prefixes for text in writings(prefix)])


def _unit(code: str) -> str:
    """The unit that a code ends with; "" for a code of one or two parts, which has none."""
    parts = code.split("//")
    return parts[-1] if len(parts) > 2 else ""


def _closeness(prefixes: Sequence[str], codebook: Codebook) -> NDArray[np.int64]:
    """Length of the longest prefix that covers each event: int64 [M], 0 where none does."""
    closeness = np.zeros(codebook.grammar.nodes, np.int64)
    for prefix in prefixes:
        for text in writings(prefix):
            # Prefixes that cover one code lie on one line of ancestors: the closer, the longer.
            length = len(canonical(text))
            closeness = np.maximum(closeness, np.where(codebook.matching((text,)), length, 0))
    return closeness


def _shelter(prefix: str, codebook: Codebook) -> str:
    told = codebook.tell(prefix)
    return (
        f"if it occurs, it is told as {told.text} and counted as that" if told.text else "if it occurs, it is not seen"
    )
