"""Risks from simulated futures: how probable it is that the outcome comes, given that the question is answered.

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
  outcome's share of all that resolves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.cohort import Cohort
from model.decoder import Decoder
from model.rollout import Reason, Rollouts, Stop, rollout
from model.tasks import Task, task_tokens
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError

Estimator = Literal["chances", "count"]

_NAMES = {Reason.EVENT: "event", Reason.HORIZON: "horizon", Reason.END: "end of timeline", Reason.CAP: "token cap"}


@dataclass(frozen=True)
class Estimates:
    """Estimated risks of a cohort's P predictions.

    Attributes:
        risk: float64 [P], in [0, 1]. Where no trajectory tells anything: the share over all trajectories of the
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
    estimator: Estimator = "chances",
    progress: Callable[[int, int], None] | None = None,
) -> Estimates:
    """Roll the futures of a cohort out and estimate the risk of the outcome.

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
    return summarize(rolled, estimator)


def summarize(rolled: Rollouts, estimator: Estimator = "chances") -> Estimates:
    """Turn trajectories, whose outcomes are [the outcome, competing events], into risks.

    Raises:
        ConfigError: trajectories that were not drawn by the model's own probabilities.
    """
    if rolled.altered:
        raise ConfigError(
            f"the trajectories were drawn with {rolled.altered}, so they would give biased risks; "
            "roll out with temperature 1 and top_p 1"
        )
    resolved = np.isin(rolled.reason, (Reason.EVENT, Reason.HORIZON))
    if estimator == "count":
        yes = ((rolled.reason == Reason.EVENT) & (rolled.event == 0)).sum(axis=1).astype(np.float64)
        told = resolved.sum(axis=1).astype(np.float64)
    else:
        yes, told = rolled.chances[:, :, 0].sum(axis=1), rolled.chances.sum(axis=(1, 2))
    overall = yes.sum() / told.sum() if told.any() else 0.5
    return Estimates(
        risk=np.where(told > 0, np.minimum(yes / np.where(told > 0, told, 1.0), 1.0), overall),
        resolved=resolved.sum(axis=1) / max(resolved.shape[1], 1),
        reasons={name: int((rolled.reason == end).sum()) for end, name in _NAMES.items()},
        trajectories=int(resolved.shape[1]),
        tokens_sampled=int(rolled.tokens_sampled.sum(dtype=np.int64)),
    )
