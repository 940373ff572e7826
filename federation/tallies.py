"""What a site tells of how well risks fit: counts by score and label, in which nobody stands for fewer than the floor.

Risks are sorted into bins of equal width on the log-odds scale from -10 to 10, which all sites share, so the tallies of
sites add up (also under masks). Three forms, which `Form` chooses:

- exact cells (`floor` 1): one histogram per label.
- cells over a floor: per label, neighbouring bins are put together until each cell stands for `floor` patients or more.
  A cell is told three times: at its lowest bin, at its highest, and at the bin of its mean log-odds. Sums of these over
  sites bound every true score from below and above, although nobody knows any more which cell was whose. Where a site
  has fewer patients of a label than the floor, it tells nothing of the question.
- noised cells (`noise` above 0): one histogram per label with discrete Gaussian noise of `noise` x `most_per_patient`.
  Of a patient, `most_per_patient` predictions count, so one patient more or less changes the two histograms by that
  at most (L2: all of them could fall into one cell).

`federation.merged` makes figures and their bounds of the sum.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from federation.discrete_noise import DiscreteGaussianNoise
from tokenizer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from model.private import Secret

SPAN = 10.0
"""Log-odds beyond ±SPAN count as that; a risk of 4.5e-5, or of 1 less that."""

BINS = 16_384
"""Of the shared grid. With exact cells of this width (0.0012 in log-odds) the AUROC's bound is 0.0006 times the
integral of the product of the two labels' densities: below 0.002 unless risks lie within about a third of a log-odd."""

MOST_NOISED_BINS = 256
MOMENTS = 4


@dataclass(frozen=True)
class Form:
    """The form of a tally, on which all sites agree.

    Attributes:
        bins: of the grid.
        floor: the fewest patients that a cell stands for; 1 for exact cells.
        noise: standard deviation of the noise on every cell, in units of `most_per_patient`; 0 for none.
        most_per_patient: how many predictions of a patient count where there is noise: the first ones.

    Raises:
        ConfigError: a value out of range, or noise and a floor, or noise on too many cells.
    """

    bins: int = BINS
    floor: int = 10
    noise: float = 0.0
    most_per_patient: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "noise", float(self.noise))
        rules = {
            "bins must be from 16 to 65,536": 16 <= self.bins <= 65_536,
            "floor must be at least 1": self.floor >= 1,
            "noise must be 0 or more": 0 <= self.noise < np.inf,
            "most_per_patient must be at least 1": self.most_per_patient >= 1,
            f"with noise, bins must be {MOST_NOISED_BINS} at most: every cell has noise": (
                not self.noise or self.bins <= MOST_NOISED_BINS
            ),
            "with noise, floor must be 1: noise hides each patient, whatever a cell holds": (
                not self.noise or self.floor == 1
            ),
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise ConfigError(f"task statistics: {'; '.join(wrong)}.")

    @property
    def parts(self) -> int:
        """How often each label's cells are told: once, or at their lowest, highest and mean bin."""
        return 3 if self.floor > 1 else 1

    @property
    def size(self) -> int:
        """The length of a tally: cells, and without noise the sums of scores and of their squares by label."""
        return 2 * self.parts * self.bins + (0 if self.noise else MOMENTS)

    @property
    def variance(self) -> float:
        """The variance of the noise that a site adds to every cell."""
        return (self.noise * self.most_per_patient) ** 2

    def bin_of(self, scores: ArrayLike) -> NDArray[np.int64]:
        """Give the bin of each risk.

        >>> Form(bins=20, floor=1).bin_of([0.0, 0.5, 1.0]).tolist()
        [0, 10, 19]
        """
        risk = np.asarray(scores, np.float64)
        with np.errstate(divide="ignore"):
            place = (np.clip(np.log(risk) - np.log1p(-risk), -SPAN, SPAN) + SPAN) * (self.bins / (2 * SPAN))
        return np.minimum(place.astype(np.int64), self.bins - 1)


def tally(labels: ArrayLike, scores: ArrayLike, subjects: ArrayLike, form: Form) -> NDArray[np.float64]:
    """Count a site's predictions, before noise.

    Args:
        labels: 0 or 1, [P].
        scores: risks in [0, 1], [P].
        subjects: whose each is, int64 [P]; of a patient's predictions the earlier come first.
        form: as agreed.

    Returns:
        float64 [form.size]: by label and part the counts of the bins, then the label's sum of scores and of squares.

    Raises:
        DataError: labels other than 0 and 1, scores outside of [0, 1], or lengths that differ.
    """
    truth, risk, owner = (np.asarray(column) for column in (labels, scores, subjects))
    if truth.shape != risk.shape or truth.shape != owner.shape or truth.ndim != 1:
        raise DataError(f"{truth.shape} labels, {risk.shape} risks and {owner.shape} subjects; there must be one each")
    if not np.isin(truth, (0, 1)).all() or not ((risk >= 0) & (risk <= 1)).all():
        raise DataError("labels must be 0 or 1 and risks between 0 and 1; leave censored predictions out")
    if form.noise:
        kept = _rank(owner) < form.most_per_patient
        truth, risk, owner = truth[kept], risk[kept], owner[kept]
    told = np.zeros(form.size)
    sides = [truth == label for label in (0, 1)]
    if min(len(np.unique(owner[side])) for side in sides) < form.floor and form.floor > 1:
        return told
    cells = told[: 2 * form.parts * form.bins].reshape(2, form.parts, form.bins)
    moments = told[cells.size :].reshape(2, -1)
    for label, side in enumerate(sides):
        bins = form.bin_of(risk[side])
        if form.floor == 1:
            cells[label, 0] = np.bincount(bins, minlength=form.bins)
        else:
            _add_cells_(cells[label], bins, owner[side], form.floor)
        if not form.noise:
            moments[label] = risk[side].sum(), (risk[side] ** 2).sum()
    return told


def noised(told: NDArray[np.float64], form: Form, secret: "Secret") -> NDArray[np.float64]:
    """Add a site's noise to its tally; equal secrets give equal noise."""
    return told + DiscreteGaussianNoise(form.variance, secret).draw(told.size)


def _rank(owner: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number each patient's predictions from 0, in the order given."""
    order = np.argsort(owner, kind="stable")
    ranked = owner[order]
    first = np.concatenate([[True], ranked[1:] != ranked[:-1]]) if len(owner) else np.zeros(0, bool)
    rank = np.empty(len(owner), np.int64)
    rank[order] = np.arange(len(owner)) - np.maximum.accumulate(np.where(first, np.arange(len(owner)), 0))
    return rank


def _add_cells_(parts: NDArray[np.float64], bins: NDArray[np.int64], owner: NDArray[np.int64], floor: int) -> None:
    """Put bins together from below until a cell has `floor` patients; what is left at the top joins the last cell."""
    order = np.argsort(bins, kind="stable")
    ranked, owners = bins[order], owner[order]
    ends, seen = [], set[int]()
    last_of_bin = np.append(ranked[1:] != ranked[:-1], True)
    for place, (patient, closes) in enumerate(zip(owners.tolist(), last_of_bin.tolist(), strict=True)):
        seen.add(patient)
        if closes and len(seen) >= floor:
            ends.append(place + 1)
            seen.clear()
    ends[-1] = len(ranked)
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        cell = ranked[start:end]
        for part, place in enumerate((cell[0], cell[-1], round(float(cell.mean())))):
            parts[part, place] += end - start
