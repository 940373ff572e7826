"""A round's local work: the one place where a model is trained.

A hospital's daemon, a simulated site, the pooled baseline (a federation of one) and the processes of a machine with
several GPUs all come here. The work is a function of the agreement, the site's name and the round; how far it has come
is kept in snapshots, and a process that goes on from one ends with the same bits as one that was never stopped: weights
and optimizer are in the snapshot, batches and dropout masks follow from the step.
"""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.archive import Agreement, Archive, Choices, RunArchive, Snapshot
from client.drift import Drift, next_drift
from client.heads import places, with_head
from federation import protection
from federation.coding import Coding, Told, round_
from federation.manifest import Manifest, TaskEvaluation
from federation.messages import ProtocolError, SiteRefusal, TrainReply, TrainRequest, Vector
from federation.update import to_decoder, to_vector
from federation.vectors import cut_, is_finite, subtract_
from model.cohort import Cohort, cohort
from model.estimate import estimate
from model.feed import ahead
from model.losses import patient_losses
from model.machine import choose_precision
from model.parallel import ALONE, Team
from model.private import PrivateOptions, PrivateTrainer, Secret, noised_update
from model.pull import Pull
from model.settings import Machine, Precision, TrainOptions
from model.tasks import Task as Question
from model.train import StepResult, Trainer, TrainingDiverged, WindowTooLarge, evaluate, learning_rate
from tokenizer.codebook import Codebook
from tokenizer.store import TokenStore
from tokenizer.windows import Batch, Windows

_OPTIMIZER = "optimizer/"


def agreement_of(run: RunArchive, site: str) -> Agreement:
    """What the site's part in a run rests on.

    Raises:
        SiteRefusal: the site has not agreed to the run.
    """
    agreement = run.agreement()
    if agreement is None:
        raise SiteRefusal(
            f"{site} takes no part in run {run.path.name}: it has not prepared for it, or forgot that with its state. "
            "Pause and resume the run, and it is asked to."
        )
    return agreement


def open_work(archive: Archive, run: RunArchive, site: str) -> "Work":
    """Open the work that a run asks of a site, from what it keeps.

    Raises:
        SiteRefusal: the site has not agreed to the run.
        DataError: its store is damaged.
    """
    store = archive.store_path(agreement_of(run, site).store)
    codebook = run.codebook()
    return Work(site, run.manifest(), codebook, TokenStore.open(store, codebook.hash))


@dataclass(frozen=True)
class Task:
    """A training request and how to go about it.

    Attributes:
        request: what is asked.
        machine: how this machine computes.
        snapshot_s: seconds between snapshots; 0 takes one after every step.
        in_time: raises when the deadline, or the site's hours, are over.
        share_of_time: share of the device's time that the work may take; it rests in between.
        pause: called with a number of seconds to rest.
        key: of a private run, the secret of this round from which all its draws and noise follow.
    """

    request: TrainRequest
    machine: Machine
    snapshot_s: float
    in_time: Callable[[], None]
    share_of_time: float = 1.0
    pause: Callable[[float], None] = time.sleep
    key: bytes = field(default=b"", repr=False)


def choices_of(run: RunArchive, work: "Work", machine: Machine) -> Choices:
    """What the machine chose for the run, once and for good: a measured precision may differ from time to time."""
    chosen = run.choices()
    if chosen is None:
        chosen = Choices(work.precision(machine), machine.micro_tokens)
        run.choose(chosen)
    return chosen


