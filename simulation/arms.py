"""The arms of a study: the federation of all sites, and what it is compared with.

- federated: all sites, through the round engine; it builds the codebook that all arms share.
- alone: each site by itself, as a federation of one, with as many passes over its own patients.
- personal: each site goes on by itself from the federation's best model, and keeps what it comes to if that is better.
- pooled: the records of all sites in one place, which a real federation can't have: the ceiling. It trains on as many
  tokens as the federated arm.
- synthesis: timelines that the sites' models of the arm "alone" make up, in one place; as many tokens as pooled.

Every arm is a run of `server.app` with a ledger of its own, so a killed study goes on in the middle of each. All run
side by side over one pool, and each ends with its best round by the loss of its own tuning patients.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import polars as pl

from client.archive import Archive
from client.files import SiteFiles
from client.local import choices_of, open_work
from federation.manifest import LocalWork, OuterOptions, PrivateEvaluation, SecureAggregation, TaskEvaluation, Transport
from federation.masking import MaskingOptions
from federation.tallies import Form
from federation.update import to_vector
from model import checkpoint
from model.settings import TrainOptions
from server.app import Outcome
from server.central import CentralPlan
from server.journal import Journal
from server.plan import FederationPlan, PrivacyPlan
from server.rounds import TUNING, Event
from simulation.config import Study, Training
from simulation.engine import roster_of, run_federation
from simulation.engine_processes import run_as_processes
from simulation.engine_ray import RayPlayers
from simulation.hospital import PROFILES, profile_of, write_hospital
from simulation.pool import Pool
from simulation.scenario import Scenario
from simulation.synthesis import Wanted, make_up
from tokenizer import durable
from tokenizer.codebook import TokenizerOptions
from tokenizer.errors import FedcometError
from tokenizer.events import MedsDataset, write_meds
from tokenizer.progress import Step, Watch
from tokenizer.split import SplitRule

FEDERATED, POOLED, SYNTHESIS = "federated", "pooled", "synthesis"
SERVER = ".server"
"""The folder of the server's own made-up patients, beside those of the sites."""
_OTHERS = 1_000_003
_INITIAL = "initial.safetensors"
_SITE_IDS = 1_000_000_000
"""Made-up patients of a site are numbered from a multiple of this."""


@dataclass(frozen=True)
class Arm:
    """A trained arm: where its ledger and checkpoints are, or why there are none.

    `begun_at` is the tuning loss of the model that it went on from, where there is one and it was compared with.
    """

    name: str
    folder: Path
    sites: tuple[SiteFiles, ...]
    outcome: Outcome | None = None
    failure: str = ""
    begun_at: float | None = None


def train(study: Study, sites: tuple[SiteFiles, ...], folder: Path, pool: Pool, watch: Watch) -> tuple[Arm, ...]:
    """Train the arms that a study wants; the same call goes on where a killed one stopped.

    The federated arm goes first as far as its codebook, then all go side by side.

    Args:
        study: the settings.
        sites: who takes part.
        folder: of the study; the arms' run directories are made in `arms/`.
        pool: who plays the sites.
        watch: told of every update, from several threads.

    Raises:
        FedcometError: the federated or the pooled arm can't go on. A site that can't train alone is an arm with a
            `failure` instead.
    """
    home = folder / "arms"
    names = {"alone": [f"{site.name} alone" for site in sites], "pooled": [POOLED]}
    wanted = [name for key in ("alone", "pooled") if key in study.arms for name in names[key]]
    as_much = _as_much(study.training, len(sites))
    with ThreadPoolExecutor(max_workers=len(wanted) + 1) as threads:
        ready: Future[bytes] = Future()
        futures = {
            threads.submit(_train_federated, study, sites, home / FEDERATED, pool, watch, ready): FEDERATED,
        }
        codebook = ready.result()
        for site in sites if "alone" in study.arms else ():
            arm = Arm(f"{site.name} alone", home / f"alone-{site.name}", (site,))
            futures[threads.submit(_train_single, study, arm, codebook, 1, pool, watch, as_much)] = arm.name
        if "pooled" in study.arms:
            pooled = SiteFiles(POOLED, _pool_records(study, sites, folder), folder / "pooled" / "state")
            arm = Arm(POOLED, home / POOLED, (pooled,))
            futures[threads.submit(_train_single, study, arm, codebook, len(sites), pool, watch, as_much)] = arm.name
        trained = {futures[future]: future.result() for future in as_completed(futures)}
    found = [trained[name] for name in [FEDERATED, *wanted]]
    if "personal" in study.arms:
        found += _personal(study, sites, found[0], codebook, home, pool, watch)
    if "synthesis" in study.arms:
        own = [arm for arm in found if arm.name.endswith(" alone")]
        found.append(_synthesis(study, own, found[0], codebook, folder, pool, watch))
    return tuple(found)


