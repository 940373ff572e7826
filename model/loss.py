"""The output layer with its loss: scores of some positions at a time, never those of a whole batch.

Notable choices:
- Scores lie in one buffer, whose rows begin at multiples of `ALIGNED` numbers. New memory for every chunk costs more
  than the softmax in it, and products with rows of an odd length take up to half as long again (on GPUs five times).
- Probabilities replace the scores; the loss comes from the sum that they were divided by, so it stays finite where the
  target's own probability is 0 in float32.

Shapes: C positions of a chunk, V vocabulary, W its columns in the buffer, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

ALIGNED = 64
"""Columns of products are filled up to a multiple of this."""
_CHUNK_NUMBERS = {"cpu": 2**21, "other": 2**26}
"""Scores of a chunk: 8 MB in float32 stay in a CPU's caches; other devices need large products to be busy."""


def products_of(weight: Tensor) -> torch.dtype:
    """What products with a weight are computed in here: autocast's type where it is on."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


class OutputLayer:
    """Losses of positions, and the gradients of their sum.

    Args:
        weight_VD: float32, the output matrix.
        dtype: of the products.

    Attributes:
        rows: most positions that go in together.
        columns: W.
        dtype: of the products.
    """

    def __init__(self, weight_VD: Tensor, dtype: torch.dtype) -> None:
        kind = "cpu" if weight_VD.device.type == "cpu" else "other"
        self._vocab = len(weight_VD)
        self.columns = columns = self._vocab + -self._vocab % ALIGNED
        self.dtype = dtype
        self.rows = max(64, _CHUNK_NUMBERS[kind] // self._vocab)
        self._weight = weight_VD.detach().to(dtype)
        if kind != "cpu":
            self._weight = F.pad(self._weight, (0, 0, 0, columns - self._vocab))
        self._buffer = torch.empty(0, columns, dtype=dtype, device=weight_VD.device)

    def surprise(self, hidden_CD: Tensor, targets_C: Tensor) -> tuple[Tensor, Tensor]:
        """Look at up to `rows` positions.

        Returns:
            Negative log-likelihoods in nats, float32 [C], and the gradient of each with respect to its scores, [C, W]
            in the products' type, 0 in columns behind the vocabulary. The next call may overwrite the latter.
        """
        if len(self._buffer) < len(hidden_CD):
            self._buffer = self._buffer.new_empty(len(hidden_CD), self._buffer.shape[1])
        s_CW, y_C1 = self._buffer[: len(hidden_CD)], targets_C[:, None]
        torch.mm(hidden_CD.to(s_CW.dtype), self._weight.T, out=s_CW[:, : len(self._weight)])
        s_CW[:, self._vocab :] = -torch.inf
        top_C1, own_C1 = s_CW.amax(1, keepdim=True).float(), s_CW.gather(1, y_C1).float()
        p_CW = torch.softmax(s_CW, 1, out=s_CW) if s_CW.dtype == torch.float32 else s_CW.softmax(1, torch.float32)
        # The likeliest token's probability is exp(0) over the sum of the softmax, and at least 1 / V.
        nll_C1 = top_C1 - p_CW.amax(1, keepdim=True).log() - own_C1
        p_CW.scatter_add_(1, y_C1, p_CW.new_full(y_C1.shape, -1.0))
        return nll_C1[:, 0], p_CW.to(s_CW.dtype)

    def back(self, grad_CW: Tensor) -> Tensor:
        """The gradient with respect to hidden states [C, D], from that with respect to scores."""
        return grad_CW[:, : len(self._weight)] @ self._weight

    def add_(self, total_VD: Tensor, grad_CW: Tensor, hidden_CD: Tensor, *, first: bool = False) -> None:
        """Add the gradient with respect to the matrix to `total_VD` (float32), or write it there."""
        if grad_CW.dtype == total_VD.dtype:
            total_VD.addmm_(grad_CW[:, : self._vocab].T, hidden_CD, beta=0 if first else 1)
            return
        found_VD = (grad_CW.T @ hidden_CD.to(grad_CW.dtype))[: self._vocab]
        total_VD.copy_(found_VD) if first else total_VD.add_(found_VD)


class _ChunkedNll(torch.autograd.Function):
    """Sum of cross-entropies with one chunk of scores alive; gradients are made with the loss and kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, learn: bool) -> Tensor:
        dtype = products_of(weight)
        with torch.autocast(hidden.device.type, enabled=False):
            layer = OutputLayer(weight, dtype)
            loss = torch.zeros((), device=hidden.device)
            if learn:
                ctx.grad_hidden, ctx.grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
            for start in range(0, len(targets), layer.rows):
                some = slice(start, start + layer.rows)
                nll_C, g_CW = layer.surprise(hidden[some], targets[some])
                loss += nll_C.sum()
                if learn:
                    ctx.grad_hidden[some] = layer.back(g_CW)
                    layer.add_(ctx.grad_weight, g_CW, hidden[some])
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return ctx.grad_hidden * grad, ctx.grad_weight * grad, None, None


chunked_nll: Callable[[Tensor, Tensor, Tensor, bool], Tensor] = _ChunkedNll.apply
"""(hidden [N, D], weight float32 [V, D], targets int64 [N], whether gradients are wanted) -> sum of their losses."""
