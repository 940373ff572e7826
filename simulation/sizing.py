"""Size a federation before it exists: from sites, machines and links to model, rounds, time and bytes, with the sums.

Every number that is not known for sure is given as three (low, middle, high: a 95 % interval); a thousand draws of all
of them, log-normal, carry that through to each figure. With D the tokens that are trained on, N parameters, r = D / N:

    passes = D / tokens of all sites;  N = D / r (or D = r N, where N is given)
    work = 6 N + 12 layers x width x context / 2 FLOP a token (Hoffmann et al. 2022, appendix F: forward and backward)
    steps of a site = its tokens x passes / batch;  rounds = steps of the middle site / local steps
    a round = the slowest site's training, download and upload, and the coordinator's sum

What it leaves out: queues, failures, evaluation, and that a step of a larger batch teaches less for each token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from federation.accountant import Gaussian, epsilon
from model.settings import PRESETS
from simulation import toml_file
from simulation.toml_file import Section

Floats = NDArray[np.float64]
_DRAWS = 1000
_DAY = 86_400.0
_BYTES = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.03}

Range = Annotated[tuple[float, float, float], Field(min_length=3, max_length=3)]


def _range(name: str, value: Range) -> None:
    if not 0 < value[0] <= value[1] <= value[2]:
        raise ValueError(f"{name} must be three numbers above 0, from low to high")


class Sites(Section):
    """Some sites that are alike: how many, what each has, and its machines and link.

    `flops` is the peak of all its devices together, in FLOP/s at the precision that is trained in; `utilisation` the
    share of it that training gets; `up_mbit` and `down_mbit` the link in Mbit/s.
    """

    name: str
    count: int = Field(default=1, ge=1)
    patients: int = Field(ge=1)
    tokens: float = Field(gt=0)
    flops: float = Field(gt=0)
    utilisation: Range = (0.2, 0.35, 0.5)
    up_mbit: Range = (50.0, 100.0, 200.0)
    down_mbit: Range = (50.0, 100.0, 200.0)

    @model_validator(mode="after")
    def _ordered(self) -> "Sites":
        for name in ("utilisation", "up_mbit", "down_mbit"):
            _range(name, getattr(self, name))
        return self


class Law(Section):
    """What to train: tokens for each parameter at the optimum (CoMET: about 1,000), and a fitted loss if there is one.

    Give `preset` or `parameters` for a model of that size, or `passes` for what the tokens allow.
    """

    tokens_per_parameter: Range = (500.0, 1000.0, 2000.0)
    passes: float | None = Field(default=None, gt=0)
    parameters: float | None = Field(default=None, gt=0)
    preset: str | None = None
    floor: float | None = None
    a: float | None = None
    b: float | None = None
    alpha: float | None = None
    beta: float | None = None

    @model_validator(mode="after")
    def _one(self) -> "Law":
        _range("tokens_per_parameter", self.tokens_per_parameter)
        if sum(given is not None for given in (self.passes, self.parameters, self.preset)) != 1:
            raise ValueError("give one of passes, parameters and preset")
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"there is no preset {self.preset!r}; there are {', '.join(PRESETS)}")
        fitted = [value is None for value in (self.floor, self.a, self.b, self.alpha, self.beta)]
        if any(fitted) and not all(fitted):
            raise ValueError("floor, a, b, alpha and beta belong together")
        return self


class Rounds(Section):
    """How sites work together; `local_steps` is what the middle site does in a round."""

    local_steps: int = Field(default=500, ge=1)
    batch_tokens: float = Field(default=524_288, gt=0)
    context: int = Field(default=8192, ge=16)
    update: str = "bfloat16"
    weights: str = "bfloat16"
    server_bytes_per_s: Range = (2e8, 5e8, 1e9)

    @model_validator(mode="after")
    def _known(self) -> "Rounds":
        _range("server_bytes_per_s", self.server_bytes_per_s)
        if self.update not in _BYTES or self.weights not in ("float32", "bfloat16"):
            raise ValueError("update is float32, bfloat16 or int8, weights float32 or bfloat16")
        return self


class Privacy(Section):
    """Noise in every step (DP-SGD) whose epsilon is told; a batch holds patients, one window of each."""

    noise_multiplier: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)


class Sizing(Section):
    """The whole file."""

    name: str
    site: tuple[Sites, ...] = Field(min_length=1)
    law: Law
    rounds: Rounds = Rounds()
    privacy: Privacy | None = None


@dataclass(frozen=True)
class Line:
    """A figure of a plan: its middle, its 95 % limits (the same where it is certain), unit, and how it comes about."""

    name: str
    value: float
    low: float
    high: float
    unit: str
    sum: str


def read(path: Path) -> Sizing:
    """Read a sizing file.

    Raises:
        ConfigError: it can't be read, or keys or values are wrong.
    """
    return toml_file.read(path, Sizing, "give the path of a sizing file")


def plan(sizing: Sizing, flops_here: Range | None = None) -> tuple[Line, ...]:
    """Work a federation out.

    Args:
        sizing: sites, law and rounds.
        flops_here: measured FLOP/s of this machine in training (`measured`), in the place of all sites' own.
    """
    draw = _Draws()
    law, sites = sizing.law, sizing.site
    all_tokens = sum(site.count * site.tokens for site in sites)
    patients = sum(site.count * site.patients for site in sites)
    ratio = draw(law.tokens_per_parameter)
    size = float(PRESETS[law.preset].parameters()) if law.preset else law.parameters
    if size is None:
        trained = draw.certain((law.passes or 1.0) * all_tokens)
        parameters = trained / ratio
    else:
        parameters = draw.certain(size)
        trained = parameters * ratio
    passes = trained / all_tokens
    lines = [
        _line("sites", draw.certain(sum(site.count for site in sites)), "", "all that are listed"),
        _line("patients", draw.certain(patients), "", "count x patients, over the list"),
        _line("tokens", draw.certain(all_tokens), "", "count x tokens, over the list"),
        _line("tokens per parameter", ratio, "", "given; CoMET's optimum is about 1,000"),
        _line("parameters N", parameters, "", "given" if size else "D / tokens per parameter"),
        _line("tokens trained D", trained, "", "N x tokens per parameter" if size else "passes x tokens"),
        _line("passes", passes, "", "D / tokens"),
    ]
    work = 6 * parameters + _attention(sizing, parameters)
    lines.append(_line("work", work, "FLOP/token", "6 N + attention at half the context"))
    lines.append(_line("compute in all", work * trained, "FLOP", "work x D"))
    return (*lines, *_course(sizing, draw, parameters, trained, passes, work, flops_here))


def _course(
    sizing: Sizing,
    draw: "_Draws",
    parameters: Floats,
    trained: Floats,
    passes: Floats,
    work: Floats,
    flops_here: Range | None,
) -> list[Line]:
    """The rounds: how many, what they take and move."""
    agreed, sites = sizing.rounds, sizing.site
    tokens = np.repeat([site.tokens for site in sites], [site.count for site in sites])
    middle = float(np.median(tokens))
    steps = middle * passes / agreed.batch_tokens
    rounds = np.maximum(1.0, np.ceil(steps / agreed.local_steps))
    up, down = parameters * _BYTES[agreed.update], parameters * _BYTES[agreed.weights]
    phases = []
    for site in sites:
        speed = draw(flops_here) if flops_here else site.flops * draw(site.utilisation)
        training = site.tokens * passes / rounds * work / speed
        phases.append((training, 8e-6 * down / draw(site.down_mbit), 8e-6 * up / draw(site.up_mbit)))
    training, download, upload = (np.max([phase[i] for phase in phases], axis=0) for i in range(3))
    count = sum(site.count for site in sites)
    summing = count * up / draw(agreed.server_bytes_per_s)
    whole = np.max(np.sum(phases, axis=1), axis=0) + summing
    lines = [
        _line("steps of the middle site", steps, "", "its tokens x passes / batch_tokens"),
        _line("rounds", rounds, "", f"steps / local_steps ({agreed.local_steps})"),
        _line(
            "a round: training", training, "s", "slowest: its tokens x passes / rounds x work / (flops x utilisation)"
        ),
        _line("a round: download", download, "s", f"slowest: N x {_BYTES[agreed.weights]:g} bytes / link"),
        _line("a round: upload", upload, "s", f"slowest: N x {_BYTES[agreed.update]:g} bytes / link"),
        _line("a round: sum", summing, "s", "sites x update / the coordinator's bytes per second"),
        _line("a round", whole, "s", "slowest site's phases + sum"),
        _line("whole run", rounds * whole / _DAY, "days", "rounds x a round"),
        _line("share of time without training", 1 - training / whole, "", "1 - training / a round"),
        _line("bytes of a site", rounds * (up + down), "B", "rounds x (update + weights)"),
        _line("bytes of the coordinator", rounds * (up + down) * count, "B", "sites x bytes of a site"),
        _line("against averaging every step", np.full(_DRAWS, float(agreed.local_steps)), "times less", "local_steps"),
        _line(
            "memory of a device, without activations", 16 * parameters, "B", "N x (weights, gradient, two moments) x 4"
        ),
    ]
    law = sizing.law
    if law.a is not None and law.b is not None and law.alpha and law.beta and law.floor is not None:
        loss = law.floor + law.a * parameters**-law.alpha + law.b * trained**-law.beta
        lines.append(_line("held-out loss", loss, "nats/token", "floor + a N^-alpha + b D^-beta"))
    if sizing.privacy is not None:
        lines.append(_epsilon(sizing, sizing.privacy, float(np.median(passes))))
    return lines


def _epsilon(sizing: Sizing, privacy: Privacy, passes: float) -> Line:
    """What DP-SGD with the noise costs a patient of the site with the fewest."""
    smallest = min(sizing.site, key=lambda site: site.patients)
    # A batch of so many tokens holds one window of each drawn patient.
    window = min(float(sizing.rounds.context), smallest.tokens / smallest.patients)
    rate = min(1.0, sizing.rounds.batch_tokens / window / smallest.patients)
    steps = max(1, round(passes / rate))
    cost = epsilon([Gaussian(privacy.noise_multiplier, rate, steps)], privacy.delta)
    told = f"DP-SGD at {smallest.name}: noise {privacy.noise_multiplier:g}, rate {rate:.3g}, {steps:,} steps"
    return Line("epsilon", cost, cost, cost, f"at delta {privacy.delta:g}", told)


def _attention(sizing: Sizing, parameters: Floats) -> Floats:
    """FLOP a token for scores and sums, at half the context on average; by the preset nearest in size."""
    nearest = min(PRESETS.values(), key=lambda shape: abs(np.log(shape.parameters() / np.median(parameters))))
    return np.full_like(parameters, 12.0 * nearest.layers * nearest.width * sizing.rounds.context / 2)


class _Draws:
    """Draws of numbers that are given as intervals; equal plans draw equally."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(0)

    def __call__(self, given: Range) -> Floats:
        low, middle, high = np.log(given)
        z = self._rng.standard_normal(_DRAWS)
        # Each side has its own width, so that 2.5 % lie below low and as many above high.
        drawn: Floats = np.exp(middle + z * np.where(z < 0, middle - low, high - middle) / 1.96)
        return drawn

    @staticmethod
    def certain(value: float) -> Floats:
        return np.full(_DRAWS, float(value))