def _synthesis(
    study: Study, own: Sequence[Arm], federated: Arm, codebook: bytes, folder: Path, pool: Pool, watch: Watch
) -> Arm:
    """Let the sites' own models make timelines up, and train on nothing else."""
    assert federated.outcome is not None
    home, run = folder / SYNTHESIS, federated.outcome.manifest.hash
    made: dict[str, Future[int]] = {}
    for number, arm in enumerate(own):
        site = arm.sites[0]
        agreement = Archive(site.state).run(run).agreement()
        if arm.outcome is None or agreement is None or (home / "made" / site.name).exists():
            continue
        seed = zlib.crc32(f"{study.seed}/{site.name}".encode())
        chosen = study.synthesis
        wanted = Wanted(chosen.timelines, chosen.max_tokens, chosen.least_patients, seed, number * _SITE_IDS)
        store = Archive(site.state).store_path(agreement.store)
        paths = (arm.outcome.best_checkpoint, arm.outcome.codebook, store)
        made[site.name] = pool.submit(f"{site.name}, synthesis", make_up, *paths, wanted, home / "made" / site.name)
    for done, (name, future) in enumerate(made.items(), 1):
        watch(Step("timelines", done, len(made), f"{name}: {future.result()}"))
    if not (home / "records").exists():
        found = {path.name: path for path in sorted((home / "made").iterdir()) if path.suffix != ".partial"}
        write_meds(home / "records", shards_of(found), name="made-up timelines of all sites")
    site = SiteFiles(SYNTHESIS, home / "records", home / "state")
    arm = Arm(SYNTHESIS, folder / "arms" / SYNTHESIS, (site,))
    # What is drawn from private models is as private as they are; learning from it needs no noise.
    changes = {"privacy": None, **_as_much(study.training, len(own))}
    return _train_single(study, arm, codebook, len(own), pool, watch, changes)


def _personal(
    study: Study, sites: Sequence[SiteFiles], federated: Arm, codebook: bytes, home: Path, pool: Pool, watch: Watch
) -> list[Arm]:
    """Let every site go on from the federation's best model, side by side, and keep what its own patients gain by.

    Losses of a private run are not told without noise: there, and without tuning patients, its own best round is kept.
    """
    assert federated.outcome is not None
    best = federated.outcome.best_checkpoint.read_bytes()
    begun = hashlib.sha256(best).hexdigest()
    options = train_options(study.training)
    rate = study.training.personal_learning_rate or options.lr / 10
    changes = {
        "initial": begun,
        "rounds": study.training.personal_rounds,
        "train": replace(options, lr=rate),
        "evaluate_every": 1,
    }

    def trained(site: SiteFiles) -> Arm:
        arm = Arm(f"{site.name} personal", home / f"personal-{site.name}", (site,))
        durable.write_bytes(arm.folder / _INITIAL, best)
        arm = _train_single(study, arm, codebook, 1, pool, watch, changes)
        if arm.outcome is None or study.privacy is not None:
            return arm
        with Journal(arm.folder / "ledger.sqlite") as journal:
            losses = journal.losses(TUNING)
        if not losses:  # no tuning patients, so nothing to compare by
            return arm
        before = pool.submit(arm.name, _loss_before, site, arm.outcome.manifest.hash, arm.folder / _INITIAL).result()
        better = min(losses.values()) < before
        outcome = arm.outcome if better else replace(arm.outcome, best_checkpoint=arm.folder / _INITIAL)
        return replace(arm, outcome=outcome, begun_at=before)

    with ThreadPoolExecutor(max_workers=len(sites)) as threads:
        return list(threads.map(trained, sites))


