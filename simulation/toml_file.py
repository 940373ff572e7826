"""TOML files of a known shape: studies, grids, sizings, lists of figures. Faults name the file, the key, and why."""

import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from tokenizer.errors import ConfigError


class Section(BaseModel):
    """A table of a file: no unknown keys, no changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=Section)


def raw(path: Path, wanted: str) -> dict[str, Any]:
    """Give what a file holds; `wanted` says what to do where there is none.

    Raises:
        ConfigError: it can't be read, or is no TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise ConfigError(f"{path}: can't be read ({problem.strerror}); {wanted}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise ConfigError(f"{path}: is not valid TOML: {problem}") from None


def read(path: Path, shape: type[S], wanted: str) -> S:
    """Read a file of a shape.

    Raises:
        ConfigError: it can't be read, or keys or values are wrong (all are named).
    """
    try:
        return shape.model_validate(raw(path, wanted))
    except ValidationError as problem:
        told = "; ".join(
            f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg'].removeprefix('Value error, ')}"
            for each in problem.errors()
        )
        raise ConfigError(f"{path}: {told}") from None
