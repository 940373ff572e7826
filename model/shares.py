"""Where the gradients of single patients are while they are under way: written out, or as products.

`Rows` writes every patient's gradient into a row of one buffer, and takes its norm while it is in the caches: on a CPU
that costs less than to compute anything twice. `Factored` keeps what a gradient is the product of, and lets kernels
make it twice, for the norm and for the sum (`model.segments`): on a GPU products are cheap; moves and kernels are not.

Both take the gradient of each weight from the same calls. What a layer's bias or norm gets is small: it is handed over
summed, a row for each window.

Shapes: N flat tokens, S windows (one of each patient), A positions with a target, C of them in a chunk, P parameters, O
outputs, I inputs, V vocabulary, W its columns in a chunk of scores, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from model.loss import OutputLayer

if TYPE_CHECKING:
    from model.segments import Products


@dataclass(frozen=True)
class Pass:
    """The windows that are under way together.

    Attributes:
        lengths: int64 [S], tokens of each.
        asked: int64 [S], positions of each that have a target.
        device: where the decoder is.
    """

    lengths: np.ndarray
    asked: np.ndarray
    device: torch.device

    def spans(self) -> list[slice]:
        """Each window's tokens."""
        ends = np.cumsum(self.lengths)
        return [slice(*span) for span in np.stack([ends - self.lengths, ends], 1).tolist()]

    def ends(self, counts: np.ndarray) -> Tensor:
        """Where windows of so many places begin and the last ends, int64 [S + 1]."""
        return torch.from_numpy(np.append(0, np.cumsum(counts))).to(self.device)

    def members(self) -> Tensor:
        """1 where a token belongs to a window, float32 [S, N]: sums over every window are a product with it."""
        which = torch.from_numpy(np.repeat(np.arange(len(self.lengths)), self.lengths)).to(self.device)
        return (which == torch.arange(len(self.lengths), device=self.device)[:, None]).float()


