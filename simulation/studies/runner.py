"""Run a grid's cells side by side over one pool of workers; what is done stays, and what fails stops nothing else."""

import fcntl
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

from simulation.pool import Pool
from simulation.studies import cell as one
from simulation.studies.book import DONE, FAILED, Book
from simulation.studies.grid import Cell
from tokenizer.errors import ConfigError, FedcometError
from tokenizer.progress import Step, Watch


def run(
    cells: Sequence[Cell],
    folder: Path,
    *,
    workers: int | None = None,
    at_once: int | None = None,
    keep: bool = False,
    again: bool = False,
    watch: Watch = lambda step: None,
    runner: one.Runner = one.run,
) -> int:
    """Run all cells that are not done; after a kill, the same call goes on in the middle of those that were running.

    Args:
        cells: of the grid.
        folder: of the grid: the ledger `study.sqlite`, `results.parquet`, and a folder for each cell at work.
        workers: processes that train; as many as there are cores when not given.
        at_once: cells at work at one time; as many as there are workers when not given.
        keep: keep the folders of cells that are done (records, checkpoints), and not only their figures.
        again: run those again that failed.
        watch: told how many cells are done.
        runner: runs a cell.

    Returns:
        How many of these cells have failed.

    Raises:
        ConfigError: the folder is in use.
    """
    with _claimed(folder), Book.at(folder) as book, Pool(workers) as pool:
        book.expect(cells)
        known = book.entries()
        passed = (DONE,) if again else (DONE, FAILED)
        for cell in cells:
            if known[cell.digest].state == DONE and not keep:  # what a kill left behind
                shutil.rmtree(folder / "cells" / cell.digest, ignore_errors=True)
        left = [cell for cell in cells if known[cell.digest].state not in passed]
        done = len(cells) - len(left)
        watch(Step("cells", done, len(cells)))
        threads = ThreadPoolExecutor(max_workers=at_once or pool.workers)
        try:
            futures = {threads.submit(_one, cell, folder, book, pool, keep, runner): cell for cell in left}
            for future in as_completed(futures):
                done += 1
                watch(Step("cells", done, len(cells), futures[future].told + future.result()))
        finally:
            threads.shutdown(cancel_futures=True)
        wanted = {cell.digest for cell in cells}
        return sum(entry.state == FAILED for entry in book.entries().values() if entry.digest in wanted)


def _one(cell: Cell, folder: Path, book: Book, pool: Pool, keep: bool, runner: one.Runner) -> str:
    """Run a cell, and give what to add to its name in the progress."""
    home, began = folder / "cells" / cell.digest, time.monotonic()
    book.begin(cell.digest)
    try:
        figures = runner(cell, home, pool, lambda step: None)
    except FedcometError as problem:
        book.fail(cell.digest, str(problem), time.monotonic() - began)
        return f": failed: {problem}"
    except Exception as problem:  # a cell that breaks in an unforeseen way must not stop the others either
        book.fail(cell.digest, f"{type(problem).__name__}: {problem}", time.monotonic() - began)
        return f": failed: {type(problem).__name__}: {problem}"
    book.end(cell.digest, figures, time.monotonic() - began)
    if not keep:
        shutil.rmtree(home, ignore_errors=True)
    return ""


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{folder}: another process runs this study; wait for it, or take another --out"
            ) from None
        yield
