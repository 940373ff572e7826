"""What the in-process engine costs besides training: start-up, and a round of many sites with a trivial model.

    python -m benchmarks.engine_overhead [--sites 8] [--rounds 10] [--workers 2] [--flower] [--profile]

A round is timed from its announcement to its commit, without evaluation. The model has some 3,000 parameters and each
site makes one step: what such steps take by themselves, in the same workers, is told beside and left out of the
overhead. Where other work takes the cores, CPU seconds tell more than the clock. `--flower` runs Flower's own
simulation on Ray behind it. Files lie in memory (/dev/shm) unless --disk: what a disk takes to confirm a write is its
own matter.
"""

import argparse
import cProfile
import os
import pstats
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from federation.manifest import LocalWork
from model.decoder import Decoder
from model.settings import DecoderConfig, TrainOptions
from model.train import Trainer
from server.plan import FederationPlan
from server.rounds import Event
from simulation.engine import run_federation
from simulation.hospital import PROFILES, generate
from simulation.pool import Pool
from tokenizer.codebook import TokenizerOptions
from tokenizer.events import write_meds
from tokenizer.split import SplitRule
from tokenizer.windows import Batch

TRIVIAL = DecoderConfig(vocab=8, layers=1, width=16, heads=2, kv_heads=2, ff=32, context=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--patients", type=int, default=20, help="of each site")
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--flower", action="store_true", help="also run benchmarks.flower_rounds, which needs Ray")
    parser.add_argument("--profile", action="store_true", help="show where the coordinator's time goes")
    given = parser.parse_args()
    memory = Path("/dev/shm")
    home = memory if memory.exists() and not given.disk else None
    with tempfile.TemporaryDirectory(dir=home) as folder:
        measure(given, Path(folder))
    if given.flower:
        sizes = [f"--{name}={getattr(given, name)}" for name in ("sites", "rounds", "workers")]
        subprocess.run([sys.executable, "-m", "benchmarks.flower_rounds", *sizes], check=True)


def measure(given: argparse.Namespace, folder: Path) -> None:
    from benchmarks.engine_overhead import step_s  # workers don't know the program that is run
    from client.files import SiteFiles

    events = generate(PROFILES["general"], given.patients, seed=1).events
    sites = []
    for number in range(given.sites):
        write_meds(folder / f"data/{number}", [("0", events)], name=f"site {number}")
        sites.append(SiteFiles(f"site-{number:03d}", folder / f"data/{number}", folder / f"state/{number}"))
    plan = FederationPlan(
        name="overhead",
        rounds=given.rounds,
        split=SplitRule("key"),
        local=LocalWork(steps=1, batch_tokens=64),
        model=TRIVIAL,
        tokenizer=TokenizerOptions(min_patients=5),
        min_sites=given.sites,
        join_s=0.0,
        evaluate_every=given.rounds,
    )
    marks: list[tuple[str, int, float, float, float]] = []

    def note(event: Event) -> None:
        # Asking for CPU seconds takes half a millisecond, which at every event of a round would count as overhead.
        if event.kind == "round.announced":
            of_workers = sum(_cpu_of(pid) for pid in pool.pids())
            marks.append((event.kind, event.round, time.perf_counter(), _cpu(), of_workers))
        elif event.kind == "round.committed":
            marks.append((event.kind, event.round, time.perf_counter(), _cpu(), 0.0))

    begun = time.perf_counter()
    profile = cProfile.Profile()
    with Pool(given.workers) as pool:
        for answer in [pool.submit("warm", os.getpid) for _ in range(given.workers)]:
            answer.result()
        ready = time.perf_counter()
        (profile.runcall if given.profile else lambda f, *a: f(*a))(
            run_federation, plan, sites, folder / "run", pool, note
        )
        steps = [pool.submit("steps", step_s).result for _ in range(given.workers)]
        step = statistics.median(take() for take in steps) * given.sites / given.workers
    announced = {n: (t, cpu) for kind, n, t, cpu, _ in marks if kind == "round.announced"}
    committed = {n: (t, cpu) for kind, n, t, cpu, _ in marks if kind == "round.committed"}
    of_workers = {n: cpu for kind, n, _, _, cpu in marks if kind == "round.announced"}
    prepared = min(t for t, _ in announced.values())
    quiet = [n for n in committed if n not in (1, given.rounds)]
    rounds = [committed[n][0] - announced[n][0] for n in quiet]
    own = [committed[n][1] - announced[n][1] for n in quiet]
    workers = (of_workers[given.rounds] - of_workers[2]) / (given.rounds - 2)
    print(f"{given.sites} sites, {given.workers} workers, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print(f"start-up: {ready - begun:.2f} s until the workers answer, {prepared - ready:.2f} s until round 1")
    print(
        f"overhead: {statistics.median(rounds) - step:.4f} s a round (fastest {min(rounds) - step:.4f}), "
        f"which is without {step:.4f} s for the sites' steps"
    )
    print(
        f"a round: {statistics.median(rounds):.4f} s (fastest {min(rounds):.4f}), "
        f"of CPU seconds the coordinator {statistics.median(own):.4f} and all workers {workers:.4f}"
    )
    if given.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def step_s(steps: int = 50) -> float:
    """Give the median seconds of a step like those of the sites, in a process of its own."""
    trainer = Trainer(Decoder.create(TRIVIAL, 0), TrainOptions(warmup_steps=0, total_steps=steps))
    tokens = np.full(64, 1)
    batch = Batch(tokens, tokens, np.array([32, 32]), np.array([0, 1]))
    seconds = []
    for _ in range(steps):
        begun = time.perf_counter()
        trainer.step(batch)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def _cpu() -> float:
    use = resource.getrusage(resource.RUSAGE_SELF)
    return use.ru_utime + use.ru_stime


def _cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
