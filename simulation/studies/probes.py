"""What is asked of a cell's models besides their losses: does a planted trigger move risks, are members told apart.

- trigger: for held-out patients of honest sites, at the first time that the study's first question is put to them, the
  mean risk with the grid's trigger planted in the record and without, and the share of patients whose risk the trigger
  lifts over one half (the attack's success). A model without a backdoor has its figures, too: odd codes move risks.
- membership: how well the loss alone tells train patients from held-out ones (Yeom et al., CSF 2018): the AUROC, and
  the share of members found at 1 % alarms. No reference model, so stronger attacks exist (`fedcomet audit` has some):
  figures near chance prove nothing, figures above it are a leak.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from client.archive import Archive
from client.files import SiteFiles
from federation.manifest import Manifest
from model import checkpoint
from model.cohort import Cohort, cohort
from model.estimate import estimate
from model.tasks import Task
from simulation.arms import Arm
from simulation.attacks.membership import separate
from simulation.attacks.training import losses
from simulation.config import Study
from simulation.mishaps import triggered
from simulation.pool import Pool
from tokenizer.codebook import Codebook
from tokenizer.events import MedsDataset, write_meds
from tokenizer.split import SPLITS, SplitRule
from tokenizer.store import TokenStore, build_store

_ASKED = 40
"""Held-out patients of a site who are asked about with the trigger and without."""


@dataclass(frozen=True)
class _Asked:
    """What a site's held-out patients are asked, and how."""

    task: Task
    trigger: tuple[str, ...]
    rule: SplitRule
    trajectories: int
    max_tokens: int
    seed: int


def trigger(
    study: Study, codes: tuple[str, ...], arm: Arm, honest: tuple[SiteFiles, ...], folder: Path, pool: Pool
) -> dict[str, float]:
    """Plant the trigger in held-out patients' records and see how the arm's risks move.

    Args:
        study: whose first question is put.
        codes: the trigger.
        arm: the model.
        honest: sites whose held-out patients are asked about.
        folder: for records with the trigger in them, removed at the end.
        pool: who computes.
    """
    assert arm.outcome is not None
    rule = SplitRule(study.split.key, study.split.tuning, study.split.held_out)
    chosen = study.task[0]
    asked = _Asked(
        # Of each patient the first time: the trigger is planted there and nowhere else.
        replace(chosen, occurrence="first"), codes, rule, study.trajectories(chosen.name),
        study.evaluation.max_tokens, study.seed,
    )  # fmt: skip
    paths = arm.outcome.best_checkpoint, arm.outcome.codebook
    parts = [pool.submit(f"{site.name}, trigger", _shift, *paths, site, asked, folder / site.name) for site in honest]
    found = [part.result() for part in parts]
    without, with_it = (np.concatenate(column) for column in zip(*found, strict=True))
    if not len(without):
        return {}
    return {
        "risk without trigger": float(without.mean()),
        "risk with trigger": float(with_it.mean()),
        "attack success": float(((with_it >= 0.5) & (without < 0.5)).mean()),
    }


def _shift(
    model: Path, codebook: Path, site: SiteFiles, asked: _Asked, folder: Path
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give risks without the trigger and with it, float64 [P] each, of some held-out patients of a site."""
    words = Codebook.load(codebook)
    decoder = checkpoint.load(model, words.hash).decoder
    dataset = MedsDataset.open(site.data)
    events = pl.concat([dataset.read(shard) for shard in dataset.shards])
    ids = events["subject_id"].unique().sort()
    held_out = ids.filter(pl.Series(asked.rule.assign(ids.to_numpy()) == SPLITS.index("held_out")))
    events = events.filter(pl.col("subject_id").is_in(held_out.implode()))
    versions = {"without": events, "with": triggered(events, asked.task.trigger, asked.trigger)}
    cohorts: dict[str, Cohort] = {}
    for name, version in versions.items():
        write_meds(folder / name, [("0", version)], name=f"held out, {name} trigger")
        store = build_store(MedsDataset.open(folder / name), words, asked.rule, folder / f"{name}-store")
        cohorts[name] = cohort(asked.task, store.split("held_out"), words)
    both = np.intersect1d(cohorts["without"].subject_ids, cohorts["with"].subject_ids)[:_ASKED]
    risks = []
    for found in cohorts.values():
        part = found.part(np.flatnonzero(np.isin(found.subject_ids, both)))
        told = estimate(
            decoder, words, part, asked.task,
            trajectories=asked.trajectories, seed=asked.seed, max_tokens=asked.max_tokens,
        )  # fmt: skip
        risks.append(told.risk)
    shutil.rmtree(folder)
    return risks[0], risks[1]


def membership(arm: Arm, sites: tuple[SiteFiles, ...], manifest: Manifest) -> dict[str, float]:
    """Try to tell an arm's train patients from held-out ones by their losses.

    Args:
        arm: the model.
        sites: whose patients it trained on.
        manifest: of the federated arm, under which their stores are kept.
    """
    assert arm.outcome is not None
    words = Codebook.load(arm.outcome.codebook)
    decoder = checkpoint.load(arm.outcome.best_checkpoint, words.hash).decoder
    scores: dict[str, list[NDArray[np.float64]]] = {"train": [], "held_out": []}
    for site in sites:
        archive = Archive(site.state)
        if (agreement := archive.run(manifest.hash).agreement()) is not None:
            store = TokenStore.open(archive.store_path(agreement.store), words.hash)
            for split, told in scores.items():
                told.append(-losses(decoder, words, store.split(split)))
    if not scores["train"]:
        return {}
    found = separate("loss", np.concatenate(scores["train"]), np.concatenate(scores["held_out"]))
    if found.auroc.value is None:
        return {}
    return {"membership AUROC": found.auroc.value, "members found at 1 % alarms": found.found[0].rate.value or 0.0}
