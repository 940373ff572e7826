"""What differential privacy costs in loss, measured on a made-up hospital: no site's record is needed, nor any budget.

`measure` trains one model twice from the same weights, on the same windows of the same patients, drawn as private steps
draw them: once on the plain gradient, once with every patient's share clipped and the noise added. The loss of patients
whom neither has seen tells the difference. One site, one run without rounds: averaging over sites, which makes the
noise smaller, is not in it.

The hospital's records are simpler than real ones, and its vocabulary smaller: compare settings by this, and take the
difference as an order of magnitude.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from model.decoder import Decoder
from model.machine import choose_precision
from model.private import PrivateOptions, PrivateTrainer, Secret
from model.settings import Machine, TrainOptions, preset
from model.train import Trainer, evaluate
from simulation.hospital import PROFILES, write_hospital
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.events import MedsDataset
from tokenizer.progress import Step, Watch
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore, build_store
from tokenizer.survey import survey
from tokenizer.windows import Windows

_PROFILE = "general"
_SPLIT = SplitRule("private cost", tuning=0.2, held_out=0.0)
_BATCH_TOKENS = 8192
_LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Trial:
    """What to train with.

    Attributes:
        patients: who train.
        sampling_rate, noise_multiplier, clip: of the private steps.
        steps: that are taken.
        model: a preset's name.
        context: most tokens of a window.
        seed: of hospital and weights.
    """

    patients: int
    sampling_rate: float
    noise_multiplier: float
    steps: int
    clip: float = 1.0
    model: str = "0.3m"
    context: int = 256
    seed: int = 0


@dataclass(frozen=True)
class Cost:
    """Losses in nats per token on the same unseen patients: before training, without privacy, with it."""

    untrained: float
    plain: float
    private: float
    patients: int
    tokens: int

    @property
    def nats(self) -> float:
        """What privacy costs."""
        return self.private - self.plain


def measure(trial: Trial, folder: Path, machine: Machine | None = None, watch: Watch = lambda step: None) -> Cost:
    """Train with and without privacy and compare.

    Args:
        trial: the settings.
        folder: where the hospital is made, or lies from an earlier call with the same patients and seed.
        machine: how to compute.
        watch: told of every step.

    Raises:
        ConfigError: no such preset, or settings out of range.
    """
    here = machine or Machine()
    codebook, store = _hospital(trial, folder)
    config = preset(trial.model, len(codebook), trial.context, 0.0)
    precision = choose_precision("auto", here, config)
    unseen = _windows(store, codebook, "tuning", trial)

    def loss(decoder: Decoder) -> tuple[float, int]:
        return evaluate(decoder, unseen.epoch(0), precision)

    options = TrainOptions(
        lr=_LEARNING_RATE, warmup_steps=max(1, trial.steps // 30), total_steps=trial.steps + 1, clip=0.0
    )
    private = PrivateOptions(trial.clip, trial.noise_multiplier, trial.sampling_rate)
    train = _windows(store, codebook, "train", trial)
    patients = len(store.split("train"))
    found = []
    for number, protected in enumerate((False, True)):
        decoder = Decoder.create(config, trial.seed).to(here.device)
        noisy = PrivateTrainer(decoder, options, private, patients, _secret_of(trial), machine=here)
        plain = Trainer(decoder, replace(options, clip=1.0), machine=here)
        untrained = loss(decoder)[0]
        for step in range(trial.steps):
            batch = noisy.batch(train, step)
            # Without anybody drawn there is nothing to learn without privacy.
            if protected:
                noisy.step(batch)
            elif len(batch.lengths):
                plain.step(batch)
            watch(Step("measuring", number * trial.steps + step + 1, 2 * trial.steps))
        found.append(loss(decoder))
    (without, tokens), (with_it, _) = found
    return Cost(untrained, without, with_it, patients, tokens)


def _secret_of(trial: Trial) -> Callable[[int, str], Secret]:
    """Draws that are the same in trials that differ in their noise only; nothing here needs to stay secret."""
    key = hashlib.sha256(f"public {trial.seed}".encode()).digest()
    return lambda step, use: Secret(key, f"{step}/{use}")


def _hospital(trial: Trial, folder: Path) -> tuple[Codebook, TokenStore]:
    """Make the hospital with the wanted number of patients who train, on average, or open it."""
    home = folder / f"{_PROFILE}-{trial.patients}-{trial.seed}"
    if not (home / "truth.parquet").exists():
        write_hospital(home, PROFILES[_PROFILE], round(trial.patients / (1 - _SPLIT.tuning)), trial.seed)
    records = MedsDataset.open(home / "records")
    options = TokenizerOptions(min_patients=10)
    codebook = Codebook.build(survey(records, _SPLIT, options))
    store = home / "store"
    if not store.exists():
        build_store(records, codebook, _SPLIT, store)
    return codebook, TokenStore.open(store, codebook.hash)


def _windows(store: TokenStore, codebook: Codebook, split: str, trial: Trial) -> Windows:
    tokens = max(_BATCH_TOKENS, trial.context)
    return Windows(store.split(split), codebook, context=trial.context, batch_tokens=tokens, seed=trial.seed)