class LocalRound:
    """A round's work, from its last snapshot on.

    Args:
        work: of the run.
        run: where snapshots are.
        task: what is asked.
        team: the processes that do it together; the first of them keeps the snapshots.
    """

    def __init__(self, work: "Work", run: RunArchive, task: Task, team: Team = ALONE) -> None:
        self._work, self._run, self._task, self._team = work, run, task, team
        request = task.request
        kept = run.snapshot(request.digest)
        choices = kept.choices if kept else choices_of(run, work, task.machine)
        limit = _least(choices.micro_tokens, task.machine.micro_tokens)
        machine = replace(task.machine, precision=choices.precision, micro_tokens=limit)
        self._results: list[StepResult] = []
        self._seconds = kept.seconds if kept else 0.0
        self._lost = False
        self._drift: Vector | None = None
        if work.manifest.local.correct_drift:
            rates = work.rates(request.round - 1)
            self._drift = next_drift(run.drift_before(request.round), request.round, np.asarray(request.weights), rates)
        self._begun = work.weights_at_home(run, request.round, request.weights)
        if kept is None:
            optimizer = run.optimizer_before(request.round) if work.keeps_optimizer else None
            self.trainer = work.trainer(request.round, self._begun, machine, optimizer, team, task.key)
            self._pull_back()
            return
        weights = kept.tensors["weights"].numpy()
        self.trainer = work.trainer(request.round, weights, machine, None, team, task.key)
        self.trainer.load_state_dict(
            {k.removeprefix(_OPTIMIZER): v for k, v in kept.tensors.items() if k.startswith(_OPTIMIZER)}
        )
        self._pull_back()
        steps = zip(kept.tensors["losses"].tolist(), kept.tensors["tokens"].tolist(), strict=True)
        self._results = [StepResult(loss, tokens, 0.0, 0.0) for loss, tokens in steps]

    def go(self, keep_end: bool = False) -> None:
        """Take the steps that are left.

        Args:
            keep_end: whether to take a snapshot at the end, for another process to go on from.
        """
        began = kept = time.monotonic()
        before = self._seconds
        batches = self._work.batches(self._task.request.round, self.trainer, len(self._results))
        for batch in ahead(batches, self._task.machine.device):
            self._task.in_time()
            try:
                self._results.append(self._step(batch))
            except TrainingDiverged:
                if not self._work.noises_update:
                    raise
                # That it came so far is the records' secret: what leaves is noise alone.
                self._lost = True
                break
            now = time.monotonic()
            self._seconds = before + now - began
            if self._team.any(now - kept >= self._task.snapshot_s):
                self._keep()
                kept = time.monotonic()
        if keep_end:
            self._keep()

    def reply(self, site: str) -> TrainReply:
        """What the round came to; what rounding took from the update is kept."""
        request = self._task.request
        update = to_vector(self.trainer.decoder)
        subtract_(update, self._begun)
        if self._work.manifest.local.own_head:
            update[places(self._work.manifest.model)] = 0.0
        if self._work.noises_update:
            if self._lost:
                update[:] = 0.0
            update = self._work.protected_update(update, request.round, self._task.key)
        coding = self._work.coding
        told: Told = update
        if coding != "float32":
            if not is_finite(update):
                raise TrainingDiverged("The update holds values that are not finite; a lower learning rate may help.")
            # Of private training, all that enters here has its noise already.
            before, seed = self._run.residual_before(request.round), f"{request.manifest_hash}/{request.round}/{site}"
            with self._run.new_residual(request.round, update.size) as keep:
                told = round_(update, coding, seed, before, keep)
        steps = self._work.releases(len(self._results))
        weight, loss, seconds = self._work.expected_patients(steps), 0.0, 0.0
        if weight is None:
            tokens = [result.tokens for result in self._results]
            loss = float(np.average([result.loss for result in self._results], weights=tokens))
            weight, seconds = sum(tokens), self._seconds
        return TrainReply(
            site=site,
            manifest_hash=request.manifest_hash,
            round=request.round,
            request_digest=request.digest,
            update=told,
            tokens=weight,
            steps=steps,
            loss=loss,
            seconds=seconds,
            coding=coding,
        )

    @property
    def choices(self) -> Choices:
        """What the work is done with by now."""
        return Choices(self.trainer.precision, self.trainer.micro_tokens)

    def drift(self, reply: TrainReply) -> Drift | None:
        """What drift correction must not forget of the round; None in a run without it."""
        if self._drift is None:
            return None
        return Drift(reply.round, self._drift, np.asarray(self._task.request.weights) + np.asarray(reply.update))

    def head(self) -> Vector | None:
        """The site's own head after the round, float32 [H]; None in a run without."""
        if not self._work.manifest.local.own_head:
            return None
        # A round that was lost leaves the head as it was.
        ended = np.asarray(self._begun) if self._lost else to_vector(self.trainer.decoder)
        return ended[places(self._work.manifest.model)]

    def _pull_back(self) -> None:
        """Add the agreed terms to every gradient of the round."""
        proximal = self._work.manifest.local.proximal
        if proximal or self._drift is not None:
            self.trainer.pull = Pull(self.trainer.decoder, np.asarray(self._begun), proximal, self._drift)

    def _step(self, batch: Batch) -> StepResult:
        """Take a step, and rest as long as the device's share of time asks for."""
        share = self._task.share_of_time
        if share == 1:
            return self.trainer.step(batch)
        began = time.monotonic()
        result = self.trainer.step(batch)
        self._task.pause((time.monotonic() - began) * (1 / share - 1))
        return result

    def _keep(self) -> None:
        # All processes take part, because each may hold a part of the tensors.
        tensors = {f"{_OPTIMIZER}{name}": value for name, value in self.trainer.state_dict().items()}
        tensors["weights"] = torch.from_numpy(to_vector(self.trainer.decoder))
        tensors["losses"] = torch.tensor([result.loss for result in self._results], dtype=torch.float64)
        tensors["tokens"] = torch.tensor([result.tokens for result in self._results])
        if self._team.rank == 0:
            done = len(self._results)
            self._run.keep_snapshot(Snapshot(self._task.request.digest, done, self.choices, self._seconds, tensors))


