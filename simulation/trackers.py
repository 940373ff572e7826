"""Figures of a run for the trackers of experiments: listeners for `Federation.run(listen=[...])`.

Only what the coordinator knows anyway goes there: the tuning loss after each round and what each site's update
reported. MLflow and Weights & Biases may send it to servers elsewhere; that is the researcher's choice.
"""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from server.rounds import Event
from tokenizer.errors import ConfigError


def figures(event: Event) -> dict[str, float]:
    """Give the numbers of an event by a name such as `round.evaluated/loss` or `update.accepted/north/loss`."""
    place = f"{event.kind}/{event.site}" if event.site else event.kind
    return {
        f"{place}/{name}": float(value)
        for name, value in event.values.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class TensorBoard:
    """Writes scalars for TensorBoard; close it at the end."""

    def __init__(self, folder: Path | str) -> None:
        """Begin a log in a folder.

        Raises:
            ConfigError: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise ConfigError("TensorBoard is not installed: pip install 'fedcomet[tensorboard]'.") from None
        self._writer: Any = SummaryWriter(str(folder))

    def __call__(self, event: Event) -> None:
        """Note an event."""
        for name, value in figures(event).items():
            self._writer.add_scalar(name, value, event.round)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class MLflow:
    """Logs metrics to the run that MLflow has active, or to a new one."""

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        """Begin; `settings` are logged as parameters.

        Raises:
            ConfigError: MLflow is not installed.
        """
        self._mlflow = _needed("mlflow", "MLflow")
        if self._mlflow.active_run() is None:
            self._mlflow.start_run()
        self._mlflow.log_params(dict(settings or {}))

    def __call__(self, event: Event) -> None:
        """Note an event."""
        if found := figures(event):
            self._mlflow.log_metrics(found, step=event.round)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class WeightsAndBiases:
    """Logs to a run of Weights & Biases."""

    def __init__(self, project: str, settings: Mapping[str, Any] | None = None) -> None:
        """Begin a run of a project; `settings` become its configuration.

        Raises:
            ConfigError: wandb is not installed.
        """
        self._run = _needed("wandb", "Weights & Biases").init(project=project, config=dict(settings or {}))

    def __call__(self, event: Event) -> None:
        """Note an event."""
        if found := figures(event):
            self._run.log({**found, "round": event.round})

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def _needed(module: str, name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise ConfigError(f"{name} is not installed: pip install 'fedcomet[{module}]'.") from None
