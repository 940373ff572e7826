"""Codes of one vocabulary become codes of another: a site's map files, and ICD-9 to ICD-10.

A map file has the columns system, code, target_system, target_code; `LAB, 50912 -> LOINC, 2160-0` turns
`LAB//50912//HIGH` into `LOINC//2160-0//HIGH`: a row is for every code that begins with it, the longest one wins, and
what follows stays. A code with several targets becomes several events at the same time, each with the value.

ICD-9 goes by the general equivalence maps (GEMs), which name candidates rather than translations. What claims least is
taken:
- one exact candidate, or the only one: that code;
- several: the category or subcategory that they have in common (three characters at least);
- a combination (several codes together say what one said): one event for each part, found as above;
- no candidate, or none in common: the ICD-9 code stays, and is counted as unmapped.

The tables in `data/` are derived from the GEMs of the Centers for Medicare & Medicaid Services (public domain): for
diagnoses the first release that lists a code, for procedures the release of 2018.

Source: CMS and NCHS, Diagnosis / Procedure Code Set General Equivalence Mappings, Documentation and User's Guide.
"""

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import polars as pl

from tokenizer.errors import DataError
from tokenizer.events import UNREADABLE

_COLUMNS = ("system", "code", "target_system", "target_code")
_TABLES = {"ICD9CM": ("icd9cm_to_icd10cm.csv.gz", "ICD10CM"), "ICD9Proc": ("icd9proc_to_icd10pcs.csv.gz", "ICD10PCS")}
# How MEDS datasets that other tools made spell the ICD systems.
_SPELLED = {
    "DIAGNOSIS//ICD//9": "ICD9CM",
    "DIAGNOSIS//ICD//10": "ICD10CM",
    "PROCEDURE//ICD//9": "ICD9Proc",
    "PROCEDURE//ICD//10": "ICD10PCS",
}
_SPELLED_PARTS = max(name.count("//") for name in _SPELLED) + 1


@dataclass(frozen=True)
class VocabularyMap:
    """Targets per source code.

    Attributes:
        name: The file's.
        targets: Full codes (`RxNorm//860975`) to full target codes, sorted.
    """

    name: str
    targets: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls, path: Path, several: Literal["all", "refuse"] = "all") -> "VocabularyMap":
        """Read a map file: .csv, .tsv or .parquet, headers in any case.

        Args:
            path: The file.
            several: `all` takes every target of a code; `refuse` allows one.

        Raises:
            DataError: The file can't be read, a column is missing, a cell is empty, or a code has several targets
                where one is allowed.
        """
        rows = _read(path)
        targets: dict[str, set[str]] = {}
        for number, row in enumerate(rows.iter_rows(), 2):
            for column, cell in zip(_COLUMNS, row, strict=True):
                if not cell:
                    raise DataError(
                        f"{path}: row {number}, column {column} is empty. Give all four cells, or remove the row."
                    )
            source, target = (normal(f"{system}//{code}") for system, code in (row[:2], row[2:]))
            found = targets.setdefault(source, set())
            found.add(target)
            if several == "refuse" and len(found) > 1:
                raise DataError(
                    f"{path}: row {number} is a second target of {source} ({' and '.join(sorted(found))})."
                    ' Keep one, or allow several with several_targets = "all".'
                )
        return cls(path.name, {source: tuple(sorted(found)) for source, found in sorted(targets.items())})

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what the map does: independent of its file's name, format and order of rows."""
        return hashlib.sha256(json.dumps(self.targets, sort_keys=True).encode()).hexdigest()

    @cached_property
    def systems(self) -> frozenset[str]:
        """First parts of the codes that the map has rows for."""
        return frozenset(source.split("//", 1)[0] for source in self.targets)

    def apply(self, code: str) -> tuple[str, ...] | None:
        """The codes that a code becomes; None if no row is for it.

        >>> drugs = VocabularyMap("m", {"MEDICATION//Insulin": ("ATC//A10A",)})
        >>> drugs.apply("MEDICATION//Insulin//Administered"), drugs.apply("MEDICATION//Insulin glargine")
        (('ATC//A10A//Administered',), None)
        """
        parts = code.split("//")
        for size in range(len(parts), 0, -1):
            found = self.targets.get("//".join(parts[:size]))
            if found is not None:
                return tuple("//".join([target, *parts[size:]]) for target in found)
        return None


def normal(code: str) -> str:
    """A code with its ICD system named and dotted as everywhere else; other codes as they are.

    >>> normal("DIAGNOSIS//ICD//9//25000"), normal("ICD10CM//e1165"), normal("PROCEDURE//ICD//10//02HV33Z")
    ('ICD9CM//250.00', 'ICD10CM//E11.65', 'ICD10PCS//02HV33Z')
    """
    parts = code.split("//")
    spelled = "//".join(parts[:_SPELLED_PARTS])
    if spelled in _SPELLED and len(parts) > _SPELLED_PARTS:
        parts = [_SPELLED[spelled], *parts[_SPELLED_PARTS:]]
    if parts[0] in _DOTTED and len(parts) > 1:
        parts[1] = _DOTTED[parts[0]](parts[1])
    return "//".join(parts)


