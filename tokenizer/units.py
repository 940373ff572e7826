"""Units of measurement: what a recorded unit means, and the one unit that every site converts it to.

`parse` reads UCUM and the spellings that hospitals use beside it (`mmHg`, `K/uL`, `MG/DL`); `canonical` gives the
unit of its dimension that the federation writes, from a fixed table, so that sites agree without seeing one another.

Rules that protect from wrong numbers:
- Amounts of substance (mol, eq, osm), arbitrary units (`[IU]`, `U` apart) and masses are dimensions of their own: mg/dL
  and mmol/L never meet, as that takes an analyte's molar mass; nor meq/L and mmol/L, that takes its charge.
- `1`, a pure annotation (`{score}`) and fillers (`UNK`, `n/a`) mean "no unit": they are never multiplied by 100 to meet
  a percentage.
- What stands above and below the bar does not cancel: mmol/mol is no percentage (HbA1c has both, as different scales),
  mg/kg/h no rate of beats, L/min/m2 no speed. Only L/L meets `%`.
- A text that isn't understood is kept as it is.

A table of our own rather than a library: ucumvert 0.3 on pint 0.25 is sound (our factors are tested against its
figures) but treats mol as convertible to counts, knows none of the hospitals' spellings, and takes 2 s to load.

Source: Schadow, McDonald, The Unified Code for Units of Measure, version 2.2, https://ucum.org/ucum
"""

import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from tokenizer.unit_spellings import BELOW, COMPONENTS, FILLERS, PLAIN_IN_CODES, SHORT_ABOVE, SPELLED

_Dimension = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """A value x in this unit is `x * factor + offset` in the base units of its dimension.

    Attributes:
        dimension: Base units with their powers, sorted, above and below the bar apart; () is a plain number as `%`.
        factor: Exact.
        offset: Of temperatures; 0 for all others.
    """

    dimension: _Dimension
    factor: Fraction
    offset: Fraction = Fraction(0)

    def to(self, other: "Unit") -> tuple[float, float]:
        """Scale and shift: x in this unit is `x * scale + shift` in the other one, of equal dimension."""
        return float(self.factor / other.factor), float((self.offset - other.offset) / other.factor)


NONE = Unit((("none", 1),), Fraction(1))
"""No unit: `1`, an annotation, a filler."""


@lru_cache(maxsize=100_000)
def parse(text: str) -> Unit | None:
    """What a unit text means; None if it isn't understood.

    >>> parse("mg/dL").dimension, parse("g/L").to(parse("MG/DL"))
    ((('g', 1), ('m', -3)), (100.0, 0.0))
    >>> parse("cells/uL") == parse("10*6/L"), parse("units")
    (True, None)
    """
    plain = _plain(text)
    if plain.casefold() in FILLERS:
        return NONE
    if _DDIMER.search(plain):
        return None
    spelled = SPELLED.get(plain) or SPELLED.get(plain.casefold().replace(" ", ""))
    if spelled is not None:
        return _ucum(spelled)
    bare = _without_annotations(plain)
    if bare in ("", "1"):
        return NONE
    return _ucum(bare) or _ucum(_respelled(bare))


def canonical(unit: Unit) -> tuple[str, Unit]:
    """The unit that the federation writes for a dimension, and its text.

    >>> canonical(parse("g/L"))[0], canonical(parse("[degF]"))[0], canonical(parse("mm[Hg]/min"))[0]
    ('mg/dL', 'Cel', 'g.m-1.s-3')
    """
    text = _PREFERRED.get(unit.dimension)
    if text is None:
        text = ".".join(base + ("" if power == 1 else str(power)) for base, power in unit.dimension)
        return text, Unit(unit.dimension, Fraction(1))
    target = _ucum(text)
    assert target is not None
    return text, target


def in_code(part: str) -> Unit | None:
    """The unit that the last `//` part of a code stands for; None if it can as well be something else.

    Compounds (with a `/` between letters) and a list of spellings count; single symbols that are also names of analytes
    or of anything else (`K`, `Mg`, `pH`, `C`) don't.
    """
    if part in PLAIN_IN_CODES:
        return parse(part)
    above, *below = part.split("/")
    sure = len(above) > 1 or above in SHORT_ABOVE
    return parse(part) if below and sure and all(p.casefold() in BELOW for p in below) else None


def _plain(text: str) -> str:
    """One spelling of micro, degree, superscripts and white space."""
    text = unicodedata.normalize("NFKC", text).replace("\u03bc", "u").replace("\u00d7", "x").replace("\u2212", "-")
    return " ".join(text.split())


def _without_annotations(text: str) -> str:
    bare = re.sub(r"\{[^{}]*\}", "{}", text)
    # An annotation that is a factor of its own is a 1.
    bare = re.sub(r"(?<=[./])\{\}|^\{\}(?=[./]|$)", "1", bare)
    return bare.replace("{}", "")


