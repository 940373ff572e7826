"""What simulated futures say: how probable the outcome is, when it comes, how often, with which value.

A trajectory resolves when the outcome or a competing event comes, or when the horizon passes. One that ends
otherwise (the timeline closes, or the cap on tokens is reached) tells nothing and leaves the estimate, as a censored
patient does: it is neither a yes nor a no.

Two estimators of the same risk:
- `count`: the share of resolved trajectories in which the outcome came, as CoMET and ETHOS do.
- `chances`: at every step of a trajectory the model says how probable the outcome is as the next token, and a sampled
  token is a coin thrown with just that probability. Summing the probabilities instead of the coins has the same
  expectation (each step's coin is replaced by its conditional mean, given all steps before) and a smaller variance:
  far fewer trajectories give the same precision, and rare outcomes get a risk above 0 from the first one on. The idea
  is that of SCOPE (arXiv 2602.03730); competing events and the horizon are summed in the same way, and the risk is the
  outcome's share of all that resolves. Summed up to a time, the same probabilities are the cumulative incidence by
  then: a competing event takes what it takes, as in Aalen and Johansen's estimator, and the curve ends at the risk.

The summed chances hold for what ends a trajectory only. Counts, times, values and sets are read off the trajectories
(`model.readings`).

Standard errors are over trajectories: they tell how far the estimate may be from that of endlessly many futures of
this model, not how far the model is from the truth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model.cohort import Cohort
from model.decoder import Decoder
from model.readings import read_codes, read_measure
from model.rollout import Reason, Rollouts, Stop, rollout
from model.tasks import Task, TaskTokens, task_tokens
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError

Estimator = Literal["chances", "count"]

_NAMES = {Reason.EVENT: "event", Reason.HORIZON: "horizon", Reason.END: "end of timeline", Reason.CAP: "token cap"}
_DAY_US = 86_400_000_000
_CURVE_POINTS = 12
MOST = 1024
"""Trajectories of a prediction whose wanted standard error is out of reach, unless told otherwise."""


@dataclass(frozen=True)
class Estimates:
    """What P predictions of a cohort are estimated to become.

    Attributes:
        risk: float64 [P], in [0, 1]: of the outcome within the horizon; for counts, values and sets, that it comes at
            least once. Where no trajectory tells anything: the share over all trajectories of the cohort, which ranks
            the patient in the middle; 0.5 if there is none at all.
        resolved: float64 [P], share of trajectories that resolved.
        reasons: how many trajectories ended by an event, by the horizon, by the end of the timeline, by the token cap.
        trajectories: int64 [P], per prediction.
        tokens_sampled: over all trajectories.
        se: float64 [P], standard error over trajectories of `mean`, where there is one, else of `risk`; nan for less
            than two trajectories that tell something.
        grid_days: float64 [G], times of the curves; empty without a horizon.
        curve: float64 [P, G], cumulative incidence of the outcome.
        competing: float64 [P, G], that of competing events.
        mean, median, low, high: float64 [P], of the count, the days to the outcome in futures in which it comes, or the
            value in those in which it is measured; low and high are the 5th and 95th percentile of single futures. nan
            where nothing is told. Empty for other kinds of task.
        codes: float64 [P, C], for each outcome prefix of a set the probability that it comes; C is 0 for others.
    """

    risk: NDArray[np.float64]
    resolved: NDArray[np.float64]
    reasons: dict[str, int]
    trajectories: NDArray[np.int64]
    tokens_sampled: int
    se: NDArray[np.float64]
    grid_days: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    curve: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    competing: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    mean: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    median: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    low: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    high: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    codes: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))


def estimate(
    decoder: Decoder,
    codebook: Codebook,
    cohort: Cohort,
    task: Task,
    *,
    trajectories: int,
    seed: int,
    max_tokens: int,
    estimator: Estimator = "chances",
    target_se: float | None = None,
    most: int = MOST,
    progress: Callable[[int, int], None] | None = None,
) -> Estimates:
    """Roll the futures of a cohort out and estimate what the task asks for.

    Args:
        decoder: the model.
        codebook: the one that wrote the prompts.
        cohort: whom and when.
        task: the question.
        trajectories: per prediction; by `count` the standard error of a risk p is sqrt(p (1 - p) / trajectories), by
            `chances` it is smaller.
        seed: equal seeds give equal risks, however the work is batched.
        max_tokens: cap on the sampled tokens of one trajectory.
        estimator: see the module.
        target_se: draw again so many trajectories for the predictions whose standard error is larger, until none is.
        most: trajectories of a prediction at which that ends.
        progress: called with trajectories done and to do, as far as that is known.

    Raises:
        ConfigError: `trajectories` or `max_tokens` below 1; a target that can't be judged.
    """
    if trajectories < 1 or max_tokens < 1:
        raise ConfigError(f"trajectories is {trajectories} and max_tokens {max_tokens}; both must be at least 1")
    if target_se is not None and (target_se <= 0 or trajectories < 2 or most < trajectories):
        raise ConfigError(
            f"target_se is {target_se} with {trajectories} trajectories at a time and {most} at most: give a target "
            "above 0, 2 trajectories or more, and no less at most"
        )
    tokens = task_tokens(task, codebook)
    stop = stop_of(task, tokens, max_tokens)
    reads = task.kind in ("count", "value", "set")
    drawn: Draws | None = None
    open_ = np.arange(len(cohort))
    while True:
        done = 0 if drawn is None else drawn.used.shape[1]
        count = trajectories if target_se is None else min(trajectories, most - done)
        part = cohort.part(open_)
        rolled = rollout(
            decoder, codebook, list(part.prompts), trajectories=count, stop=stop, seed=seed, first=done,
            keep_tokens=reads, progress=progress,
        )  # fmt: skip
        found = draws_of(rolled, estimator, task, tokens, codebook, [prompt.elapsed_us for prompt in part.prompts])
        found = found.spread(open_, len(cohort))
        drawn = found if drawn is None else drawn.then(found)
        estimates = _estimates(drawn, task)
        if target_se is None or drawn.used.shape[1] >= most:
            return estimates
        open_ = open_[_uncertainty(drawn, estimates, estimator)[open_] > target_se]
        if not len(open_):
            return estimates


def summarize(rolled: Rollouts, estimator: Estimator = "chances") -> Estimates:
    """Turn trajectories, whose outcomes are [the outcome, competing events], into risks.

    Raises:
        ConfigError: trajectories that were not drawn by the model's own probabilities.
    """
    return _estimates(draws_of(rolled, estimator), None)


def read_off(rolled: Rollouts, task: Task, codebook: Codebook, elapsed_us: Sequence[int]) -> Estimates:
    """Turn trajectories that `stop_of` ended, with their tokens kept, into the answer that the task's kind asks for.

    Args:
        rolled: P x R trajectories.
        task: the question.
        codebook: the one that wrote the prompts.
        elapsed_us: per prediction, time between the last event of the prompt and the prediction.

    Raises:
        ConfigError: trajectories that were not drawn by the model's own probabilities.
    """
    return _estimates(draws_of(rolled, "chances", task, task_tokens(task, codebook), codebook, elapsed_us), task)


@dataclass(frozen=True)
class Told:
    """Trajectories with their tokens, what they say together, and the standard error of the curve, float64 [P, G]."""

    rolled: Rollouts
    estimates: Estimates
    curve_se: NDArray[np.float64]


def tell(
    decoder: Decoder,
    codebook: Codebook,
    cohort: Cohort,
    task: Task,
    *,
    trajectories: int,
    seed: int,
    max_tokens: int,
) -> Told:
    """Estimate as `estimate` does, and keep what was drawn, to be looked at; arguments are the same."""
    tokens = task_tokens(task, codebook)
    stop = stop_of(task, tokens, max_tokens)
    rolled = rollout(
        decoder, codebook, list(cohort.prompts), trajectories=trajectories, stop=stop, seed=seed, keep_tokens=True
    )
    drawn = draws_of(rolled, "chances", task, tokens, codebook, [prompt.elapsed_us for prompt in cohort.prompts])
    by_day = np.cumsum(drawn.curve[:, :, 0], axis=2)
    errors = [_ratio_error(by_day[:, :, cell], drawn.told, drawn.used) for cell in range(by_day.shape[2])]
    error = np.stack(errors, axis=1) if errors else np.zeros((len(cohort), 0))
    return Told(rolled, _estimates(drawn, task), error)


def grid_days(task: Task) -> NDArray[np.float64]:
    """Times at which a task's curves are told: twelfths of its horizon, float64 [G]; none without one."""
    if task.horizon_days is None:
        return np.zeros(0)
    return task.horizon_days * np.arange(1, _CURVE_POINTS + 1) / _CURVE_POINTS


