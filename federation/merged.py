"""What the sum of sites' tallies says of a model: figures, and how far those of all predictions pooled can be away.

Of a sum it is known in which bin, or between which bins, every score lies (`federation.tallies`). So for each figure
there is an interval in which the pooled figure must lie:

- AUROC: a pair of a positive and a negative whose bins can't overlap is ordered; all others count as won (`high`), lost
  (`low`), or by their cells' mean bins (`value`). With exact cells `high - low` is the share of pairs within one bin.
- Average precision: the j-th best positive has j or more positives at or above it, and at most those negatives that can
  be at or above it; and the other way round.
- Brier score: from sums of scores and squares, exact; with noise from the cells, within their width.
- Calibration error: over ten groups of about equal size, cut where bins end (`Merged.cuts`); it is compared with the
  pooled figure over the same groups.
- Calibration slope and intercept: the logistic regression of `model.metrics.recalibration`, log-odds cut to ±10, on
  the bins' middles. The bound is of first order: what the derivative makes of all scores' greatest displacements.

With noise, `low` and `high` also hold what noise makes of the figure, by drawing it anew (95 %). How sure the figures
are of patients like these, `least` and `most` say (`federation.merged_intervals`), widened by the bounds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from federation.merged_intervals import Redrawn
from federation.tallies import MOMENTS, SPAN, Form
from model import metrics
from tokenizer.errors import DataError

Floats = NDArray[np.float64]

GROUPS = 10
FIGURES = ("auroc", "auprc", "brier", "ece", "slope", "intercept")


@dataclass(frozen=True)
class Bounded:
    """A figure of a sum; all None where it isn't defined.

    Attributes:
        value: the figure.
        low, high: between which that of the pooled predictions lies.
        least, most: 95 % interval of what endlessly many predictions like these would give.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    least: float | None = None
    most: float | None = None


@dataclass(frozen=True)
class Merged:
    """One question's figures over all sites.

    Attributes:
        predictions, positives: that the sites told of; with noise, about so many.
        auroc, auprc, brier, ece, slope, intercept: see the module.
        cuts: the bins at which the groups of `ece` begin, but for the first.
        predicted, observed, count: the groups' mean risks, shares of positives, and sizes.
        roc: false and true positive rates.
        noise: standard deviation of the noise on every cell of the sum.
    """

    predictions: float
    positives: float
    auroc: Bounded
    auprc: Bounded
    brier: Bounded
    ece: Bounded
    slope: Bounded
    intercept: Bounded
    cuts: tuple[int, ...]
    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    count: tuple[float, ...]
    roc: tuple[tuple[float, ...], tuple[float, ...]]
    noise: float = 0.0

    def figures(self) -> Mapping[str, float]:
        """Give the figures that are defined, their bounds and intervals, by name."""
        ends = {"": "value", ".low": "low", ".high": "high", ".least": "least", ".most": "most"}
        told = {f"{name}{end}": getattr(getattr(self, name), part) for name in FIGURES for end, part in ends.items()}
        counts = {"predictions": self.predictions, "positives": self.positives}
        return {name: float(value) for name, value in {**counts, **told}.items() if value is not None}


def merge(summed: ArrayLike, form: Form, sites: int = 1) -> Merged:
    """Make figures of the sum of tallies.

    Args:
        summed: float64 [form.size], the sum of the sites' tallies.
        form: as agreed.
        sites: how many tallies, of which each brought its own noise.

    Raises:
        DataError: a sum of another length.
    """
    told = np.asarray(summed, np.float64)
    if told.shape != (form.size,) or not np.isfinite(told).all():
        raise DataError(f"a tally of {form.bins} bins in this form has {form.size} finite numbers, got {told.shape}")
    whole = _Sum(told, form)
    deviation = float(np.sqrt(form.variance * sites))
    merged = replace(whole.merged(), noise=deviation)
    if merged.auroc.value is None:
        return merged
    redrawn = Redrawn(whole.at, whole.middle, merged.cuts, deviation)
    sure = {name: _sure(name, getattr(merged, name), redrawn) for name in FIGURES}
    return Merged(**{**vars(merged), **sure})


