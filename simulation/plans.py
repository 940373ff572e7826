"""A federation's plan from a study's training settings alone, for those who have no study file."""

from typing import Any

from pydantic import ValidationError

from federation.manifest import LocalWork, OuterOptions
from server.plan import FederationPlan
from simulation.arms import train_options
from simulation.config import Training
from tokenizer.codebook import TokenizerOptions
from tokenizer.errors import ConfigError
from tokenizer.split import SplitRule


def training_plan(name: str, seed: int, context: int, settings: dict[str, Any]) -> FederationPlan:
    """Make a plan.

    Args:
        name: of the run.
        seed: of the run.
        context: tokens of the longest window.
        settings: of `simulation.config.Training`.

    Raises:
        ConfigError: a setting is unknown, missing or out of range; all are named.
    """
    try:
        train = Training.model_validate(settings)
    except ValidationError as error:
        said = "; ".join(
            ": ".join([*map(str, e["loc"]), e["msg"].removeprefix("Value error, ")]) for e in error.errors()
        )
        raise ConfigError(f"the federation's settings: {said}") from None
    outer = OuterOptions()
    if train.outer == "nesterov":
        outer = OuterOptions.nesterov(train.outer_learning_rate or 0.7, train.outer_momentum)
    elif train.outer_learning_rate is not None:
        outer = OuterOptions(lr=train.outer_learning_rate)
    return FederationPlan(
        name=name,
        rounds=train.rounds,
        split=SplitRule("fedcomet"),
        local=LocalWork(
            steps=train.local_steps,
            epochs=train.local_epochs,
            batch_tokens=train.batch_tokens,
            windows_per_patient=train.windows_per_patient,
            warmup_share=train.warmup_share,
            optimizer_state=train.optimizer_state,
        ),
        model="0.3m",
        context=context,
        train=train_options(train),
        outer=outer,
        tokenizer=TokenizerOptions(),
        seed=seed,
        min_sites=train.min_sites,
        deadline_s=60 * train.round_deadline_minutes,
        evaluate_every=train.evaluate_every,
        sites_per_round=train.sites_per_round,
    )
