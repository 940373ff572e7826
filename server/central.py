"""What the coordinator asks the global model by itself every few rounds, about a cohort that the server holds.

That cohort is public, made up or consented; no site is asked, and nothing is charged, as what is done with a released
model costs nobody's privacy anything. The figures of a round go into the ledger before it is committed, and from them
alone follow the best round and whether the run ends early: whoever takes a run up again decides the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from model.tasks import Task
from tokenizer.errors import ConfigError

Metric = Literal["auroc", "brier", "loss"]
PREFIX = "central."


@dataclass(frozen=True)
class CentralPlan:
    """What the coordinator asks the global model by itself, and what follows from the answers.

    Attributes:
        records: a MEDS dataset at the coordinator, as a path, absolute or from the run directory.
        tasks: the questions; names are unique.
        every: rounds between two evaluations; the last round is evaluated, too.
        trajectories, max_tokens: of a prediction's rollout, where its task doesn't say how many.
        metric: by which the best round is chosen: the mean of the tasks' AUROC or Brier score, or the loss, nats a
            token.
        patience: after so many evaluations in a row that are no better than the best one, the run ends; 0: never.
        split: whose answers count, by the run's keyed split, so that nobody who trains at a site is among them.
        foreign: whether no patient of the cohort is at any site; then all of them count.
        most: the most predictions of a task; evenly spread ones are taken of more.
        device: where the rollouts run.
    """

    records: str
    tasks: tuple[Task, ...] = ()
    every: int = 1
    trajectories: int = 32
    max_tokens: int = 256
    metric: Metric = "auroc"
    patience: int = 0
    split: Literal["tuning", "held_out"] = "tuning"
    foreign: bool = False
    most: int = 1000
    device: str = "cpu"

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        rules = {
            "records must name a MEDS dataset": bool(self.records),
            f'metric = "{self.metric}" needs tasks': bool(names) or self.metric == "loss",
            "every task needs a name of its own": len(set(names)) == len(names),
            "a task with given = true has its predictions in a file; leave it out": not any(
                t.given for t in self.tasks
            ),
            "every, trajectories, max_tokens and most must be at least 1": min(
                self.every, self.trajectories, self.max_tokens, self.most
            )
            >= 1,
            "patience must not be negative": self.patience >= 0,
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise ConfigError(f"central evaluation: {'; '.join(wrong)}.")

    def due(self, number: int, rounds: int) -> bool:
        """Tell whether a round of so many is evaluated."""
        return number % self.every == 0 or number == rounds

    def best(self, values: Mapping[int, float]) -> int | None:
        """Give the round with the best value of the metric, the earliest of equal ones; None if there is none."""
        sign = -1.0 if self.metric == "auroc" else 1.0
        return min(values, key=lambda number: (sign * values[number], number), default=None)

    def over(self, values: Mapping[int, float]) -> bool:
        """Tell whether the run ends early, by the values of the metric so far.

        >>> plan = CentralPlan("records", metric="loss", patience=2)
        >>> [plan.over({1: 3.0, 2: 2.0, 3: 2.5}), plan.over({1: 3.0, 2: 2.0, 3: 2.5, 4: 2.0})]
        [False, True]
        """
        best = self.best(values)
        return best is not None and 0 < self.patience <= sum(number > best for number in values)
