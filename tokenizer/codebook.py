"""What the parties agree on about tokens: the surveys that sites tell, and the codebook of all.

The grammar of a timeline:

    timeline = static* moment* EOT
    moment   = interval* [age] event+   all events of one distinct time
    event    = code [value] | other     `fused` options put code and bin in one token

- static: a code without a time; `GENDER//*` or `*` when it is too rare to be named.
- age: `40-45`; at the first moment and whenever the bucket changed, if the birth is known.
- interval: the gap since the moment before, in 13 classes; none below a minute; `6mo+` is repeated
  round(gap / 180 d) times.
- code: a code with a time. Inside one moment codes are sorted by name, then by value; deaths come
  last.
- other: a code too rare to be named; its longest `//` parent that can be named stands for it, or ""
  for none.
- value: `Q1` is the lowest bin of the code before it.

Notable choices: no polars here, so a rollout on a bare GPU host can read a codebook; canonical JSON
bytes, so equal codebooks are equal files with equal hashes; the survey holds integers only, so
merging is exact in any order.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tokenizer import durable, sketch
from tokenizer.errors import ConfigError, DataError
from tokenizer.sketch import Sketch

BIRTH, DEATH = "MEDS_BIRTH", "MEDS_DEATH"

# The time of an event without a time.
STATIC = int(np.iinfo(np.int64).min)

_MINUTE = 60_000_000
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR

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
LONGEST = "6mo+"

_OLDEST = 120
# Counts that sum in int64 whatever a site says.
_MOST = 2**40
_SURVEY_FORMAT, _CODEBOOK_FORMAT = "fedcomet-survey/1", "fedcomet-codebook/1"


@dataclass(frozen=True, order=True)
class Token:
    """One entry of the vocabulary; `bin` is 0 but for fused code-and-value tokens."""

    kind: str
    text: str
    bin: int = 0


@dataclass(frozen=True)
class TokenizerOptions:
    """How events become tokens.

    Args:
        values: `separate` writes a value as its own token after the code's; `fused` as one token
            per code and bin.
        value_bins: Quantile bins of a code's values.
        min_patients: A site tells nothing about fewer patients than this.
        sketch_accuracy: Relative accuracy of the sketches, 0.001 to 0.1.
        age_years: Width of an age bucket.
        named: Codes that have a token however rare they are, because questions ask for them; whoever
            asks names them, so that they are in the codebook tells nothing about any record.
    """

    values: Literal["separate", "fused"] = "separate"
    value_bins: int = 10
    min_patients: int = 10
    sketch_accuracy: float = 0.01
    age_years: int = 5
    named: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # The order, and how JSON gives it back, make no difference.
        object.__setattr__(self, "named", tuple(sorted(set(self.named))))
        checks = (
            (self.values in ("separate", "fused"), 'values must be "separate" or "fused"'),
            (2 <= self.value_bins <= 100, "value_bins must be 2 to 100"),
            (self.min_patients >= 1, "min_patients must be at least 1"),
            (0.001 <= self.sketch_accuracy <= 0.1, "sketch_accuracy must be 0.001 to 0.1"),
            (1 <= self.age_years <= _OLDEST, f"age_years must be 1 to {_OLDEST}"),
        )
        for good, rule in checks:
            if not good:
                raise ConfigError(f"tokenizer options: {rule}, got {self}.")


@dataclass(frozen=True)
class Survey:
    """What a site tells about its codes: counts of patients and value histograms, over the floor.

    Every count of patients, and the number of patients behind every bucket of a sketch, is at least
    `options.min_patients` (0 patients stands for "fewer than the floor"). Merged surveys sum over
    sites: a patient of two sites counts twice, and what each site alone couldn't release stays
    unknown.

    Attributes:
        codes: Patients per code with a time.
        prefixes: Patients per `//` parent whose rarer codes are only together frequent enough.
        statics: Patients per code without a time.
        static_prefixes: The same for their parents.
        values: A sketch of the numeric values per code.
        gaps: A sketch of the gaps between events, in seconds, per interval class but the longest.
    """

    options: TokenizerOptions
    patients: int = 0
    codes: Mapping[str, int] = field(default_factory=dict)
    prefixes: Mapping[str, int] = field(default_factory=dict)
    statics: Mapping[str, int] = field(default_factory=dict)
    static_prefixes: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, Sketch] = field(default_factory=dict)
    gaps: Mapping[str, Sketch] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal surveys are equal bytes."""
        return _canonical({"format": _SURVEY_FORMAT, **asdict(self)})

    @classmethod
    def from_bytes(cls, data: bytes) -> "Survey":
        """Read a survey and check it: one that breaks its own floor is refused.

        Raises:
            DataError: It isn't a survey of this version, or a count lies below the floor.
        """
        try:
            content = _parse(data, _SURVEY_FORMAT)
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
        if not all(cells) or not self.gaps.keys() <= INTERVALS.keys() - {LONGEST}:
            raise ValueError("an empty sketch or an unknown interval class")
        accuracy = self.options.sketch_accuracy
        if not all(sketch.is_bucket(bucket, accuracy) for cell in cells for bucket in cell):
            raise ValueError("a bucket lies outside the grid")


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
    )


