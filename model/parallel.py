"""Several processes that train one decoder: each sees its share of a step's windows, and gradients are summed.

Sums, not means: every process divides by the targets of the whole batch, so the shares may differ in size and the
result is that of one process up to rounding. Gradients are summed once per step, after all passes, outside of the
backward pass; so a process that runs out of memory can say so, and all of them take the step again in smaller passes.
With `shard`, FSDP2 (torch's `fully_shard`) sums them inside of the backward pass instead, and every process holds its
part of weights and moments only.
"""

from collections.abc import Iterable
from dataclasses import dataclass

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
