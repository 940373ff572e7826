"""What a coordinator wants of a run: all settings in one value, before codebook and sites are known.

`FederationPlan.manifest` turns it into the agreement once the codebook is built. The plan's bytes lie in the run
directory, so that a run is only ever continued with the settings it began with.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Literal

from federation import canonical, protection
from federation.accountant import Mechanism, epsilon
from federation.manifest import (
    LocalWork,
    Manifest,
    OuterOptions,
    Privacy,
    PrivateEvaluation,
    SecureAggregation,
    TaskEvaluation,
    Transport,
    software_version,
)
from federation.messages import ProtocolError
from federation.planner import noise_for
from federation.update import Layout
from model.settings import DecoderConfig, TrainOptions, preset
from server.central import CentralPlan
from tokenizer.codebook import Codebook, TokenizerOptions
from tokenizer.errors import ConfigError
from tokenizer.split import SplitRule

_FEWEST_TOKENS = 8
"""Fewer than any codebook has; what a model of so few tokens can't have, no larger one has."""


@dataclass(frozen=True)
class PrivacyPlan:
    """Private training at the sites: how strong, and how patients are drawn.

    Attributes:
        sampling_rate: chance of every patient to be in a step's batch; 1 with noise on the update.
        delta: at which epsilon is told; well below 1 / patients of the smallest site.
        epsilon: the most that the whole run may cost a patient, from which the noise follows; or
        noise_multiplier: standard deviation of the noise, in units of `clip`, from which epsilon follows. With both,
            epsilon must be enough.
        clip: the largest L2 norm of one patient's share of a gradient, or of an update.
        mechanism: "dp-sgd", noise in every step, "local", noise on each site's update, or "distributed", noise on their
            sum, of which each site adds a share under secure aggregation (docs/privacy.md says which to take).
        honest_sites: of "distributed": how many sites of every sum are relied on for their share, at least 2.
        evaluation: noised losses of the sites' tuning patients, from which the best round is chosen; `epsilon` pays for
            them, too. None: no losses are told, and the last round counts as the best.
    """

    sampling_rate: float = 1.0
    delta: float = 1e-6
    epsilon: float | None = None
    noise_multiplier: float | None = None
    clip: float = 1.0
    mechanism: Literal["dp-sgd", "local", "distributed"] = "dp-sgd"
    honest_sites: int | None = None
    evaluation: PrivateEvaluation | None = None

    def __post_init__(self) -> None:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ConfigError("privacy: say what the run may cost (epsilon) or how much noise there is.")
        # What can be out of range is checked where it is checked for sites, too.
        self._stated(self.epsilon or 1.0, self.noise_multiplier or 1.0)

    def promise(self, local: LocalWork, rounds: int, tasks: TaskEvaluation | None = None) -> Privacy:
        """Work out what the manifest states: the noise for the wanted epsilon, or the epsilon of the given noise."""
        noise, cost = self.noise_multiplier, self.epsilon
        releases = protection.releases_of_round(self._stated(1.0, 1.0), local) * rounds
        told = sum(protection.is_due(self.evaluation, number, rounds) for number in range(1, rounds + 1))
        losses = protection.of_evaluations(self._stated(1.0, 1.0), told).all if told else ()
        beside = (*losses, *protection.of_tallies(tasks, rounds, rounds))
        if noise is None:
            noise = noise_for(
                cost or 0.0,
                self.delta,
                self.sampling_rate,
                releases,
                lambda noise: self._released(noise, releases),
                beside,
            )
        if cost is None:
            found = epsilon([*self._released(noise, releases), *beside], self.delta)
            cost = math.ceil(found * 1e4) / 1e4
        return self._stated(cost, noise)

    def _released(self, noise: float, releases: int) -> tuple[Mechanism, ...]:
        return protection.of_steps(self._stated(1.0, noise), releases).all

    def _stated(self, cost: float, noise: float) -> Privacy:
        return Privacy(
            self.mechanism,
            cost,
            self.delta,
            self.clip,
            noise,
            self.sampling_rate,
            self.honest_sites,
            self.evaluation,
        )


