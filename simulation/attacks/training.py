"""The training that is attacked: that of one site, with the settings of a run, in one go.

What averaging with other sites would do to the weights in between is left out: the attacker gets the model of the one
site, which holds more of its patients than any average. So what an attack finds here is what a site risks at most by
these attacks, and the privacy claim of a site's steps must hold here, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from model.decoder import Decoder
from model.feed import ahead
from model.losses import patient_losses
from model.private import PrivateOptions, PrivateTrainer, Secret
from model.settings import DecoderConfig, Machine, TrainOptions
from model.train import Trainer
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError, DataError
from tokenizer.store import TokenSplit
from tokenizer.windows import Windows

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens that go through a model together when it is only asked.
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Recipe:
    """How a site trains.

    Attributes:
        decoder: its shape.
        options: of the optimizer; `total_steps` is how many are taken.
        batch_tokens: of a step that isn't private.
        windows_per_patient: most windows of a patient in a pass that isn't private; None is all.
        private: how steps are made private; None leaves privacy out.
        seed: of initial weights and of batches that aren't private.
        device: where it trains.
    """

    decoder: DecoderConfig
    options: TrainOptions
    batch_tokens: int
    windows_per_patient: int | None = None
    private: PrivateOptions | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.private is not None and self.decoder.dropout:
            raise ConfigError("audit: private steps are without dropout; take a study with dropout 0")

    def initial(self) -> Decoder:
        """The model before any training."""
        return Decoder.create(self.decoder, self.seed).to(self.device)

    def windows(self, split: TokenSplit, codebook: Codebook) -> Windows:
        """The batches of a training."""
        return Windows(
            split,
            codebook,
            context=self.decoder.context,
            batch_tokens=self.batch_tokens,
            seed=self.seed,
            per_patient=self.windows_per_patient,
        )


def train(
    recipe: Recipe,
    split: TokenSplit,
    codebook: Codebook,
    key: bytes,
    *,
    start: Decoder | None = None,
    steps: int | None = None,
    first: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Decoder:
    """Train a model on a split.

    Args:
        recipe: how.
        split: of all patients; private steps count all of them, also those without anything to predict.
        codebook: of its tokens.
        key: of secret draws (`model.private.KEY_BYTES`); used only for private steps.
        start: the weights to start from, left as they are; the initial ones if None.
        steps: how many; all if None.
        first: the step to begin with, as far as the learning rate goes; the optimizer begins anew.
        progress: told of steps done and steps in all.

    Raises:
        TrainingDiverged: the learning rate is too high for it.
        DataError: the split holds nothing to train on.
    """
    decoder = recipe.initial() if start is None else _copied(start)
    count = recipe.options.total_steps if steps is None else steps
    windows = recipe.windows(split, codebook)
    if not windows.steps(0):
        raise DataError("audit: there is no timeline with anything to predict among the patients to train on")
    machine = Machine(device=recipe.device)
    if recipe.private is None:
        trainer = Trainer(decoder, recipe.options, first, machine)
        batches = ahead((windows.batch(step) for step in range(first, first + count)), recipe.device)
        for done, batch in enumerate(batches, 1):
            trainer.step(batch)
            progress(done, count)
        return decoder
    secret = lambda step, use: Secret(key, f"audit {step} {use}")  # noqa: E731
    options = replace(recipe.options, clip=0.0)
    private = PrivateTrainer(decoder, options, recipe.private, len(split), secret, first, machine)
    for done in range(1, count + 1):
        private.step(private.batch(windows))
        progress(done, count)
    return decoder


def all_windows(decoder: Decoder, codebook: Codebook, split: TokenSplit) -> Windows:
    """All windows of a split's patients, whatever a training caps them at."""
    context = decoder.config.context
    return Windows(split, codebook, context=context, batch_tokens=max(_BATCH_TOKENS, context), seed=0)


def losses(decoder: Decoder, codebook: Codebook, split: TokenSplit) -> "NDArray[np.float64]":
    """Each patient's mean loss over all that can be predicted in the timeline: float64 [P] in nats, nan without any."""
    return patient_losses(decoder, all_windows(decoder, codebook, split).epoch(0), len(split))


def _copied(decoder: Decoder) -> Decoder:
    with decoder.embed_tokens.weight.device:
        copy = Decoder(decoder.config)
    copy.load_state_dict(decoder.state_dict())
    return copy
