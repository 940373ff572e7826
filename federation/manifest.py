"""The run manifest: everything that the coordinator and every site must agree on before round 1.

It is canonical JSON, and its hash stands in every later message: a site that was asked for anything else than what it
agreed to refuses. A field or a version that this software doesn't know is refused by name, never ignored.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from importlib import metadata
from typing import Literal

from federation import canonical
from federation.coding import Coding
from federation.masking import MaskingOptions, TooFewSites, check_roster
from federation.messages import ProtocolError
from federation.tallies import Form
from model.settings import DecoderConfig, TrainOptions
from model.tasks import Task
from tokenizer.codebook import TokenizerOptions
from tokenizer.errors import ConfigError
from tokenizer.split import SplitRule

VERSION = 1
"""The version of the manifest's vocabulary."""


@dataclass(frozen=True)
class LocalWork:
    """What a site does in one round: a number of optimizer steps, or a number of passes over its train patients.

    Attributes:
        steps, epochs: one of the two; a quarter of a pass is 0.25 epochs.
        batch_tokens: most tokens of a step's batch; the context of its windows is the model's.
        windows_per_patient: most windows of a patient in one pass over the patients, none is all of them; see
            `tokenizer.windows`.
        warmup_share: share of the site's steps in the whole run with a rising learning rate.
        optimizer_state: AdamW's moments are kept from round to round at the site, or start anew.
        proximal: FedProx's μ: the loss gets μ/2 times the squared distance from the weights that the round began with.
        correct_drift: SCAFFOLD: every gradient loses what this site's differ by from those of all sites, which a site
            works out from consecutive global weights alone (`client.drift`), so no more bytes travel.
        own_head: the output layer stays at each site, which trains and keeps one of its own (`client.heads`).
    """

    steps: int | None = None
    epochs: float | None = None
    batch_tokens: int = 8192
    windows_per_patient: int | None = None
    warmup_share: float = 0.03
    optimizer_state: Literal["keep", "reset"] = "keep"
    proximal: float = 0.0
    correct_drift: bool = False
    own_head: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "proximal", float(self.proximal))
        if not 0 <= self.proximal < math.inf:
            raise ConfigError("local.proximal must not be negative.")
        if self.correct_drift and self.steps is None:
            raise ConfigError("local.correct_drift needs local.steps: sites that take as many steps as one another.")
        if self.correct_drift and self.own_head:
            raise ConfigError("local.own_head: drift correction needs whole updates; take one of both.")
        if self.epochs is not None:
            # 1 and 1.0 mean the same, so they must be the same bytes.
            object.__setattr__(self, "epochs", float(self.epochs))
        given = [value for value in (self.steps, self.epochs) if value is not None]
        if len(given) != 1 or not given[0] > 0:
            raise ConfigError("Local work needs either steps or epochs, and more than 0.")
        if self.batch_tokens < 1:
            raise ConfigError("local.batch_tokens must be at least 1.")
        if self.windows_per_patient is not None and self.windows_per_patient < 1:
            raise ConfigError("local.windows_per_patient must be at least 1, or absent.")
        if not 0 <= self.warmup_share < 1:
            raise ConfigError("local.warmup_share must be at least 0 and below 1.")


