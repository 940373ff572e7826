"""Muon: momentum whose update is made orthogonal, for the matrices inside the blocks.

Where the number of steps limits what a federation can learn (few patients, sites that work side by side), an optimizer
that gains more by each step is worth most: on the ICU stays of docs/results.md the federation's loss after two thirds
of a pass is 1.95 with Muon and 2.22 with AdamW.

With B the momentum of the gradients G, the update is the orthogonal matrix nearest to G + μ B (all singular values 1),
found by five quintic Newton-Schulz steps. Scaled by 0.2 sqrt(longer side) it has about the size of an AdamW update, so
both share one learning rate.

Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), and the scale of Liu et al.,
arXiv 2502.16982, section 2.2. `torch.optim.Muon` does the same one matrix at a time and in bfloat16; here all matrices
of one shape go together, in float32, which is faster on CPUs, and reproducible.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_STEPS = 5
_QUINTIC = (3.4445, -4.7750, 2.0315)
_RMS = 0.2
_TINY = 1e-7


class Muon:
    """Optimizer of two-dimensional parameters.

    Args:
        params: matrices, float32.
        lr: learning rate; each step moves a matrix by about `lr` times what AdamW would.
        momentum: μ, of Nesterov's form.
        weight_decay: decoupled, times the learning rate.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        matrices = list(params)
        if any(weight.dim() != 2 for weight in matrices):
            raise ValueError("Muon trains matrices only")
        self.param_groups: list[dict[str, Any]] = [
            {"params": matrices, "lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        ]
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """Move every matrix that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(tuple(sorted(weight.shape)), []).append(weight)
            for (_, longer), weights in by_shape.items():
                directions = orthogonal(torch.stack([self._direction(w, group["momentum"]) for w in weights]))
                size = group["lr"] * _RMS * longer**0.5
                for weight, direction in zip(weights, directions, strict=True):
                    weight.mul_(1.0 - group["lr"] * group["weight_decay"])
                    weight.add_(_lying(direction, weight), alpha=-size)

    def _direction(self, weight: Tensor, momentum: float) -> Tensor:
        """Gradient with Nesterov momentum, its shorter side first."""
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer = state["momentum_buffer"].mul_(momentum).add_(weight.grad)
        return _lying(weight.grad.add(buffer, alpha=momentum), weight)


def orthogonal(matrices_NRC: Tensor) -> Tensor:
    """Bring the singular values of each matrix near 1 (0.7 to 1.2): float32 [N, R, C] with R <= C."""
    a, b, c = _QUINTIC
    x_NRC = matrices_NRC / (matrices_NRC.norm(dim=(1, 2), keepdim=True) + _TINY)
    for _ in range(_STEPS):
        gram_NRR = x_NRC @ x_NRC.mT
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c), x_NRC, beta=a)
    return x_NRC


def _lying(x: Tensor, weight: Tensor) -> Tensor:
    """`x`, turned if `weight` is higher than wide; turning twice gives `x` again."""
    return x if weight.shape[0] <= weight.shape[1] else x.T