class Places:
    """Where each parameter lies in a flat vector of all."""

    def __init__(self, weights: list[Tensor]) -> None:
        self.shapes = [weight.shape for weight in weights]
        starts = np.cumsum([0, *(shape.numel() for shape in self.shapes)]).tolist()
        self.size: int = starts[-1]
        self.starts: dict[int, int] = {id(weight): start for weight, start in zip(weights, starts, strict=False)}

    def of(self, flat: Tensor, weight: Tensor) -> Tensor:
        """The part [..., *shape] of `flat` [..., P] that is the weight's."""
        start = self.starts[id(weight)]
        return flat[..., start : start + weight.numel()].unflatten(-1, weight.shape)

    def split(self, flat: Tensor) -> list[Tensor]:
        """A vector [P] as tensors in the shapes of the parameters."""
        parts = flat.split([shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Rows:
    """Gradients written out, a row [P] for each window."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._buffer = torch.empty(0)

    def open(self, windows: Pass) -> None:
        """Forget what was there and begin with other windows."""
        self._windows, self._spans = windows, windows.spans()
        count = len(self._spans)
        if len(self._buffer) < count:
            self._buffer = torch.empty(count, self._places.size, device=windows.device)
        self._rows = self._buffer[:count]
        self._squares = torch.zeros(count, dtype=torch.float64, device=windows.device)
        # Norms of the rows of the output layer's or embedding's gradient, of each window.
        self._lengths_SV = torch.zeros(count, 0)

    def linear(self, weight: Tensor, g_NO: Tensor, x_NI: Tensor) -> None:
        """Take a layer's gradient: that of its outputs, and its inputs."""
        rows = self._places.of(self._rows, weight)
        # Views made all at once: one by one they would take as long as a small product.
        lengths = self._windows.lengths.tolist()
        for row_OI, g_OT, x_TI in zip(rows.unbind(), g_NO.T.split(lengths, 1), x_NI.split(lengths), strict=True):
            if g_NO.dtype == x_NI.dtype == torch.float32:
                torch.mm(g_OT, x_TI, out=row_OI)
            else:
                row_OI.copy_(g_OT @ x_TI.to(g_NO.dtype))
        self._measure(rows)

    def summed(self, weight: Tensor, sums_SI: Tensor) -> None:
        """Take a small gradient of every window, float32."""
        rows = self._places.of(self._rows, weight)
        rows.copy_(sums_SI)
        self._measure(rows)

    def begin_head(self, weight: Tensor, layer: OutputLayer) -> None:
        """Say which matrix the output layer has, before its gradients come."""
        self._head, self._layer, asked = self._places.of(self._rows, weight), layer, self._windows.asked
        self._lengths_SV = torch.zeros(len(asked), len(weight), device=self._windows.device)
        for row in np.flatnonzero(asked == 0):
            self._head[row].zero_()

    def head(self, chunk: slice, g_CW: Tensor, h_CD: Tensor) -> None:
        """Take the output layer's gradient from some of the positions with a target, in their order."""
        rows, asked = self._head, self._windows.asked
        ends = np.cumsum(asked)
        for row in np.flatnonzero((asked > 0) & (ends > chunk.start) & (ends - asked < chunk.stop)):
            begin = ends[row] - asked[row]
            mine = slice(max(0, begin - chunk.start), ends[row] - chunk.start)
            self._layer.add_(rows[row], g_CW[mine], h_CD[mine], first=begin >= chunk.start)
            if ends[row] <= chunk.stop:
                self._lengths_SV[row] = torch.linalg.vector_norm(rows[row], dim=1)

    def embedding(self, weight: Tensor, tokens: Tensor, e_ND: Tensor, tied: bool) -> None:
        """Take the embedding's gradient, after that of `head`: added to it where both are one matrix."""
        rows = self._places.of(self._rows, weight)
        if not tied:
            self._squares += self._lengths_SV.double().square().sum(1)
            self._lengths_SV.zero_()
            rows.zero_()
        for row, span in enumerate(self._spans):
            mine = tokens[span]
            rows[row].index_add_(0, mine, e_ND[span].float())
            self._lengths_SV[row, mine] = torch.linalg.vector_norm(rows[row][mine], dim=1)
        self._squares += self._lengths_SV.double().square().sum(1)

    def squares(self) -> Tensor:
        """Squared Euclidean norm of each window's gradient, float64 [S]."""
        return self._squares

    def add_(self, total: Tensor, factors_S: Tensor) -> None:
        """Add every window's gradient times its factor to `total` [P]; factor 0 is nothing at all."""
        # By index: a mask would pass over the whole buffer.
        self._rows.index_fill_(0, (factors_S == 0).nonzero()[:, 0], 0.0)
        total.addmv_(self._rows.T, factors_S)

    def _measure(self, rows: Tensor) -> None:
        # Float32 sums are exact enough over a thousand numbers, not over millions; float64 costs twenty times as much.
        self._squares += torch.linalg.vector_norm(rows, dim=-1).double().square().reshape(len(rows), -1).sum(1)


class Factored:
    """Gradients as products, made by kernels when their norms are taken and when they are added up."""

    def __init__(self, places: Places) -> None:
        from model.segments import Products

        self._places, self._made = places, Products

    def open(self, windows: Pass) -> None:
        """Forget what was there and begin with other windows."""
        self._windows = windows
        self._ends, self._asked_ends = windows.ends(windows.lengths), windows.ends(windows.asked)
        self._squares = torch.zeros(len(windows.lengths), dtype=torch.float64, device=windows.device)
        self._products: list[tuple[Tensor, Products]] = []
        self._sums: list[tuple[Tensor, Tensor]] = []

    def linear(self, weight: Tensor, g_NO: Tensor, x_NI: Tensor) -> None:
        """Take a layer's gradient: that of its outputs, and its inputs."""
        self._take(weight, self._made(g_NO.contiguous(), x_NI.to(g_NO.dtype).contiguous(), self._ends))

    def summed(self, weight: Tensor, sums_SI: Tensor) -> None:
        """Take a small gradient of every window, float32."""
        self._sums.append((weight, sums_SI))
        self._squares += torch.linalg.vector_norm(sums_SI, dim=1).double().square()

    def begin_head(self, weight: Tensor, layer: OutputLayer) -> None:
        """Say which matrix the output layer has, before its gradients come."""
        total = int(self._windows.asked.sum())
        self._head = weight
        self._scores_AW = torch.empty(total, layer.columns, dtype=layer.dtype, device=self._windows.device)
        self._hidden_AD = self._scores_AW.new_empty(total, weight.shape[1])

    def head(self, chunk: slice, g_CW: Tensor, h_CD: Tensor) -> None:
        """Take the output layer's gradient from some of the positions with a target, in their order."""
        self._scores_AW[chunk], self._hidden_AD[chunk] = g_CW, h_CD

    def embedding(self, weight: Tensor, tokens: Tensor, e_ND: Tensor, tied: bool) -> None:
        """Take the embedding's gradient, after that of `head`: added to it where both are one matrix."""
        table = (tokens, e_ND.to(self._scores_AW.dtype).contiguous(), self._ends)
        if tied:
            self._take(weight, self._made(self._scores_AW, self._hidden_AD, self._asked_ends, *table))
            return
        self._take(self._head, self._made(self._scores_AW, self._hidden_AD, self._asked_ends))
        nothing = torch.zeros_like(self._ends)
        self._take(weight, self._made(self._scores_AW[:0], self._hidden_AD[:0], nothing, *table))

    def squares(self) -> Tensor:
        """Squared Euclidean norm of each window's gradient, float64 [S]."""
        return self._squares

    def add_(self, total: Tensor, factors_S: Tensor) -> None:
        """Add every window's gradient times its factor to `total` [P]; factor 0 is nothing at all."""
        for weight, products in self._products:
            products.add_(self._places.of(total, weight), factors_S)
        for weight, sums_SI in self._sums:
            self._places.of(total, weight).addmv_(sums_SI.masked_fill(factors_S[:, None] == 0, 0.0).T, factors_S)

    def _take(self, weight: Tensor, products: "Products") -> None:
        self._products.append((weight, products))
        self._squares += products.squares()


def chunks(counts: np.ndarray, most: int) -> Iterator[slice]:
    """Cut runs of so many places each into chunks of at most so many, where a run ends if that is possible."""
    start, end = 0, 0
    for count in counts.tolist():
        if end > start and end + count - start > most:
            yield slice(start, end)
            start = end
        end += count
        while end - start > most:
            yield slice(start, start + most)
            start += most
    if end > start:
        yield slice(start, end)
