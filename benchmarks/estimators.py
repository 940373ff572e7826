"""What an estimator costs: simulated tokens for equal variance, and whether the means agree, on patients of known risk.

    python -m benchmarks.estimators [--patients 400] [--steps 600] [--asked 120] [--trajectories 64]

A synthetic hospital is made, a decoder of 0.3 M parameters trains on its train patients, and the hospital's two
questions are put to its held-out patients. Both estimators read the same trajectories. Printed are, for each question,
with 95 % bootstrap intervals over predictions:

- tokens for equal variance: variance of the counted risk over that of the summed one at equal tokens. The variance of
  an estimate of R trajectories is that between them over R, so this is how many times the tokens counting needs.
- difference of the means, in standard errors: the estimators estimate the same, so it exceeds 4 in one run of 16,000.
- ranking: AUROC of both from few trajectories, and that of the true risk, which no model can beat.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import polars as pl

from model.cohort import Cohort, cohort
from model.decoder import Decoder
from model.metrics import auroc
from model.rollout import Reason, Rollouts, Stop, rollout
from model.settings import TrainOptions, preset
from model.tasks import Task, task_tokens
from model.train import Trainer
from simulation.hospital import PROFILES, generate
from tokenizer.codebook import Codebook, TokenizerOptions, merge
from tokenizer.events import MedsDataset, write_meds
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey
from tokenizer.windows import Windows

TASKS = (
    Task("death_90d", "", ("HOSPITAL_DISCHARGE",), ("MEDS_DEATH",), horizon_days=90, occurrence="each"),
    Task(
        "readmission_30d", "", ("HOSPITAL_DISCHARGE",), ("HOSPITAL_ADMISSION",), ("MEDS_DEATH",), horizon_days=30,
        occurrence="each",
    ),
)  # fmt: skip
_RESAMPLES = 2000
_FEW = (1, 4, 16)


def risks(rolled: Rollouts, first: int) -> tuple[np.ndarray, np.ndarray]:
    """Risks of the first trajectories of every prediction: counted and summed, float64 [P] each; nan if none tells."""
    resolved = np.isin(rolled.reason, (Reason.EVENT, Reason.HORIZON))[:, :first]
    yes = ((rolled.reason == Reason.EVENT) & (rolled.event == 0))[:, :first]
    chances = rolled.chances[:, :first]
    with np.errstate(invalid="ignore"):
        return yes.sum(1) / resolved.sum(1), chances[:, :, 0].sum(1) / chances.sum((1, 2))


def linearized(rolled: Rollouts) -> tuple[np.ndarray, np.ndarray]:
    """What each trajectory adds to its patient's two estimates, float64 [P, R] each.

    Both are ratios of sums, yes over told; (yes - risk told) / mean(told) has their variance to first order.
    """
    resolved = np.isin(rolled.reason, (Reason.EVENT, Reason.HORIZON)).astype(float)
    yes = ((rolled.reason == Reason.EVENT) & (rolled.event == 0)).astype(float)
    pairs = ((yes, resolved), (rolled.chances[:, :, 0], rolled.chances.sum(2)))
    parts = []
    for said, told in pairs:
        mean = told.mean(1, keepdims=True)
        risk = said.mean(1, keepdims=True) / mean
        parts.append(risk + (said - risk * told) / mean)
    return parts[0], parts[1]


def compare(rolled: Rollouts, truth: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measure both estimators; see the module."""
    told = (rolled.chances.sum((1, 2)) > 0) & np.isin(rolled.reason, (Reason.EVENT, Reason.HORIZON)).any(1)
    keep = np.flatnonzero(told)
    counted, summed = (part[keep] for part in linearized(rolled))
    spread_counted, spread_summed = counted.var(1, ddof=1), summed.var(1, ddof=1)
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(keep), (_RESAMPLES, len(keep)))
    ratio = spread_counted[drawn].sum(1) / spread_summed[drawn].sum(1)
    low, high = np.percentile(ratio, [2.5, 97.5])
    difference = (summed - counted).mean(1)
    # Given the patients, all that varies is the draws: the variance of each mean difference, summed.
    error = np.sqrt(((summed - counted).var(1, ddof=1) / counted.shape[1]).sum()) / len(keep)
    found = {
        "tokens for equal variance": float(spread_counted.sum() / spread_summed.sum()),
        "low": float(low),
        "high": float(high),
        "difference": float(difference.mean()),
        "standard errors": float(difference.mean() / error),
        "auroc truth": auroc(labels, truth),
    }
    for few in _FEW:
        for name, risk in zip(("counted", "summed"), risks(rolled, few), strict=True):
            middle = np.nanmean(risk)
            found[f"auroc {name} {few}"] = auroc(labels, np.where(np.isnan(risk), middle, risk))
    return found


