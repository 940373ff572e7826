"""Membership inference: was this patient in the training? Scores for members and others, and how far they come apart.

Two attacks, each stronger with a reference model that was trained in the same way on other patients: what is easy for
both models says nothing of membership (calibration: Watson et al., ICLR 2022, arXiv 2111.08440).

- by loss (Yeom et al., CSF 2018): members have a lower one.
- by rollouts: simulated futures tell more of what comes next in a member's timeline. This needs no weights.

An average success hides the few patients who can be told with certainty, so the rate of members found at few false
alarms stands beside the AUROC (Carlini et al., S&P 2022, arXiv 2112.03570).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from model import metrics
from model.decoder import Decoder
from model.rollout import Prompt, Stop, rollout
from server.results import Figure
from simulation.attacks.canaries import chosen
from simulation.attacks.training import losses
from tokenizer.codebook import Codebook
from tokenizer.store import TokenSplit

Floats = NDArray[np.float64]

FALSE_ALARM_RATES = (0.01, 0.001)
_LEVEL = 0.05
# Points of a curve that a page draws.
_POINTS = 200


@dataclass(frozen=True)
class Found:
    """The members found where few others are taken for members.

    Attributes:
        asked: the rate of false alarms that is allowed.
        alarms: others who are taken for members at the threshold that was taken.
        highest: what the rate of false alarms at this threshold may be, at most, with 95 % confidence.
        rate: share of members found, with its exact interval (Clopper, Pearson 1934) at this threshold.
        note: why the rate asked for can't be measured; empty if it can.
    """

    asked: float
    alarms: int
    highest: float
    rate: Figure
    note: str = ""


@dataclass(frozen=True)
class Separation:
    """How well an attack's scores tell members from others.

    Attributes:
        attack: its name.
        members, others: how many have a score.
        auroc: chance that a member scores above another patient; 0.5 is guessing.
        found: at each of FALSE_ALARM_RATES.
        roc: false alarm rates and rates of members found; empty where undefined.
    """

    attack: str
    members: int
    others: int
    auroc: Figure
    found: tuple[Found, ...]
    roc: tuple[tuple[float, ...], tuple[float, ...]]


def separate(attack: str, members: Floats, others: Floats) -> Separation:
    """Compare scores, float64 [M] and [N], higher for those the attacker takes for members; nan is no score."""
    members, others = members[~np.isnan(members)], others[~np.isnan(others)]
    if not len(members) or not len(others):
        missing = Figure(None, note="no patients to compare")
        return Separation(attack, len(members), len(others), missing, (), ((), ()))
    labels = np.repeat([1, 0], [len(members), len(others)])
    scores = np.concatenate([members, others])
    area = metrics.auroc(labels, scores)
    curve = metrics.roc(labels, scores)
    thin = np.unique(np.linspace(0, len(curve.x) - 1, min(_POINTS, len(curve.x))).round().astype(int))
    return Separation(
        attack,
        len(members),
        len(others),
        Figure(area, *auroc_interval(area, len(members), len(others))),
        tuple(_found(members, others, rate) for rate in FALSE_ALARM_RATES),
        (tuple(curve.x[thin].tolist()), tuple(curve.y[thin].tolist())),
    )


@dataclass(frozen=True)
class Effort:
    """How much work the attack by rollouts may be.

    Attributes:
        most: patients of each kind who are asked about.
        trajectories: futures of each.
        seed: of choices and futures.
    """

    most: int = 300
    trajectories: int = 2
    seed: int = 0


def attack(
    model: Decoder,
    reference: Decoder | None,
    codebook: Codebook,
    members: TokenSplit,
    others: TokenSplit,
    effort: Effort,
    watch: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Separation, ...]:
    """Try to tell members from others, by loss and by rollouts.

    Args:
        model: under attack.
        reference: a model of other patients, whose scores are subtracted; None subtracts nothing.
        codebook: of the tokens.
        members, others: whom to tell apart.
        effort: of the attack by rollouts.
        watch: told of parts that are done, and of all.
    """
    rng = np.random.default_rng(effort.seed)
    few = [chosen(split, np.sort(rng.permutation(len(split))[: effort.most])) for split in (members, others)]
    told: dict[str, list[Floats]] = {"loss": [], "rollouts": []}
    parts = 4
    for number, (split, part) in enumerate(zip((members, others), few, strict=True)):
        loss, own = -losses(model, codebook, split), _told(model, codebook, part, effort)
        watch(2 * number + 1, parts)
        if reference is not None:
            loss += losses(reference, codebook, split)
            own -= _told(reference, codebook, part, effort)
        watch(2 * number + 2, parts)
        told["loss"].append(loss)
        told["rollouts"].append(own)
    return tuple(separate(name, *scores) for name, scores in told.items())


def _told(decoder: Decoder, codebook: Codebook, split: TokenSplit, effort: Effort) -> Floats:
    return repeated(decoder, codebook, split, trajectories=effort.trajectories, seed=effort.seed)


def auroc_interval(area: float, positives: int, negatives: int) -> tuple[float, float]:
    """A 95 % interval of an AUROC that also holds near 0 and 1.

    The limits are the areas from which the one found is 1.96 standard errors away.

    Source: Newcombe, Statistics in Medicine 25 (2006) 559-573, method 5, with the variance of Hanley and McNeil 1982.
    """
    size, z = (positives + negatives) / 2 - 1, float(stats.norm.isf(_LEVEL / 2))

    def deviation(true: float) -> float:
        spread = 1 + size * (1 - true) / (2 - true) + size * true / (1 + true)
        return float(np.sqrt(true * (1 - true) * spread / (positives * negatives)))

    def limit(end: float, sign: float) -> float:
        def gap(true: float) -> float:
            return sign * (true - area) - z * deviation(true)

        # At 0 and 1 the deviation is 0: the gap there is positive unless the area lies there itself.
        inside = min(max(area, 1e-12), 1 - 1e-12)
        return end if gap(end) <= 0 else float(optimize.brentq(gap, inside, end))

    return limit(0.0, -1.0), limit(1.0, 1.0)


def share_interval(hits: int, of: int) -> Figure:
    """A share with its exact 95 % interval (Clopper, Pearson 1934)."""
    if not of:
        return Figure(None, note="nobody to ask about")
    limits = stats.binomtest(hits, of).proportion_ci(1 - _LEVEL, "exact")
    return Figure(hits / of, float(limits.low), float(limits.high))


def _found(members: Floats, others: Floats, rate: float) -> Found:
    """Members strictly above the highest threshold that keeps false alarms within the rate, counted on the others."""
    allowed = int(rate * len(others) + 1e-9)
    # Ties with the first one that is not allowed to be an alarm are no alarms either.
    threshold = np.sort(others)[len(others) - 1 - allowed]
    alarms = int((others > threshold).sum())
    note = ""
    if rate * len(others) < 1:
        note = f"{len(others)} others are too few to measure this rate: the threshold is their highest score"
    highest = float(stats.beta.ppf(1 - _LEVEL, alarms + 1, len(others) - alarms)) if alarms < len(others) else 1.0
    return Found(rate, alarms, highest, share_interval(int((members > threshold).sum()), len(members)), note)


def repeated(
    decoder: Decoder,
    codebook: Codebook,
    split: TokenSplit,
    *,
    cuts: int = 8,
    trajectories: int = 4,
    tokens: int = 8,
    seed: int = 0,
) -> Floats:
    """How much of a timeline simulated futures tell again, from several places in it.

    Needs nothing but rollouts: what somebody can do who may ask for futures and doesn't have the weights.

    Args:
        decoder: the model.
        codebook: of the tokens.
        split: whom to ask about.
        cuts: places in each timeline, from its first quarter on, where the future is asked for.
        trajectories: futures at each.
        tokens: of a future.
        seed: of the draws.

    Returns:
        float64 [P]: share of the next tokens that a future tells before its first error, mean over futures and places;
        nan for timelines of fewer than four tokens.
    """
    scores = np.full(len(split), np.nan)
    prompts, truths, owner = [], [], []
    for patient in np.flatnonzero(np.diff(split.offsets) >= 4):
        timeline = split.timeline(int(patient))[0].astype(np.int64)
        places = np.unique(np.linspace(max(1, len(timeline) // 4), len(timeline) - 1, cuts).astype(int))
        for place in places:
            prompts.append(Prompt(timeline[:place]))
            truths.append(timeline[place : place + tokens])
            owner.append(patient)
    if not prompts:
        return scores
    told = rollout(
        *(decoder, codebook, prompts),
        trajectories=trajectories,
        stop=Stop([], None, tokens),
        seed=seed,
        keep_tokens=True,
    )
    shares = [
        np.mean([_right_until_wrong(told.trajectory(place, number), truth) for number in range(trajectories)])
        for place, truth in enumerate(truths)
    ]
    sums, counts = (np.bincount(owner, weights, len(split)) for weights in (np.array(shares), None))
    return np.divide(sums, counts, out=scores, where=counts > 0)


def _right_until_wrong(future: NDArray[np.int32], truth: NDArray[np.int64]) -> float:
    both = min(len(future), len(truth))
    wrong = np.flatnonzero(future[:both] != truth[:both])
    return float(wrong[0] if len(wrong) else both) / len(truth)