@dataclass(frozen=True)
class FederationPlan:
    """All settings of one federated run.

    Attributes:
        name: the run's name.
        rounds: number of rounds.
        model: a preset's name, or a decoder's shape; its vocabulary is set by the codebook.
        context: most tokens of a window; the preset's own when not given.
        dropout: the preset's own when not given.
        local: what a site does in a round.
        train: the inner optimizer; `total_steps`, `warmup_steps` and `seed` follow from the rest.
        outer: how the mean update is applied.
        seed: of the whole run.
        split: which patients train.
        tokenizer: how records become tokens.
        min_sites: a round with fewer accepted updates fails.
        expect_sites: how many sites to wait for before the run begins, at most `join_s` seconds; 0 is `min_sites`.
        join_s: see `expect_sites`.
        deadline_s: how long sites have for an answer.
        evaluate_every: rounds between two evaluations on the sites' tuning patients; 0 is never. In a private run,
            `privacy.evaluation` says instead which rounds are evaluated.
        max_norm: the largest L2 norm of an accepted update.
        sites_per_round, transport: as in `federation.manifest`.
        purposes: the questions that the trained model will be asked.
        initial: sha256 of a checkpoint with the same codebook and shape, whose weights the run begins with; it lies in
            the run directory as `initial.safetensors`. Empty to draw weights by `seed`.
        privacy: private training. The sites' losses then stay where they are unless `privacy.evaluation` is given; with
            private steps, the gradient as a whole is not clipped and there is no dropout.
        secure_aggregation: how updates and losses are summed under masks, and among whom; without, they are told in
            clear.
        stage_deadline_s: how long sites have for an answer in a masked sum, which needs no training; such a sum asks
            five times. At most `deadline_s`.
        signed_wait_s: how long to wait, before the run ends, for sites that have signed a sum and then left: nobody can
            take their place.
        tasks: the questions that sites answer about their own patients; of a private run with noise, for which
            `privacy.epsilon` pays, too.
        central: what the coordinator asks the model by itself every few rounds, and when the run ends early for it; no
            part of the agreement with sites.
        codebook: a fixed codebook's bytes; without, one is built from the sites' surveys.
    """

    name: str
    rounds: int
    split: SplitRule
    local: LocalWork
    model: str | DecoderConfig = "1m"
    context: int | None = None
    dropout: float | None = None
    train: TrainOptions = field(default_factory=TrainOptions)
    outer: OuterOptions = field(default_factory=OuterOptions)
    tokenizer: TokenizerOptions = field(default_factory=TokenizerOptions)
    seed: int = 0
    min_sites: int = 1
    expect_sites: int = 0
    join_s: float = 600.0
    deadline_s: float = 86_400.0
    evaluate_every: int = 1
    max_norm: float | None = None
    sites_per_round: int | None = None
    transport: Transport = field(default_factory=Transport)
    purposes: tuple[str, ...] = ()
    initial: str = ""
    privacy: PrivacyPlan | None = None
    secure_aggregation: SecureAggregation | None = None
    stage_deadline_s: float = 600.0
    signed_wait_s: float = 0.0
    tasks: TaskEvaluation | None = None
    central: CentralPlan | None = None
    codebook: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        rules = {
            "name must not be empty": bool(self.name),
            "rounds must be at least 1": self.rounds >= 1,
            "min_sites must be at least 1": self.min_sites >= 1,
            "expect_sites must not be negative": self.expect_sites >= 0,
            "join_s must not be negative": self.join_s >= 0,
            "deadline_s must be above 0": self.deadline_s > 0,
            "stage_deadline_s must be above 0": self.stage_deadline_s > 0,
            "signed_wait_s must not be negative": self.signed_wait_s >= 0,
            "evaluate_every must not be negative": self.evaluate_every >= 0,
            "max_norm must be above 0": self.max_norm is None or self.max_norm > 0,
        }
        if wrong := [rule for rule, holds in rules.items() if not holds]:
            raise ConfigError(f"federation plan: {'; '.join(wrong)}.")

    def evaluates(self, number: int) -> bool:
        """Tell whether a round is evaluated on the sites' tuning patients."""
        if self.privacy is not None:
            return protection.is_due(self.privacy.evaluation, number, self.rounds)
        every = self.evaluate_every
        return every > 0 and (number % every == 0 or number == self.rounds)

    def check(self) -> None:
        """Refuse what no codebook would make an agreement of, before sites are asked and surveys paid for.

        Raises:
            ConfigError: as `manifest`.
        """
        self._agreement(_FEWEST_TOKENS, "0" * 64)

    def manifest(self, codebook: Codebook) -> Manifest:
        """Write the agreement for a codebook.

        Raises:
            ConfigError: there is no such preset, the codebook was built with other options, or the wanted privacy
                costs more than it may.
        """
        if codebook.options != self.tokenizer:
            raise ConfigError(f"The codebook has the options {codebook.options}, the plan {self.tokenizer}.")
        return self._agreement(len(codebook), codebook.hash)

    def _agreement(self, tokens: int, codebook_hash: str) -> Manifest:
        private_steps = self.privacy is not None and self.privacy.mechanism == "dp-sgd"
        if isinstance(self.model, str):
            dropout = 0.0 if private_steps and self.dropout is None else self.dropout
            model = preset(self.model, tokens, self.context, dropout)
        else:
            model = dataclasses.replace(self.model, vocab=tokens)
        if self.local.batch_tokens < model.context:
            raise ConfigError(
                f"local.batch_tokens is {self.local.batch_tokens}; it must hold a window of {model.context} tokens."
            )
        privacy = None if self.privacy is None else self.privacy.promise(self.local, self.rounds, self.tasks)
        manifest = Manifest(
            name=self.name,
            seed=self.seed,
            rounds=self.rounds,
            model=model,
            codebook_hash=codebook_hash,
            layout_hash=Layout.of_config(model).hash,
            local=self.local,
            train=dataclasses.replace(self.train, clip=0.0) if private_steps else self.train,
            outer=self.outer,
            split=self.split,
            tokenizer=self.tokenizer,
            min_sites=self.min_sites,
            deadline_s=self.deadline_s,
            max_norm=self.max_norm,
            sites_per_round=self.sites_per_round,
            transport=self.transport,
            purposes=self.purposes,
            initial=self.initial,
            privacy=privacy,
            secure_aggregation=self.secure_aggregation,
            tasks=self.tasks,
            software=software_version(),
        )
        try:
            protection.check(manifest)
        except ProtocolError as problem:
            raise ConfigError(f"federation plan: {problem}") from None
        return manifest

    def to_bytes(self) -> bytes:
        """Give canonical JSON in which a fixed codebook is named by the sha256 of its bytes."""
        named = None if self.codebook is None else hashlib.sha256(self.codebook).hexdigest()
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.central is None:
            del fields["central"]  # as in plans of runs that began before there was such a thing
        return canonical.encode({**fields, "codebook": named})

    @classmethod
    def from_bytes(cls, data: bytes, codebook: bytes | None = None) -> "FederationPlan":
        """Read a plan; missing fields have their defaults.

        Args:
            data: JSON, as from `to_bytes`.
            codebook: the bytes of the fixed codebook that the plan names, if it names one.

        Raises:
            ConfigError: naming the field that is unknown, missing or doesn't fit.
        """
        try:
            plain = json.loads(data)
        except ValueError as cause:
            raise ConfigError(f"The federation plan is not JSON: {cause}.") from None
        named = plain.pop("codebook", None) if isinstance(plain, dict) else None
        plan = canonical.build(cls, plain, "The federation plan", ConfigError)
        if named is None:
            return plan
        if codebook is None or hashlib.sha256(codebook).hexdigest() != named:
            raise ConfigError(f"The federation plan names the codebook {named}; lay that file beside it.")
        return dataclasses.replace(plan, codebook=codebook)

    def differences(self, data: bytes) -> list[str]:
        """Name the settings in which another plan's bytes differ from this one."""
        mine, other = json.loads(self.to_bytes()), json.loads(data)
        return sorted(key for key in {*mine, *other} if mine.get(key) != other.get(key))
