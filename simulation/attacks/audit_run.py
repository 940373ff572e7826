"""An audit of a run: one site's training done again with canaries, once, and every attack on what comes of it.

Attacked are the model of that training, the released model, and what the sites' updates of the first and the last round
would tell. The training's secret draws come from a key of the operating system, as at a site; coins, canaries and
choices follow from a seed, which the report names.
"""

import secrets
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version

import numpy as np

from federation.update import to_vector
from model.decoder import Decoder
from model.private import KEY_BYTES, PrivateOptions, Secret, noised_update
from simulation.attacks import leakage, membership, memory, releases
from simulation.attacks.audit_plan import Plan
from simulation.attacks.bound import GUESSED_SHARES, largest_disproved, lower_bound
from simulation.attacks.canaries import Ints, alone, nobody, plant, scattered
from simulation.attacks.finished_run import FinishedRun
from simulation.attacks.releases import Told
from simulation.attacks.training import Recipe, losses, train
from simulation.attacks.verdict import Audit, Canaries, Stage, Target
from tokenizer.errors import ConfigError
from tokenizer.progress import Step, Watch
from tokenizer.store import TokenSplit

# A reference that knows fewer patients than this calibrates nothing.
_LEAST_REFERENCE = 20


def audit_run(run: FinishedRun, plan: Plan, *, command: str = "", watch: Watch = lambda step: None) -> Audit:
    """Train one site's model again with canaries, and attack it, the released model and the updates.

    Args:
        run: a finished study.
        plan: how; the privacy that the run's manifest states counts unless it has some of its own.
        command: that asked for it, for the report.
        watch: told how far the work is.

    Raises:
        ConfigError: a site that there isn't, settings that don't go together.
        FedcometError: the training can't be done.
    """
    plan = plan.following(run.privacy)
    site = plan.site or run.most_exposed()
    if site not in run.stores:
        raise ConfigError(f"audit: there is no site {site!r}; there are {', '.join(run.stores)}")
    seed = secrets.randbits(48) if plan.seed is None else plan.seed
    own, others = run.stores[site].split("train"), run.stores[site].split("held_out")
    recipe = run.recipe(own, private=plan.private, steps=plan.steps, seed=seed, device=plan.device)
    work = _Work(run, plan, recipe, watch)
    reference = work.reference(own)
    everybody = [run.together(split) for split in ("train", "held_out")]
    released = work.target("the released model", run.model.to(plan.device), reference, *everybody)
    name = run.study.title or run.study.name
    if plan.update is not None:
        return Audit(
            f"{name}: noise on the updates of {site}",
            _facts(run, plan, recipe, site, len(own)),
            claim=plan.claim(recipe.options.total_steps),
            releases=work.releases(plan.update),
            targets=(released,),
            stages=work.stages(),
            notes=(
                "Audited is what a site does with its updates: the code that cuts and noises them is run many times on "
                "two updates that are as far apart as any. Its training needs no privacy of its own.",
            ),
            software=version("fedcomet"),
            command=command,
        )
    model, cast = work.train_with_canaries(own)
    return Audit(
        f"{name}: training at {site}",
        _facts(run, plan, recipe, site, len(own)),
        claim=plan.claim(recipe.options.total_steps),
        canaries=work.judge(model, cast),
        targets=(work.target("the audited training", model, reference, own, others), released),
        planted=work.remembered(model, cast),
        stages=work.stages(),
        notes=(
            "The audited training has the settings of the run but is one of its own: its patients are those of the "
            "site and the canaries, and its weights are not averaged with other sites'.",
        ),
        software=version("fedcomet"),
        command=command,
    )


@dataclass(frozen=True)
class _Cast:
    """Who was planted: canaries and how their coins fell; courses by how many patients had them."""

    canaries: list[Ints]
    included: np.ndarray
    courses: dict[int, list[tuple[memory.Course, Ints]]]

    def patients(self, absent: Ints) -> list[Ints]:
        """The timelines to be planted."""
        coins = [canary if coin else absent for canary, coin in zip(self.canaries, self.included, strict=True)]
        return coins + [whole for times, some in self.courses.items() for _, whole in some for _ in range(times)]


