"""The words of a codebook: which tokens a survey asks for, and in which order they stand."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tokenizer import spelling
from tokenizer.options import TokenizerOptions, age_texts
from tokenizer.release import Survey

BIRTH, DEATH = "MEDS_BIRTH", "MEDS_DEATH"


@dataclass(frozen=True, order=True)
class Token:
    """One entry of the vocabulary; `bin` is 0 but for fused code-and-value tokens."""

    kind: str
    text: str
    bin: int = 0


# Follows a node of the trie for a code below it that has no path of its own.
BELOW = Token("piece", "*")


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary's words.

    Attributes:
        statics: texts of static tokens.
        whole: codes that are one token.
        spelled: codes that are spelled by pieces.
        spelled_prefixes: ancestors of rarer codes that are spelled.
        others: all other ancestors of rarer codes.
        valued: codes with value bins.
    """

    statics: frozenset[str]
    whole: frozenset[str]
    spelled: frozenset[str]
    spelled_prefixes: frozenset[str]
    others: frozenset[str]
    valued: frozenset[str]

    @classmethod
    def of(cls, survey: Survey, valued: Iterable[str]) -> "Vocabulary":
        """The words that a survey asks for."""
        named = {spelling.canonical(code) for code in survey.options.named}
        codes = {*survey.codes, *valued, *named, DEATH}

        def is_spelled(code: str) -> bool:
            return bool(spelling.pieces(code, survey.options.widths))

        spelled, above = set(filter(is_spelled, codes)), set(filter(is_spelled, survey.prefixes))
        # A system that has a code has a token for its unknown codes.
        systems = {spelling.system_of(code) for code in (*codes, *survey.prefixes) if "//" in code}
        return cls(
            statics=frozenset({*survey.statics, *(f"{text}//*" for text in survey.static_prefixes), "*"}),
            whole=frozenset(codes - spelled),
            spelled=frozenset(spelled),
            spelled_prefixes=frozenset(above),
            others=frozenset({*survey.prefixes, *systems, ""} - above),
            valued=frozenset(valued),
        )

    def tokens(self, options: TokenizerOptions, intervals: Iterable[str], bins: Mapping[str, int]) -> list[Token]:
        """All tokens in their order; `bins` are those of codes with values."""
        paths = [spelling.pieces(text, options.widths) for text in self.spelled | self.spelled_prefixes]
        pieces = {text for path in paths for text, _ in path[1:]}
        if self.spelled_prefixes or pieces:
            pieces.add(BELOW.text)
        fused = bins if options.values == "fused" else {}
        separate = options.values == "separate" or not self.spelled.isdisjoint(self.valued)
        codes = self.whole | {path[0][0] for path in paths}
        return [
            *(Token("special", text) for text in ("pad", "eot", "unk")),
            *(Token("static", text) for text in sorted(self.statics)),
            *(Token("age", text) for text in age_texts(options.age_years)),
            *(Token("interval", text) for text in intervals),
            *(Token("value", f"Q{n + 1}") for n in range(options.value_bins * separate)),
            *(
                Token("code", text, n)
                for text in sorted(codes)
                for n in range(fused.get(text, 0) + 1 if text in self.whole else 1)
            ),
            *(Token("piece", text) for text in sorted(pieces)),
            *(Token("other", text) for text in sorted(self.others)),
        ]
