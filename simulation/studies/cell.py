"""Run one cell of a grid, and read its figures: what it cost, what it learned, how well it answers.

Losses are nats per token on the held-out patients of all sites, which neither trained nor chose the round, so every arm
is measured on the same tokens; "loss at home" is the mean over sites of the loss on a site's own ones (of a model that
belongs to one site, on that site's). Bytes are counted per run: up is what sites send of updates, down the weights that
they get. "planned cost" is what `fedcomet privacy plan` would have said that the noise costs, in nats per token (the
mean over sites): to be held against the loss without privacy.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.archive import Archive
from client.files import SiteFiles
from client.heads import with_head
from federation import planner
from federation.accountant import epsilon
from federation.manifest import Manifest
from federation.protection import of_run
from federation.summed import update_bytes
from federation.update import to_decoder, to_vector
from model import checkpoint, metrics
from model.train import evaluate
from server.journal import Journal, Status
from server.rounds import TUNING
from simulation.arms import SYNTHESIS, Arm
from simulation.pool import Pool
from simulation.studies import probes
from simulation.studies.grid import Cell
from simulation.studies.hostile import HostilePool, backdoored_records
from simulation.study import Result, run_study
from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError
from tokenizer.progress import Watch
from tokenizer.split import SplitRule
from tokenizer.store import TokenStore
from tokenizer.windows import NO_TARGET, Windows

OWN = ("alone", "personal")
"""Arms of which each site has one; told as the mean over sites."""


@dataclass(frozen=True)
class Figure:
    """A measure of an arm of a cell."""

    arm: str
    measure: str
    value: float


def run(cell: Cell, folder: Path, pool: Pool, watch: Watch = lambda step: None) -> tuple[Figure, ...]:
    """Run a cell to its end, from wherever its folder says it is.

    Args:
        cell: what to run.
        folder: of this cell.
        pool: who plays the sites.
        watch: told how far it is.

    Raises:
        FedcometError: it can't be run; its message says why.
    """
    hostile = cell.hostile
    if hostile is not None and cell.study.arms != ("federated",):
        raise ConfigError('hostile sites need arms = ["federated"]: no other arm has to bear them')
    if cell.study.training.own_head and (cell.membership or cell.trigger):
        raise ConfigError("training.own_head: membership and trigger ask the federation's model, which has no head")

    def players(sites: tuple[SiteFiles, ...]) -> Pool:
        if hostile is None:
            return pool
        records: dict[str, Path] = {}
        if hostile.attack == "backdoor":
            rule = SplitRule(cell.study.split.key, cell.study.split.tuning, cell.study.split.held_out)
            asked = cell.study.task[0]
            records = backdoored_records(hostile, sites, rule, asked, cell.trigger, folder / "hostile")
        return HostilePool(pool, hostile, [site.name for site in sites], records)

    result = run_study(cell.study, folder, watch=watch, pool=players, ask=cell.ask)
    trained = [arm for arm in result.arms if arm.outcome is not None]
    figures = [figure for arm in trained for figure in [*_of_arm(arm, result, pool), *_probed(arm, cell, result, pool)]]
    for answers in result.answers:
        for arm, risks in answers.risks.items():
            if len(set(answers.cohort.labels.tolist())) == 2:
                found = {"auroc": metrics.auroc, "brier": metrics.brier}
                figures += [
                    Figure(arm, f"{name} {answers.task.name}", float(measure(answers.cohort.labels, risks)))
                    for name, measure in found.items()
                ]
    return _together(figures)


def _of_arm(arm: Arm, result: Result, pool: Pool) -> list[Figure]:
    assert arm.outcome is not None
    manifest, model = arm.outcome.manifest, arm.outcome.manifest.model
    with Journal(arm.folder / "ledger.sqlite") as journal:
        rounds = range(1, journal.committed() + 1)
        work, losses = journal.work(journal.committed()), journal.losses(TUNING)
        replies = [r for number in rounds for r in journal.replies(number) if r.status is Status.ACCEPTED]
        slowest = sum(
            max((r.seconds for r in journal.replies(number) if r.status is Status.ACCEPTED), default=0.0)
            for number in rounds
        )
    masked = manifest.secure_aggregation is not None
    up = update_bytes(manifest) * len(replies) if masked else sum(reply.bytes for reply in replies)
    width = {"float32": 4, "bfloat16": 2}[manifest.transport.weights]
    nodes, total = len(arm.sites), model.parameters()
    told = pool.submit(f"{arm.name}, held out", held_out, arm, result.sites, result.arms[0]).result()
    home = [told[site.name] for site in arm.sites if site.name in told] or list(told.values())
    found = {
        "loss": sum(nll for nll, _ in told.values()) / max(1, sum(count for _, count in told.values())),
        "loss at home": float(np.mean([nll / count for nll, count in home if count])),
        "tuning loss": min(losses.values(), default=math.nan),
        "tokens": float(work.tokens),
        "parameters": float(total),
        "compute": 6.0 * total * work.tokens,
        "bytes up": float(up),
        "bytes down": float(width * total * max(len(replies), nodes * len(rounds))),
        "seconds of work": slowest,
    }
    if manifest.privacy is not None:
        if manifest.privacy.mechanism == "dp-sgd" and manifest.local.steps is not None:
            found["tokens"] = sum(_expected_tokens(manifest, site) for site in arm.sites)
            found["compute"] = 6.0 * total * found["tokens"]
        found["epsilon"] = epsilon(of_run(manifest).all, manifest.privacy.delta)
        planned = [cost for site in arm.sites if (cost := _planned_cost(manifest, site)) is not None]
        if planned:
            found["planned cost"] = float(np.mean(planned))
    return [Figure(arm.name, name, value) for name, value in found.items() if math.isfinite(value)]


def _probed(arm: Arm, cell: Cell, result: Result, pool: Pool) -> list[Figure]:
    """Ask an arm's model what the grid asks for besides losses."""
    federated = result.arms[0].outcome
    assert federated is not None
    found: dict[str, float] = {}
    if cell.trigger:
        bad = () if cell.hostile is None else cell.hostile.among(site.name for site in result.sites)
        honest = tuple(site for site in result.sites if site.name not in bad)
        place = result.folder / "trigger" / arm.folder.name
        found |= probes.trigger(cell.study, cell.trigger, arm, honest, place, pool)
    if cell.membership and arm.name != SYNTHESIS:
        own = tuple(site for site in result.sites if site in arm.sites) or result.sites
        job = pool.submit(f"{arm.name}, membership", probes.membership, arm, own, federated.manifest)
        found |= job.result()
    return [Figure(arm.name, name, value) for name, value in found.items()]