def _loss_before(site: SiteFiles, run: str, model: Path) -> float:
    """Give a model's mean loss on a site's tuning patients in nats per token, as the rounds of a run measure it."""
    archive = Archive(site.state)
    kept = archive.run(run)
    work = open_work(archive, kept, site.name)
    precision = choices_of(kept, work, site.machine).precision
    return work.evaluate(TUNING, to_vector(checkpoint.load(model).decoder), site.machine.device, precision)[0]


def _as_much(training: Training, sites: int) -> dict[str, object]:
    """Rounds of an arm whose one site trains in each of them, where the federation draws some sites for each of its."""
    share = min(1.0, (training.sites_per_round or sites) / sites)
    if share == 1.0:
        return {}
    return {
        "rounds": max(1, round(share * training.rounds)),
        "evaluate_every": max(1, round(share * training.evaluate_every)),
    }


def _asked_for(study: Study) -> tuple[str, ...]:
    """The codes of the questions: without tokens of their own, their answers would hide among those of other codes."""
    return tuple(code for task in study.task for code in task.codes)


def _train_federated(
    study: Study, sites: tuple[SiteFiles, ...], folder: Path, pool: Pool, watch: Watch, ready: "Future[bytes]"
) -> Arm:
    """Train over all sites; `ready` gets the codebook once every site has encoded its records with it."""

    def listen(event: Event) -> None:
        if event.kind == "round.announced" and not ready.done():
            ready.set_result((folder / "codebook.json").read_bytes())
        progress(event)

    progress = _Progress(FEDERATED, study.training.rounds, len(sites), watch)
    try:
        train = study.training
        plan = _plan(study, FEDERATED, secure_aggregation=_summing(study, sites), tasks=_at_sites(study))
        outer = replace(
            plan.outer,
            max_share=train.max_share,
            rule=train.outer_rule,
            byzantine=train.byzantine,
            clip_norm=train.clip_norm,
        )
        transport = Transport(**study.transport.model_dump())
        central = _central(study, folder)
        plan = replace(plan, outer=outer, sites_per_round=train.sites_per_round, transport=transport, central=central)
        outcome = _run(study, plan, sites, folder, pool, listen)
        if not ready.done():  # every round was committed before
            ready.set_result((folder / "codebook.json").read_bytes())
    except BaseException as error:
        if not ready.done():
            ready.set_exception(error)
        raise
    return Arm(FEDERATED, folder, sites, outcome)


def _run(
    study: Study,
    plan: FederationPlan,
    sites: tuple[SiteFiles, ...],
    folder: Path,
    pool: Pool,
    listen: Callable[[Event], None],
) -> Outcome:
    """Run the federated arm on the engine that the study wants."""
    if study.engine.kind == "processes":
        return run_as_processes(plan, sites, folder, listen)
    scenario = None
    if (troubles := study.scenario) is not None:
        scenario = Scenario(
            study.seed, troubles.dropout, troubles.straggler, 60 * troubles.straggler_minutes, troubles.absent
        )
    if study.engine.kind == "ray":
        # With devices of their own, sites share them as the study says; Ray only counts cores.
        with RayPlayers(pool.workers) as players:
            return run_federation(plan, sites, folder, None, listen, scenario, players.answer)
    return run_federation(plan, sites, folder, pool, listen, scenario)