def _respelled(text: str) -> str:
    """Each component of a compound in UCUM's spelling: `MG/DL` is `mg/dL`, `mcg/kg/min` is `ug/kg/min`."""
    parts = re.split(r"\s*/\s*|\s+per\s+", text)
    return "/".join(COMPONENTS.get(part.casefold().replace(" ", ""), part) for part in parts)


_FACTOR = re.compile(r"\((?P<group>[^()]*)\)|(?P<power10>10[*^])(?P<exponent>[+-]?\d+)|(?P<symbol>[^./()]+)")


def _ucum(text: str) -> Unit | None:
    """Parse case-sensitive UCUM: factors joined by `.` and `/`, from left to right."""
    if text in _SPECIAL:
        base, factor, offset = _SPECIAL[text]
        return Unit(((base, 1),), factor, offset)
    powers: dict[tuple[str, bool], int] = {}
    factor = Fraction(1)
    sign, place = 1, 0
    if text.startswith("/"):
        sign, place = -1, 1
    while True:
        found = _FACTOR.match(text, place)
        part = None if found is None else _factor(found)
        if found is None or part is None:
            return None
        factor *= part.factor**sign
        for base, power in part.dimension:
            side = (base, sign * power > 0)
            powers[side] = powers.get(side, 0) + sign * power
        place = found.end()
        if place == len(text):
            break
        if text[place] not in "./":
            return None
        sign = -1 if text[place] == "/" else 1
        place += 1
    dimension = tuple(sorted((base, power) for (base, _), power in powers.items()))
    return Unit(() if dimension == _VOLUME_SHARE else dimension, factor)


def _factor(found: re.Match[str]) -> Unit | None:
    if (group := found["group"]) is not None:
        return _ucum(group)
    if found["power10"]:
        exponent = int(found["exponent"])
        return Unit((), Fraction(10) ** exponent) if abs(exponent) <= 30 else None
    symbol = found["symbol"]
    if re.fullmatch(r"\d{1,9}", symbol):
        return Unit((), Fraction(int(symbol))) if int(symbol) else None
    split = re.fullmatch(r"(?P<name>.*?[^\d+-])(?P<power>[+-]?\d{1,2})?", symbol)
    atom = None if split is None else _atom(split["name"])
    if split is None or atom is None:
        return None
    power = int(split["power"] or 1)
    if not power:
        return None
    return Unit(tuple((base, n * power) for base, n in atom.dimension), atom.factor**power)


def _atom(name: str) -> Unit | None:
    if name in _ATOMS:
        return _ATOMS[name]
    for size in (2, 1):
        prefix, rest = name[:size], name[size:]
        if prefix in _PREFIXES and rest in _METRIC:
            atom = _ATOMS[rest]
            return Unit(atom.dimension, atom.factor * _PREFIXES[prefix])
    return None


def _of(factor: str | int, **powers: int) -> Unit:
    return Unit(tuple(sorted(powers.items())), Fraction(factor))


def _own(*names: str) -> dict[str, Unit]:
    """Units that convert to nothing else."""
    return {name: Unit(((name, 1),), Fraction(1)) for name in names}


_PREFIXES = {
    symbol: Fraction(10) ** power
    for symbol, power in {
        **{"T": 12, "G": 9, "M": 6, "k": 3, "h": 2, "da": 1},
        **{"d": -1, "c": -2, "m": -3, "u": -6, "n": -9, "p": -12, "f": -15},
    }.items()
}

