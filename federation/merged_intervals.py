"""How sure figures of a sum of tallies are: by drawing its counts anew, as a bootstrap of the predictions would.

The counts of a histogram are all that a bootstrap over predictions needs: a resample of N predictions is a multinomial
draw of N over the cells. So intervals of the sum are those of the pooled predictions, up to the cells' width. Whose a
prediction is, no tally tells: patients who are asked about several times make the true intervals wider than these.

With noise of standard deviation s on every cell, a draw adds noise of that size once more, and what is drawn of a count
has the count's own variance (Poisson). Noise bends figures (a curve through noised cells is a worse one), so intervals
reach as far as bias and 1.96 deviations of the draws. Calibration errors have their test-inverting interval with and
without noise (`model.metrics.of_gaps`): gaps are linear in the counts, so noise is added to them as it is to cells.
"""

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from model import metrics

Floats = NDArray[np.float64]

DRAWS = 500
_Z = 1.959963984540054
_CHUNK = 2_000_000
# Neighbouring bins are drawn together beyond so many: what is asked of draws is their spread only.
_MOST_BINS = 512

BENT = ("auprc", "slope", "intercept")
"""Figures that noise on counts bends, as counts below 0 are left out: no interval of theirs was found to cover."""


class Redrawn:
    """The figures of a sum of counts, drawn anew many times over: its predictions, the noise on it, or both."""

    def __init__(self, counts: Floats, log_odds: Floats, cuts: tuple[int, ...], deviation: float) -> None:
        """Put bins together and take the sum's figures.

        Args:
            counts: float64 [2, B], by label and bin; with noise also below 0.
            log_odds: float64 [B], ascending.
            cuts: the bins at which the groups of the calibration error begin, but for the first.
            deviation: standard deviation of the noise on every count; 0 for none.
        """
        self._deviation, self.noisy = deviation, deviation > 0
        self._kept: dict[bool, Mapping[str, Floats]] = {}
        used = np.arange(len(log_odds)) if self.noisy else np.flatnonzero(counts.any(0))
        places = np.linspace(0, len(used), min(len(used), _MOST_BINS), endpoint=False).astype(int)
        starts = np.union1d([0, *used[places]], np.asarray(cuts, np.int64)).astype(int)
        self._counts = np.add.reduceat(counts, starts, axis=1)
        weight = np.abs(counts).sum(0) + 1e-12  # so that empty bins have a middle, too
        size = np.add.reduceat(weight, starts)
        self._log_odds = np.add.reduceat(weight * log_odds, starts) / size
        self._risk = np.add.reduceat(weight / (1 + np.exp(-log_odds)), starts) / size
        self._groups = np.searchsorted(starts, [0, *cuts])
        self._own = self._figures(self._counts[None])

    def interval(self, name: str, value: float, *, sampled: bool) -> tuple[float, float] | None:
        """Give the interval of a figure of the sum, or None if too few draws have it, or none that covers is known.

        Args:
            name: `auroc`, `auprc`, `brier`, `ece`, `slope` or `intercept`.
            value: the sum's own figure.
            sampled: whether it is to hold what endlessly many predictions like these would give (95 %), or what these
                predictions give without the noise on their counts.
        """
        if sampled and self.noisy and name in BENT:
            return None
        drawn = self._drawn(sampled=sampled)
        if name == "ece":
            found = metrics.of_gaps(self._own["gaps"][0], drawn["gaps"])
            return None if np.isnan(found.low) else (found.low, found.high)
        # Bins that are drawn together move a figure a little, all draws alike.
        values = drawn[name] - self._own[name][0] + value
        defined = values[np.isfinite(values)]
        if 2 * len(defined) < len(values):
            return None
        if not self.noisy:
            found = metrics.interval(value, defined)
            return found.low, found.high
        reach = abs(float(defined.mean()) - value) + _Z * float(defined.std())
        return value - reach, value + reach

    def _drawn(self, *, sampled: bool) -> Mapping[str, Floats]:
        """Figures [DRAWS], and gaps [DRAWS, groups]; the same ones every time."""
        if sampled not in self._kept:
            parts = [self._figures(counts) for counts in self._draws(sampled=sampled)]
            self._kept[sampled] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return self._kept[sampled]

    def _draws(self, *, sampled: bool) -> Iterator[Floats]:
        """Counts [R, 2, G], some at a time."""
        rng = np.random.default_rng(0)  # of the intervals only; nothing secret follows from it
        shape, there = self._counts.shape, np.maximum(self._counts, 0.0)
        variance = np.full(shape, self._deviation**2)
        if sampled and self.noisy:
            # Noise alone makes some counts positive; each label's counts vary by as much as there is in all.
            total, positive = self._counts.sum(1, keepdims=True), there.sum(1, keepdims=True)
            variance += there * np.divide(total, positive, out=np.zeros_like(total), where=positive > 0).clip(0.0)
        step = max(1, _CHUNK // self._counts.size)
        for begin in range(0, DRAWS, step):
            size = min(step, DRAWS - begin)
            if self.noisy:
                yield self._counts + rng.normal(0.0, np.sqrt(variance), (size, *shape))
            else:
                whole = round(there.sum())
                yield rng.multinomial(whole, (there / there.sum()).ravel(), size).reshape(size, *shape).astype(float)

    def _figures(self, counts: Floats) -> dict[str, Floats]:
        """Figures of counts [R, 2, G]; nan where a label has none."""
        negative, positive = counts[:, 0], counts[:, 1]
        totals, size = counts.sum(2), counts.sum((1, 2))
        told = np.where((totals > 0.5).all(1), 1.0, np.nan)
        totals, size = np.maximum(totals, 0.5), np.maximum(size, 1.0)
        below = np.cumsum(negative, axis=1) - negative / 2
        found = {"auroc": told * np.clip((positive * below).sum(1) / totals.prod(1), 0.0, 1.0)}
        seen = np.maximum(counts, 0.0)
        hits, called = (np.cumsum(side[:, ::-1], axis=1)[:, ::-1] for side in (seen[:, 1], seen.sum(1)))
        precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
        found["auprc"] = told * (precision * seen[:, 1]).sum(1) / np.maximum(seen[:, 1].sum(1), 0.5)
        found["brier"] = told * (negative @ self._risk**2 + positive @ (1 - self._risk) ** 2) / size
        gap = np.add.reduceat(positive - counts.sum(1) * self._risk, self._groups, axis=1)
        found["gaps"] = told[:, None] * gap / size[:, None]
        truth = np.repeat([0.0, 1.0], len(self._log_odds))
        rows, start = seen.reshape(len(seen), -1), np.maximum(self._counts, 0.0).ravel()
        lines = metrics.recalibrations(np.tile(self._log_odds, 2), truth, rows, near=start)
        return {**found, "slope": told * lines[0], "intercept": told * lines[1]}
