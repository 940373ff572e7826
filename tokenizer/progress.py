"""How far something is, for whoever shows it."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """How far something is; `label` names it for people, `note` says what is worth knowing now."""

    label: str
    done: int
    total: int
    note: str = ""


Watch = Callable[[Step], None]