def _central(study: Study, folder: Path) -> CentralPlan | None:
    """What the server itself asks the federated arm, and about whom."""
    if (chosen := study.evaluation.central) is None:
        return None
    records = chosen.data
    if records is None:
        records = folder.parent.parent / "records" / SERVER / "records"
        if not (records.parent / "truth.parquet").exists():
            profile = profile_of((study.data.hospitals or tuple(PROFILES))[0])
            # Other patients than those of the hospital of this kind, whatever their ids.
            write_hospital(records.parent, profile, chosen.patients, study.seed + _OTHERS)
    return CentralPlan(
        str(records.absolute()),
        study.task,
        every=chosen.every or study.training.evaluate_every,
        trajectories=chosen.trajectories,
        max_tokens=study.evaluation.max_tokens,
        metric=chosen.metric,
        patience=chosen.patience,
        foreign=True,
        most=chosen.most,
    )


def _at_sites(study: Study) -> TaskEvaluation | None:
    """The questions that the federated arm's sites answer themselves."""
    if (chosen := study.evaluation.at_sites) is None:
        return None
    return TaskEvaluation(
        study.task,
        every=chosen.every,
        split=chosen.split,
        trajectories=study.evaluation.trajectories,
        max_tokens=study.evaluation.max_tokens,
        form=Form(chosen.bins, chosen.floor, chosen.noise, chosen.most_per_patient),
        delta=chosen.delta,
    )


def _train_single(
    study: Study,
    arm: Arm,
    codebook: bytes,
    share: int,
    pool: Pool,
    watch: Watch,
    changes: Mapping[str, object] = MappingProxyType({}),
) -> Arm:
    """Train one site by itself; `share` times the local steps, where steps are the measure, for equal tokens."""
    plan = _plan(study, arm.name, codebook=codebook, outer=OuterOptions(), min_sites=1)
    # One site can't drift from itself.
    plan = replace(plan, local=replace(plan.local, proximal=0.0, correct_drift=False, own_head=False))
    if plan.privacy is not None and plan.privacy.mechanism == "distributed":
        # There is nobody to share the noise with.
        plan = replace(plan, privacy=replace(plan.privacy, mechanism="local", honest_sites=None))
    if plan.local.steps is not None:
        plan = replace(plan, local=replace(plan.local, steps=plan.local.steps * share))
    plan = replace(plan, **changes)  # type: ignore[arg-type]
    progress = _Progress(arm.name, plan.rounds, 1, watch)
    try:
        return replace(arm, outcome=run_federation(plan, arm.sites, arm.folder, pool, progress))
    except FedcometError as error:
        if arm.name == POOLED:
            raise
        # A site that can't train by itself (no patients, broken records) takes nothing from the others.
        return replace(arm, failure=str(error))


def _summing(study: Study, sites: Sequence[SiteFiles]) -> SecureAggregation | None:
    """How a study's federated arm sums, among all of its sites."""
    if (chosen := study.secure_aggregation) is None:
        return None
    threshold = chosen.threshold or 2 * len(sites) // 3 + 1
    train = study.training
    # With shared noise all weights are 1.
    most = chosen.max_weight or (train.local_steps or 0) * train.batch_tokens or 1
    masking = MaskingOptions(threshold, chosen.clip, most, chosen.precision_bits)
    return SecureAggregation(chosen.min_sites or threshold, masking, roster_of(sites))


