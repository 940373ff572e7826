"""Several processes that train one decoder: each sees its share of a step's windows, and gradients are summed.

Sums, not means: every process divides by the targets of the whole batch, so the shares may differ in size and the
result is that of one process up to rounding. Gradients are summed once per step, after all passes, outside of the
backward pass; so a process that runs out of memory can say so, and all of them take the step again in smaller passes.
With `shard`, FSDP2 (torch's `fully_shard`) sums them inside of the backward pass instead, and every process holds its
part of weights and moments only.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Team:
    """The processes that train together, of the default process group.

    Attributes:
        rank: this process's place among them.
        size: how many there are.
        device: where their messages lie.
        sharded: each holds a part of the weights only.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"
    sharded: bool = False

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over the team."""
        if self.size > 1:
            sent = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in sent:
                work.wait()

    def any(self, mine: bool) -> bool:
        """Whether it holds for anybody."""
        flag = torch.tensor(float(mine), device=self.device)
        self.sum_([flag])
        return flag.item() > 0


ALONE = Team()


def shares(lengths: np.ndarray, most: int, team: Team = ALONE) -> list[tuple[int, int]]:
    """This process's passes over a batch: runs [first, last) of its windows.

    Args:
        lengths: int64 [S], tokens per window.
        most: tokens in a pass, unless one window is longer; 0 is no limit.
        team: every window goes to one of its processes, and all get about as many tokens.

    >>> shares(np.array([5, 5, 4, 4, 2]), most=8)
    [(0, 1), (1, 2), (2, 4), (4, 5)]
    >>> [shares(np.array([5, 5, 4, 4, 2]), 0, Team(rank, 2)) for rank in (0, 1)]
    [[(0, 2)], [(2, 5)]]
    """
    ends = np.cumsum(lengths)
    # A window belongs to the process in whose part of the batch its middle lies.
    owner = (2 * ends - lengths) * team.size // (2 * ends[-1])
    first, stop = (int(at) for at in np.searchsorted(owner, [team.rank, team.rank + 1]))
    if not most:
        return [(first, stop)] if first < stop else []
    passes = []
    while first < stop:
        before = ends[first] - lengths[first]
        last = min(max(first + 1, int(np.searchsorted(ends, before + most, side="right"))), stop)
        passes.append((first, last))
        first = last
    return passes


def shard_(root: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Split the weights of `root` over the team; those of a block come together only while it works."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for module in (*blocks, root):
        fully_shard(module)
        assert isinstance(module, FSDPModule)
        # Sums, not means: see above. Gloo, on CPUs, knows no other way than to add first.
        module.set_force_sum_reduction_for_comms(True)
        module.set_gradient_divide_factor(1.0)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its parts: all processes of the team must ask at the same time."""
    gather = getattr(tensor, "full_tensor", None)  # asking for the class would import it: a second or more
    return tensor if gather is None else gather()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A new tensor with the content of `value`, lying as `parameter` does: on its device, in the same parts."""
    value = value.to(parameter.device, copy=True)
    if getattr(parameter, "device_mesh", None) is None:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
