"""What a run with secure aggregation sums, as its manifest alone says: both sides derive the same `Agreement` from it.

An update counts by the tokens it was made of (in private runs: by the patients that were drawn on average), or all
count the same; tokens, steps and losses ride in the same sum. An evaluation is a sum of its own, of losses and tokens
only, or of tallies. Checks that need a single update are made here too, for the site: the coordinator sees none.

Where noise is shared out over the sites, a sum tells nothing of records but its noisy update: all weights are equal,
and the totals are constants.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from federation.fixed_point import FixedPoint, Total
from federation.manifest import Manifest, SecureAggregation
from federation.masking import Agreement, MaskingOptions, Place
from federation.messages import AssessReply, EvaluateReply, ProtocolError, TrainReply, Vector
from federation.vectors import norm

TOKENS, STEPS, LOSS = "tokens", "steps", "loss"
"""The totals: targets, optimizer steps, and the sum of negative log-likelihoods in nats."""

_MOST_LOSS = 64.0  # nats per target: far above a model that knows nothing; what is more counts as that
_MOST_STEPS = 2**31
_MOST_EVALUATED = 2**34  # targets of a split
_MOST_TOLD = 2.0**24  # predictions in a cell, or a sum of risks: float32 has all whole numbers up to it


@dataclass(frozen=True, eq=False)
class Summand:
    """What one site adds to a sum: a vector float32 [P], its weight, the totals, and the secret key of its noise."""

    vector: Vector
    weight: int
    totals: Mapping[str, float]
    noise_key: bytes = field(default=b"", repr=False)


def aggregation_of(manifest: Manifest) -> SecureAggregation:
    """Give how a run's updates are summed.

    Raises:
        ProtocolError: they are told in clear.
    """
    if manifest.secure_aggregation is None:
        raise ProtocolError(f"Run {manifest.hash} has no secure aggregation.")
    return manifest.secure_aggregation


def agreement_of(manifest: Manifest, place: Place, work: str) -> Agreement:
    """Give what a sum is about.

    Args:
        manifest: the run.
        place: which of its sums.
        work: digest of the request whose answers are summed.

    Raises:
        ProtocolError: the run has no such sum.
    """
    chosen = aggregation_of(manifest)
    if place.manifest_hash != manifest.hash or not 1 <= place.round <= manifest.rounds or place.attempt < 1:
        raise ProtocolError(f"Run {manifest.hash} has no sum for round {place.round}, attempt {place.attempt}.")
    match place.purpose:
        case "train":
            options, size = _of_updates(manifest, chosen.masking), manifest.model.parameters()
        case "evaluate tasks":
            if manifest.tasks is None:
                raise ProtocolError(f"Run {manifest.hash} asks no questions at its sites.")
            options, size = _of_tallies(chosen), manifest.tasks.size
        case _:
            options, size = _of_losses(chosen), 1
    return Agreement(place, work, size, chosen.roster, options)


def numbers_of(manifest: Manifest) -> FixedPoint:
    """Give how a run's updates become integers.

    Raises:
        ProtocolError: the run has no secure aggregation.
    """
    return agreement_of(manifest, Place(manifest.hash, 1, "train", 1), "").numbers


def update_bytes(manifest: Manifest) -> int:
    """Give the bytes of one site's update of a round, as it leaves: float32, or masked words of 32 or 64 bits."""
    size = manifest.model.parameters()
    return size * (4 if manifest.secure_aggregation is None else numbers_of(manifest).dtype.itemsize)


def update_of(manifest: Manifest, reply: TrainReply, noise_key: bytes = b"") -> Summand:
    """Give what a round's work adds to the sum; the vector is the reply's own."""
    if shares_noise(manifest):
        return Summand(np.asarray(reply.update), 1, {TOKENS: 1, STEPS: 1, LOSS: 0.0}, noise_key)
    loss = min(reply.loss, _MOST_LOSS) * reply.tokens
    weight = reply.tokens if manifest.outer.weights == "tokens" else 1
    return Summand(np.asarray(reply.update), weight, {TOKENS: reply.tokens, STEPS: reply.steps, LOSS: loss})


def score_of(manifest: Manifest, reply: EvaluateReply) -> Summand:
    """Give what an evaluation adds to the sum; in a private run, a noised loss over patients in the place of tokens."""
    most = _MOST_LOSS * reply.tokens if manifest.privacy is None else _MOST_LOSS * _MOST_EVALUATED
    loss = max(-most, min(reply.nll, most))
    return Summand(np.zeros(1, np.float32), 1, {TOKENS: reply.tokens, LOSS: loss})


def assessment_of(reply: AssessReply) -> Summand:
    """Give what tallies add to the sum."""
    return Summand(reply.tallies, 1, {TOKENS: 0, LOSS: 0.0})


def shares_noise(manifest: Manifest) -> bool:
    """Tell whether every site adds a share of the noise to its update before it is masked."""
    return manifest.privacy is not None and manifest.privacy.mechanism == "distributed"


def objection(manifest: Manifest, reply: TrainReply) -> str:
    """Say why a site's own update must not go into a sum; empty when it may. The text tells no figure of the site."""
    most, limit = aggregation_of(manifest).masking.max_weight, manifest.max_norm
    if not 1 <= reply.tokens <= most:
        return f"its weight is beyond masking.max_weight = {most}; agree on a greater one in a new run"
    length = norm(reply.update)
    if not np.isfinite(length):
        return "it holds values that are not finite"
    if limit is not None and length > limit:
        return f"its norm is above the agreed {limit:.6g}"
    return ""


def _of_updates(manifest: Manifest, options: MaskingOptions) -> MaskingOptions:
    most = options.max_weight
    totals = (
        Total(TOKENS, most),
        Total(STEPS, _MOST_STEPS),
        # The step grows with the greatest weight, so that any number of sites fits; of a mean loss it is 2^-24 nats
        # for sites of that weight.
        Total(LOSS, _MOST_LOSS * most, most * 2.0**-24),
    )
    weight = most if manifest.outer.weights == "tokens" else 1
    noise = 0.0 if manifest.privacy is None else manifest.privacy.share
    return replace(options, max_weight=weight, totals=totals, noise=noise)


def _of_tallies(chosen: SecureAggregation) -> MaskingOptions:
    # A step of 2^-16: counts are exact, and sums of risks as good as float32.
    return replace(_of_losses(chosen), clip=_MOST_TOLD, precision_bits=40)


def _of_losses(chosen: SecureAggregation) -> MaskingOptions:
    most = _MOST_LOSS * _MOST_EVALUATED
    step = 2.0**-12 * len(chosen.roster)
    totals = (Total(TOKENS, _MOST_EVALUATED), Total(LOSS, most, step))
    return replace(chosen.masking, clip=1.0, max_weight=1, totals=totals)