def stop_of(task: Task, tokens: TaskTokens, max_tokens: int) -> Stop:
    """What ends a trajectory: what is counted goes on to the horizon."""
    if task.kind in ("count", "value", "set"):
        return Stop([np.zeros_like(tokens.outcome), tokens.competing], task.horizon_us, max_tokens)
    grid = tuple(round(days * _DAY_US) for days in grid_days(task))
    return Stop([tokens.outcome, tokens.competing], task.horizon_us, max_tokens, grid)


@dataclass(frozen=True)
class Draws:
    """What single trajectories say: P predictions, R trajectories each, some of which were not drawn.

    Attributes:
        used: bool [P, R], whether it was drawn.
        reason: int8 [P, R].
        yes, told: float64 [P, R], its share of the numerator and the denominator of the risk.
        curve: float64 [P, R, K, G], its share of the numerator by time.
        measure: float64 [P, R], the count, days or value; nan where it tells none.
        codes: float64 [P, R, C], whether each code came; nan where it doesn't tell.
        tokens: int64 [P, R], sampled.
    """

    used: NDArray[np.bool_]
    reason: NDArray[np.int8]
    yes: NDArray[np.float64]
    told: NDArray[np.float64]
    curve: NDArray[np.float64]
    measure: NDArray[np.float64]
    codes: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def spread(self, rows: NDArray[np.int64], size: int) -> "Draws":
        """Put predictions in their places among `size`, with nothing drawn for the others."""
        empty = {"reason": -1, "measure": np.nan, "codes": np.nan}
        columns: dict[str, Any] = {}
        for each in fields(self):
            column = getattr(self, each.name)
            columns[each.name] = np.full((size, *column.shape[1:]), empty.get(each.name, 0), column.dtype)
            columns[each.name][rows] = column
        return Draws(**columns)

    def then(self, more: "Draws") -> "Draws":
        """The trajectories of both."""
        return Draws(*(np.concatenate([getattr(d, f.name) for d in (self, more)], axis=1) for f in fields(self)))


