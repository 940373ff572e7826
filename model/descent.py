"""Plain optimizers: AdamW by torch's fused kernel, and SGD without momentum.

They do what `torch.optim.AdamW(fused=True)` and `torch.optim.SGD` do, to the bit. Those import torch's compiler when
the first one is made: seconds of every process that trains, and hundreds of megabytes.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

_EPS = 1e-8


class Optimizer(Protocol):
    """What a trainer knows of an optimizer.

    Attributes:
        param_groups: "params" of each group, its "lr", and what else the optimizer goes by.
        state: what it remembers of each parameter, by name.
    """

    param_groups: list[dict[str, Any]]
    state: defaultdict[Tensor, dict[str, Tensor]]

    def step(self) -> None:
        """Move every parameter that has a gradient."""


class AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101).

    Args:
        groups: "params" and "weight_decay" of each group.
        lr: learning rate.
        betas: decay rates of the two moments.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        self.param_groups = [{"lr": lr, "betas": betas, **group} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            states = [self._state_of(weight) for weight in weights]
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                weights,
                [weight.grad for weight in weights],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=_EPS,
                amsgrad=False,
                maximize=False,
            )

    def _state_of(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state


class SGD:
    """Gradient descent without momentum; weight decay is a part of the gradient. It remembers nothing.

    Args:
        groups: "params" and "weight_decay" of each group.
        lr: learning rate.
    """

    def __init__(self, groups: Iterable[Mapping[str, Any]], lr: float) -> None:
        self.param_groups = [{"lr": lr, **group} for group in groups]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                decay = group["weight_decay"]
                gradient = weight.grad.add(weight, alpha=decay) if decay else weight.grad
                weight.add_(gradient, alpha=-group["lr"])