class Codebook:
    """The vocabulary and what writing and reading its tokens takes; immutable, known by its hash.

    The vocabulary holds every code that at least one site could release. Its order is fixed:
    specials, static, age, interval and value tokens, then codes, then parents of rare codes, each
    sorted by name.

    Attributes:
        options: How events become tokens.
        tokens: The vocabulary; a token's id is its place.
        pad, eot, unk: Ids of the specials. `unk` is never written by `encode`: rare codes have
            their parents.
        breaks: Per code with values, the inner edges of its value bins, float64 ascending.
        advance_us: int64 [V], the time that an interval token stands for, 0 for other tokens.
        is_header: bool [V], static and age tokens.
        hash: SHA-256 (hex) of the canonical bytes.
    """

    pad, eot, unk = 0, 1, 2

    def __init__(
        self,
        options: TokenizerOptions,
        tokens: Sequence[Token],
        advance: Mapping[str, int],
        breaks: Mapping[str, Sequence[float]],
        medians: Mapping[str, Sequence[float]],
    ) -> None:
        self.options = options
        self.tokens = tuple(tokens)
        self.breaks = {code: np.array(edges, np.float64) for code, edges in breaks.items()}
        self._advance = dict(advance)
        self._medians = {code: tuple(values) for code, values in medians.items()}
        self._ids = {token: place for place, token in enumerate(self.tokens)}
        kinds = [token.kind for token in self.tokens]
        self.is_header = np.isin(kinds, ("static", "age"))
        self.advance_us = np.array(
            [self._advance[t.text] if t.kind == "interval" else 0 for t in self.tokens], np.int64
        )

    @classmethod
    def build(cls, survey: Survey) -> "Codebook":
        """The codebook of a (merged) survey.

        Codes whose values all fall in one bucket get no value bins: their value says nothing. A gap
            class that nobody
        could release stands for the geometric middle of its edges, any other for the mean of its
            gaps: elapsed times
        are sums of these, and only means keep sums right. `6mo+` is 180 days, as it is repeated.
        """
        options = survey.options
        accuracy = options.sketch_accuracy
        cuts = {
            code: sketch.quantile_bins(cells, options.value_bins, accuracy) for code, cells in survey.values.items()
        }
        breaks = {code: edges for code, (edges, _) in cuts.items() if edges}
        medians = {code: cuts[code][1] for code in breaks}
        statics = {*survey.statics, *(f"{text}//*" for text in survey.static_prefixes), "*"}
        codes = [
            Token("code", text, n)
            for text in sorted({*survey.codes, *breaks, *options.named, DEATH})
            for n in range(len(medians.get(text, ())) + 1 if options.values == "fused" else 1)
        ]
        separate = options.values == "separate"
        tokens = [
            *(Token("special", text) for text in ("pad", "eot", "unk")),
            *(Token("static", text) for text in sorted(statics)),
            *(Token("age", text) for text in _age_texts(options.age_years)),
            *(Token("interval", text) for text in INTERVALS),
            *(Token("value", f"Q{n + 1}") for n in range(options.value_bins * separate)),
            *codes,
            *(Token("other", text) for text in sorted({*survey.prefixes, ""})),
        ]
        advance = {text: _represent(text, survey.gaps.get(text), accuracy) for text in INTERVALS}
        return cls(options, tokens, advance, breaks, medians)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal codebooks are equal bytes."""
        return _canonical(
            {
                "format": _CODEBOOK_FORMAT,
                "options": asdict(self.options),
                "tokens": [[token.kind, token.text, token.bin] for token in self.tokens],
                "advance_us": self._advance,
                "breaks": {code: edges.tolist() for code, edges in self.breaks.items()},
                "medians": self._medians,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Codebook":
        """Read a codebook.

        Raises:
            DataError: It isn't a codebook of this version, or is damaged.
        """
        try:
            content = _parse(data, _CODEBOOK_FORMAT)
            codebook = cls(
                TokenizerOptions(**content["options"]),
                [Token(kind, text, n) for kind, text, n in content["tokens"]],
                content["advance_us"],
                content["breaks"],
                content["medians"],
            )
            codebook._check()
            if codebook.to_bytes() != data:
                raise ValueError("its bytes are not canonical")
        except (ConfigError, TypeError, ValueError, KeyError, AttributeError) as problem:
            raise DataError(f"The codebook can't be used ({problem}); fetch it anew.") from None
        return codebook

    def _check(self) -> None:
        specials = tuple(Token("special", text) for text in ("pad", "eot", "unk"))
        if self.tokens[:3] != specials or len(self._ids) != len(self.tokens):
            raise ValueError("its specials are not in place or a token occurs twice")
        needed = {Token("static", "*"), Token("code", DEATH), Token("other", "")}
        if not needed <= self._ids.keys():
            raise ValueError("a token that every codebook has is missing")
        if {text: self._medians[text] and len(edges) + 1 for text, edges in self.breaks.items()} != {
            text: len(values) for text, values in self._medians.items()
        }:
            raise ValueError("breaks and medians don't fit together")

    def save(self, path: Path) -> None:
        """Write the codebook to a file, at once or not at all."""
        durable.write_bytes(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> "Codebook":
        """Read a codebook file.

        Raises:
            DataError: The file is missing or not a codebook.
        """
        try:
            return cls.from_bytes(path.read_bytes())
        except OSError as problem:
            raise DataError(f"{path}: can't be read ({problem.strerror}).") from None
        except DataError as problem:
            raise DataError(f"{path}: {problem}") from None

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the canonical bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def __len__(self) -> int:
        return len(self.tokens)

    def id(self, token: Token) -> int:
        """Id of a token.

        Raises:
            DataError: The vocabulary lacks it.
        """
        try:
            return self._ids[token]
        except KeyError:
            raise DataError(f"The codebook {self.hash[:12]} has no {token}.") from None

    def code_id(self, code: str, *, static: bool = False) -> int:
        """Id of a code's token (bin 0), or of its longest parent that has one."""
        if (named := self._ids.get(Token("static" if static else "code", code))) is not None:
            return named
        for prefix in parents(code):
            parent = Token("static", f"{prefix}//*") if static else Token("other", prefix)
            if parent in self._ids:
                return self._ids[parent]
        return self._ids[Token("static", "*") if static else Token("other", "")]

    def matching(self, prefixes: Sequence[str]) -> NDArray[np.bool_]:
        """Which tokens stand for events under any of the prefixes: bool [V].

        A code matches `HOSPITAL_DISCHARGE` if it is that or starts with `HOSPITAL_DISCHARGE//`.
        """
        wanted = [prefix.removesuffix("//") for prefix in prefixes]
        return np.array(
            [
                token.kind in ("code", "other")
                and any(token.text == w or token.text.startswith(w + "//") for w in wanted)
                for token in self.tokens
            ],
            bool,
        )

    def value_of(self, code: str, bin: int) -> float:  # noqa: A002
        """The median value in a bin of a code; NaN for bin 0 and for codes without bins."""
        medians = self._medians.get(code, ())
        return medians[bin - 1] if 1 <= bin <= len(medians) else float("nan")


