"""Work on the parts of a dataset in threads, in worker processes, or on a Ray cluster, with the same results.

A job is a call of a module's function that reads files and writes files; only what is small goes through pipes. Who
does which job makes no difference, so the number of workers changes nothing but the time.
"""

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tokenizer import workers
from tokenizer.errors import ConfigError
from tokenizer.workers import Pool, WorkerDied

T = TypeVar("T")

# Below this many events a worker process takes longer to start than to save.
SMALL_EVENTS = 5_000_000
# More threads wait for each other: between numpy's and polars' calls only one runs.
MOST_THREADS = 4
# What a worker needs for a piece of a million events, with room to spare.
WORKER_BYTES = 1 << 30
_ONE_THREAD = {"POLARS_MAX_THREADS": "1"}


@dataclass(frozen=True)
class Crew:
    """Who works.

    Args:
        workers: processes; None: one per core (fewer where memory is short) if there is enough to do, else this
            process with a thread per core. 1 is this process and one thread.
        ray: address of a Ray cluster, "auto" for the one that this machine belongs to, "local" to start one here.
            All its machines must see the files under the same paths.
    """

    workers: int | None = None
    ray: str | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"There can't be {self.workers} workers; give 1 or more.")
        if self.ray is not None and self.workers is not None:
            raise ConfigError("A Ray cluster decides on its workers itself; give a number of workers or Ray, not both.")

    def processes(self, jobs: int, events: int) -> int:
        """Worker processes for so many jobs over so many events; 1 is this process."""
        if self.workers is not None:
            return min(self.workers, max(jobs, 1))
        if events < SMALL_EVENTS or workers.is_worker():
            return 1
        cores = len(os.sched_getaffinity(0))
        return max(1, min(cores, jobs, _free_memory() // WORKER_BYTES))

    def threads(self, jobs: int) -> int:
        """Threads of this process for so many jobs, where it works alone."""
        if self.workers is not None or workers.is_worker():
            return 1
        return max(1, min(len(os.sched_getaffinity(0)), MOST_THREADS, jobs, _free_memory() // WORKER_BYTES))


AS_IT_FITS = Crew()


def each(
    function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], crew: Crew, *, events: int, what: str
) -> Generator[T]:
    """Give `function(*job)` for every job, in order; close it, and whoever works for it is gone.

    Args:
        function: of a module, so that another process finds it.
        jobs: its arguments.
        crew: who works.
        events: how much there is to do in all.
        what: names the work in the error of a worker that died.

    Raises:
        ConfigError: Ray is wanted, and missing or not there.
        WorkerDied: a worker ended in the middle of a job, as it does when memory runs out.
        Exception: whatever the function raised first.
    """
    if crew.ray is not None:
        return _on_ray(function, jobs, crew.ray, what)
    if (processes := crew.processes(len(jobs), events)) > 1:
        return _on_pool(function, jobs, processes, what)
    if (threads := crew.threads(len(jobs))) > 1:
        return _on_threads(function, jobs, threads)
    return (function(*job) for job in jobs)


def _on_pool(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], processes: int, what: str) -> Generator[T]:
    with Pool(processes, _ONE_THREAD) as pool:
        waiting = (pool.submit(what, function, *job) for job in jobs)
        for future in _ahead(waiting, 2 * processes):
            try:
                yield future.result()
            except WorkerDied as death:
                raise WorkerDied(
                    f"{death} If memory ran out, use fewer workers (each needs about"
                    f" {WORKER_BYTES >> 30} GiB for a million events of a piece)."
                ) from None


def _on_threads(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], threads: int) -> Generator[T]:
    pool = ThreadPoolExecutor(threads)
    try:
        for future in _ahead((pool.submit(function, *job) for job in jobs), 2 * threads):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _on_ray(function: Callable[..., T], jobs: Sequence[tuple[Any, ...]], address: str, what: str) -> Generator[T]:
    with _cluster(address) as ray:
        remote = ray.remote(num_cpus=1, max_retries=3)(function)
        cores = int(ray.cluster_resources().get("CPU", 1))
        for reference in _ahead((remote.remote(*job) for job in jobs), 2 * cores):
            try:
                yield ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise WorkerDied(f"Ray gave up on {what}: {str(error).splitlines()[0]}") from None


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed here; `pip install 'fedcomet[ray]'` does that.") from None
    package = str(Path(__file__).parents[1])
    environment = {**_ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))}
    try:
        ray.init(
            address,
            runtime_env={"env_vars": environment},
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if address == "local" else None,
        )
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as problem:
        raise ConfigError(
            f"Ray at {address!r}: {str(problem).splitlines()[0]}. Start it, or check the address."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _ahead(started: Iterable[T], count: int) -> Iterator[T]:
    """Take things that start when they are taken, `count` ahead of the one that is given."""
    iterator = iter(started)
    waiting = deque(islice(iterator, count))
    while waiting:
        yield waiting.popleft()
        waiting.extend(islice(iterator, 1))


def _free_memory() -> int:
    """Bytes that may be used without swapping; a large number where the system doesn't say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return 1 << 62