class _Work:
    """The parts of an audit of a run."""

    def __init__(self, run: FinishedRun, plan: Plan, recipe: Recipe, watch: Watch) -> None:
        self._run, self._plan, self._recipe, self._watch = run, plan, recipe, watch
        self._key = secrets.token_bytes(KEY_BYTES)

    def train_with_canaries(self, own: TokenSplit) -> tuple[Decoder, _Cast]:
        """Train on the site's patients and on those that are planted."""
        plan, words = self._plan, self._run.codebook
        rng = np.random.default_rng([self._recipe.seed, 0])
        cast = _Cast(
            scattered(words, plan.canaries, plan.canary_tokens, rng),
            rng.random(plan.canaries) < 0.5,
            {n: memory.invent(words, plan.courses, plan.course_tokens, rng) for n in (0, *plan.repetitions)},
        )
        split = plant(own, cast.patients(nobody(words)))
        return train(self._recipe, split, words, self._key, progress=self._counter("training")), cast

    def judge(self, model: Decoder, cast: _Cast) -> Canaries:
        """Guess which canaries were in, by how much less surprising they became."""
        plan, words = self._plan, self._run.codebook
        all_of_them = alone(cast.canaries)
        scores = losses(self._recipe.initial(), words, all_of_them) - losses(model, words, all_of_them)
        bound = lower_bound(scores, cast.included, delta=plan.delta, confidence=plan.confidence)
        level = (1 - plan.confidence) / len(GUESSED_SHARES)
        inside, outside = (tuple(np.sort(scores[coins]).tolist()) for coins in (cast.included, ~cast.included))
        m = plan.canaries
        return Canaries(bound, largest_disproved(m, m, m, plan.delta, level), inside, outside)

    def releases(self, noise: PrivateOptions) -> Told:
        """Tell apart two updates by what is released of them in all rounds."""
        plan, claim = self._plan, self._plan.claim(1)
        return releases.attack(
            noise,
            self._run.study.training.rounds,
            releases.repetitions_for(None if claim is None else claim.epsilon),
            delta=plan.delta,
            confidence=plan.confidence,
            seed=self._recipe.seed,
            watch=self._counter("noised updates"),
        )

    def reference(self, own: TokenSplit) -> Decoder | None:
        """A model trained in the same way, without privacy, on patients of no other part of the audit; None if few."""
        tuning, words = self._run.together("tuning"), self._run.codebook
        if len(tuning) < _LEAST_REFERENCE:
            return None
        recipe = replace(self._recipe, private=None)
        batches = [recipe.windows(split, words).steps(0) for split in (own, tuning)]
        if not min(batches):
            return None
        passes = self._run.recipe(own, private=None, steps=None, seed=recipe.seed, device=recipe.device)
        steps = max(1, round(passes.options.total_steps * batches[1] / batches[0]))
        warmup = min(recipe.options.warmup_steps, steps - 1)
        recipe = replace(recipe, options=replace(recipe.options, total_steps=steps, warmup_steps=warmup))
        return train(recipe, tuning, words, self._key, progress=self._counter("reference"))

    def target(
        self, name: str, model: Decoder, reference: Decoder | None, members: TokenSplit, others: TokenSplit
    ) -> Target:
        """Membership inference against one model."""
        plan = self._plan
        effort = membership.Effort(plan.most, plan.trajectories, self._recipe.seed)
        found = membership.attack(
            *(model, reference, self._run.codebook, members, others, effort), self._counter(f"members, {name}")
        )
        calibrated = "a model of tuning patients" if reference else ""
        told = (f"{len(members):,} patients in training", f"{len(others):,} held-out patients")
        return Target(name, *told, calibrated, found)

    def remembered(self, model: Decoder, cast: _Cast) -> tuple[memory.Repetition, ...]:
        """What became of the planted courses."""
        plan = self._plan
        parts: list[memory.Repetition] = []
        for done, (times, some) in enumerate(cast.courses.items(), 1):
            parts += memory.planted(
                *(model, self._run.codebook, {times: [course for course, _ in some]}),
                rivals=plan.rivals,
                tries=plan.tries,
                seed=self._recipe.seed,
            )
            self._watch(Step("courses", done, len(cast.courses)))
        return tuple(parts)

    def stages(self) -> tuple[Stage, ...]:
        """Attack the updates of the first round and of one that starts from the released model."""
        starts = {"the first round": self._recipe.initial(), "the last round": self._run.model.to(self._plan.device)}
        return tuple(self._stage(name, start) for name, start in starts.items())

    def _stage(self, name: str, start: Decoder) -> Stage:
        run, plan, before = self._run, self._plan, to_vector(start)
        sites, steps = [], 1
        for done, (site, store) in enumerate(run.stores.items(), 1):
            members, others = store.split("train"), store.split("held_out")
            recipe = run.recipe(members, private=plan.private, steps=None, seed=self._recipe.seed, device=plan.device)
            steps = max(1, recipe.options.total_steps // run.study.training.rounds)
            first = 0 if name == "the first round" else recipe.options.total_steps - steps
            after = train(recipe, members, run.codebook, self._key, start=start, steps=steps, first=first)
            update = to_vector(after) - before
            if plan.update is not None:
                update = noised_update(update, plan.update, Secret(secrets.token_bytes(KEY_BYTES), f"{name}/{site}"))
            sites.append(leakage.Site(site, members, others, update, float(members.tokens_total)))
            self._watch(Step(f"updates, {name}", done, len(run.stores)))
        leaks = leakage.attack(start, run.codebook, sites, most=plan.most, seed=self._recipe.seed)
        return Stage(name, steps, leaks)

    def _counter(self, label: str) -> "partial[None]":
        return partial(_count, self._watch, label)


def _count(watch: Watch, label: str, done: int, total: int) -> None:
    watch(Step(label, done, total))


def _facts(run: FinishedRun, plan: Plan, recipe: Recipe, site: str, patients: int) -> dict[str, str]:
    private, planted = plan.private, plan.courses * sum(plan.repetitions)
    steps = f"{recipe.options.total_steps:,} steps"
    if private is not None:
        steps += (
            f" of private training: clip {private.clip:g}, noise multiplier {private.noise_multiplier:g}, sampling "
            f"rate {private.sampling_rate:g}"
        )
    who = f"{patients:,} of the site"
    if (noise := plan.update) is None:
        who += f", {plan.canaries:,} canaries by a coin each, {planted:,} with planted courses"
    else:
        steps += f"; noise on the update of each of {run.study.training.rounds:,} rounds: clip {noise.clip:g}, noise "
        steps += f"multiplier {noise.noise_multiplier:g}"
    return {
        "audited site": f"{site} of {len(run.stores)}",
        "patients in training": who,
        "training": steps + ("" if private or plan.update else ", without differential privacy"),
        "model": f"{recipe.decoder.parameters():,} parameters, context {recipe.decoder.context:,}",
        "codebook": f"{run.codebook.hash[:16]}, {len(run.codebook):,} tokens",
        "seed of coins and choices": str(recipe.seed),
    }
