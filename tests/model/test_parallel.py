"""Several processes take the step that one would take."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.decoder import Decoder
from model.parallel import Team
from model.train import Trainer
from tests.model.test_train import CONFIG, MUON
from tokenizer.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]


def test_two_processes_train_as_one_with_copies_and_with_shards() -> None:
    """Both, each with the whole share at once and in passes; stopped and gone on with in the middle."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.model.team", str(port)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [case[:2] for case in found] == [[False, 0], [False, 70], [True, 0], [True, 70]]
    for _, _, off, alone, together in found:
        assert together == pytest.approx(alone, rel=1e-5)
        assert off < 2e-5  # weights have moved by about 1e-2


def test_one_alone_is_a_team() -> None:
    numbers = torch.tensor([1.0, 2.0])
    Team().sum_([numbers])
    assert numbers.tolist() == [1.0, 2.0]
    assert Team().any(True)
    assert not Team().any(False)


def test_muon_cannot_be_sharded() -> None:
    with pytest.raises(ConfigError, match="Muon needs whole matrices"):
        Trainer(Decoder.create(CONFIG, 0), MUON, team=Team(0, 2, "cpu", sharded=True))
