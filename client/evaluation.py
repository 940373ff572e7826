"""Evaluation of a private run at a site: one noised number, charged before it leaves, whatever happens in between.

Each tuning patient's mean loss per token is cut to [0, bound] and rounded to a grid of bound / 2^16; the sum over the
patients, an integer on that grid, gets Gaussian noise of `noise_multiplier` x `bound`. One patient more or less changes
the sum by `bound` at most. How many tuning patients there are counts as known. As for a round of training, the key that
the noise follows from lies in the budget's ledger: killed anywhere, the same request gets the same answer.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from client.archive import RunArchive
from client.budget import Release, State
from client.gate import Gate, digest_of_answer
from client.local import Work
from federation import protection
from federation.manifest import PrivateEvaluation
from federation.messages import EvaluateReply, EvaluateRequest, SiteRefusal
from model.private import PrivateOptions, Secret, noised
from tokenizer.split import SPLITS

_LEVELS = 2**16  # `model.private.noised` rounds a single number to the same grid


def check_request(work: Work, request: EvaluateRequest) -> PrivateEvaluation:
    """Refuse what a private run does not tell, before anything is computed.

    Raises:
        SiteRefusal: losses of this run, split or round stay at the site.
    """
    manifest = work.manifest
    chosen = protection.privacy_of(manifest).evaluation
    if chosen is None:
        raise SiteRefusal("The run is private: losses and token counts have no noise, and stay at the site.")
    if request.split != SPLITS[1]:
        raise SiteRefusal(
            f"The run is private: losses are told of the split {SPLITS[1]!r} only, not {request.split!r}."
        )
    if not protection.evaluated(manifest, request.round):
        raise SiteRefusal(f"Round {request.round} is not among those whose loss the run's manifest asks for.")
    if work.patients(request.split) == 0:
        raise SiteRefusal(f"There are no patients in the split {request.split!r}.")
    return chosen


def evaluate(
    site: str,
    run: RunArchive,
    request: EvaluateRequest,
    gate: Gate,
    work: Work,
    losses: Callable[[], NDArray[np.float64]],
) -> EvaluateReply:
    """Give the noised sum of the patients' losses, which is kept and charged by then; ask while working on the run.

    Args:
        site: the site's name.
        run: where the answer is kept.
        request: one that `check_request` let pass.
        gate: keeps the budget.
        work: of the run.
        losses: gives each patient's mean loss, float64 [P] in nats; nan where there is nothing to predict.

    Raises:
        BudgetExhausted: it would cost more than the site allows.
        SiteRefusal: another request was answered for this round, or its answer is no longer kept.
    """
    manifest = work.manifest
    privacy, chosen = protection.privacy_of(manifest), check_request(work, request)
    costs = protection.of_evaluations(privacy, 1)
    release = Release(request.manifest_hash, request.round, "evaluation", costs, request.digest)
    with gate.budget() as budget:
        charge = budget.reserve(release)
    reply = run.score(request.round, request.split)
    if reply is None or reply.request_digest != request.digest:
        if charge.state != State.RESERVED:
            raise SiteRefusal(f"{release.name} was answered already; its answer is no longer kept.")
        secret = Secret(charge.key, f"{manifest.hash}/{request.round}/evaluation")
        told = noised_sum(losses(), chosen, secret)
        about = (site, request.manifest_hash, request.round, request.split, request.digest)
        reply = EvaluateReply(*about, told, work.patients(request.split))
        run.keep_score(reply)
    with gate.budget() as budget:
        budget.charge(release, sha256=digest_of_answer(reply))
        budget.cancel_before(release)
    return reply


def noised_sum(losses: NDArray[np.float64], chosen: PrivateEvaluation, secret: Secret) -> float:
    """Sum patients' losses, float64 [P] in nats, each cut to [0, bound], and add the noise.

    One beyond any number counts as the bound, and nan, as of a patient without anything to predict, as 0.
    """
    levels = np.rint(np.clip(np.nan_to_num(losses, nan=0.0, posinf=np.inf), 0.0, chosen.bound) / chosen.bound * _LEVELS)
    exact = torch.tensor([int(levels.sum()) * (chosen.bound / _LEVELS)], dtype=torch.float64)
    (noisy,) = noised([exact], PrivateOptions(chosen.bound, chosen.noise_multiplier, 1.0), secret)
    return float(noisy)
