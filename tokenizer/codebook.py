"""What the parties agree on about tokens: the codebook.

The grammar of a timeline:

    timeline = static* [moment (interval* moment)*] EOT
    moment   = [age] event+             all events of one time; of several within a minute
    event    = code [value] | other     `fused` options put code and bin in one token
    code     = token | category piece*  a code of a system that is spelled, as the options say

- static: a code without a time; `GENDER//*` or `*` when it is too rare to be named.
- age: `40-45`; at the first moment and behind an interval where the bucket changed, if the birth is known.
- interval: the gap since the moment before; none below the shortest class; `6mo+` is repeated
  round(gap / 180 d) times.
- code: a code with a time. Inside one moment codes are sorted by name, then by value; deaths come
  last.
- category, piece: `ICD10CM//E11.65` is `ICD10CM//E11` and the piece `ICD10CM//2//65`, which other
  categories share. The piece `*` stands for a code below that can't be named.
- other: a code too rare to be named; its nearest ancestor that can be named stands for it, at last its
  system (`LOINC`), or "" for none.
- value: `Q1` is the lowest bin of the code before it. In `fused` mode spelled codes have it too.

`Codebook.grammar` holds generation to this, and to the codes and bins that exist.

Notable choices: no polars here, so a rollout on a bare GPU host can read a codebook; canonical JSON
bytes, so equal codebooks are equal files with equal hashes. The vocabulary only ever grows at its end
(`extend`), so a model's rows stay where they are.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tokenizer import durable, sketch, spelling
from tokenizer.errors import ConfigError, DataError
from tokenizer.grammar import Grammar, Words
from tokenizer.options import (
    INTERVAL_TABLES,
    INTERVALS,
    LONGEST,
    TokenizerOptions,
    age_bucket,
    age_texts,
    age_width,
)
from tokenizer.output import settle
from tokenizer.release import Survey, canonical_json, merge, parse_json
from tokenizer.sketch import Sketch
from tokenizer.spelling import parents
from tokenizer.trie import Event, Trie
from tokenizer.vocabulary import BELOW, BIRTH, DEATH, Token, Vocabulary

__all__ = [
    "BIRTH",
    "DEATH",
    "INTERVALS",
    "INTERVAL_TABLES",
    "LONGEST",
    "STATIC",
    "Codebook",
    "Survey",
    "Token",
    "TokenizerOptions",
    "Told",
    "age_bucket",
    "age_width",
    "merge",
    "parents",
]

# The time of an event without a time.
STATIC = int(np.iinfo(np.int64).min)

_FORMAT = "fedcomet-codebook/3"
# Times that stand for the gaps of a class: a horizon inside a class is passed by as many of 32 as lie behind it.
_POINTS = 32


@dataclass(frozen=True)
class Told:
    """How a code is written.

    Attributes:
        tokens: ids; the first is a code, other or static token, the rest are pieces.
        level: by its own tokens, by those of an ancestor, or as something unknown of its system.
        text: the canonical name of the code, or the ancestor's; "" for none.
    """

    tokens: tuple[int, ...]
    level: Literal["itself", "ancestor", "unknown"]
    text: str


class Codebook:
    """The vocabulary and what writing and reading its tokens takes; immutable, known by its hash.

    The vocabulary holds every code that at least one site could release. Its order is fixed:
    specials, static, age, interval and value tokens, then codes and categories, pieces, and others, each
    sorted by name; what `extend` added follows in the same order.

    Attributes:
        options: How events become tokens.
        tokens: The vocabulary; a token's id is its place.
        pad, eot, unk: Ids of the specials. `unk` is never written by `encode`: rare codes have
            their ancestors.
        intervals: Lower end, in us, of each class of gaps, ascending.
        breaks: Per code with values, the inner edges of its value bins, float64 ascending.
        spelled: The spelled codes that have a path of their own.
        spelled_prefixes: Ancestors whose rarer codes are told by `*` behind their path.
        prepared: Digests of the maps and unit tables that the surveyed records went through.
        parent: Hash of the codebook that this one extends.
        advance_us: int64 [V], the mean time that passes with an interval token, 0 for other tokens.
        waits_us: int64 [C, K], for each class of gaps, ascending: equally likely times that pass with it.
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
        *,
        waits: Mapping[str, Sequence[int]] | None = None,
        intervals: Mapping[str, int] | None = None,
        spelled: Iterable[str] = (),
        spelled_prefixes: Iterable[str] = (),
        prepared: Iterable[str] = (),
        parent: str | None = None,
    ) -> None:
        self.options = options
        self.tokens = tuple(tokens)
        self.intervals = dict(options.interval_edges if intervals is None else intervals)
        self.breaks = {code: np.array(edges, np.float64) for code, edges in breaks.items()}
        self.spelled, self.spelled_prefixes = frozenset(spelled), frozenset(spelled_prefixes)
        self.prepared, self.parent = tuple(sorted(set(prepared))), parent
        self._advance = dict(advance)
        # Always the mean where no others are given.
        self._waits = (
            {text: (time,) for text, time in advance.items()}
            if waits is None
            else {text: tuple(times) for text, times in waits.items()}
        )
        self._medians = {code: tuple(values) for code, values in medians.items()}
        self._ids = {token: place for place, token in enumerate(self.tokens)}
        kinds = [token.kind for token in self.tokens]
        self.is_header = np.isin(kinds, ("static", "age"))
        self.advance_us = np.array(
            [self._advance[t.text] if t.kind == "interval" else 0 for t in self.tokens], np.int64
        )
        self.waits_us = np.array([self._waits[text] for text in self.intervals], np.int64)

    @classmethod
    def build(cls, survey: Survey) -> "Codebook":
        """The codebook of a (merged) survey.

        Codes whose values all fall in one bucket get no value bins: their value says nothing. Where one time
        stands for a class of gaps, it is the mean of its gaps: elapsed times are sums of these, and only means keep
        sums right. Where time passes by chance (rollouts), it is one of their quantiles. A class that nobody
        could release has equally likely logarithms of times between its edges. `6mo+` is 180 days, as it is
        repeated.
        """
        options, edges = survey.options, survey.options.interval_edges
        accuracy = options.sketch_accuracy
        cuts = {
            code: sketch.quantile_bins(cells, options.value_bins, accuracy) for code, cells in survey.values.items()
        }
        breaks = {code: inner for code, (inner, _) in cuts.items() if inner}
        medians = {code: cuts[code][1] for code in breaks}
        names = Vocabulary.of(survey, breaks)
        classes = {text: _Gaps.of(text, edges, survey.gaps.get(text), accuracy) for text in edges}
        return cls(
            options,
            names.tokens(options, edges, {code: len(values) for code, values in medians.items()}),
            {text: gaps.mean_us for text, gaps in classes.items()},
            breaks,
            medians,
            waits={text: gaps.waits_us for text, gaps in classes.items()},
            spelled=names.spelled,
            spelled_prefixes=names.spelled_prefixes,
            prepared=survey.prepared,
        )

    def extend(self, survey: Survey) -> "Codebook":
        """A later version: every token, bin and duration stays what it is, the survey's new codes follow.

        A code that was here before keeps its value bins, or gets none if it had none. The new codebook names
        this one as its parent.

        Raises:
            ConfigError: The survey was taken under options that cut codes, values or time otherwise.
        """
        options = replace(survey.options, named=(*self.options.named, *survey.options.named))
        if replace(options, named=self.options.named, min_patients=self.options.min_patients) != self.options:
            raise ConfigError(
                f"The survey was taken under {survey.options}, the codebook was built under {self.options};"
                " only named and min_patients may change. Ask for the survey again with the codebook's options."
            )
        new = Codebook.build(replace(survey, options=options))
        here = {token.text for token in self.tokens if token.kind == "code"} | self.spelled
        fresh = [code for code in new.breaks if code not in here]
        return Codebook(
            options,
            [*self.tokens, *(token for token in new.tokens if self._is_new(token, here))],
            self._advance,
            {
                code: edges.tolist()
                for code, edges in (self.breaks | {code: new.breaks[code] for code in fresh}).items()
            },
            {**self._medians, **{code: new._medians[code] for code in fresh}},
            waits=self._waits,
            intervals=self.intervals,
            spelled=self.spelled | new.spelled,
            spelled_prefixes=self.spelled_prefixes | new.spelled_prefixes,
            prepared=(*self.prepared, *new.prepared),
            parent=self.hash,
        )

    def _is_new(self, token: Token, here: set[str]) -> bool:
        # Fused bins of a code that had none would not stand beside it.
        return token not in self._ids and not (token.bin and token.text in here)

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal codebooks are equal bytes."""
        return canonical_json(
            {
                "format": _FORMAT,
                "options": asdict(self.options),
                "tokens": [[token.kind, token.text, token.bin] for token in self.tokens],
                "intervals": [[text, edge] for text, edge in self.intervals.items()],
                "advance_us": self._advance,
                "waits_us": self._waits,
                "breaks": {code: edges.tolist() for code, edges in self.breaks.items()},
                "medians": self._medians,
                "spelled": sorted(self.spelled),
                "spelled_prefixes": sorted(self.spelled_prefixes),
                "prepared": self.prepared,
                "parent": self.parent,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> "Codebook":
        """Read a codebook.

        Raises:
            DataError: It isn't a codebook of this version, or is damaged.
        """
        return _read(data)

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
        self._check_blocks()
        _ = self.grammar

    def _check_blocks(self) -> None:
        """Refuse ages, gaps, bins and values that don't stand side by side, as counting on from a first one needs."""
        blocks = [
            [Token("age", text) for text in age_texts(self.options.age_years)],
            [Token("interval", text) for text in self.intervals],
            [token for token in self.tokens if token.kind == "value"],
        ]
        if self.options.values == "fused":
            unspelled = self.breaks.keys() - self.spelled
            blocks += [[Token("code", code, n) for n in range(len(self._medians[code]) + 1)] for code in unspelled]
        for block in blocks:
            first = self._ids[block[0]] if block else 0
            if self.tokens[first : first + len(block)] != tuple(block):
                raise ValueError(f"the tokens from {block[0]} on are not in place")
        edges = list(self.intervals.values())
        fits = list(self.intervals)[-1] == LONGEST and self._advance.keys() == self._waits.keys() == {*self.intervals}
        if edges != sorted(edges) or not fits or self.waits_us.ndim != 2 or (np.diff(self.waits_us.ravel()) < 0).any():
            raise ValueError("its interval classes don't fit together")

    def save(self, path: Path) -> None:
        """Write the codebook to a file, at once or not at all."""
        durable.write_bytes(path, self.to_bytes())

    @classmethod
    def load(cls, path: Path) -> "Codebook":
        """Read a codebook file.

        Raises:
            DataError: The file is missing or not a codebook.
        """
        settle(path.parent)
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

    @cached_property
    def kinds(self) -> NDArray[np.str_]:
        """Each token's kind, [V]."""
        return np.array([token.kind for token in self.tokens])

    def first_id(self, kind: str) -> int:
        """Id of the first token of a kind (age, interval, value), which the others of its kind follow."""
        return next(place for place, token in enumerate(self.tokens) if token.kind == kind)

    def tell(self, code: str, *, static: bool = False) -> Told:
        """How a code is written: by its own tokens, its nearest ancestor's, or as unknown of its system."""
        code = spelling.canonical(code)
        own = self._static(code) if static else self._own(code)
        if own is not None:
            return Told(own, "itself", code)
        system = spelling.system_of(code)
        for above in spelling.parents(code) if static else spelling.ancestors(code):
            told = self._static(f"{above}//*") if static else self._below(above)
            if told is not None:
                vague = len(above) <= len(system) and self.tokens[told[0]].kind != "code"
                return Told(told, "unknown" if vague else "ancestor", above)
        return Told((self._ids[Token("static", "*") if static else Token("other", "")],), "unknown", "")

    def _static(self, text: str) -> tuple[int, ...] | None:
        found = self._ids.get(Token("static", text))
        return None if found is None else (found,)

    def _own(self, code: str) -> tuple[int, ...] | None:
        if code in self.spelled:
            return self._path(code)
        found = None if self._pieces(code) else self._ids.get(Token("code", code))
        return None if found is None else (found,)

    def _below(self, above: str) -> tuple[int, ...] | None:
        """How something below a code or a parent is told; None if that has no token either."""
        if (node := self._trie.node_of.get(above)) is not None:
            if (node, self._ids.get(BELOW, -1)) in self._trie.edges:
                return (*self._path(above), self._ids[BELOW])
        elif (found := self._ids.get(Token("other", above))) is not None:
            return (found,)
        return self._own(above)

    def _pieces(self, code: str) -> tuple[tuple[str, str], ...]:
        return spelling.pieces(code, self.options.widths)

    def _path(self, code: str) -> tuple[int, ...]:
        (category, _), *rest = self._pieces(code)
        return (self.id(Token("code", category)), *(self.id(Token("piece", text)) for text, _ in rest))

    @cached_property
    def _trie(self) -> Trie:
        released = sorted(self.spelled | self.spelled_prefixes)
        paths = {
            text: [(path, token) for (_, path), token in zip(self._pieces(text), self._path(text), strict=True)]
            for text in released
        }
        below = self.id(BELOW) if self.spelled_prefixes or any(len(path) > 1 for path in paths.values()) else -1
        return Trie.plant(paths, self.spelled, self.spelled_prefixes, len(self.tokens), below)

    @cached_property
    def grammar(self) -> Grammar:
        """Which token may follow which; a mask over its nodes names events."""
        kinds = np.array([token.kind for token in self.tokens])
        trie, nodes = self._trie, len(self.tokens) + len(self._trie.texts)
        categories = {text for text, node in trie.node_of.items() if node < len(self.tokens)}
        ends = np.zeros(nodes, bool)
        ends[: len(self.tokens)] = [
            token.kind == "other" or (token.kind == "code" and token.text not in categories) for token in self.tokens
        ]
        ends[list(trie.ends)] = True
        bins = np.zeros(nodes, np.int64)
        for code, values in self._medians.items():
            if code in self.spelled:
                bins[trie.node_of[code]] = len(values)
            elif self.options.values == "separate":
                bins[self.id(Token("code", code))] = len(values)
        edges = np.array([(*edge, child) for edge, child in trie.edges.items()], np.int64).reshape(-1, 3)
        longest = self.id(Token("interval", list(self.intervals)[-1]))
        return Grammar(Words(kinds, longest, self.eot, ends, bins, (edges[:, 0], edges[:, 1], edges[:, 2])))

    def event(self, node: int) -> str:
        """What the event that ends at a node of the grammar reads as: a code, or `LAB//*` for one below `LAB`.

        A code that breaks off before its last piece is one below what was told of it.
        """
        event = self._event(node)
        return (f"{event.text}//*" if event.text else "*") if event.below else event.text

    def _event(self, node: int) -> Event:
        if node >= len(self.tokens):
            return self._trie.texts[node - len(self.tokens)]
        token = self.tokens[node]
        part = token.text in self._trie.node_of and token.text not in self.spelled
        return Event(token.text, below=part or token.kind == "other")

    def matching(self, prefixes: Sequence[str]) -> NDArray[np.bool_]:
        """Which nodes of the grammar stand for events under any of the prefixes: bool [M].

        A code matches `HOSPITAL_DISCHARGE` if it is that or starts with `HOSPITAL_DISCHARGE//`, and
        `ICD10CM//E11.6` if it is that or lies under it (`ICD10CM//E11.65`). The first V nodes are the tokens;
        where no code is spelled by pieces there are no others.
        """
        wanted = {spelling.canonical(prefix.removesuffix("//")) for prefix in prefixes}
        matches = np.zeros(len(self._lineages), bool)
        for node, lineage in enumerate(self._lineages):
            matches[node] = not wanted.isdisjoint(lineage)
        return matches

    @cached_property
    def _lineages(self) -> tuple[frozenset[str], ...]:
        """Per node the event's code and all its ancestors."""
        texts = [token.text if token.kind in ("code", "other") else "" for token in self.tokens]
        texts += [event.text for event in self._trie.texts]
        return tuple(frozenset((text, *spelling.ancestors(text)) if text else ()) for text in texts)

    def value_of(self, code: str, bin: int) -> float:  # noqa: A002
        """The median value in a bin of a code; NaN for bin 0 and for codes without bins."""
        medians = self._medians.get(code, ())
        return medians[bin - 1] if 1 <= bin <= len(medians) else float("nan")