def draws_of(
    rolled: Rollouts,
    estimator: Estimator,
    task: Task | None = None,
    tokens: TaskTokens | None = None,
    codebook: Codebook | None = None,
    elapsed_us: Sequence[int] = (),
) -> Draws:
    """Read single trajectories; without a task, only for the risk.

    Raises:
        ConfigError: trajectories that were not drawn by the model's own probabilities.
    """
    if rolled.altered:
        raise ConfigError(
            f"the trajectories were drawn with {rolled.altered}, so they would give biased risks; "
            "roll out with temperature 1 and top_p 1"
        )
    resolved = np.isin(rolled.reason, (Reason.EVENT, Reason.HORIZON))
    came = (rolled.reason == Reason.EVENT) & (rolled.event == 0)
    shape = resolved.shape
    curve = np.zeros((*shape, 2, 0)) if rolled.curve is None else rolled.curve
    measure, codes = np.full(shape, np.nan), np.zeros((*shape, 0))
    yes, told = came.astype(np.float64), resolved.astype(np.float64)
    if task is not None and tokens is not None and codebook is not None and task.kind in ("count", "value", "set"):
        measure = read_measure(rolled, task, tokens, codebook, elapsed_us)
        if task.kind == "set":
            codes = np.where(resolved[..., None], read_codes(rolled, tokens, codebook, elapsed_us, task), np.nan)
        happened = measure > 0 if task.kind == "count" else ~np.isnan(measure)
        happened = codes.any(axis=2) & resolved if task.kind == "set" else happened
        measure, yes = np.where(resolved, measure, np.nan), (happened & resolved).astype(np.float64)
    else:
        if task is not None and task.kind == "time":
            measure = np.where(came, rolled.elapsed_us / _DAY_US, np.nan)
        if estimator == "chances":
            yes, told = rolled.chances[:, :, 0], rolled.chances.sum(axis=2)
        elif rolled.curve is not None and task is not None:
            curve = _counted_curve(rolled, task)
    sampled = rolled.tokens_sampled.astype(np.int64)
    return Draws(np.ones(shape, bool), rolled.reason.astype(np.int8), yes, told, curve, measure, codes, sampled)


def _counted_curve(rolled: Rollouts, task: Task) -> NDArray[np.float64]:
    """Which cell of the grid each trajectory's event fell in: float64 [P, R, K, G]."""
    grid = np.array([round(days * _DAY_US) for days in grid_days(task)])
    cell = np.searchsorted(grid, np.maximum(rolled.elapsed_us, 0), side="left")
    came = rolled.reason == Reason.EVENT
    inside = cell[..., None, None] == np.arange(len(grid))
    which = rolled.event[..., None, None] == np.arange(2)[:, None]
    return (inside & which & came[..., None, None]).astype(np.float64)