def _expected_tokens(manifest: Manifest, site: SiteFiles) -> float:
    """Tokens that a site's private steps are expected to train on: who is drawn is its secret, how many on average not.

    Counted on one window of each train patient, which is what a step takes of those who are drawn.
    """
    archive = Archive(site.state)
    agreement = archive.run(manifest.hash).agreement()
    assert agreement is not None
    assert manifest.privacy is not None
    assert manifest.local.steps is not None
    codebook = archive.run(manifest.hash).codebook()
    train = TokenStore.open(archive.store_path(agreement.store), codebook.hash).split("train")
    settings = {"context": manifest.model.context, "batch_tokens": manifest.local.batch_tokens, "seed": 0}
    uniform = np.random.default_rng(0).random((len(train), 2))
    drawn = Windows(train, codebook, **settings).draw(np.arange(len(train)), uniform)
    steps = manifest.local.steps * manifest.rounds
    return float((drawn.targets != NO_TARGET).sum()) * (manifest.privacy.sampling_rate or 0.0) * steps


def _planned_cost(manifest: Manifest, site: SiteFiles) -> float | None:
    """Nats per token that the noise will probably cost, by the arithmetic of `fedcomet privacy plan`, seen from a site.

    None where the noise is not in the steps: the planner has no estimate then.
    """
    privacy, steps = manifest.privacy, manifest.local.steps
    agreement = Archive(site.state).run(manifest.hash).agreement()
    if privacy is None or privacy.mechanism != "dp-sgd" or privacy.sampling_rate is None:
        return None
    if steps is None or agreement is None:
        return None
    store = TokenStore.open(Archive(site.state).store_path(agreement.store), manifest.codebook_hash)
    batch = max(1, round(privacy.sampling_rate * len(store.split("train"))))
    noise = privacy.noise_multiplier / batch
    return planner.loss(noise, batch, steps * manifest.rounds, manifest.model.parameters())


def held_out(arm: Arm, sites: tuple[SiteFiles, ...], federated: Arm) -> dict[str, tuple[float, int]]:
    """Give an arm's summed loss in nats on each site's held-out patients, and the number of tokens."""
    assert arm.outcome is not None
    assert federated.outcome is not None
    manifest = federated.outcome.manifest
    codebook = Codebook.load(federated.outcome.codebook)
    decoder = checkpoint.load(arm.outcome.best_checkpoint, codebook.hash)[0]
    shared = to_vector(decoder) if arm.outcome.manifest.local.own_head else None
    told = {}
    for site in sites:
        archive = Archive(site.state)
        if (agreement := archive.run(manifest.hash).agreement()) is None:
            continue
        store = TokenStore.open(archive.store_path(agreement.store), codebook.hash)
        if shared is not None:
            head = archive.run(manifest.hash).head_before(manifest.rounds + 1)
            decoder = to_decoder(manifest.model, with_head(manifest.model, shared, head))
        windows = Windows(
            store.split("held_out"),
            codebook,
            context=manifest.model.context,
            batch_tokens=manifest.local.batch_tokens,
            seed=0,
        )
        loss, count = evaluate(decoder, windows.epoch(0))
        told[site.name] = (loss * count if count else 0.0, count)
    return told


def _together(figures: list[Figure]) -> tuple[Figure, ...]:
    """Put the sites' own models together: the mean of every measure over them."""
    kept, own = [], dict[tuple[str, str], list[float]]()
    for figure in figures:
        kind = figure.arm.rpartition(" ")[2]
        if kind in OWN and figure.arm != kind:
            own.setdefault((kind, figure.measure), []).append(figure.value)
        else:
            kept.append(figure)
    return (*kept, *(Figure(kind, measure, float(np.mean(values))) for (kind, measure), values in own.items()))


Runner = Callable[[Cell, Path, Pool, Watch], tuple[Figure, ...]]
"""What runs a cell: `run`, or a stand-in in tests of the grid alone."""