@dataclass(frozen=True)
class _Gaps:
    """What stands for the gaps of a class: their mean, and equally likely ones."""

    mean_us: int
    waits_us: tuple[int, ...]

    @classmethod
    def of(cls, text: str, edges: Mapping[str, int], gaps: Sketch | None, accuracy: float) -> "_Gaps":
        low = edges[text]
        if text == LONGEST:
            return cls(low, (low,) * _POINTS)
        high = min(edge for edge in edges.values() if edge > low)
        if gaps is None:
            middle = (low * high) ** 0.5 / 1e6
            points: Sequence[float] = [low * (high / low) ** ((k + 0.5) / _POINTS) / 1e6 for k in range(_POINTS)]
        else:
            middle, points = sketch.mean(gaps, accuracy), sketch.quantiles(gaps, _POINTS, accuracy)
        # Whole seconds, inside the class, so that the time written back falls in the class it came from.
        mean_us, *waits_us = (min(max(round(time) * 1_000_000, low), high - 1_000_000) for time in (middle, *points))
        return cls(mean_us, tuple(waits_us))


@lru_cache(maxsize=4)
def _read(data: bytes) -> Codebook:
    """Read a codebook once: a site needs its run's for every answer."""
    try:
        content = parse_json(data, _FORMAT)
        codebook = Codebook(
            TokenizerOptions(**content["options"]),
            [Token(kind, text, n) for kind, text, n in content["tokens"]],
            content["advance_us"],
            content["breaks"],
            content["medians"],
            waits=content["waits_us"],
            intervals=dict(content["intervals"]),
            spelled=content["spelled"],
            spelled_prefixes=content["spelled_prefixes"],
            prepared=content["prepared"],
            parent=content["parent"],
        )
        codebook._check()
        if codebook.to_bytes() != data:
            raise ValueError("its bytes are not canonical")
    except (ConfigError, DataError, TypeError, ValueError, KeyError, AttributeError) as problem:
        raise DataError(f"The codebook can't be used ({problem}); fetch it anew.") from None
    return codebook