_LITRE = _of("1/1000", m=3)
# Units that take prefixes; base units m, s, g, K, C, cd, and those that UCUM would let cancel.
_METRIC: dict[str, Unit] = {
    "m": _of(1, m=1),
    "s": _of(1, s=1),
    "g": _of(1, g=1),
    "K": _of(1, K=1),
    "C": _of(1, C=1),
    "L": _LITRE,
    "l": _LITRE,
    "mol": _of(1, mol=1),
    "cd": _of(1, cd=1),
    "Hz": _of(1, s=-1),
    "N": _of(1000, g=1, m=1, s=-2),
    "Pa": _of(1000, g=1, m=-1, s=-2),
    "bar": _of(100_000_000, g=1, m=-1, s=-2),
    "J": _of(1000, g=1, m=2, s=-2),
    "W": _of(1000, g=1, m=2, s=-3),
    "cal": _of(4184, g=1, m=2, s=-2),
    "dyn": _of("1/100", g=1, m=1, s=-2),
    "A": _of(1, C=1, s=-1),
    "V": _of(1000, g=1, m=2, s=-2, C=-1),
    "Ohm": _of(1000, g=1, m=2, s=-1, C=-2),
    "S": _of("1/1000", g=-1, m=-2, s=1, C=2),
    "F": _of("1/1000", g=-1, m=-2, s=2, C=2),
    "Bq": _of(1, Bq=1),
    "Ci": _of(37_000_000_000, Bq=1),
    "Gy": _of(1, m=2, s=-2),
    "Sv": _of(1, Sv=1),
    # The enzyme unit, 1 umol/min; apart from [IU], as UCUM has it.
    "U": Unit((("mol", 1), ("s", -1)), Fraction(1, 60_000_000)),
    "kat": Unit((("mol", 1), ("s", -1)), Fraction(1)),
    "m[Hg]": _of("133322000", g=1, m=-1, s=-2),
    "m[H2O]": _of("9806650", g=1, m=-1, s=-2),
    **_own("eq", "osm", "[IU]"),
}
_METRIC["[iU]"] = _METRIC["[IU]"]
_ATOMS: dict[str, Unit] = {
    **_METRIC,
    "min": _of(60, s=1),
    "h": _of(3600, s=1),
    "d": _of(86_400, s=1),
    "wk": _of(604_800, s=1),
    "mo": _of(2_629_800, s=1),
    "a": _of(31_557_600, s=1),
    "%": _of("1/100"),
    "[ppth]": _of("1/1000"),
    "[ppm]": _of("1/1000000"),
    "[ppb]": _of("1/1000000000"),
    "t": _of(1_000_000, g=1),
    "atm": _of(101_325_000, g=1, m=-1, s=-2),
    "[psi]": _of("6894757.293168", g=1, m=-1, s=-2),
    "[Cal]": _of(4_184_000, g=1, m=2, s=-2),
    "[in_i]": _of("0.0254", m=1),
    "[ft_i]": _of("0.3048", m=1),
    "[lb_av]": _of("453.59237", g=1),
    "[oz_av]": _of("28.349523125", g=1),
    "[foz_us]": _of("0.0000295735295625", m=3),
    "[drp]": _of("1/20000000", m=3),
    **_own(
        *("rad", "[pH]", "[HPF]", "[LPF]", "[CFU]", "[PFU]", "[arb'U]", "[GPL'U]", "[MPL'U]", "[APL'U]"),
        *("[USP'U]", "[TCID_50]", "[BAU]", "[EU]", "[diop]"),
    ),
}
_ATOMS["deg"] = Unit((("rad", 1),), Fraction("0.017453292519943295"))
# Special units, only alone; base unit, factor, offset (a difference of temperatures isn't told from a temperature).
_SPECIAL: dict[str, tuple[str, Fraction, Fraction]] = {
    "K": ("Cel", Fraction(1), Fraction("-273.15")),
    "Cel": ("Cel", Fraction(1), Fraction(0)),
    "[degF]": ("Cel", Fraction(5, 9), Fraction(-160, 9)),
    # Normed to a body surface; an annotation to UCUM, yet no flow as others are.
    "mL/min/{1.73_m2}": ("mL/min/{1.73_m2}", Fraction(1), Fraction(0)),
}
_VOLUME_SHARE = (("m", -3), ("m", 3))
# D-dimer in two equivalents that differ by a factor of about two: never taken for plain ng/mL.
_DDIMER = re.compile(r"(?<![A-Za-z])(FEU|DDU)(?![A-Za-z])", re.IGNORECASE)


def _table(texts: tuple[str, ...]) -> Mapping[_Dimension, str]:
    units = {text: _ucum(text) for text in texts}
    return {unit.dimension: text for text, unit in units.items() if unit is not None}


# The unit of each dimension that a federation writes; part of the format: a change here changes codes.
_PREFERRED = _table(
    (
        *(
            "%",
            "mg/g",
            "mmol/mol",
            "kg",
            "cm",
            "m2",
            "mL",
            "s",
            "1/min",
            "Cel",
            "mm[Hg]",
            "mV",
            "mA",
            "Ohm",
            "kcal",
            "W",
        ),
        *("mg/dL", "mmol/L", "meq/L", "mosm/L", "mosm/kg", "[IU]/L", "U/L", "10*9/L", "[CFU]/mL", "mmol/kg", "meq/kg"),
        *("mL/h", "mg/h", "mmol/h", "meq/h", "[IU]/h", "mg/kg/h", "mL/kg", "mL/kg/h", "[IU]/kg", "[IU]/kg/h", "mm/h"),
        *("mmol", "meq", "[IU]", "mosm", "kg/m2", "L/min/m2", "mL/m2", "mg/mmol", "U/g", "[IU]/g", "dyn.s.cm-5"),
        *("dyn.s.cm-5/m2", "mL/cm[H2O]", "kcal/kg", "1/[HPF]", "1/[LPF]", "[pH]", "deg", "MBq"),
    )
)