def parents(code: str) -> list[str]:
    """The `//` parents of a code, longest first.

    >>> parents("LAB//50912//mg/dL")
    ['LAB//50912', 'LAB']
    """
    parts = code.split("//")
    return ["//".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def age_width(age_years: int) -> int:
    """Width of an age bucket in us; a year is 365.25 days."""
    return age_years * 1461 * _DAY // 4


def age_bucket(age_us: NDArray[np.int64], age_years: int) -> NDArray[np.int64]:
    """Index of the age bucket, int64 [N]; a time before birth counts as age 0."""
    return np.clip(age_us // age_width(age_years), 0, _OLDEST // age_years)


def _age_texts(age_years: int) -> list[str]:
    lowest = range(0, _OLDEST // age_years * age_years, age_years)
    return [*(f"{low}-{low + age_years}" for low in lowest), f"{lowest.stop}+"]


def _represent(text: str, gaps: Sketch | None, accuracy: float) -> int:
    low = INTERVALS[text]
    if text == LONGEST:
        return low
    high = min(edge for edge in INTERVALS.values() if edge > low)
    seconds = (low * high) ** 0.5 / 1e6 if gaps is None else sketch.mean(gaps, accuracy)
    # Whole seconds, inside the class, so that the time written back falls in the class it came
    # from.
    return min(max(round(seconds) * 1_000_000, low), high - 1_000_000)


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


def _canonical(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def _parse(data: bytes, expected: str) -> dict[str, Any]:
    content = json.loads(data)
    if not isinstance(content, dict) or content.get("format") != expected:
        raise ValueError(f"its format is not {expected}")
    del content["format"]
    return content
