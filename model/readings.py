"""Numbers read off the tokens of simulated trajectories: how often, which value, which codes.

Times are those of a trajectory's clock, from the prediction; events behind the horizon don't count, and events at one
moment (no interval between them) count once, as in `model.cohort`.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from model.cohort import value_at
from model.rollout import Rollouts
from model.tasks import Task, TaskTokens
from tokenizer.codebook import Codebook


def read_measure(
    rolled: Rollouts, task: Task, tokens: TaskTokens, codebook: Codebook, elapsed_us: Sequence[int]
) -> NDArray[np.float64]:
    """The count of the outcome, or its first value, in each trajectory.

    Args:
        rolled: P x R trajectories with their tokens.
        task: of kind `count` or `value`; for others nothing is told.
        tokens: its events.
        codebook: what the tokens mean.
        elapsed_us: per prediction, time between the last event of the prompt and the prediction.

    Returns:
        float64 [P, R], nan where there is no value.
    """
    found = np.full(rolled.reason.shape, np.nan)
    if task.kind not in ("count", "value"):
        return found
    for place, sampled, places, nodes, at in _trajectories(rolled, codebook, elapsed_us, task):
        wanted = np.flatnonzero(tokens.outcome[nodes])
        if task.kind == "count":
            found[place] = len(np.unique(at[wanted]))
            continue
        values = (value_at(sampled, int(places[event]), int(nodes[event]), codebook) for event in wanted)
        found[place] = next((value for value in values if not np.isnan(value)), np.nan)
    return found


def read_codes(
    rolled: Rollouts, tokens: TaskTokens, codebook: Codebook, elapsed_us: Sequence[int], task: Task
) -> NDArray[np.float64]:
    """Whether each outcome prefix comes in each trajectory: float64 [P, R, C], 0 or 1."""
    found = np.zeros((*rolled.reason.shape, len(tokens.members)))
    for place, _, _, nodes, _ in _trajectories(rolled, codebook, elapsed_us, task):
        found[place] = tokens.members[:, nodes].any(axis=1)
    return found


def _trajectories(
    rolled: Rollouts, codebook: Codebook, elapsed_us: Sequence[int], task: Task
) -> Iterator[tuple[tuple[int, int], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Place, tokens, and the events by the horizon: where their codes end, what they are, when they come."""
    predictions, count = rolled.reason.shape
    for prediction in range(predictions):
        for number in range(count):
            sampled = rolled.trajectory(prediction, number)
            clock = np.cumsum(rolled.passed(prediction, number)) - elapsed_us[prediction]
            places, nodes = codebook.grammar.events(sampled)
            at = np.maximum(clock[places], 0)
            inside = at <= (np.iinfo(np.int64).max if task.horizon_us is None else task.horizon_us)
            yield (prediction, number), sampled, places[inside], nodes[inside], at[inside]
