"""How an audit is done, and what is claimed of what it audits."""

import math
from dataclasses import dataclass, replace

from federation.accountant import Gaussian, epsilon
from federation.manifest import Privacy
from model.private import PrivateOptions
from simulation.attacks.verdict import Claim
from tokenizer.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """How to audit.

    Attributes:
        private: how steps are made private; None audits a training without privacy.
        update: how updates are made private, by noise of their own; steps then are not.
        epsilon: what is claimed; computed from `private` and the steps if None.
        delta: of the claim.
        basis: where `epsilon` comes from, in words.
        confidence: of the lower bound; a true claim raises the alarm with at most the rest.
        canaries: patients that coins put in or leave out.
        canary_tokens: events of each.
        repetitions: how many patients have a planted course, for each kind of them.
        courses: planted courses of each kind.
        course_tokens: of each, half of them known to who asks.
        rivals: courses that a planted one is ranked among.
        tries: sampled futures when a course is asked for.
        trajectories: of the attack by rollouts.
        most: patients of each kind that the slower attacks ask about.
        steps: of the training; as the run's settings say if None.
        site: whose training is audited; the one with the fewest patients if None.
        seed: of coins, canaries and choices; drawn anew if None. Secret draws of private steps never follow from it.
        device: where to compute.

    Raises:
        ConfigError: for a value out of range.
    """

    private: PrivateOptions | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    basis: str = "as given"
    confidence: float = 0.95
    canaries: int = 200
    canary_tokens: int = 8
    repetitions: tuple[int, ...] = (1, 4, 16)
    courses: int = 6
    course_tokens: int = 16
    rivals: int = 511
    tries: int = 10
    trajectories: int = 2
    most: int = 300
    steps: int | None = None
    site: str | None = None
    seed: int | None = None
    device: str = "cpu"
    update: PrivateOptions | None = None

    def __post_init__(self) -> None:
        checks = {
            "epsilon must not be negative": self.epsilon is None or self.epsilon >= 0,
            "delta must lie in [0, 1)": 0 <= self.delta < 1,
            "confidence must lie in (0, 1)": 0 < self.confidence < 1,
            "canaries must be at least 10": self.canaries >= 10,
            "courses, tries, trajectories and most must be at least 1": min(
                self.courses, self.tries, self.trajectories, self.most
            )
            >= 1,
            "steps must be at least 1": self.steps is None or self.steps >= 1,
            "a claim computed from noise needs a delta above 0": self.private is None
            or self.epsilon is not None
            or self.delta > 0,
        }
        if wrong := [rule for rule, holds in checks.items() if not holds]:
            raise ConfigError(f"audit: {'; '.join(wrong)}")

    def following(self, stated: Privacy | None) -> "Plan":
        """The same with the private steps, or updates, that a run's manifest states, unless this plan has its own.

        The manifest's epsilon is claimed too, unless another one is given, or another number of steps: then the
        accountant tells what these cost.

        Raises:
            ConfigError: the run's noise is shared out over the sites.
        """
        if stated is None or self.private is not None:
            return self
        if stated.mechanism == "distributed":
            raise ConfigError(
                "audit: the run's noise is shared out over the sites, and only private steps and noise on a site's own "
                "update can be audited here; state steps with --noise-multiplier and --sampling-rate to audit them"
            )
        noise = PrivateOptions(stated.clip, stated.noise_multiplier, stated.sampling_rate)
        mine = replace(self, update=noise) if stated.mechanism == "local" else replace(self, private=noise)
        if self.epsilon is not None:
            return mine
        if self.steps is not None and mine.private is not None:
            return replace(mine, delta=stated.delta)
        return replace(mine, epsilon=stated.epsilon, delta=stated.delta, basis="the run's manifest")

    def claim(self, steps: int) -> Claim | None:
        """What is claimed of so many steps; None if nothing is."""
        private = self.private
        if self.epsilon is not None:
            return Claim(self.epsilon, self.delta, self.basis)
        if private is None:
            return None
        cost = epsilon([Gaussian(private.noise_multiplier, private.sampling_rate, steps)], self.delta)
        if not math.isfinite(cost):
            raise ConfigError(
                f"audit: {steps} steps with this noise have no epsilon at delta {self.delta:g}; add noise"
            )
        return Claim(
            cost,
            self.delta,
            f"accountant: {steps:,} steps, noise multiplier {private.noise_multiplier:g}, sampling rate "
            f"{private.sampling_rate:g}",
        )