def ece_at(labels: ArrayLike, scores: ArrayLike, form: Form, cuts: tuple[int, ...]) -> float:
    """Give the calibration error of single predictions over the groups of a `Merged`, to compare it with."""
    group = np.searchsorted(np.asarray(cuts, np.int64), form.bin_of(scores), side="right")
    gap = np.bincount(group, np.asarray(labels, np.float64) - np.asarray(scores, np.float64), len(cuts) + 1)
    return float(np.abs(gap).sum() / max(len(group), 1))


def _sure(name: str, figure: Bounded, redrawn: Redrawn) -> Bounded:
    """Add what the noise and the choice of patients may have made of a figure."""
    if figure.value is None or figure.low is None or figure.high is None:
        return Bounded(None)
    below, above = figure.value - figure.low, figure.high - figure.value
    ends = (-np.inf, np.inf) if name in ("slope", "intercept") else (0.0, 1.0)

    def within(found: tuple[float, float]) -> tuple[float, float]:
        return max(ends[0], found[0] - below), min(ends[1], found[1] + above)

    low, high = figure.low, figure.high
    if redrawn.noisy:
        if (bent := redrawn.interval(name, figure.value, sampled=False)) is None:
            return Bounded(None)
        low, high = within(bent)
    sure = redrawn.interval(name, figure.value, sampled=True)
    return Bounded(figure.value, low, high, *(within(sure) if sure else ()))


