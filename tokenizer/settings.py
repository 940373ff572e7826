"""One TOML shape for what happens to a site's events before they are tokens, and for how its survey is protected.

    [prepare]
    cohort = "comet"                         # or "all", the default; the filters below change single ones of it
    maps = ["local-labs.csv"]                # relative to this file
    several_targets = "refuse"               # or "all", the default
    names = true
    icd9 = true
    units = true
    canonical_units = { "LOINC//718-7" = "g/dL" }
    unit_rules = [{ code = "LOINC//2345-7", unit = "mmol/L", to = "mg/dL", factor = 18.016 }]

    [prepare.filters]
    first_day = 2015-01-01
    duplicates = false
    age = { on = 2015-01-01, least = 18, most = 120 }
    encounters = { least = 2, within_days = 730 }

    [survey_privacy]                         # left out: the floor alone protects
    mechanism = "gaussian"
    epsilon = 1.0
    delta = 1e-6
    bounds = { codes = 32 }

Every key that is unknown and every value that is out of range is named with its place, all of them at once.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenizer import cohort
from tokenizer.codebook import Codebook
from tokenizer.cohort import Filters
from tokenizer.errors import ConfigError
from tokenizer.maps import VocabularyMap
from tokenizer.noisy_survey import SurveyPrivacy
from tokenizer.prepare import Preparation, UnitRule


class _Section(BaseModel):
    """Tables of the file; the dataclasses below take its rule that no key may be unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class _Prepare(_Section):
    cohort: Literal["all", "comet"] = "all"
    maps: tuple[str, ...] = ()
    several_targets: Literal["all", "refuse"] = "all"
    names: bool = True
    icd9: bool = True
    units: bool = True
    canonical_units: dict[str, str] | None = None
    unit_rules: tuple[UnitRule, ...] = ()
    filters: Filters | None = None


class _File(_Section):
    prepare: _Prepare | None = None
    survey_privacy: SurveyPrivacy | None = None


@dataclass(frozen=True)
class Settings:
    """What to do to the events (None: nothing), and how to protect the survey (None: by the floor alone)."""

    preparation: Preparation | None
    survey_privacy: SurveyPrivacy | None = None


def read(path: Path) -> Settings:
    """Read a TOML file.

    Raises:
        ConfigError: It can't be read, or a key or value is wrong; all of them are named.
        DataError: A map file can't be used.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise ConfigError(f"{path}: can't be read ({problem}).") from None
    try:
        return parse(content, path.parent)
    except ConfigError as problem:
        raise ConfigError(f"{path}: {problem}") from None


AS_THEY_ARE, STANDARD = "none", "standard"

_BRANCH = re.compile(r"[a-z-]+\[.*\]")
"""How pydantic names one of several kinds that a value may have, where a key is looked for."""


class OtherPreparation(ConfigError):
    """A codebook was made of records to which other things were done than here; the text names no file."""


def agreed(config: str | None, codebook: Codebook | None = None) -> Settings:
    """Decide what to do to a site's records, and see that a codebook was made of records that the same was done to.

    Args:
        config: A TOML file; "standard" is the preparation with its defaults, "none" leaves the records as they are;
            None is the standard, but for a codebook whose records were left as they are.
        codebook: The federation's, if there is one yet.

    Raises:
        ConfigError: The file can't be used, or (`OtherPreparation`) the codebook's records went through something else.
        DataError: A map file can't be used.
    """
    if config == AS_THEY_ARE or (config is None and codebook is not None and not codebook.prepared):
        asked = Settings(None)
    else:
        asked = Settings(Preparation()) if config in (None, STANDARD) else read(Path(config))
    if codebook is None:
        return asked
    ours = None if asked.preparation is None else asked.preparation.common_digest
    if (ours is None and codebook.prepared) or (ours is not None and ours not in codebook.prepared):
        raise OtherPreparation(
            f"The codebook {codebook.hash[:16]} was made of records to which other filters, names or units were applied"
            f" ({', '.join(digest[:16] for digest in codebook.prepared) or 'none'}) than here"
            f" ({ours[:16] if ours else 'none'}). Use the federation's settings file."
        )
    return asked


def parse(content: Mapping[str, Any], folder: Path) -> Settings:
    """Read the tables `prepare` and `survey_privacy`, as a larger file may hold them.

    Args:
        content: The two tables, or one, or none.
        folder: What paths are relative to.

    Raises:
        ConfigError: A key or value is wrong; all of them are named.
        DataError: A map file can't be used.
    """
    try:
        file = _File.model_validate(content)
    except ValidationError as problem:
        raise ConfigError(explain(problem, _File)) from None
    asked = file.prepare or _Prepare()
    base = cohort.COMET if asked.cohort == "comet" else Filters()
    given = content.get("prepare", {}).get("filters", {})
    preparation = Preparation(
        filters=replace(base, **{key: getattr(asked.filters, key) for key in given}),
        names=asked.names,
        maps=tuple(VocabularyMap.load(folder / name, asked.several_targets) for name in asked.maps),
        icd9=asked.icd9,
        units=asked.units,
        canonical_units=asked.canonical_units or {},
        unit_rules=asked.unit_rules,
    )
    return Settings(preparation, file.survey_privacy)


def explain(problem: ValidationError, file: type[BaseModel]) -> str:
    """Say in a line what is wrong in a file, by pydantic's errors and the model of the whole file."""
    told: dict[str, list[str]] = {}
    for error in problem.errors():
        place = tuple(part for part in error["loc"] if not (isinstance(part, str) and _BRANCH.fullmatch(part)))
        # A person counts the tables of an array from one.
        key = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            known = _keys_at(place[:-1], file)
            close = difflib.get_close_matches(str(place[-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            told[f"{key} is not a known key; {hint}"] = []
        elif error["type"] == "missing":
            told[f"{key} is missing"] = []
        elif error["type"] == "value_error":
            told.setdefault(key or "the file", []).append(error["msg"].removeprefix("Value error, "))
        else:  # what a value may be, of several kinds, are several errors
            told.setdefault(f"{key} = {error['input']!r}", []).append(error["msg"].replace("valid tuple", "valid list"))
    text = "; ".join(": ".join(filter(None, (what, " or ".join(why)))) for what, why in told.items())
    return text if text.endswith("?") else f"{text}."


def _keys_at(place: tuple[Any, ...], section: Any) -> list[str]:
    """The keys that the table at `place` below a section knows."""
    for part in place:
        if isinstance(part, str):
            kind = _kinds(section)[part]
            section = next(option for option in (kind, *get_args(kind)) if isinstance(option, type) and _kinds(option))
    return sorted(_kinds(section))


def _kinds(section: Any) -> dict[str, Any]:
    """Types of a table's keys; {} for what is no table."""
    if is_dataclass(section):
        return {field.name: field.type for field in fields(section)}
    if isinstance(section, type) and issubclass(section, BaseModel):
        return {name: field.annotation for name, field in section.model_fields.items()}
    return {}
