"""Who the patients of a cohort are, as far as their prompts tell: the groups that figures are told for.

Sex and race are static facts of a record; age is the last age token before the prediction, in bands of twenty years, as
groups of five years are too small to say anything.
"""

from typing import TYPE_CHECKING

import numpy as np

from model.cohort import Cohort

if TYPE_CHECKING:
    from tokenizer.codebook import Codebook

_FACTS = {"sex": ("GENDER//", "SEX//"), "race": ("RACE//",)}
_BAND = 20


def groups_of(cohort: Cohort, codebook: "Codebook") -> dict[str, list[str | None]]:
    """Give the values of the columns `sex`, `race` and `age` by prediction: None where a prompt doesn't tell.

    Args:
        cohort: P predictions.
        codebook: the one that wrote their prompts.

    Returns:
        Lists of P values each; a column without any value is left out.
    """
    words: dict[str, dict[int, str]] = {name: {} for name in (*_FACTS, "age")}
    for token, word in enumerate(codebook.tokens):
        for name, prefixes in _FACTS.items():
            prefix = next((each for each in prefixes if word.kind == "static" and word.text.startswith(each)), None)
            if prefix is not None and not word.text.endswith("*"):
                words[name][token] = word.text.removeprefix(prefix)
        if word.kind == "age":
            words["age"][token] = _band(word.text)
    found = {name: [_last(prompt.tokens, known) for prompt in cohort.prompts] for name, known in words.items()}
    return {name: column for name, column in found.items() if any(value is not None for value in column)}


def _last(tokens: np.ndarray, words: dict[int, str]) -> str | None:
    """What the last token that has a word says."""
    places = np.flatnonzero(np.isin(tokens, list(words)))
    return words[int(tokens[places[-1]])] if len(places) else None


def _band(span: str) -> str:
    """The band of an age token.

    >>> _band("65-70"), _band("100+")
    ('60-79', '80 and older')
    """
    begins = int("".join(letter if letter.isdigit() else " " for letter in span).split()[0])
    low = begins // _BAND * _BAND
    return "80 and older" if low >= 80 else f"{low}-{low + _BAND - 1}"