def train(store: TokenStore, codebook: Codebook, steps: int) -> Decoder:
    """Train a decoder of 0.3 M parameters with Muon."""
    decoder = Decoder.create(preset("0.3m", len(codebook), context=512), 0)
    options = TrainOptions(optimizer="muon", lr=8e-3, warmup_steps=steps // 20, total_steps=steps)
    trainer = Trainer(decoder, options)
    windows = Windows(store.split("train"), codebook, context=512, batch_tokens=512, seed=0)
    for step in range(steps):
        trainer.step(windows.batch(step))
    return decoder


def with_truth(asked: Cohort, truth: pl.DataFrame, task: str) -> tuple[Cohort, np.ndarray]:
    """Those that the record follows past the horizon, so that their labels are an unbiased sample; and true risks."""
    keys = pl.DataFrame(
        {"subject_id": asked.subject_ids, "prediction_time": pl.Series(asked.prediction_us).cast(pl.Datetime("us"))}
    )
    known = keys.join(
        truth.filter(pl.col("task") == task),
        on=["subject_id", "prediction_time"],
        how="left",
        maintain_order="left",
    )
    rows = np.flatnonzero(known["complete"].fill_null(False).to_numpy() & (asked.labels >= 0))
    return asked.part(rows), known["risk"].to_numpy()[rows]


def main() -> None:
    """Make, train, ask, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--patients", type=int, default=400)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--asked", type=int, default=120)
    parser.add_argument("--trajectories", type=int, default=64)
    given = parser.parse_args()
    records = generate(PROFILES["heart"], given.patients, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        write_meds(Path(folder, "meds"), [("0", records.events)], name="heart")
        dataset, rule = MedsDataset.open(Path(folder, "meds")), SplitRule("estimators")
        options = TokenizerOptions(values="fused")
        codebook = Codebook.build(merge([survey(dataset, rule, options)]))
        store = build_store(dataset, codebook, rule, Path(folder, "store"))
        decoder = train(store, codebook, given.steps)
        # Whoever trained nothing may be asked: tuning and held-out patients.
        for task in TASKS:
            cohorts = [cohort(task, store.split(split), codebook) for split in ("tuning", "held_out")]
            parts = [with_truth(found, records.truth, task.name) for found in cohorts]
            prompts = [prompt for part, _ in parts for prompt in part.prompts][: given.asked]
            labels = np.concatenate([part.labels for part, _ in parts])[: given.asked]
            truth = np.concatenate([risk for _, risk in parts])[: given.asked]
            tokens = task_tokens(task, codebook)
            rolled = rollout(
                decoder,
                codebook,
                prompts,
                trajectories=given.trajectories,
                stop=Stop([tokens.outcome, tokens.competing], task.horizon_us, 256),
                seed=0,
                batch_rows=1024,
            )
            sampled = rolled.tokens_sampled.mean()
            print(f"{task.name}: {len(prompts)} predictions, {labels.sum()} yes, {sampled:.1f} tokens per trajectory")
            for name, value in compare(rolled, truth, labels).items():
                print(f"  {name:<28}{value:>10.4f}")


if __name__ == "__main__":
    main()
