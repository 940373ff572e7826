"""Events per second from MEDS files to a token store, beside a plain tokenizer and a published one.

    python -m benchmarks.tokenizing                     a made-up hospital of 4,000 patients
    python -m benchmarks.tokenizing PATH                a MEDS dataset
    python -m benchmarks.tokenizing PATH --peer         beside meds-torch-data 0.9.0, in an environment of its own
    python -m benchmarks.tokenizing PATH --workers 2    with so many worker processes

"Encode and store" is what the goal of 1.5 M events/s on two cores is for: opening the dataset, encoding, and a store on
disk, with a codebook that is known. The plain tokenizer goes event by event; it reads the same shards, uses the same
codebook and writes tokens and times to disk, and its tokens are compared with ours. meds-torch-data's MTD_preprocess
is a related job, not the same: it makes normalised values and vocabulary ids, and fits both itself, so "in all", ours
with the survey and the codebook, is the like-for-like row. It starts five processes, which costs it seconds whatever
the size. All run in turn; seconds are the best of the runs.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import polars as pl

from tests.tokenizer.plain import encode_sorted
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.events import MedsDataset, write_meds
from tokenizer.shards import Crew
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey

RULE = SplitRule("benchmark")
GOAL = 1_500_000
# What installs meds-torch-data 0.9.0 with what it really works with; unpinned, pip falls back to 0.4.
PEER = ("meds-torch-data==0.9.0", "MEDS-transforms==0.6.7")


def hospital(patients: int, seed: int = 0) -> pl.DataFrame:
    """Two days of vital signs and laboratory values per patient: about 400 events each."""
    rng = np.random.default_rng(seed)
    events = rng.poisson(400, patients)
    subject = np.repeat(np.arange(patients), events)
    minutes = rng.integers(0, 2 * 24 * 12, len(subject)) * 5
    names = np.array([f"LAB//{n:02}" for n in range(40)])
    code = names[np.minimum(rng.zipf(1.3, len(subject)) - 1, 39)]
    stays = {
        "subject_id": subject,
        "time": minutes * 60_000_000,
        "code": code,
        "numeric_value": rng.lognormal(4, 0.4, len(subject)),
    }
    births = {
        "subject_id": np.arange(patients),
        "time": -rng.integers(18, 90, patients) * 365 * 86_400_000_000,
        "code": np.full(patients, "MEDS_BIRTH"),
        "numeric_value": np.full(patients, np.nan),
    }
    both = pl.concat([pl.DataFrame(stays), pl.DataFrame(births)])
    return both.with_columns(
        pl.col("time").cast(pl.Datetime("us")), pl.col("numeric_value").fill_nan(None).cast(pl.Float32)
    )


def encode_plainly(dataset: MedsDataset, book: Codebook, path: Path) -> int:
    """Tokens written by the plain tokenizer."""
    path.mkdir()
    written = 0
    for place, shard in enumerate(dataset.shards):
        frame = dataset.read(shard).with_columns(pl.col("time").cast(pl.Int64))
        timelines = encode_sorted(frame.iter_rows(), book)
        pairs = np.array([pair for timeline in timelines.values() for pair in timeline], np.int64)
        np.save(path / f"{place}-tokens.npy", pairs[:, 0].astype(np.int32))
        np.save(path / f"{place}-times.npy", pairs[:, 1])
        np.save(path / f"{place}-lengths.npy", np.array([len(timeline) for timeline in timelines.values()]))
        written += len(pairs)
    return written


def survey_and_build(source: Path, crew: Crew) -> Codebook:
    return Codebook.build(survey(MedsDataset.open(source), RULE, TokenizerOptions(), crew=crew))


def encode_and_store(source: Path, book: Codebook, path: Path, crew: Crew) -> TokenStore:
    return build_store(MedsDataset.open(source), book, RULE, path, crew=crew)


def peer_environment(folder: Path) -> Path:
    """The folder of programs of an environment with the peer, made if it isn't there."""
    programs = folder / "bin"
    if not (programs / "MTD_preprocess").exists():
        import torch

        print(f"installing {', '.join(PEER)} into {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        pip = [programs / "python", "-m", "pip", "install", "--quiet"]
        # The same build of torch as ours; by itself pip may choose one that is gigabytes larger.
        subprocess.run([*pip, f"torch=={torch.__version__}"], check=True)
        subprocess.run([*pip, *PEER], check=True)
    return programs


def preprocess_by_peer(programs: Path, source: Path, path: Path) -> None:
    # It calls a program of its own by name.
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "HYDRA_FULL_ERROR": "1"}
    command = [programs / "MTD_preprocess", f"MEDS_dataset_dir={source}", f"output_dir={path}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not list(path.rglob("*.nrt")):
        raise SystemExit(f"MTD_preprocess failed ({done.returncode}):\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def timed(work: Callable, *arguments):
    start = perf_counter()
    result = work(*arguments)
    return perf_counter() - start, result


def main() -> None:
    arguments = argparse.ArgumentParser(description="Events per second, ours and others.")
    arguments.add_argument("dataset", type=Path, nargs="?")
    arguments.add_argument("--runs", type=int, default=3)
    arguments.add_argument("--workers", type=int)
    arguments.add_argument("--peer", action="store_true", help="beside meds-torch-data 0.9.0")
    arguments.add_argument("--peer-environment", type=Path, help="where it is, or is to be, installed")
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = chosen.dataset or root / "meds"
        if chosen.dataset is None:
            write_meds(source, [("train/0", hospital(4000))], name="benchmark")
        peer = peer_environment((chosen.peer_environment or root / "peer").absolute()) if chosen.peer else None
        compare(source, root, chosen.runs, Crew(chosen.workers), peer)


def compare(source: Path, root: Path, runs: int, crew: Crew, peer: Path | None) -> None:
    dataset = MedsDataset.open(source)
    seconds: dict[str, list[float]] = {}

    def run(name: str, work: Callable, *arguments):
        took, result = timed(work, *arguments)
        seconds.setdefault(name, []).append(took)
        return result

    for turn in range(runs):
        shutil.rmtree(root / "plain", ignore_errors=True)
        book = run("ours, survey and codebook", survey_and_build, source, crew)
        store = run("ours, encode and store", encode_and_store, source, book, root / "store", crew)
        tokens = run("plain, encode and store", encode_plainly, dataset, book, root / "plain")
        if tokens != store.tokens_total:
            raise SystemExit(f"tokens differ: plain {tokens:,}, ours {store.tokens_total:,}")
        if peer:
            run("meds-torch-data 0.9.0", preprocess_by_peer, peer, source.absolute(), root / f"peer{turn}")
    check_equal(dataset, store, root / "plain")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{dataset.events:,} events -> {tokens:,} tokens, vocabulary {len(book):,}, peak memory {peak:,.0f} MiB (ours"
        " and plain)"
    )
    best = {name: min(took) for name, took in seconds.items()}
    best["ours, in all"] = best["ours, survey and codebook"] + best["ours, encode and store"]
    others = [name for name in best if not name.startswith("ours")]
    print(" ".join([f"{'':28} {'seconds':>9} {'events/s':>12}", *(f"{'x ' + name:>26}" for name in others)]))
    for name, took in best.items():
        ratios = (f"{best[other] / took:26.1f}" for other in others)
        print(" ".join([f"{name:28} {took:9.2f} {dataset.events / took:12,.0f}", *ratios]))
    rate = dataset.events / best["ours, encode and store"]
    print(f"encode and store: {rate / 1e6:.2f} M events/s, {rate / GOAL:.2f} of the goal of {GOAL / 1e6} M")


def check_equal(dataset, store, path: Path) -> None:
    """Every patient's tokens and times are those of the plain tokenizer."""
    found = {}
    for split in SPLITS:
        part = store.split(split)
        found |= {int(subject): part.timeline(n) for n, subject in enumerate(part.subject_ids)}
    for place, shard in enumerate(dataset.shards):
        tokens, times, lengths = (np.load(path / f"{place}-{name}.npy") for name in ("tokens", "times", "lengths"))
        ends = np.cumsum(lengths)
        subjects = dataset.read(shard)["subject_id"].unique().sort()
        for subject, begin, end in zip(subjects, ends - lengths, ends, strict=True):
            if not all(map(np.array_equal, found[subject], (tokens[begin:end], times[begin:end]))):
                raise SystemExit(f"subject {subject}: the plain tokenizer writes other tokens")


if __name__ == "__main__":
    main()