class _Progress:
    """Turns a run's events into steps: one for every update that arrived."""

    def __init__(self, label: str, rounds: int, sites: int, watch: Watch) -> None:
        self._label, self._rounds, self._sites, self._watch = label, rounds, sites, watch
        self._note = ""
        self._round = 0
        self._arrived = 0

    def __call__(self, event: Event) -> None:
        if event.kind == "run.begun":
            self._round = event.round
        elif event.kind.startswith("update."):
            self._arrived += 1
        elif event.kind == "round.evaluated":
            self._note = f"tuning loss {event.values['loss']:.3f}"
        elif event.kind == "run.early":
            self._round, self._arrived, self._note = self._rounds, 0, f"over after round {event.round}: {event.text}"
        elif event.kind == "round.committed":
            self._round, self._arrived = event.round, 0
        else:
            return
        done = self._round * self._sites + min(self._arrived, self._sites)
        self._watch(Step(self._label, done, self._rounds * self._sites, self._note))


def _pool_records(study: Study, sites: Sequence[SiteFiles], folder: Path) -> Path:
    """Put the records of all sites in one place."""
    if study.data.kind == "meds" and study.data.path is not None:
        return study.data.path
    path = folder / "pooled" / "records"
    if not path.exists():
        write_meds(path, shards_of({site.name: site.data for site in sites}), name="the records of all sites")
    return path


def shards_of(records: Mapping[str, Path]) -> Iterator[tuple[str, pl.DataFrame]]:
    """Give the shards of several MEDS datasets, one after the other, under names of their own."""
    for name, path in records.items():
        dataset = MedsDataset.open(path)
        for number, shard in enumerate(dataset.shards):
            yield f"{name}-{number}", dataset.read(shard)


def train_options(training: Training) -> TrainOptions:
    """Translate a study's settings of the optimizer; how many steps there are, a run finds out."""
    return TrainOptions(
        optimizer=training.optimizer,
        lr=training.learning_rate,
        min_lr_ratio=training.min_learning_rate_ratio,
        weight_decay=training.weight_decay,
        clip=training.clip,
    )


def _plan(study: Study, name: str, **changes: object) -> FederationPlan:
    """Translate a study's settings for one arm."""
    train = study.training
    outer = OuterOptions(lr=train.outer_learning_rate or 1.0)
    if train.outer == "nesterov":
        outer = OuterOptions.nesterov(train.outer_learning_rate or 0.7, train.outer_momentum)
    elif train.outer != "fedavg":
        outer = OuterOptions.adaptive(train.outer, train.outer_learning_rate or 1e-2, train.outer_momentum)
        outer = replace(outer, second=train.outer_second, floor=train.outer_floor)
    if study.privacy is not None and study.privacy.mechanism == "distributed":
        outer = replace(outer, weights="uniform")
    else:
        outer = replace(outer, weights=train.weights)
    plan = FederationPlan(
        name=f"{study.name}/{name}",
        rounds=train.rounds,
        split=SplitRule(study.split.key, study.split.tuning, study.split.held_out),
        local=LocalWork(
            steps=train.local_steps,
            epochs=train.local_epochs,
            batch_tokens=train.batch_tokens,
            windows_per_patient=train.windows_per_patient,
            warmup_share=train.warmup_share,
            optimizer_state=train.optimizer_state,
            proximal=train.proximal,
            correct_drift=train.correct_drift,
            own_head=train.own_head,
        ),
        model=study.model.shape(),
        context=study.model.context,
        dropout=study.model.dropout,
        train=train_options(train),
        outer=outer,
        tokenizer=TokenizerOptions(**study.tokenizer.model_dump(), named=_asked_for(study)),
        seed=study.seed,
        min_sites=train.min_sites,
        deadline_s=60 * train.round_deadline_minutes,
        evaluate_every=train.evaluate_every,
        purposes=tuple(question.question for question in study.task),
        privacy=_privacy(study),
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


def _privacy(study: Study) -> PrivacyPlan | None:
    """Translate a study's settings of private training."""
    if (chosen := study.privacy) is None:
        return None
    settings = chosen.model_dump(exclude_none=True, exclude={"evaluation"})
    told = chosen.evaluation
    return PrivacyPlan(**settings, evaluation=None if told is None else PrivateEvaluation(**told.model_dump()))
