"""How events become tokens: the settings that all parties share, and the classes of time they choose from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokenizer.errors import ConfigError

_MINUTE = 60_000_000
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR
_OLDEST = 120
# The longest codes that are spelled (ICD-10) have seven letters.
_MOST_PIECES = 7


@dataclass(frozen=True)
class TokenizerOptions:
    """How events become tokens.

    Args:
        values: `separate` writes a value as its own token after the code's; `fused` as one token
            per code and bin (but for spelled codes, whose last piece is shared by many codes).
        value_bins: Quantile bins of a code's values.
        min_patients: A site tells nothing about fewer patients than this.
        sketch_accuracy: Relative accuracy of the sketches, 0.001 to 0.1.
        age_years: Width of an age bucket.
        named: Codes that have a token however rare they are, because questions ask for them; whoever
            asks names them, so that they are in the codebook tells nothing about any record.
        intervals: The classes of gaps: `comet13` from a minute, `ethos19` finer, from five minutes.
        icd10cm_split, atc_split, icd10pcs_split: Letters of the first pieces that spell a code, the rest
            being the last one; () keeps codes of the system whole. Diagnoses fall into category, the next
            three letters and the rest, as in ETHOS-ARES; (3, 1) is the other known reading of CoMET.
            Procedures stay whole, as in CoMET; (1, 1, 1, 1, 1, 1) spells them by their axes, as ETHOS does.
    """

    values: Literal["separate", "fused"] = "separate"
    value_bins: int = 10
    min_patients: int = 10
    sketch_accuracy: float = 0.01
    age_years: int = 5
    named: tuple[str, ...] = ()
    intervals: Literal["comet13", "ethos19"] = "comet13"
    icd10cm_split: tuple[int, ...] = (3, 3)
    atc_split: tuple[int, ...] = (3, 1)
    icd10pcs_split: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # The order, and how JSON gives it back, make no difference.
        object.__setattr__(self, "named", tuple(sorted(set(self.named))))
        for name in ("icd10cm_split", "atc_split", "icd10pcs_split"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        splits = (self.icd10cm_split, self.atc_split, self.icd10pcs_split)
        checks = (
            (self.values in ("separate", "fused"), 'values must be "separate" or "fused"', self.values),
            (2 <= self.value_bins <= 100, "value_bins must be 2 to 100", self.value_bins),
            (self.min_patients >= 1, "min_patients must be at least 1", self.min_patients),
            (0.001 <= self.sketch_accuracy <= 0.1, "sketch_accuracy must be 0.001 to 0.1", self.sketch_accuracy),
            (1 <= self.age_years <= _OLDEST, f"age_years must be 1 to {_OLDEST}", self.age_years),
            (
                self.intervals in INTERVAL_TABLES,
                f"intervals must be one of {', '.join(INTERVAL_TABLES)}",
                self.intervals,
            ),
            (
                all(len(split) < _MOST_PIECES and all(1 <= n <= _MOST_PIECES for n in split) for split in splits),
                f"icd10cm_split, atc_split and icd10pcs_split must be up to {_MOST_PIECES - 1} numbers of letters",
                splits,
            ),
        )
        for good, rule, value in checks:
            if not good:
                raise ConfigError(f"tokenizer options: {rule}, got {value!r}.")

    @property
    def widths(self) -> dict[str, tuple[int, ...]]:
        """The splits per code system."""
        return {"ICD10CM": self.icd10cm_split, "ATC": self.atc_split, "ICD10PCS": self.icd10pcs_split}

    @property
    def interval_edges(self) -> Mapping[str, int]:
        """Lower end, in us, of each class of gaps, ascending; the last has no upper end."""
        return INTERVAL_TABLES[self.intervals]


# Lower ends, in us; a month is 30 days. CoMET has 13 classes from 1-5 min to 6+ months but its
# edges are not public: these are the edges of the original ETHOS (npj Digital Medicine 2024) plus
# 1-5 min, with 1-2 w and 2 w-1 mo joined.
INTERVALS: dict[str, int] = {
    "1-5min": _MINUTE,
    "5-15min": 5 * _MINUTE,
    "15min-1h": 15 * _MINUTE,
    "1-2h": _HOUR,
    "2-6h": 2 * _HOUR,
    "6-12h": 6 * _HOUR,
    "12h-1d": 12 * _HOUR,
    "1-3d": _DAY,
    "3-7d": 3 * _DAY,
    "7-30d": 7 * _DAY,
    "1-3mo": 30 * _DAY,
    "3-6mo": 90 * _DAY,
    "6mo+": 180 * _DAY,
}
# The classes of ETHOS-ARES (its tokenize/time_interval.py).
_ETHOS: dict[str, int] = {
    "5-15min": 5 * _MINUTE,
    "15-45min": 15 * _MINUTE,
    "45min-1h15min": 45 * _MINUTE,
    "1h15min-2h": 75 * _MINUTE,
    "2-3h": 2 * _HOUR,
    "3-5h": 3 * _HOUR,
    "5-8h": 5 * _HOUR,
    "8-12h": 8 * _HOUR,
    "12-18h": 12 * _HOUR,
    "18h-1d": 18 * _HOUR,
    "1-2d": _DAY,
    "2-4d": 2 * _DAY,
    "4-7d": 4 * _DAY,
    "7-12d": 7 * _DAY,
    "12-20d": 12 * _DAY,
    "20-30d": 20 * _DAY,
    "1-2mo": 30 * _DAY,
    "2-6mo": 60 * _DAY,
    "6mo+": 180 * _DAY,
}
INTERVAL_TABLES: dict[str, dict[str, int]] = {"comet13": INTERVALS, "ethos19": _ETHOS}
# The last class of every table; it is repeated round(gap / 180 d) times.
LONGEST = "6mo+"


def age_width(age_years: int) -> int:
    """Width of an age bucket in us; a year is 365.25 days."""
    return age_years * 1461 * _DAY // 4


def age_bucket(age_us: NDArray[np.int64], age_years: int) -> NDArray[np.int64]:
    """Index of the age bucket, int64 [N]; a time before birth counts as age 0."""
    return np.clip(age_us // age_width(age_years), 0, _OLDEST // age_years)


def age_texts(age_years: int) -> list[str]:
    """Texts of the age buckets, ascending."""
    lowest = range(0, _OLDEST // age_years * age_years, age_years)
    return [*(f"{low}-{low + age_years}" for low in lowest), f"{lowest.stop}+"]
