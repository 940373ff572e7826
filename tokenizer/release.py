"""What a site tells about its records: its survey, and how surveys of many sites become one.

Integers only, so merging is exact in any order. Canonical JSON bytes: equal surveys are equal bytes.

What the floor guarantees, for every survey as it leaves a site: each count of patients stands for at least
`min_patients` distinct patients, and so does each bucket of a sketch. No released count of codes holds another: a code
counts either under its own name or, with other codes below the floor, in one of its ancestors, so subtracting counts
of codes reveals none of a part. A count of all but fewer patients than the floor is told as that of all patients, so
neither does subtracting from their total. Not guaranteed: what follows from codes that outside knowledge says exclude
each other or together are everybody's (two sexes), and what follows from two surveys of one site at different times.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tokenizer import sketch
from tokenizer.errors import ConfigError, DataError
from tokenizer.options import LONGEST, TokenizerOptions
from tokenizer.sketch import Sketch

_FORMAT = "fedcomet-survey/2"
# Counts that sum in int64 whatever a site says.
_MOST = 2**40


@dataclass(frozen=True)
class Survey:
    """What a site tells about its codes: counts of patients and value histograms, over the floor.

    Every count of patients, and the number of patients behind every bucket of a sketch, is at least
    `options.min_patients` (0 patients stands for "fewer than the floor"). Merged surveys sum over
    sites: a patient of two sites counts twice, and what each site alone couldn't release stays
    unknown.

    Attributes:
        codes: Patients per code with a time, in its canonical writing.
        prefixes: Patients per ancestor whose rarer codes are only together frequent enough.
        statics: Patients per code without a time.
        static_prefixes: The same for their parents.
        values: A sketch of the numeric values per code.
        gaps: A sketch of the gaps between events, in seconds, per interval class but the longest.
        prepared: Digests of the maps and unit tables that the records went through, sorted.
    """

    options: TokenizerOptions
    patients: int = 0
    codes: Mapping[str, int] = field(default_factory=dict)
    prefixes: Mapping[str, int] = field(default_factory=dict)
    statics: Mapping[str, int] = field(default_factory=dict)
    static_prefixes: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, Sketch] = field(default_factory=dict)
    gaps: Mapping[str, Sketch] = field(default_factory=dict)
    prepared: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal surveys are equal bytes."""
        return canonical_json({"format": _FORMAT, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Survey":
        """Read a survey and check it: one that breaks its own floor is refused.

        Raises:
            DataError: It isn't a survey of this version, or a count lies below the floor.
        """
        try:
            content = parse_json(data, _FORMAT)
            content["prepared"] = tuple(content["prepared"])
            options = TokenizerOptions(**content.pop("options"))
            for name in ("values", "gaps"):
                content[name] = {
                    code: {int(bucket): events for bucket, events in cells.items()}
                    for code, cells in content[name].items()
                }
            survey = cls(options, **content)
            survey._check()
        except (ConfigError, TypeError, ValueError, KeyError, AttributeError) as problem:
            raise DataError(f"The survey can't be used ({problem}); ask its site anew.") from None
        return survey

    def _check(self) -> None:
        counts = [self.codes, self.prefixes, self.statics, self.static_prefixes]
        cells: list[Sketch] = [*self.values.values(), *self.gaps.values()]
        numbers = [n for count in counts for n in count.values()]
        numbers += [n for cell in cells for n in cell.values()]
        numbers += [self.patients] if self.patients else []
        if not all(type(n) is int and n >= self.options.min_patients for n in numbers):
            raise ValueError(f"a count lies below the floor of {self.options.min_patients}")
        if max(numbers, default=0) > _MOST:
            raise ValueError(f"a count lies above {_MOST}")
        if not all(cells) or not self.gaps.keys() <= self.options.interval_edges.keys() - {LONGEST}:
            raise ValueError("an empty sketch or an unknown interval class")
        accuracy = self.options.sketch_accuracy
        if not all(sketch.is_bucket(bucket, accuracy) for cell in cells for bucket in cell):
            raise ValueError("a bucket lies outside the grid")
        if list(self.prepared) != sorted({str(digest) for digest in self.prepared}):
            raise ValueError("what the records went through is not a sorted list of digests")


def merge(surveys: Iterable[Survey]) -> Survey:
    """Sum surveys; exact, and the same to the byte in whatever order and grouping.

    Raises:
        ConfigError: No survey, or surveys taken under different options.
    """
    surveys = list(surveys)
    if not surveys:
        raise ConfigError("There is no survey to merge; ask at least one site for its survey.")
    options = surveys[0].options
    for other in surveys[1:]:
        if other.options != options:
            raise ConfigError(
                f"Surveys were taken under different tokenizer options: {options} and"
                f" {other.options}. Ask all sites again with the same options."
            )
    return Survey(
        options,
        patients=sum(survey.patients for survey in surveys),
        codes=_sum(survey.codes for survey in surveys),
        prefixes=_sum(survey.prefixes for survey in surveys),
        statics=_sum(survey.statics for survey in surveys),
        static_prefixes=_sum(survey.static_prefixes for survey in surveys),
        values=_sum_sketches(survey.values for survey in surveys),
        gaps=_sum_sketches(survey.gaps for survey in surveys),
        prepared=tuple(sorted({digest for survey in surveys for digest in survey.prepared})),
    )


def canonical_json(content: dict[str, Any]) -> bytes:
    """Equal contents as equal bytes."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def parse_json(data: bytes, expected: str) -> dict[str, Any]:
    """Read what `canonical_json` wrote under a format's name.

    Raises:
        ValueError: It isn't JSON, or of another format.
    """
    content = json.loads(data)
    if not isinstance(content, dict) or content.get("format") != expected:
        raise ValueError(f"its format is not {expected}")
    del content["format"]
    return content


def _sum(groups: Iterable[Mapping[Any, int]]) -> dict[Any, int]:
    total: dict[Any, int] = {}
    for group in groups:
        for key, count in group.items():
            total[key] = total.get(key, 0) + count
    return total


def _sum_sketches(groups: Iterable[Mapping[str, Sketch]]) -> dict[str, Sketch]:
    total: dict[str, Sketch] = {}
    for group in groups:
        for key, cells in group.items():
            total[key] = _sum((total.get(key, {}), cells))
    return total
