"""Many hospitals on one machine: synthetic hospitals, partitions, engines, studies.

For notebooks, `simulation.Dataset`, `Sites`, `Federation`, `Results` and `Scenario` are here too; they are loaded when
they are asked for, so that importing a module of this folder loads nothing else.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulation.notebook import Dataset, Federation, Results, Sites
    from simulation.scenario import Scenario

__all__ = ["Dataset", "Federation", "Results", "Scenario", "Sites"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'simulation' has no attribute {name!r}")
    return getattr(import_module("simulation.scenario" if name == "Scenario" else "simulation.notebook"), name)
