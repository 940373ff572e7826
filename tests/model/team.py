"""Two processes that train together, beside one that trains alone: `team.py PORT` prints what each came to, as JSON."""

import json
import os
import sys
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model.decoder import Decoder
from model.parallel import ALONE, Team, whole
from model.settings import Machine
from model.train import Trainer
from tests.model.test_train import CONFIG, OPTIONS, counting_batch

FREE = replace(CONFIG, tied=False)


def train(team: Team, micro_tokens: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Two steps, a stop, and two more; gives losses and norms, and the weights."""
    machine = Machine(precision="fp32", micro_tokens=micro_tokens)
    first = Trainer(Decoder.create(FREE, 0), OPTIONS, machine=machine, team=team)
    results = [first.step(counting_batch(step)) for step in range(2)]
    weights = {name: whole(weight.detach()) for name, weight in first.decoder.named_parameters()}
    state = first.state_dict()
    decoder = Decoder.create(FREE, 1)
    decoder.load_state_dict(weights)
    second = Trainer(decoder, OPTIONS, machine=machine, team=team)
    second.load_state_dict(state)
    results += [second.step(counting_batch(step)) for step in range(2, 4)]
    told = [number for result in results for number in (result.loss, result.grad_norm)]
    return told, {name: whole(weight.detach()) for name, weight in second.decoder.named_parameters()}


def work(rank: int, port: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    told, weights = train(ALONE, 0)
    for sharded in (False, True):
        for micro_tokens in (0, 70):
            found, others = train(Team(rank, 2, "cpu", sharded), micro_tokens)
            off = max((weights[name] - others[name]).abs().max().item() for name in weights)
            if rank == 0:
                print(json.dumps([sharded, micro_tokens, off, told, found]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), 2)