def icd9_to_10(code: str) -> tuple[str, ...] | None:
    """The ICD-10 codes that an ICD-9 code (in normal form) becomes; () if it has none, None if it is no ICD-9 code.

    >>> icd9_to_10("ICD9CM//250.00"), icd9_to_10("ICD9CM//E934.2"), icd9_to_10("LOINC//2345-7")
    (('ICD10CM//E11.9',), (), None)
    """
    system, _, rest = code.partition("//")
    if system not in _TABLES:
        return None
    bare, *qualifiers = rest.split("//")
    _, target = _TABLES[system]
    found = _reduce(_entries(system, bare.replace(".", "")))
    return tuple(normal("//".join([target, one, *qualifiers])) for one in found)


@lru_cache(maxsize=1)
def icd9_digest() -> str:
    """SHA-256 (hex) of the ICD-9 tables that come with the package."""
    total = hashlib.sha256()
    for name, _ in _TABLES.values():
        total.update((Path(__file__).parent / "data" / name).read_bytes())
    return total.hexdigest()


_Entry = tuple[str, str]


def _reduce(entries: Iterable[_Entry]) -> tuple[str, ...]:
    """What GEM entries (ICD-10 code, flags) of one ICD-9 code say in common.

    Flags are five digits: approximate, no map, combination, scenario, choice list.
    """
    entries = [entry for entry in entries if entry[1][1] == "0"]
    exact = {code for code, flags in entries if flags == "00000"}
    single = {code for code, flags in entries if flags[2] == "0"}
    if exact or single:
        common = _common(exact or single)
        return (common,) if common else ()
    # Choice lists of the same number in other scenarios hold the same part of the meaning, more or less exactly.
    lists: dict[str, set[str]] = {}
    for code, flags in entries:
        lists.setdefault(flags[4], set()).add(code)
    return tuple(sorted({common for codes in lists.values() if (common := _common(codes))}))


def _common(codes: set[str]) -> str:
    """The longest common beginning of three characters at least, or ""."""
    low, high = min(codes), max(codes)
    same = next((place for place, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    common = low[:same]
    return common if len(common) >= 3 else ""


@lru_cache(maxsize=2)
def _table(system: str) -> tuple[list[str], list[_Entry]]:
    """ICD-9 codes without dots, ascending, and the entry of each row."""
    file = Path(__file__).parent / "data" / _TABLES[system][0]
    rows = pl.read_csv(file, infer_schema=False).sort("icd_9", maintain_order=True)
    return rows["icd_9"].to_list(), list(zip(rows["icd_10"].to_list(), rows["flags"].to_list(), strict=True))


def _entries(system: str, bare: str) -> list[_Entry]:
    """The entries of a code; of a category that is not listed itself, those of all codes in it, as equal candidates."""
    codes, entries = _table(system)
    first = bisect_left(codes, bare)
    if codes[first : first + 1] == [bare]:
        return entries[first : bisect_left(codes, bare + "\0", first)]
    if len(bare) < 2:
        return []
    inside = entries[first : bisect_left(codes, bare + "\uffff", first)]
    return [(code, "1" + flags[1] + "000") for code, flags in inside]


def _dotted(width: int, long_e: bool = False) -> Callable[[str], str]:
    """Insert the dot after `width` characters (ICD-9's E codes: one more)."""

    def dotted(code: str) -> str:
        code = code.upper()
        if not re.fullmatch(r"[0-9A-Z]+", code):
            return code
        at = width + (long_e and code.startswith("E"))
        return code if len(code) <= at else f"{code[:at]}.{code[at:]}"

    return dotted


_DOTTED: dict[str, Callable[[str], str]] = {
    "ICD9CM": _dotted(3, long_e=True),
    "ICD10CM": _dotted(3),
    "ICD9Proc": _dotted(2),
    "ICD10PCS": str.upper,
}


def _read(path: Path) -> pl.DataFrame:
    """The four columns as text, stripped."""
    readers: dict[str, Callable[[], pl.DataFrame]] = {
        ".csv": lambda: pl.read_csv(path, infer_schema=False, encoding="utf8"),
        ".tsv": lambda: pl.read_csv(path, infer_schema=False, encoding="utf8", separator="\t"),
        ".parquet": lambda: pl.read_parquet(path, hive_partitioning=False, glob=False),
    }
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: a map file ends in .csv, .tsv or .parquet; rename or convert it.")
    try:
        raw = readers[path.suffix.lower()]()
    except UNREADABLE as problem:
        raise DataError(f"{path}: can't be read ({str(problem).splitlines()[0]}). Mend the file.") from None
    names = {re.sub(r"[^a-z]+", "_", column.lower()).strip("_"): column for column in raw.columns}
    missing = [column for column in _COLUMNS if column not in names]
    if missing:
        raise DataError(
            f"{path}: column {missing[0]} is missing (it has {', '.join(raw.columns)}). A map file has the columns"
            f" {', '.join(_COLUMNS)}."
        )
    return raw.select(pl.col(names[column]).cast(pl.String).str.strip_chars().alias(column) for column in _COLUMNS)
