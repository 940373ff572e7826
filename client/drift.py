"""Drift correction at a site: SCAFFOLD whose control variates nobody sends.

SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378, algorithm 1, option II) takes g − cᵢ + c as the gradient,
where cᵢ ← cᵢ − c + (x − yᵢ) / Σ η after a round from x to yᵢ with learning rates η, and c is the mean of all cᵢ. When
all sites take part, count the same and x⁺ is the mean of the yᵢ, the new c is (x − x⁺) / Σ η, so the one vector that
matters follows from the next global weights, which a site gets anyhow:

    hᵢ = cᵢ − c,    hᵢ ← hᵢ + (x⁺ − yᵢ) / Σ η

(the form of Scaffnew: Mishchenko et al., ICML 2022, arXiv 2202.09357, algorithm 2). All hᵢ add up to nothing. It costs
no byte on the wire and goes under masks as it is; at the site it costs two vectors on the disk (`client.archive`). A
site that was not asked in the round before keeps its hᵢ as it was, as x⁺ is then not what its last yᵢ led to.
"""

from dataclasses import dataclass

import numpy as np

from federation.messages import Vector


@dataclass(frozen=True, eq=False)
class Drift:
    """What a site keeps of a round.

    Attributes:
        round: its number.
        drift: h that gradients were corrected by, float32 [P].
        ended: the local weights as they were told, float32 [P].
    """

    round: int
    drift: Vector
    ended: Vector


def next_drift(kept: Drift | None, number: int, weights: Vector, rates: float) -> Vector:
    """Give the correction of a round, float32 [P].

    Args:
        kept: of the last round that the site answered; None before the first.
        number: of the round.
        weights: the global weights that it begins with, float32 [P].
        rates: the sum of the learning rates of the round before.
    """
    if kept is None:
        return np.zeros_like(weights)
    if kept.round != number - 1:
        return kept.drift
    return kept.drift + (weights - kept.ended) / np.float32(rates)
