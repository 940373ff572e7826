"""Time and memory of survey and store as a site grows: ten, thirty, a hundred million events, all in one file.

    python -m benchmarks.scale --dataset PATH --events 10 30 100 [--folder FOLDER] [--workers N]

The events are those of a MEDS dataset, again and again with other subject ids (without --dataset those of a made-up
hospital), in one parquet file, which is the hardest case: nothing but pieces bounds memory. Each size runs in processes
of its own; memory is the largest sum of the resident sizes of all of them together (RSS: pages that processes share
count for each), looked up every 20 ms. CPU seconds are those of all processes: they tell more than the clock where
other work takes the cores.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow.parquet

from benchmarks.tokenizing import RULE, hospital
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.events import MedsDataset, canonical_order
from tokenizer.shards import Crew
from tokenizer.store import build_store
from tokenizer.survey import survey

LIMIT_GIB = 4.0


def replicate(frames: list[pl.DataFrame], events: int, path: Path) -> None:
    """Write a MEDS dataset of one file with at least so many events."""
    file = path / "data" / "all.parquet"
    file.parent.mkdir(parents=True)
    step = max(int(frame["subject_id"].max()) for frame in frames) + 1
    with pyarrow.parquet.ParquetWriter(file, frames[0].to_arrow().schema, compression="zstd") as writer:
        written = copies = 0
        while written < events:
            for frame in frames:
                again = frame.with_columns(pl.col("subject_id") + step * copies)
                writer.write_table(again.to_arrow(), row_group_size=1_000_000)
                written += len(again)
            copies += 1


def work(path: Path, out: Path, workers: int | None) -> None:
    """Survey and store, timed; what the measured processes do."""
    crew = Crew(workers)
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    dataset = MedsDataset.open(path)
    told = {"events": dataset.events, "pieces": len(dataset.pieces), "open": lap()}
    book = Codebook.build(survey(dataset, RULE, TokenizerOptions(), crew=crew))
    told["survey"] = lap()
    store = build_store(dataset, book, RULE, out, crew=crew)
    told |= {"store": lap(), "tokens": store.tokens_total}
    print(json.dumps(told))


def tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        children = [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except OSError:
        return
    for child in children:
        yield from tree(int(child))


def resident(pid: int) -> int:
    """Resident bytes of a process; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


def cpu_seconds() -> float:
    """Of all processes that have ended below this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(path: Path, out: Path, workers: int | None) -> tuple[dict, float, int]:
    """What `work` told and its CPU seconds, the largest sum of resident GiB, and the number of processes."""
    before = cpu_seconds()
    command = [sys.executable, "-m", "benchmarks.scale", "--work", str(path), str(out)]
    command += [] if workers is None else ["--workers", str(workers)]
    peak = most = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        while process.poll() is None:
            processes = list(tree(process.pid))
            peak, most = max(peak, sum(map(resident, processes))), max(most, len(processes))
            time.sleep(0.02)
        if process.returncode:
            raise SystemExit(f"it ended with code {process.returncode}")
        told = json.loads(process.stdout.read())
    return {**told, "cpu": cpu_seconds() - before}, peak / 2**30, most


def main() -> None:
    arguments = argparse.ArgumentParser(description="Time and memory of survey and store as a site grows.")
    arguments.add_argument("--dataset", type=Path, help="a MEDS dataset to repeat")
    arguments.add_argument("--events", type=float, nargs="+", default=[10, 30], help="in millions")
    arguments.add_argument("--folder", type=Path, help="where to put data and stores")
    arguments.add_argument("--workers", type=int)
    arguments.add_argument("--work", type=Path, nargs=2, help=argparse.SUPPRESS)
    chosen = arguments.parse_args()
    if chosen.work:
        work(*chosen.work, chosen.workers)
        return
    frames = [canonical_order(hospital(4000))]
    if chosen.dataset:
        dataset = MedsDataset.open(chosen.dataset)
        frames = [dataset.read(shard) for shard in dataset.shards]
    head = (
        "million events",
        "file MB",
        "pieces",
        "open s",
        "survey s",
        "store s",
        "events/s",
        "CPU s",
        "processes",
        "peak GiB",
    )
    print(" ".join(f"{name:>14}" for name in head), flush=True)
    rates, costs = [], []
    for millions in chosen.events:
        with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
            replicate(frames, int(millions * 1e6), Path(folder, "meds"))
            size = (Path(folder, "meds", "data", "all.parquet")).stat().st_size / 1e6
            told, peak, processes = measured(Path(folder, "meds"), Path(folder, "store"), chosen.workers)
            shutil.rmtree(Path(folder, "store"))
        seconds = told["open"] + told["survey"] + told["store"]
        rates.append(told["events"] / seconds)
        costs.append(told["cpu"] / told["events"])
        cells = (
            *(f"{told['events'] / 1e6:.1f}", f"{size:.0f}", str(told["pieces"])),
            *(f"{told[name]:.1f}" for name in ("open", "survey", "store")),
            *(f"{rates[-1]:,.0f}", f"{told['cpu']:.1f}", str(processes), f"{peak:.2f}"),
        )
        print(" ".join(f"{cell:>14}" for cell in cells), flush=True)
        if peak > LIMIT_GIB:
            raise SystemExit(f"peak memory {peak:.2f} GiB is above {LIMIT_GIB} GiB")
    print(
        f"per event, the last against the first: {rates[0] / rates[-1]:.2f} of the time,"
        f" {costs[-1] / costs[0]:.2f} of the CPU"
    )


if __name__ == "__main__":
    main()