@dataclass(frozen=True)
class OuterOptions:
    """How the coordinator makes one update of the sites' and applies it; see `server.aggregate` for the formulas.

    Attributes:
        name, lr, momentum: the optimizer; of "adam" and "yogi" (FedAdam, FedYogi), `momentum` is β₁.
        second, floor: of "adam" and "yogi": β₂, and τ, which bounds the step where updates are small.
        weights: whether sites count by the tokens they trained on or all the same; the median and the trimmed mean
            take all the same.
        max_share: the most that one site's weight may be of all weights; where that can't be, all count the same.
        rule: how updates become one; all but "mean" bear some hostile or broken sites, and need to see single updates.
        byzantine: how many such sites "trimmed_mean" (cut off at both ends) and "krum" bear.
        clip_norm: an update with a larger L2 norm is cut to it; None cuts none.
    """

    name: Literal["fedavg", "nesterov", "adam", "yogi"] = "fedavg"
    lr: float = 1.0
    momentum: float = 0.0
    second: float = 0.99
    floor: float = 1e-3
    weights: Literal["tokens", "uniform"] = "tokens"
    max_share: float = 1.0
    rule: Literal["mean", "median", "trimmed_mean", "krum"] = "mean"
    byzantine: int = 0
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_share", float(self.max_share))
        if self.lr <= 0:
            raise ConfigError("outer.lr must be above 0.")
        if not 0 < self.max_share <= 1:
            raise ConfigError("outer.max_share must be above 0, and 1 at most.")
        if self.byzantine < 0 or (self.byzantine > 0) != (self.rule in ("trimmed_mean", "krum")):
            raise ConfigError("outer.byzantine belongs to the rules trimmed_mean and krum, which need at least 1.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ConfigError("outer.clip_norm must be above 0, or absent.")
        if not 0 <= self.momentum < 1:
            raise ConfigError("outer.momentum must be at least 0 and below 1.")
        if self.name == "fedavg" and self.momentum != 0:
            raise ConfigError("outer.momentum belongs to the nesterov, adam and yogi optimizers; fedavg has none.")
        if not 0 <= self.second < 1 or not 0 < self.floor < math.inf:
            raise ConfigError("outer.second must be at least 0 and below 1, outer.floor above 0.")

    @classmethod
    def nesterov(cls, lr: float = 0.7, momentum: float = 0.9) -> "OuterOptions":
        """The outer optimizer of DiLoCo with the values of its paper (arXiv 2311.08105, section 3.1)."""
        return cls("nesterov", lr, momentum)

    @classmethod
    def adaptive(cls, name: Literal["adam", "yogi"], lr: float = 1e-2, momentum: float = 0.9) -> "OuterOptions":
        """FedAdam or FedYogi with β₂ = 0.99 and τ = 1e-3, as most often best in Reddi et al. (arXiv 2003.00295)."""
        return cls(name, lr, momentum)


@dataclass(frozen=True)
class PrivateEvaluation:
    """What sites tell of a private run's tuning losses, with noise; its cost is part of the run's.

    Attributes:
        every: rounds between two evaluations; the last round is evaluated, too.
        bound: a patient's mean loss per token, in nats, counts as at most this.
        noise_multiplier: standard deviation of the noise on a site's sum over its patients, in units of `bound`.
    """

    every: int
    bound: float
    noise_multiplier: float

    def __post_init__(self) -> None:
        for name in ("bound", "noise_multiplier"):
            object.__setattr__(self, name, float(getattr(self, name)))
        rules = {
            "every must be at least 1": self.every >= 1,
            "bound must be above 0": 0 < self.bound < math.inf,
            "noise_multiplier must be above 0": 0 < self.noise_multiplier < math.inf,
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise ConfigError(f"privacy.evaluation: {'; '.join(wrong)}.")


@dataclass(frozen=True)
class Transport:
    """How vectors travel (`federation.coding`).

    Attributes:
        update: sites' updates. What rounding takes away from one, a site adds to its next.
        weights: the global weights. Sites train and evaluate from the rounded ones; the coordinator keeps all digits.
    """

    update: Coding = "float32"
    weights: Literal["float32", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Privacy:
    """The differential privacy that every site's part in the run has; the unit is always a patient's whole record.

    Attributes:
        mechanism: noise in every training step ("dp-sgd"), on the site's update ("local"), or shared out over the sites
            under secure aggregation ("distributed").
        epsilon, delta: the most that the whole run may cost a patient of a site, whatever else is set here.
        clip: largest L2 norm of what one patient gives ("dp-sgd") or of the update.
        noise_multiplier: standard deviation of the noise, in units of `clip`.
        sampling_rate: chance of a patient to be in a step's batch; 1 where the mechanism doesn't sample.
        honest_sites: of "distributed" only: how many sites of every sum are relied on to add their noise and to tell
            nobody; theirs together is `noise_multiplier` x `clip`. The rest of `secure_aggregation.min_sites` may work
            together with the coordinator.
        evaluation: what is told of tuning losses; None is nothing.
    """

    mechanism: Literal["dp-sgd", "local", "distributed"]
    epsilon: float
    delta: float
    clip: float
    noise_multiplier: float
    sampling_rate: float = 1.0
    honest_sites: int | None = None
    evaluation: PrivateEvaluation | None = None

    def __post_init__(self) -> None:
        for name in ("epsilon", "delta", "clip", "noise_multiplier", "sampling_rate"):
            # 1 and 1.0 mean the same, so they must be the same bytes.
            object.__setattr__(self, name, float(getattr(self, name)))
        rules = {
            "epsilon must be above 0": self.epsilon > 0,
            "delta must be above 0 and below 1": 0 < self.delta < 1,
            "clip must be above 0": self.clip > 0,
            "noise_multiplier must be above 0": self.noise_multiplier > 0,
            "sampling_rate must be above 0, and 1 at most": 0 < self.sampling_rate <= 1,
            'honest_sites must be given with mechanism "distributed", and with no other': (
                (self.honest_sites is not None) == (self.mechanism == "distributed")
            ),
            "honest_sites must be at least 2": self.honest_sites is None or self.honest_sites >= 2,
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise ConfigError(f"privacy: {'; '.join(wrong)}.")

    @property
    def share(self) -> float:
        """Standard deviation of the noise that one site adds to a sum; 0 where noise is not shared out."""
        if self.honest_sites is None:
            return 0.0
        return self.noise_multiplier * self.clip / math.sqrt(self.honest_sites)


@dataclass(frozen=True)
class TaskEvaluation:
    """The questions that every site answers about its own patients, by rollouts, and how it tells how well.

    Attributes:
        tasks: the questions; names are unique.
        every: rounds between two evaluations; 0 is never before the end. At the end, the round that the run is known
            by (the one with the lowest tuning loss) is evaluated.
        split: whose patients; those that chose the round are no fair judges of it.
        trajectories, max_tokens: of a prediction's rollout, where its task doesn't say how many.
        form: what is told.
        delta: at which the cost of noised statistics is told, in a run that is not private otherwise.
    """

    tasks: tuple[Task, ...]
    every: int = 0
    split: Literal["tuning", "held_out"] = "held_out"
    trajectories: int = 32
    max_tokens: int = 256
    form: Form = field(default_factory=Form)
    delta: float = 1e-6

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        rules = {
            "tasks must not be empty": bool(self.tasks),
            "every task needs a name of its own": len(set(names)) == len(names),
            "every must not be negative": self.every >= 0,
            "trajectories and max_tokens must be at least 1": min(self.trajectories, self.max_tokens) >= 1,
            "delta must be above 0 and below 1": 0 < self.delta < 1,
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise ConfigError(f"tasks: {'; '.join(wrong)}.")

    @property
    def size(self) -> int:
        """The length of a site's answer: a tally per task."""
        return len(self.tasks) * self.form.size

    def due(self, number: int, rounds: int) -> bool:
        """Tell whether a round of so many is followed by an evaluation."""
        return number == rounds or (self.every > 0 and number % self.every == 0)


@dataclass(frozen=True)
class SecureAggregation:
    """How updates are summed so that nobody sees a single one.

    Attributes:
        min_sites: the fewest sites that are summed.
        masking: how; `masking.threshold` sites must stay to the end, fewer open nothing. `masking.max_weight` is the
            most tokens (in private runs: patients) of a site and round; what is summed beside the update follows from
            the run (`federation.summed`), so `masking.totals` is empty.
        roster: the sites that may take part, with their public keys as `fedcomet site key` shows them.
    """

    min_sites: int
    masking: MaskingOptions
    roster: Mapping[str, str]

    def __post_init__(self) -> None:
        if not 2 <= self.masking.threshold <= self.min_sites:
            raise ConfigError("secure_aggregation.masking.threshold must be at least 2, and min_sites at most.")
        if self.min_sites > len(self.roster):
            raise ConfigError(
                f"secure_aggregation.min_sites is {self.min_sites}, but the roster has {len(self.roster)} sites."
            )
        if self.masking.totals or self.masking.noise:
            raise ConfigError("secure_aggregation.masking.totals and noise must be left out: they follow from the run.")
        try:
            check_roster(self.roster, self.masking.threshold)
        except TooFewSites as problem:
            raise ConfigError(f"secure_aggregation: {problem}") from None


@dataclass(frozen=True)
class Manifest:
    """The agreement of one run; its hash names the run.

    Attributes:
        name: the run's name; another name is another run, even with equal settings.
        seed: of the initial weights, and, with round and site, of everything random at a site.
        rounds: how many there will be.
        model: the decoder.
        codebook_hash, layout_hash: the vocabulary, and the order of the flat vector.
        local, train, outer: local work, inner optimizer, outer optimizer. The learning rate's curve spans the site's
            own part of the run: each site puts its `total_steps`, `warmup_steps` and `seed` into `train` itself.
        split, tokenizer: which patients train, and how records become tokens.
        min_sites: a round with fewer accepted updates fails.
        deadline_s: the time that sites have for one answer.
        max_norm: the largest L2 norm of an accepted update, or none.
        sites_per_round: how many sites are asked in a round, drawn anew for each; None asks all. Drawing sites is no
            part of any claim of privacy.
        transport: how vectors travel.
        purposes: the questions that the trained model will be asked.
        initial: sha256 of the checkpoint whose weights the run begins with; empty to draw them by `seed`.
        privacy: differential privacy of what sites give; None is none.
        secure_aggregation: how updates are summed; None leaves them in clear.
        tasks: the questions that sites answer about their own patients; None asks none.
        software: the version of this software on both sides.
    """

    name: str
    seed: int
    rounds: int
    model: DecoderConfig
    codebook_hash: str
    layout_hash: str
    local: LocalWork
    train: TrainOptions
    outer: OuterOptions
    split: SplitRule
    tokenizer: TokenizerOptions
    min_sites: int
    deadline_s: float
    max_norm: float | None = None
    sites_per_round: int | None = None
    transport: Transport = Transport()
    purposes: tuple[str, ...] = ()
    initial: str = ""
    privacy: Privacy | None = None
    secure_aggregation: SecureAggregation | None = None
    tasks: TaskEvaluation | None = None
    software: str = ""
    version: int = VERSION

    def __post_init__(self) -> None:
        # People read them in terminals, which other characters could lead to show something else.
        if not all(text.isprintable() for text in (self.name, self.software, *self.purposes)):
            raise ConfigError("name, software and purposes must be printable characters on one line.")
        if self.sites_per_round is not None and self.sites_per_round < max(1, self.min_sites):
            raise ConfigError("sites_per_round must be at least min_sites, or absent.")
        if self.local.correct_drift:
            self._check_drift()
        if self.secure_aggregation is None:
            return
        if self.transport.update != "float32":
            raise ConfigError(
                "transport.update must be float32 with secure aggregation, whose sums have words instead."
            )
        if self.outer.rule != "mean" or self.outer.clip_norm is not None:
            raise ConfigError(
                "outer.rule must be mean and outer.clip_norm absent with secure aggregation, where nobody sees a "
                "single update; each site keeps to max_norm."
            )
        if self.sites_per_round is not None and self.sites_per_round < self.secure_aggregation.min_sites:
            raise ConfigError("sites_per_round must be at least secure_aggregation.min_sites, or absent.")

    def _check_drift(self) -> None:
        """Refuse what drift correction does not fit: corrections of all sites must add up to nothing."""
        rules = {
            "train.optimizer must be sgd": self.train.optimizer == "sgd",
            "outer must be fedavg with lr 1": (self.outer.name, self.outer.lr) == ("fedavg", 1.0),
            "outer.rule must be mean and outer.weights uniform": (
                (self.outer.rule, self.outer.weights) == ("mean", "uniform")
            ),
            "outer.clip_norm must be absent": self.outer.clip_norm is None,
            "transport.weights must be float32": self.transport.weights == "float32",
            "privacy must be absent": self.privacy is None,
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise ConfigError(f"local.correct_drift: {'; '.join(wrong)}.")

    def to_bytes(self) -> bytes:
        """Give the canonical bytes."""
        return canonical.encode(self)

    @cached_property
    def hash(self) -> str:
        """The sha256 of the canonical bytes."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Read a manifest from the other side.

        Raises:
            ProtocolError: naming the unknown version or field, or the value that doesn't fit.
        """
        return _read(data)


@lru_cache(maxsize=16)
def _read(data: bytes) -> Manifest:
    """Read a manifest once: a site looks at its run's several times for every answer."""
    manifest = canonical.decode(Manifest, data, "The run manifest", ProtocolError)
    if manifest.version != VERSION:
        raise ProtocolError(
            f"The run manifest has version {manifest.version}; this software knows version {VERSION}: update it."
        )
    return manifest


@cache
def software_version() -> str:
    """Give the version of fedcomet that runs here."""
    try:
        return metadata.version("fedcomet")
    except metadata.PackageNotFoundError:
        return "source"