class _Sum:
    """A sum of tallies, by label (0, 1) float64 [B]: counts at the lowest, highest and mean bin of the cells."""

    def __init__(self, told: Floats, form: Form) -> None:
        cells = told[: 2 * form.parts * form.bins].reshape(2, form.parts, form.bins)
        self.low, self.high, self.at = cells[:, 0], cells[:, min(1, form.parts - 1)], cells[:, -1]
        self.moments = told[cells.size :].reshape(2, -1) if told.size == cells.size + MOMENTS else None
        self.exact, self.noisy = form.floor == 1, bool(form.noise)
        self.totals = self.at.sum(1)
        edges = np.linspace(-SPAN, SPAN, form.bins + 1)
        self.middle = (edges[1:] + edges[:-1]) / 2
        self.width = float(edges[1] - edges[0])
        edges[0], edges[-1] = -np.inf, np.inf  # scores beyond the grid lie in its first and last bin
        self.edges, self.risk = _sigmoid(edges), _sigmoid(self.middle)

    def merged(self) -> Merged:
        negative, positive = (float(total) for total in self.totals)
        if min(negative, positive) <= 0.5:
            none = Bounded(None)
            counts = max(negative + positive, 0.0), max(positive, 0.0)
            return Merged(*counts, none, none, none, none, none, none, (), (), (), (), ((), ()))
        cuts = self._cuts()
        groups = [np.add.reduceat(self.at * weight, [0, *cuts], axis=1) for weight in (1.0, self.risk)]
        size, sums = groups[0].sum(0), groups[1].sum(0)
        share = [np.divide(part, size, out=np.zeros_like(size), where=size > 0) for part in (sums, groups[0][1])]
        slope, intercept = self._recalibration()
        return Merged(
            predictions=negative + positive,
            positives=positive,
            auroc=self._auroc(),
            auprc=self._auprc(),
            brier=self._brier(),
            ece=self._ece(cuts, np.abs(groups[0][1] - sums).sum()),
            slope=slope,
            intercept=intercept,
            cuts=tuple(cuts),
            predicted=tuple(share[0].tolist()),
            observed=tuple(share[1].tolist()),
            count=tuple(size.tolist()),
            roc=self._roc(),
        )

    def _auroc(self) -> Bounded:
        pairs = float(self.totals.prod())

        def won(positive: Floats, negative: Floats, ties: float) -> float:
            below = np.cumsum(negative) - (1 - ties) * negative
            return float(np.clip((positive * below).sum() / pairs, 0.0, 1.0))

        low = won(self.low[1], self.high[0], 0.0)
        high = won(self.high[1], self.low[0], 1.0)
        return Bounded(float(np.clip(won(self.at[1], self.at[0], 0.5), low, high)), low, high)

    def _auprc(self) -> Bounded:
        at, low, high = (np.maximum(part, 0.0) if self.noisy else part for part in (self.at, self.low, self.high))
        hits, false = (np.cumsum(side[::-1])[::-1] for side in (at[1], at[0]))
        called = hits + false
        precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
        value = float((precision * at[1]).sum() / at[1].sum())
        if self.noisy:
            return Bounded(value, value, value)
        # Bins of the j-th best positive, at the lowest and at the highest that it can be: int64 [positives].
        lowest, highest = (
            np.repeat(np.arange(len(side)), side.round().astype(int))[::-1] for side in (low[1], high[1])
        )
        rank = np.arange(1, len(lowest) + 1)
        false_most = np.cumsum(high[0][::-1])[::-1][lowest]
        false_least = np.append(np.cumsum(low[0][::-1])[::-1], 0.0)[highest + 1]
        hits_most = np.cumsum(high[1][::-1])[::-1][lowest]
        least = float((rank / (rank + false_most)).mean())
        most = float((hits_most / (hits_most + false_least)).mean())
        return Bounded(min(max(value, least), most), least, most)

    def _brier(self) -> Bounded:
        size = float(self.totals.sum())
        if self.moments is not None:
            (_, squares), (sums, others) = self.moments
            value = float((squares + self.totals[1] - 2 * sums + others) / size)
            # Sums of scores travel as float32.
            return Bounded(value, value - 1e-6, value + 1e-6)
        told = [float((self.at[0] * risk**2 + self.at[1] * (1 - risk) ** 2).sum() / size) for risk in (self.risk,)]
        slack = 2 * self._slack() / size
        return Bounded(told[0], told[0] - slack, told[0] + slack)

    def _slack(self) -> float:
        """The most that the scores, told by their cells' mean bins, can be off in all."""
        if self.exact:
            off = np.maximum(self.edges[1:] - self.risk, self.risk - self.edges[:-1])
            return float((np.abs(self.at) * off).sum())
        return float((self.high * self.edges[1:] - self.low * self.edges[:-1]).sum())

    def _cuts(self) -> list[int]:
        """Where groups of about equal size begin, but for the first; distinct bins, none at an end."""
        filled = np.cumsum(np.maximum(self.at.sum(0), 0.0))
        wanted = filled[-1] * np.arange(1, GROUPS) / GROUPS
        cuts = np.unique(np.searchsorted(filled, wanted) + 1)
        return [int(cut) for cut in cuts if cut < len(filled) and 0 < filled[cut - 1] < filled[-1]]

    def _ece(self, cuts: list[int], gap: float) -> Bounded:
        size = float(self.totals.sum())
        below = [part.sum(0).cumsum() for part in (self.low, self.high)]
        astray = sum(abs(below[0][cut - 1] - below[1][cut - 1]) for cut in cuts)
        slack = (2 * astray + self._slack()) / size
        value = gap / size
        return Bounded(value, max(0.0, value - slack), value + slack)

    def _recalibration(self) -> tuple[Bounded, Bounded]:
        """Slope and intercept with their first-order bounds, by the implicit function theorem."""
        weights = np.maximum(self.at, 0.0)
        score = np.concatenate([self.middle, self.middle])
        truth = np.repeat([0.0, 1.0], len(self.middle))
        fit = metrics.fit_logistic(score, truth, weights.ravel())
        if fit is None:
            return Bounded(None), Bounded(None)
        risk = _sigmoid(fit[0] * score + fit[1])
        bend = risk * (1 - risk)
        design = np.stack([score, np.ones_like(score)])
        curvature = (design * (weights.ravel() * bend)) @ design.T
        moved = np.stack([truth - risk - bend * fit[0] * score, -bend * fit[0]])
        gain = np.abs(np.linalg.solve(curvature, moved)).reshape(2, 2, -1)  # [slope or intercept, label, bin]
        if self.exact:
            off = (gain * weights).sum((1, 2)) * self.width / 2
        else:
            spread = ((self.high - self.low) * self.middle).sum(1) + self.width * self.totals
            off = ((gain * (weights > 0)).max(2) * spread).sum(1)
        slope, intercept = (Bounded(float(v), float(v - d), float(v + d)) for v, d in zip(fit, off, strict=True))
        return slope, intercept

    def _roc(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The curve through the ends of cells, highest scores first."""
        used = np.flatnonzero(self.at.any(0))[::-1]
        rates = [np.clip(np.append(0.0, np.cumsum(side[used]) / side.sum()), 0.0, 1.0) for side in self.at]
        return tuple(rates[0].tolist()), tuple(rates[1].tolist())


def _sigmoid(log_odds: Floats) -> Floats:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-log_odds)))
