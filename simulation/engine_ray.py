"""Sites played by Flower's simulation backend on Ray: actors on one machine or a cluster, shares of GPUs.

Only who plays the sites changes: the grid, the coordinator and scenarios are those of `simulation.engine`. On a
cluster, the sites' folders must be on a file system that all machines share.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.files import SiteFiles
from tokenizer.errors import ConfigError


def _app() -> ClientApp:
    import torch

    from client.app import app

    torch.set_num_threads(1)
    return app


class RayPlayers:
    """Ray actors that play sites; close it, or use it in a `with` statement."""

    def __init__(self, workers: int | None = None, gpus_per_site: float = 0.0, address: str | None = None) -> None:
        """Start Ray, or join it.

        Args:
            workers: sites played at the same time; as many as Ray has cores (and shares of GPUs) when not given.
            gpus_per_site: share of a GPU that a site gets while it is played.
            address: of a running cluster ("auto", "ray://..."); a Ray of its own on this machine when not given.

        Raises:
            ConfigError: Ray is not installed, or can't be reached.
        """
        try:
            import ray
            from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend
        except ModuleNotFoundError:
            raise ConfigError('Engine "ray" needs Ray: pip install "fedcomet[ray]", or take kind = "local".') from None
        self._joined = ray.is_initialized()
        start: dict[str, Any] = {"address": address} if address else {"num_cpus": workers} if workers else {}
        config: Any = {
            "init_args": {"log_to_driver": False, **start},
            "client_resources": {"num_cpus": 1, "num_gpus": gpus_per_site},
        }
        try:
            self._backend = RayBackend(config)
            self._backend.build(_app)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"Ray can't play sites: {error}") from error
        self._threads = ThreadPoolExecutor(self._backend.num_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def answer(self, site: SiteFiles, node: int, message: Message) -> "Future[Message]":
        """Let an actor answer a message as a site."""
        # The backend wants to know which part of a data set a node is; ours know by their own settings.
        context = Context(0, node, {"partition-id": node, **site.node_config()}, RecordDict(), {})
        return self._threads.submit(lambda: self._backend.process_message(message, context)[0])

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        import ray

        self._threads.shutdown(cancel_futures=True)
        self._backend.terminate()
        if not self._joined:
            ray.shutdown()
