"""Worker processes that play sites and roll trajectories out: torch is loaded, and its number of threads is fixed."""

import os

from tokenizer import workers


class Pool(workers.Pool):
    """A number of worker processes; close it, or use it in a `with` statement. Safe to share between threads."""

    def __init__(self, workers: int | None = None, threads: int = 1) -> None:
        """Start the workers.

        Args:
            workers: how many; as many as there are cores when not given.
            threads: torch threads in each. Results on other numbers of threads may differ in the last bits.
        """
        count = str(threads)
        super().__init__(workers, {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count}, _load_torch)


def _load_torch() -> None:
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