class Work:
    """The work that one run asks of one site, as a function of the round."""

    def __init__(self, site: str, manifest: Manifest, codebook: Codebook, store: TokenStore) -> None:
        self._site, self._manifest, self._codebook, self._store = site, manifest, codebook, store

    @property
    def manifest(self) -> Manifest:
        """What was agreed."""
        return self._manifest

    @property
    def keeps_optimizer(self) -> bool:
        """Whether the optimizer's state passes from round to round."""
        return self._manifest.local.optimizer_state == "keep"

    @property
    def coding(self) -> Coding:
        """How updates travel."""
        return self._manifest.transport.update

    @property
    def most_steps(self) -> int:
        """Steps of the longest round."""
        return max(after - before for before, after in itertools.pairwise(self._starts()))

    def patients(self, split: str) -> int:
        """How many patients a split has."""
        return len(self._store.split(split))

    def check(self) -> None:
        """Refuse what can't be trained on."""
        if len(self._store.split("train")) == 0:
            raise SiteRefusal(f"{self._site} has no patients in the train split.")
        if self._windows.steps(0) == 0:
            raise SiteRefusal(f"{self._site} has no timeline with something to predict in the train split.")

    def check_request(self, number: int, weights: Told) -> None:
        """Refuse weights that don't fit the agreed model, or a round that was not agreed on."""
        if not 1 <= number <= self._manifest.rounds:
            raise ProtocolError(f"There is no round {number}; {self._manifest.rounds} were agreed on.")
        size = self._manifest.model.parameters()
        if weights.shape != (size,) or not is_finite(weights):
            raise ProtocolError(f"The weights must be {size} finite numbers; they have shape {weights.shape}.")

    def weights_at_home(self, run: RunArchive, number: int, weights: Told) -> Told:
        """Give global weights, float32 [P], as a round begins with them here: with the site's own head."""
        if not self._manifest.local.own_head:
            return weights
        return with_head(self._manifest.model, weights, run.head_before(number))

    def trainer(
        self,
        number: int,
        weights: Told,
        machine: Machine,
        optimizer: dict[str, Tensor] | None,
        team: Team = ALONE,
        key: bytes = b"",
    ) -> Trainer:
        """Set up the training of a round from weights [P] and the optimizer's state after the round before.

        Args:
            number: of the round.
            weights: where it begins.
            machine: how to compute.
            optimizer: its state; None to begin anew.
            team: who trains together.
            key: the round's secret in a private run, which one process trains.
        """
        starts = self._starts()
        decoder = to_decoder(self._manifest.model, weights, machine.device)
        options = self._train_options(starts[-1])
        privacy = self._manifest.privacy
        if privacy is None or privacy.mechanism != "dp-sgd":
            trainer = Trainer(decoder, options, starts[number - 1], machine, team)
        else:
            private = PrivateOptions(privacy.clip, privacy.noise_multiplier, privacy.sampling_rate)
            # The key is this run's and round's own; the step and the use tell its draws apart.
            secret = partial(_secret, key, self._where(number))
            trainer = PrivateTrainer(
                decoder, options, private, self.patients("train"), secret, starts[number - 1], machine
            )
        if optimizer is not None:
            trainer.load_state_dict(optimizer)
            trainer.global_step = starts[number - 1]
        return trainer

    def rates(self, number: int) -> float:
        """The sum of the learning rates of a round's steps; 0 of round 0."""
        starts = self._starts()
        options = self._train_options(starts[-1])
        steps = range(starts[number - 1], starts[number]) if number else range(0)
        return math.fsum(learning_rate(options, step) for step in steps)

    def batches(self, number: int, trainer: Trainer, done: int = 0) -> Iterator[Batch]:
        """Walk through a round's batches, but for those that are done; a private trainer draws its own."""
        starts = self._starts()
        for step in range(starts[number - 1] + done, starts[number]):
            if isinstance(trainer, PrivateTrainer):
                yield trainer.batch(self._windows, step)
            else:
                yield self._windows.batch(step)

    @property
    def noises_update(self) -> bool:
        """Whether the noise is added to the update, here or under masks, rather than in every step."""
        return self._manifest.privacy is not None and self._manifest.privacy.mechanism != "dp-sgd"

    def protected_update(self, update: Vector, number: int, key: bytes) -> Vector:
        """Cut a round's update, float32 [P], to the agreed norm, and add its noise, which follows from the key.

        Where noise is shared out, the update is cut in place, and noise is added to the integers that are summed
        (`client.masked`).
        """
        privacy = protection.privacy_of(self._manifest)
        if privacy.mechanism == "distributed":
            cut_(update, protection.clip_before_rounding(self._manifest))
            return update
        options = PrivateOptions(privacy.clip, privacy.noise_multiplier, privacy.sampling_rate)
        return noised_update(update, options, _secret(key, self._where(number), 0, "update"))

    def releases(self, steps: int) -> int:
        """How many noised sums a round of so many steps tells; without differential privacy, the steps."""
        return 1 if self.noises_update else steps

    def expected_patients(self, steps: int) -> int | None:
        """How many patients so many private steps draw on average; None in a run without differential privacy."""
        privacy = self._manifest.privacy
        return None if privacy is None else protection.expected_patients(privacy, self.patients("train"), steps)

    def smaller_passes(self, micro_tokens: int) -> int:
        """Half as many tokens per pass as did not fit.

        Raises:
            WindowTooLarge: a pass is one window already.
        """
        context = self._manifest.model.context
        tried = micro_tokens or self._manifest.local.batch_tokens
        if tried <= context:
            raise WindowTooLarge(
                f"A window of {context} tokens doesn't fit into this machine's memory. Set checkpointing in the site's "
                "options, or shard over more processes; or agree on a shorter context."
            )
        return max(context, tried // 2)

    def precision(self, machine: Machine) -> Precision:
        """What this machine computes the run's products in; may be measured."""
        return choose_precision(self._manifest.train.precision, machine, self._manifest.model)

    def evaluate(self, split: str, weights: Told, device: str, precision: Precision) -> tuple[float, int]:
        """Give the mean nll in nats and the number of targets."""
        decoder = to_decoder(self._manifest.model, weights, device)
        return evaluate(decoder, ahead(self._split_windows(split).epoch(0), device), precision)

    def cohort(self, task: Question, split: str) -> Cohort:
        """Find the predictions of a split that a question asks for and the records answer."""
        return cohort(task, self._store.split(split), self._codebook).labelled()

    def estimate(
        self,
        task: Question,
        asked: Cohort,
        weights: Told,
        device: str,
        options: TaskEvaluation,
        progress: Callable[[int, int], None],
    ) -> "NDArray[np.float64]":
        """Answer a question by rollouts: risks, float64 [P]. Draws follow from the run's seed, patient and time."""
        decoder = to_decoder(self._manifest.model, weights, device)
        found = estimate(
            decoder,
            self._codebook,
            asked,
            task,
            trajectories=task.trajectories or options.trajectories,
            seed=self._manifest.seed,
            max_tokens=options.max_tokens,
            progress=progress,
            target_se=task.target_se,
        )
        return found.risk

    def patient_losses(self, split: str, weights: Told, device: str, precision: Precision) -> "NDArray[np.float64]":
        """Give each patient's mean loss per target, float64 [P] in nats; nan where there is nothing to predict."""
        decoder = to_decoder(self._manifest.model, weights, device)
        return patient_losses(decoder, self._split_windows(split).epoch(0), self.patients(split), precision)

    @cached_property
    def _windows(self) -> Windows:
        return self._split_windows("train", self._manifest.local.windows_per_patient)

    def _split_windows(self, split: str, per_patient: int | None = None) -> Windows:
        return Windows(
            self._store.split(split),
            self._codebook,
            context=self._manifest.model.context,
            batch_tokens=self._manifest.local.batch_tokens,
            seed=self._seed(f"windows/{split}"),
            per_patient=per_patient,
        )

    def _starts(self) -> list[int]:
        """The global step at which each round starts, and the one at which the last ends."""
        local, rounds = self._manifest.local, self._manifest.rounds
        if (privacy := self._manifest.privacy) is not None and privacy.mechanism == "dp-sgd":
            steps_of_round = protection.steps_of_round(local, privacy.sampling_rate)
            return [number * steps_of_round for number in range(rounds + 1)]
        if local.steps is not None:
            return [number * local.steps for number in range(rounds + 1)]
        passes = [number * (local.epochs or 1.0) for number in range(rounds + 1)]
        steps = [self._windows.steps(epoch) for epoch in range(math.ceil(passes[-1]) + 1)]
        before = list(itertools.accumulate(steps, initial=0))
        starts = [0]
        for done in passes[1:]:
            whole = math.floor(done)
            # A site with a handful of patients does at least one step in every round.
            starts.append(max(starts[-1] + 1, before[whole] + round((done - whole) * steps[whole])))
        return starts

    def _train_options(self, total: int) -> TrainOptions:
        warmup = min(round(total * self._manifest.local.warmup_share), total - 1)
        return replace(self._manifest.train, total_steps=total, warmup_steps=warmup, seed=self._seed("dropout"))

    def _where(self, number: int) -> str:
        return f"{self._manifest.hash}/{number}"

    def _seed(self, use: str) -> int:
        key = f"{self._manifest.seed}/{self._site}/{use}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=7).digest())


def _secret(key: bytes, where: str, step: int, use: str) -> Secret:
    return Secret(key, f"{where}/{step}/{use}")


def _least(one: int, other: int) -> int:
    """The smaller limit, where 0 is none."""
    return min(one or other, other or one)
