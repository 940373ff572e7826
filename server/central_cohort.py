"""The cohort that the coordinator holds, and how well a round's model answers questions about it, by rollouts."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from model import checkpoint, metrics
from model.cohort import Cohort, cohort, join
from model.decoder import Decoder
from model.estimate import estimate
from model.machine import usable
from model.tasks import Task
from model.train import evaluate
from server.central import PREFIX, CentralPlan
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError
from tokenizer.events import MedsDataset
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.windows import Windows

_BATCH = 8192


class Central:
    """The server's cohort, tokenized with the run's codebook, and the questions about it."""

    def __init__(self, plan: CentralPlan, store: TokenStore, codebook: Codebook, seed: int) -> None:
        """Find whom to ask.

        Args:
            plan: the questions.
            store: the cohort's, made with the codebook.
            codebook: the run's.
            seed: of the draws, the same in every round, so that rounds differ by their weights only.

        Raises:
            ConfigError: nobody to ask, or only one answer where ranking is what counts.
        """
        self.plan, self._codebook, self._seed = plan, codebook, seed
        self._splits = [store.split(name) for name in (SPLITS if plan.foreign else (plan.split,))]
        self._cohorts = [(task, self._asked(task)) for task in plan.tasks]
        if not sum(len(split) for split in self._splits):
            raise ConfigError(
                f"central evaluation: {plan.records} has no {plan.split} patients by the run's split; give more "
                "records, or say foreign = true where none of them is at a site"
            )

    @classmethod
    def open(cls, run_dir: Path, plan: CentralPlan, codebook: Codebook, rule: SplitRule, seed: int) -> "Central":
        """Tokenize the cohort, once for a run directory.

        Raises:
            DataError: records that can't be read.
            ConfigError: see `__init__`.
        """
        home = run_dir / "central" / codebook.hash[:16]
        if not home.exists():
            build_store(MedsDataset.open(run_dir / plan.records), codebook, rule, home)
        return cls(plan, TokenStore.open(home, codebook.hash), codebook, seed)

    def figures(self, path: Path, watch: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Measure a round's checkpoint.

        Args:
            path: of the checkpoint.
            watch: called now and then; may raise to end it.

        Returns:
            `central.loss`, nats a token; with tasks `central.auroc` and `central.brier`, their means, and the same of
            each task as `central.<task>.auroc`.
        """
        decoder = checkpoint.load(path, self._codebook.hash).decoder.to(usable(self.plan.device))
        found = {"loss": self._loss(decoder)}
        for task, asked in self._cohorts:
            watch()
            risks = estimate(
                decoder,
                self._codebook,
                asked,
                task,
                trajectories=task.trajectories or self.plan.trajectories,
                seed=self._seed,
                max_tokens=self.plan.max_tokens,
                target_se=task.target_se,
                progress=lambda done, total: watch(),
            ).risk
            for name, measure in (("auroc", metrics.auroc), ("brier", metrics.brier)):
                found[f"{task.name}.{name}"] = measure(asked.labels, risks)
        for name in ("auroc", "brier"):
            values = [found[f"{task.name}.{name}"] for task, _ in self._cohorts]
            known = [value for value in values if np.isfinite(value)]
            found |= {name: float(np.mean(known))} if known else {}
        return {f"{PREFIX}{name}": value for name, value in found.items() if np.isfinite(value)}

    def _asked(self, task: Task) -> Cohort:
        whole = join([cohort(task, split, self._codebook) for split in self._splits]).labelled()
        if not len(whole) or (self.plan.metric == "auroc" and len(set(whole.labels.tolist())) < 2):
            raise ConfigError(
                f"central evaluation: task {task.name!r} has {len(whole)} answers among the cohort's patients, "
                f"{int((whole.labels == 1).sum())} of them yes; give more records or another task"
            )
        places = np.linspace(0, len(whole) - 1, min(self.plan.most, len(whole)))
        return whole.part(np.unique(places.round().astype(int)))

    def _loss(self, decoder: Decoder) -> float:
        """Mean nats a token over the cohort's timelines; nan where there is nothing to predict."""
        total, count = 0.0, 0
        for split in self._splits:
            context = decoder.config.context
            windows = Windows(split, self._codebook, context=context, batch_tokens=max(_BATCH, context), seed=0)
            if len(split):
                loss, tokens = evaluate(decoder, windows.epoch(0))
                total, count = total + (loss * tokens if tokens else 0.0), count + tokens
        return total / count if count else float("nan")
