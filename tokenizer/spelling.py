"""What a code's own system says about it: its parents, its one way of writing, and how it falls into pieces.

A code is a `//` path; the last part may be a code of a system whose letters are a hierarchy (ICD-10-CM: E11.65 lies
under E11.6, and that under E11). Such a system is recognised by the part before it (`ICD10CM//E11.65`,
`DIAGNOSIS//ICD10CM//I50.9`) or, in MIMIC's way, by version and table (`DIAGNOSIS//ICD//10//E1165`, written without a
dot). Anything that doesn't look like a code of its system is a name like any other.

Notable choice: parents follow the letters, not the pieces. So what a rare code falls back to, and what a site may
tell, doesn't depend on how codes are cut into tokens.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

LONGEST = 200
"""Most characters of a code."""

_DIGITS = 16
# With what else is blank around it, the line ends of Unicode among them.
_CONTROL = re.compile(r"\s*[\x00-\x1f\x7f-\x9f\u2028\u2029][\s\x00-\x1f\x7f-\x9f]*")


@dataclass(frozen=True)
class _System:
    """A system of codes.

    Attributes:
        pattern: its codes without a dot; the group is the category, which the dot follows.
        levels: lengths at which a code stands for a level of the hierarchy.
        dotted: whether codes are written with a dot behind the category.
    """

    pattern: re.Pattern[str]
    levels: tuple[int, ...]
    dotted: bool = False


_SYSTEMS = {
    "ICD10CM": _System(re.compile(r"([A-Z]\d[0-9A-Z])[0-9A-Z]{0,4}"), (3, 4, 5, 6, 7), dotted=True),
    "ICD9CM": _System(re.compile(r"(\d{3}|V\d{2}|E\d{3})\d{0,2}"), (3, 4, 5, 6), dotted=True),
    "ICD9Proc": _System(re.compile(r"(\d{2})\d{0,2}"), (2, 3, 4), dotted=True),
    "ICD10PCS": _System(re.compile(r"([0-9A-HJ-NP-Z]{3})[0-9A-HJ-NP-Z]{0,4}"), (3, 4, 5, 6, 7)),
    "ATC": _System(re.compile(r"([A-Z])(\d{2}([A-Z]([A-Z](\d{2})?)?)?)?"), (1, 3, 4, 5, 7)),
}
_MIMIC: dict[tuple[str, ...], str] = {
    ("DIAGNOSIS", "ICD", "10"): "ICD10CM",
    ("DIAGNOSIS", "ICD", "9"): "ICD9CM",
    ("PROCEDURE", "ICD", "10"): "ICD10PCS",
    ("PROCEDURE", "ICD", "9"): "ICD9Proc",
}


@dataclass(frozen=True)
class SystemCode:
    """A code of a known system.

    Attributes:
        head: the path before it, with its last `//`.
        system: OMOP's name of the system.
        letters: the code without its dot.
        category: letters of its category, its topmost level.
        dotted: whether a dot is written behind the category.
    """

    head: str
    system: str
    letters: str
    category: int
    dotted: bool

    def text(self, length: int) -> str:
        """The path of its first `length` letters.

        >>> read("ICD10CM//E11.65").text(4)
        'ICD10CM//E11.6'
        """
        letters = self.letters[:length]
        if self.dotted and length > self.category:
            letters = f"{letters[: self.category]}.{letters[self.category :]}"
        return self.head + letters


def read(code: str) -> SystemCode | None:
    """Recognise a code of a known system; None for any other name."""
    before, _, last = code.rpartition("//")
    parts = tuple(before.split("//"))
    mimic = _MIMIC.get(parts[-3:])
    name = mimic or parts[-1]
    system = _SYSTEMS.get(name)
    if system is None:
        return None
    letters = last.replace(".", "", 1) if system.dotted else last
    fits = system.pattern.fullmatch(letters)
    if fits is None:
        return None
    category = len(fits[1])
    if letters != last and (last.index(".") != category or last.endswith(".")):
        return None
    return SystemCode(f"{before}//", name, letters, category, system.dotted and mimic is None)


def fit(code: str) -> str:
    r"""A code as it may stand in a codebook, whatever source it is from; nearly all codes do as they are.

    Control characters and line ends become a blank. A part that is only `*` becomes `(*)`, for `*` stands for codes too
    rare to be named. Of more than `LONGEST` characters the first are kept, with a hash of all, so that different codes
    stay different and one code is the same everywhere.

    >>> fit("LAB//no growth\r\n(final)"), fit("RACE//*"), len(fit("x" * 100_000))
    ('LAB//no growth (final)', 'RACE//(*)', 200)
    """
    if code.isprintable() and len(code) <= LONGEST and "*" not in code:
        return code
    bare = _CONTROL.sub(" ", code)
    if bare != code:
        bare = bare.strip() or "(blank)"
    if "*" in bare:
        bare = "//".join("(*)" if part == "*" else part for part in bare.split("//"))
    if len(bare) <= LONGEST:
        return bare
    digits = hashlib.sha256(bare.encode("utf-8", "surrogatepass")).hexdigest()[:_DIGITS]
    return f"{bare[: LONGEST - _DIGITS - 1]}~{digits}"


def canonical(code: str) -> str:
    """The one way of writing a code: it fits, and ICD has its dot, but none where MIMIC's way is used.

    >>> canonical("ICD10CM//E1165"), canonical("DIAGNOSIS//ICD//10//E11.65"), canonical("LAB//1.5")
    ('ICD10CM//E11.65', 'DIAGNOSIS//ICD//10//E1165', 'LAB//1.5')
    """
    code = fit(code)
    known = read(code)
    return code if known is None else known.text(len(known.letters))


def ancestors(code: str) -> list[str]:
    """What a code lies under, nearest first: along its system's letters, then the `//` parents.

    The ancestors of its nearest ancestor are its other ancestors.

    >>> ancestors("ICD10CM//E11.65")
    ['ICD10CM//E11.6', 'ICD10CM//E11', 'ICD10CM']
    >>> ancestors("ATC//A10BA02")
    ['ATC//A10BA', 'ATC//A10B', 'ATC//A10', 'ATC//A', 'ATC']
    """
    known = read(code)
    if known is None:
        return parents(code)
    levels = [n for n in _SYSTEMS[known.system].levels if known.category <= n < len(known.letters)]
    return [*(known.text(n) for n in reversed(levels)), *parents(code)]


def parents(code: str) -> list[str]:
    """The `//` parents of a code, longest first.

    >>> parents("LAB//50912//mg/dL")
    ['LAB//50912', 'LAB']
    """
    parts = code.split("//")
    return ["//".join(parts[:n]) for n in range(len(parts) - 1, 0, -1)]


def pieces(code: str, widths: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, str], ...]:
    """How a code is spelled: for each piece the text of its token, and of the path up to it. () if it isn't.

    The first piece is the category, whose token reads like its path; those after it, `<system>//<place>//<letters>`,
    are shared by all categories of a system.

    Args:
        code: in its canonical writing.
        widths: per system, letters of the first pieces; the rest is the last. () leaves codes whole.

    >>> [token for token, _ in pieces("ICD10CM//S72.001A", {"ICD10CM": (3, 3)})]
    ['ICD10CM//S72', 'ICD10CM//2//001', 'ICD10CM//3//A']
    >>> [path for _, path in pieces("ICD10CM//S72.001A", {"ICD10CM": (3, 3)})]
    ['ICD10CM//S72', 'ICD10CM//S72.001', 'ICD10CM//S72.001A']
    """
    known = read(code)
    if known is None or not widths.get(known.system):
        return ()
    told: list[tuple[str, str]] = []
    start = 0
    for place, width in enumerate((*widths[known.system], len(known.letters)), 1):
        if start < len(known.letters):
            path = known.text(start + width)
            letters = known.letters[start : start + width]
            told.append((f"{known.system}//{place}//{letters}" if start else path, path))
        start += width
    return tuple(told)


def system_of(code: str) -> str:
    """The path that names a code's system: `DIAGNOSIS//ICD10CM`, or the first part of a code of no known system."""
    known = read(code)
    return known.head.removesuffix("//") if known else code.partition("//")[0]