def _estimates(drawn: Draws, task: Task | None) -> Estimates:
    yes, told = drawn.yes.sum(axis=1), drawn.told.sum(axis=1)
    overall = yes.sum() / told.sum() if told.any() else 0.5
    safe = np.where(told > 0, told, 1.0)
    # Below 0 by chance where codes have several tokens (`model.guide`).
    risk = np.where(told > 0, np.clip(yes / safe, 0.0, 1.0), overall)
    resolved = np.isin(drawn.reason, (Reason.EVENT, Reason.HORIZON)) & drawn.used
    number = drawn.used.sum(axis=1)
    found = Estimates(
        risk=risk,
        resolved=resolved.sum(axis=1) / np.maximum(number, 1),
        reasons={name: int(((drawn.reason == end) & drawn.used).sum()) for end, name in _NAMES.items()},
        trajectories=number.astype(np.int64),
        tokens_sampled=int(drawn.tokens.sum()),
        se=_ratio_error(drawn.yes, drawn.told, drawn.used),
    )
    if task is None:
        return found
    if drawn.curve.shape[-1]:
        curves = np.cumsum(drawn.curve.sum(axis=1), axis=2) / safe[:, None, None]
        curves[told == 0] = np.nan
        found = replace(
            found,
            grid_days=grid_days(task),
            curve=np.clip(curves[:, 0], 0.0, 1.0),
            competing=np.clip(curves[:, 1], 0.0, 1.0),
        )
    if task.kind == "set":
        known = ~np.isnan(drawn.codes)
        count = known.sum(axis=1)
        share = np.where(known, drawn.codes, 0.0).sum(axis=1) / np.maximum(count, 1)
        return replace(found, codes=np.where(count > 0, share, np.nan))
    return found if task.kind == "event" else _with_measures(found, drawn.measure)


def _with_measures(found: Estimates, measure: NDArray[np.float64]) -> Estimates:
    """Mean, median, percentiles and standard error of the mean, over the trajectories that tell a number."""
    known = ~np.isnan(measure)
    count = known.sum(axis=1)
    safe = np.where(count > 0, count, 1)
    mean = np.where(count > 0, np.where(known, measure, 0.0).sum(axis=1) / safe, np.nan)
    squares = np.where(known, (measure - mean[:, None]) ** 2, 0.0).sum(axis=1)
    error = np.where(count > 1, np.sqrt(squares / np.maximum(count - 1, 1) / safe), np.nan)
    points = np.full((3, len(mean)), np.nan)
    for row in np.flatnonzero(count):
        points[:, row] = np.quantile(measure[row, known[row]], (0.05, 0.5, 0.95))
    return replace(found, mean=mean, median=points[1], low=points[0], high=points[2], se=error)


def _ratio_error(yes: NDArray[np.float64], told: NDArray[np.float64], used: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Standard error of sum(yes) / sum(told) over independent trajectories, linearised: float64 [P].

    Source: Cochran, Sampling Techniques (1977), equation 2.46.
    """
    number, total = used.sum(axis=1), told.sum(axis=1)
    tells = (number > 1) & (total > 0)
    ratio = yes.sum(axis=1) / np.where(total > 0, total, 1.0)
    squares = (np.where(used, yes - ratio[:, None] * told, 0.0) ** 2).sum(axis=1)
    error = np.sqrt(squares * number / np.maximum(number - 1, 1)) / np.where(total > 0, total, 1.0)
    return np.where(tells, error, np.nan)


def _uncertainty(drawn: Draws, found: Estimates, estimator: Estimator) -> NDArray[np.float64]:
    """The standard error that decides about more trajectories: float64 [P].

    Where coins are counted, all alike says little: there it is that of two more yes and two more no (Agresti and Coull,
    The American Statistician 1998). A prediction that tells nothing yet is as uncertain as can be.
    """
    error = np.where(np.isnan(found.se), np.inf, found.se)
    if len(found.mean) or (estimator == "chances" and not found.codes.shape[1]):
        return error
    shares = found.codes if found.codes.shape[1] else found.risk[:, None]
    number = drawn.told.sum(axis=1, keepdims=True)
    counted = (shares * number + 2) / (number + 4)
    wald = np.sqrt(counted * (1 - counted) / (number + 4)).max(axis=1)
    return np.where(np.isnan(wald), np.inf, np.maximum(np.where(np.isfinite(error), error, 0), wald))
