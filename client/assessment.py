"""How well the run's model answers questions about a site's own patients: told as tallies, and kept before they leave.

Risks come from rollouts at the site; only counts by score and label are told (`federation.tallies`). Where these
have noise, it follows from a key in the budget's ledger, and they are charged before they are handed over: killed
anywhere, the same request gets the same answer.
"""

from collections.abc import Callable

import numpy as np

from client.archive import RunArchive
from client.budget import Release, State
from client.gate import Gate, digest_of_answer
from client.local import Work
from federation import protection
from federation.accountant import Mechanisms
from federation.coding import Told
from federation.manifest import TaskEvaluation
from federation.messages import AssessReply, AssessRequest, SiteRefusal
from federation.tallies import noised, tally
from model.private import Secret


def assess(
    site: str,
    run: RunArchive,
    request: AssessRequest,
    gate: Gate,
    work: Work,
    device: str,
    watch: Callable[[int, int], None],
) -> AssessReply:
    """Give the tallies of all questions; ask while working on the run.

    Args:
        site: the site's name.
        run: where the answer is kept.
        request: what is asked.
        gate: keeps the budget, and the fewest patients behind a figure.
        work: of the run.
        device: that rolls out.
        watch: called with trajectories done and to do; may raise.

    Raises:
        SiteRefusal: the manifest asks nothing after this round, another request was answered for it, or its answer
            is no longer kept.
        PolicyRefusal: the split has fewer patients than the policy's floor.
        BudgetExhausted: noised tallies would cost more than the site allows.
    """
    asked = _check_request(work, request)
    gate.admit_figure(work.patients(asked.split))
    weights = work.weights_at_home(run, request.round + 1, request.weights)
    kept = run.assessment(request.round)
    if kept is not None and kept.request_digest != request.digest:
        raise SiteRefusal(f"The questions after round {request.round} were answered already, for another request.")
    if not asked.form.noise:
        if kept is None:
            kept = _reply(site, request, work, weights, device, watch, b"")
            run.keep_assessment(kept)
        return kept
    costs = Mechanisms((protection.of_one_tally(asked),))
    release = Release(request.manifest_hash, request.round, "statistics", costs, request.digest)
    with gate.budget() as budget:
        charge = budget.reserve(release)
    if kept is None:
        if charge.state != State.RESERVED:
            raise SiteRefusal(f"{release.name} was answered already; its answer is no longer kept.")
        kept = _reply(site, request, work, weights, device, watch, charge.key)
        run.keep_assessment(kept)
    with gate.budget() as budget:
        budget.charge(release, sha256=digest_of_answer(kept))
        budget.cancel_before(release)
    return kept


def _check_request(work: Work, request: AssessRequest) -> TaskEvaluation:
    asked = work.manifest.tasks
    if asked is None or not asked.due(request.round, work.manifest.rounds):
        raise SiteRefusal(f"The run's manifest asks no questions after round {request.round}.")
    work.check_request(request.round, request.weights)
    return asked


def _reply(
    site: str,
    request: AssessRequest,
    work: Work,
    weights: Told,
    device: str,
    watch: Callable[[int, int], None],
    key: bytes,
) -> AssessReply:
    """Roll out and count; with a key, add the noise that follows from it."""
    asked = _check_request(work, request)
    told = []
    for task in asked.tasks:
        cohort = work.cohort(task, asked.split)
        risk = work.estimate(task, cohort, weights, device, asked, watch) if len(cohort) else np.zeros(0)
        counts = tally(cohort.labels, risk, cohort.subject_ids, asked.form)
        if key:
            counts = noised(counts, asked.form, Secret(key, f"{request.manifest_hash}/{request.round}/{task.name}"))
        told.append(counts.astype(np.float32))
    return AssessReply(site, request.manifest_hash, request.round, request.digest, np.concatenate(told))
