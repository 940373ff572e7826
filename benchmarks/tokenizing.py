"""Events per second from MEDS files to a token store, beside a plain tokenizer that goes event by event.

    python -m benchmarks.tokenizing                     a made-up hospital of 4,000 patients
    python -m benchmarks.tokenizing PATH                a MEDS dataset

Both read the same shards with polars, use the same codebook and write tokens and times to disk; their tokens are
compared. The plain one is given the codebook for nothing, so "encode and store" is the like-for-like row; "in all"
is ours with the survey and the codebook, which the plain one doesn't have. Seconds are the best of three runs in turn.
"""

import argparse
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import polars as pl

from tests.tokenizer.plain import encode_sorted
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.events import MedsDataset, write_meds
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import build_store
from tokenizer.survey import survey

RULE = SplitRule("benchmark")


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


def survey_and_build(dataset: MedsDataset) -> Codebook:
    return Codebook.build(survey(dataset, RULE, TokenizerOptions()))


def timed(work: Callable, *arguments):
    start = perf_counter()
    result = work(*arguments)
    return perf_counter() - start, result


def main() -> None:
    arguments = argparse.ArgumentParser(description="Events per second, ours and plain.")
    arguments.add_argument("dataset", type=Path, nargs="?")
    arguments.add_argument("--runs", type=int, default=3)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        source = chosen.dataset or root / "meds"
        if chosen.dataset is None:
            write_meds(source, [("0", hospital(4000))], name="benchmark")
        compare(source, root, chosen.runs)


def compare(source: Path, root: Path, runs: int) -> None:
    dataset = MedsDataset.open(source)
    events = sum(len(dataset.read(shard)) for shard in dataset.shards)
    ours, surveys, plain = [], [], []
    for run in range(runs):
        seconds, book = timed(survey_and_build, dataset)
        surveys.append(seconds)
        seconds, store = timed(build_store, dataset, book, RULE, root / f"store{run}")
        ours.append(seconds)
        seconds, tokens = timed(encode_plainly, dataset, book, root / f"plain{run}")
        plain.append(seconds)
        if tokens != store.tokens_total:
            raise SystemExit(f"tokens differ: plain {tokens:,}, ours {store.tokens_total:,}")
    check_equal(dataset, store, root / f"plain{runs - 1}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{events:,} events -> {tokens:,} tokens, vocabulary {len(book):,}, peak memory {peak:,.0f} MiB (both)")
    rows = {
        "plain, encode and store": min(plain),
        "ours,  encode and store": min(ours),
        "ours,  survey and codebook": min(surveys),
        "ours,  in all": min(ours) + min(surveys),
    }
    for name, seconds in rows.items():
        print(f"{name:28} {seconds:8.2f} s {events / seconds:12,.0f} events/s {min(plain) / seconds:6.1f} x plain")


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
