"""Several processes of one machine: what they train together is what one trains alone."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.site import Site
from client.torchrun import ProcessesFailed
from federation.manifest import LocalWork
from federation.messages import SiteRefusal
from model.settings import Machine, TrainOptions
from tests import tiny
from tests.client.test_site import agree, ask
from tokenizer.errors import ConfigError

DROPPING = dataclasses.replace(tiny.MODEL, layers=2, dropout=0.2)
WORK = LocalWork(steps=3, batch_tokens=256)


def pair(root: Path, machine: Machine, **plan: Any) -> tuple[Site, Site, Any]:
    """A site that trains alone, one of the same name and records that trains as told, and their manifest."""
    settings = {"local": WORK, "model": DROPPING, **plan}
    sites = [
        Site(dataclasses.replace(tiny.site(root / name, "icu", 1), machine=choice))
        for name, choice in (("alone", Machine()), ("team", machine))
    ]
    manifest, _, _ = agree(sites[0], **settings)
    agree(sites[1], **settings)
    return sites[0], sites[1], manifest


@pytest.mark.parametrize(
    "machine",
    [
        Machine(processes=2),
        pytest.param(Machine(processes=2, shard=True), marks=pytest.mark.slow),
        pytest.param(Machine(processes=3, micro_tokens=64, checkpointing=True), marks=pytest.mark.slow),
        pytest.param(Machine(processes=2, micro_tokens=64, shard=True, checkpointing=True), marks=pytest.mark.slow),
    ],
    ids=["copies", "sharded", "copies in passes", "sharded in passes"],
)
def test_processes_train_together_what_one_trains_alone(ram_path: Path, machine: Machine) -> None:
    alone, team, manifest = pair(ram_path, machine)
    for number in (1, 2) if machine.shard else (1,):
        expected, found = alone.train(ask(manifest, number)), team.train(ask(manifest, number))
        np.testing.assert_allclose(found.update, expected.update, atol=3e-5)
        assert (found.tokens, found.steps) == (expected.tokens, expected.steps)
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    run = team.archive.run(manifest.hash).path
    assert not (run / "job").exists()
    assert not (run / "local.safetensors").exists()


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_is_told_as_if_it_were_here(ram_path: Path) -> None:
    alone, team, manifest = pair(ram_path, Machine(processes=2, shard=True), train=TrainOptions(optimizer="muon"))
    with pytest.raises(ConfigError, match="Muon needs whole matrices"):
        team.train(ask(manifest))
    alone = Site(dataclasses.replace(alone.files, machine=Machine(device="nowhere", processes=2)))
    with pytest.raises(ProcessesFailed, match="2 training processes ended with code 1"):
        alone.train(ask(manifest))
    with pytest.raises(SiteRefusal, match="deadline"):
        Site(team.files, clock=lambda: 0.0).train(ask(manifest, deadline_s=1.0))
