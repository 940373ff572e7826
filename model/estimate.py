"""Risks from simulated futures: the share of a patient's trajectories in which the outcome comes.

A trajectory resolves when the outcome or a competing event comes, or when the horizon passes. One that ends
otherwise (the timeline closes, or the cap on tokens is reached) tells nothing and leaves the count, as a censored
patient does: it is neither a yes nor a no.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.decoder import Decoder
from model.rollout import Reason, Stop, rollout
from model.tasks import Cohort, Task, task_tokens
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError

_NAMES = {Reason.EVENT: "event", Reason.HORIZON: "horizon", Reason.END: "end of timeline", Reason.CAP: "token cap"}


@dataclass(frozen=True)
class Estimates:
    """Estimated risks of a cohort's P predictions.

    Attributes:
        risk: float64 [P], in [0, 1]. Where no trajectory resolved: the share over all resolved trajectories of the
            cohort, which ranks the patient in the middle; 0.5 if there is none at all.
        resolved: float64 [P], share of trajectories that resolved.
        reasons: how many trajectories ended by an event, by the horizon, by the end of the timeline, by the token cap.
        trajectories: per prediction.
        tokens_sampled: over all trajectories.
    """

    risk: NDArray[np.float64]
    resolved: NDArray[np.float64]
    reasons: dict[str, int]
    trajectories: int
    tokens_sampled: int


def estimate(
    decoder: Decoder,
    codebook: Codebook,
    cohort: Cohort,
    task: Task,
    *,
    trajectories: int,
    seed: int,
    max_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Estimates:
    """Roll the futures of a cohort out and count the outcomes.

    Args:
        decoder: the model.
        codebook: the one that wrote the prompts.
        cohort: whom and when.
        task: the question.
        trajectories: per prediction; the standard error of a risk p is sqrt(p (1 - p) / trajectories).
        seed: equal seeds give equal risks, however the work is batched.
        max_tokens: cap on the sampled tokens of one trajectory.
        progress: called with trajectories done and to do.

    Raises:
        ConfigError: `trajectories` or `max_tokens` below 1.
    """
    if trajectories < 1 or max_tokens < 1:
        raise ConfigError(f"trajectories is {trajectories} and max_tokens {max_tokens}; both must be at least 1")
    tokens = task_tokens(task, codebook)
    stop = Stop(outcomes=[tokens.outcome, tokens.competing], horizon_us=task.horizon_us, max_tokens=max_tokens)
    rolled = rollout(
        decoder, codebook, list(cohort.prompts), trajectories=trajectories, stop=stop, seed=seed, progress=progress
    )
    return count(rolled.reason, rolled.event, rolled.tokens_sampled)


def count(reason: NDArray[np.int8], event: NDArray[np.int32], tokens_sampled: NDArray[np.int32]) -> Estimates:
    """Turn the ends of trajectories into risks.

    Args:
        reason: int8 [P, R], a `Reason`.
        event: int32 [P, R], 0 where the outcome ended the trajectory.
        tokens_sampled: int32 [P, R].
    """
    hits = (reason == Reason.EVENT) & (event == 0)
    resolved = (reason == Reason.EVENT) | (reason == Reason.HORIZON)
    answered = resolved.sum(axis=1)
    overall = hits.sum() / resolved.sum() if resolved.any() else 0.5
    risk = np.where(answered > 0, hits.sum(axis=1) / np.maximum(answered, 1), overall)
    return Estimates(
        risk=risk.astype(np.float64),
        resolved=answered / max(reason.shape[1], 1),
        reasons={name: int((reason == end).sum()) for end, name in _NAMES.items()},
        trajectories=int(reason.shape[1]),
        tokens_sampled=int(tokens_sampled.sum(dtype=np.int64)),
    )