def _line(name: str, drawn: Floats, unit: str, told: str) -> Line:
    low, middle, high = np.percentile(drawn, [2.5, 50, 97.5])
    return Line(name, float(middle), float(low), float(high), unit, told)


def measured(preset: str, seconds: float, clock: Callable[[], float], device: str = "cpu") -> Range:
    """Train a preset on made-up tokens on this machine, and give its FLOP/s: slowest, median and fastest step.

    Args:
        preset: of the decoder.
        seconds: for how long.
        clock: gives seconds.
        device: torch's name.
    """
    import torch

    from model.decoder import Decoder
    from model.settings import TrainOptions
    from model.settings import preset as shape
    from model.train import Trainer
    from tokenizer.windows import Batch

    config = shape(preset, vocab=500, context=512)
    trainer = Trainer(Decoder.create(config, 0).to(device), TrainOptions(warmup_steps=1, total_steps=10_000))
    tokens = np.random.default_rng(0).integers(1, 500, 4096)
    lengths = np.full(8, 512)
    batch = Batch(tokens, tokens, lengths, np.arange(8))
    work = 4096 * (6.0 * config.parameters() + 12.0 * config.layers * config.width * 512 / 2)
    rates: list[float] = []
    began = clock()
    while clock() - began < seconds or len(rates) < 4:
        start = clock()
        trainer.step(batch)
        if device != "cpu":
            torch.cuda.synchronize()
        rates.append(work / (clock() - start))
    low, middle, high = np.percentile(rates[1:], [2.5, 50, 97.5])
    return float(low), float(middle), float(high)


def shown(lines: tuple[Line, ...]) -> list[tuple[str, str, str]]:
    """Give a plan's rows for people: name, figure with its limits, and the sum behind it."""
    return [(line.name, _told(line), line.sum) for line in lines]


def _told(line: Line) -> str:
    spread = f" ({_number(line.low)} to {_number(line.high)})" if line.low != line.high else ""
    return f"{_number(line.value)}{spread} {line.unit}".rstrip()


def _number(value: float) -> str:
    for size, letter in (
        (1e24, " Y"),
        (1e21, " Z"),
        (1e18, " E"),
        (1e15, " P"),
        (1e12, " T"),
        (1e9, " G"),
        (1e6, " M"),
    ):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def as_json(lines: tuple[Line, ...]) -> list[Mapping[str, Any]]:
    """Give a plan for other programs."""
    return [vars(line) for line in lines]
