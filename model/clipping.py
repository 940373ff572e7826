"""Per-patient gradients of the decoder, clipped one by one and summed: what differential privacy needs of a step.

Every patient's gradient is made in full, a few patients at a time. Their windows go through the decoder together, and
when the gradient of a layer's output arrives, the layer's weight gradient is computed for each window apart, straight
into that patient's row of one buffer. That is the arithmetic of a plain step in another order: no norms by inner
products of activations ("ghost" norms), so no rule that could be wrong where a weight is used twice. A tied embedding
gets what both of its uses give, added up before the norm is taken.

Notable choices:
- How many patients are under way at once follows from a budget of bytes; large models have one at a time.
- Only layers that are known here get a gradient, and every parameter must belong to one: anything else is refused,
  because a parameter that is passed over would make the bound on a patient's share void without a sign.
- A patient's share is scaled by its own norm, and made smaller by more than rounding can make it larger.
- Dropout is refused: masks go by the place in the batch, so one patient more would change what others give.

What each patient gives depends on that patient's window only, but for rounding: which windows share a product can
change its last bits.

The idea of splitting the weight gradient by example inside the backward pass: Goodfellow, arXiv 1510.01799; Bu et al.,
arXiv 2210.00038, call it book-keeping where norms are taken without it.

Shapes: N flat tokens, S windows (one of each patient), P parameters, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.decoder import Decoder, RMSNorm
from model.loss import OutputLayer, products_of
from tokenizer.errors import ConfigError

if TYPE_CHECKING:
    from tokenizer.windows import Batch

# Bytes of gradients of single patients that are alive at once: on CPUs, and on other devices, which need more work
# at a time to be busy.
BUDGET_BYTES = {"cpu": 256 << 20, "other": 4 << 30}
# Tokens that go through the decoder together, so that activations and rows don't add up to more than a plain step.
_GROUP_TOKENS = {"cpu": 2048, "other": 32768}
# Shares are made smaller by this part of themselves, more than float32 rounds norms down and shares up by.
_SAFETY = 2.0**-16

Autocast = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Clipped:
    """The sum of clipped gradients over the patients of a batch.

    Attributes:
        gradients: float32, one per parameter of the decoder, in its order.
        norms: float64 [S], each patient's norm before clipping, in the order of the batch.
        losses: float64 [S], each patient's mean loss in nats per target; 0 without targets.
    """

    gradients: list[Tensor]
    norms: np.ndarray
    losses: np.ndarray


def clipped_sum(
    decoder: Decoder,
    batch: "Batch",
    clip: float,
    *,
    budget_bytes: int | None = None,
    autocast: Autocast = nullcontext,
) -> Clipped:
    """Sum the gradients of each patient's mean loss, each clipped to the norm `clip`.

    Args:
        decoder: its weights are not changed, and their `grad` is not touched.
        batch: one window of each patient.
        clip: largest Euclidean norm of a patient's share, over all parameters together.
        budget_bytes: for gradients of single patients; one at least is held. None takes `BUDGET_BYTES`.
        autocast: makes the context in which the decoder computes.

    Returns:
        The sum, which one patient changes by a vector of at most this norm (add or remove); norms and losses are of
        single patients and must not leave the site. A patient whose gradient is not finite has no share: to stop there
        would tell of the patient, as whoever chose the weights may have meant it to.

    Raises:
        ConfigError: two windows of one patient, dropout, or a parameter without a rule.
    """
    if len(np.unique(batch.patients)) != len(batch.patients):
        raise ConfigError("clipping: a patient has several windows in the batch; take one of each")
    if clip <= 0:
        raise ConfigError(f"clipping: the norm must be positive, not {clip}")
    if decoder.config.dropout:
        raise ConfigError("clipping: dropout masks would let one patient change others' shares; set dropout to 0")
    book = _Book(decoder)
    total = torch.zeros(book.size, device=decoder.embed_tokens.weight.device)
    kind = "cpu" if total.device.type == "cpu" else "other"
    norms, losses = np.zeros(len(batch.lengths)), np.zeros(len(batch.lengths))
    most = max(1, (BUDGET_BYTES[kind] if budget_bytes is None else budget_bytes) // (book.size * 4))
    groups = list(_groups(batch, most, _GROUP_TOKENS[kind]))
    for places in groups:  # grows
        losses[places] = book.fill(batch, places, autocast)
        norm = book.norms()
        norms[places] = norm.cpu().numpy()
        scale = (clip * (1.0 - _SAFETY) / norm.clamp(min=clip)).float()
        if (wrong := ~np.isfinite(norms[places])).any():
            # Whether it was this patient or one beside it is seen when each is alone; such a share is nothing.
            groups += [places[[at]] for at in np.flatnonzero(wrong)] if len(places) > 1 else []
            book.rows[torch.from_numpy(wrong)] = 0.0
            scale[torch.from_numpy(wrong)] = 0.0
        total.addmv_(book.rows.T, scale)
    return Clipped(book.split(total), norms, losses)


def _groups(batch: "Batch", most: int, tokens: int) -> Iterator[np.ndarray]:
    """Places of windows that go together, of similar length: at most so many, with at most so many tokens or one."""
    order = np.argsort(-batch.lengths, kind="stable")
    ends = np.cumsum(batch.lengths[order])
    first = 0
    while first < len(order):
        before = ends[first - 1] if first else 0
        fit = int(np.searchsorted(ends, before + tokens, side="right")) - first
        last = first + min(max(fit, 1), most)
        yield order[first:last]
        first = last


def _chunks(counts: np.ndarray, most: int) -> Iterator[slice]:
    """Cut runs of so many positions each into chunks of at most so many, where a run ends if that is possible."""
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


class _Book:
    """The gradients of some patients, one row each, and the rules that fill them.

    Attributes:
        size: P.
        rows: float32 [S, P], the gradients of the windows that `fill` took last.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._device = decoder.embed_tokens.weight.device
        weights = dict(decoder.named_parameters())
        _refuse_strangers(decoder, weights)
        self._shapes = [weight.shape for weight in weights.values()]
        starts = np.cumsum([0, *(shape.numel() for shape in self._shapes)]).tolist()
        self.size = starts[-1]
        self._places = {id(weight): start for weight, start in zip(weights.values(), starts, strict=False)}
        self._buffer = torch.empty(0, self.size, device=self._device)
        self.rows = self._buffer
        self._spans: list[slice] = []
        self._written: list[int] = []
        self._squares = torch.zeros(0)
        # Norms of the rows of the output layer's or embedding's gradient, of each window.
        self._lengths_SV = torch.zeros(0)

    def norms(self) -> Tensor:
        """Euclidean norms of the rows, float64 [S]."""
        return self._squares.sqrt()

    def split(self, flat: Tensor) -> list[Tensor]:
        """A vector [P] as tensors in the shapes of the parameters."""
        parts = flat.split([shape.numel() for shape in self._shapes])
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def fill(self, batch: "Batch", places: np.ndarray, autocast: Autocast) -> np.ndarray:
        """Put the gradients of some windows' mean losses into `rows`; gives these losses, float64 [S]."""
        part = _picked(batch, places)
        ends = np.cumsum(part.lengths)
        self._spans = [slice(*span) for span in np.stack([ends - part.lengths, ends], 1).tolist()]
        self._written = []
        if len(self._buffer) < len(places):
            self._buffer = torch.empty(len(places), self.size, device=self._device)
        self.rows = self._buffer[: len(places)]
        self._squares = torch.zeros(len(places), dtype=torch.float64, device=self._device)
        self._lengths_SV = torch.empty(len(places), self._decoder.config.vocab, device=self._device)
        tokens = torch.from_numpy(part.tokens).to(self._device)
        with _frozen(self._decoder), self._watching() as leaves, autocast():
            hidden = self._decoder(tokens, torch.from_numpy(part.lengths))
            losses, grad = self._head(hidden.detach(), torch.from_numpy(part.targets).to(self._device))
        hidden.backward(grad)
        self._embedding(tokens, leaves[0].grad)
        if sorted(self._written) != sorted(self._places):
            raise ConfigError("clipping: a layer took no part in the step, or took part twice; its norm is unknown")
        return losses

    def _head(self, hidden_ND: Tensor, targets: Tensor) -> tuple[np.ndarray, Tensor]:
        """Each window's mean loss, and the gradient of their sum; the output layer's own gradients go to `rows`."""
        weight = self._decoder.head_weight
        layer = OutputLayer(weight, products_of(weight))
        asked = (targets >= 0).nonzero().squeeze(1)
        counts = np.add.reduceat((targets >= 0).cpu().numpy(), [span.start for span in self._spans], dtype=np.int64)
        ends = np.cumsum(counts)
        part_A1 = torch.from_numpy(np.repeat(1.0 / np.maximum(counts, 1), counts)).to(hidden_ND)[:, None]
        nll_A = torch.empty(len(asked), device=self._device)
        grad_ND = torch.zeros_like(hidden_ND)
        rows = self._rows_of(weight)
        with torch.autocast(self._device.type, enabled=False):
            for chunk in _chunks(counts, layer.rows):
                some = asked[chunk]
                h_CD = hidden_ND[some]
                nll_A[chunk], g_CW = layer.surprise(h_CD, targets[some])
                grad_ND[some] = layer.back(g_CW).mul_(part_A1[chunk]).to(grad_ND.dtype)
                h_CD *= part_A1[chunk]
                first, last = np.searchsorted(ends, [chunk.start, chunk.stop - 1], side="right")
                for row in range(first, last + 1):
                    begin = ends[row] - counts[row]
                    if not counts[row]:
                        continue
                    mine = slice(max(0, begin - chunk.start), ends[row] - chunk.start)
                    layer.add_(rows[row], g_CW[mine], h_CD[mine], first=begin >= chunk.start)
                    if ends[row] <= chunk.stop:
                        self._lengths_SV[row] = torch.linalg.vector_norm(rows[row], dim=1)
        for row in np.flatnonzero(counts == 0):
            rows[row].zero_()
            self._lengths_SV[row] = 0.0
        losses = [float(part.sum(dtype=torch.float64)) for part in (nll_A * part_A1[:, 0]).split(counts.tolist())]
        return np.array(losses), grad_ND

    def _embedding(self, tokens: Tensor, grad_ND: Tensor | None) -> None:
        assert grad_ND is not None
        weight = self._decoder.embed_tokens.weight
        if self._decoder.lm_head is None:
            # The other use of the same weight has written its part already.
            self._written.remove(id(weight))
            rows = self._rows_of(weight)
        else:
            self._squares += self._lengths_SV.double().square().sum(1)
            self._lengths_SV.zero_()
            rows = self._rows_of(weight).zero_()
        for row, span in enumerate(self._spans):
            mine = tokens[span]
            rows[row].index_add_(0, mine, grad_ND[span].float())
            self._lengths_SV[row, mine] = torch.linalg.vector_norm(rows[row][mine], dim=1)
        self._squares += self._lengths_SV.double().square().sum(1)

    @contextmanager
    def _watching(self) -> Iterator[list[Tensor]]:
        """Write gradients down as they come; gives the embedded tokens, the leaf that everything follows from."""
        leaves: list[Tensor] = []

        def embedded(_module: nn.Module, _inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
            leaves.append(out.detach().requires_grad_())
            return leaves[0]

        handles = [self._decoder.embed_tokens.register_forward_hook(embedded)]
        for module in self._decoder.modules():
            if isinstance(module, nn.Linear) and module is not self._decoder.lm_head:
                handles.append(module.register_forward_hook(self._linear))
            elif isinstance(module, RMSNorm):
                handles.append(module.register_forward_hook(self._norm))
        try:
            yield leaves
        finally:
            for handle in handles:
                handle.remove()

    def _linear(self, module: nn.Linear, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        x_NI = inputs[0].detach()

        def arrived(g_NO: Tensor) -> None:
            weights = self._rows_of(module.weight)
            for row, span in enumerate(self._spans):
                if g_NO.dtype == x_NI.dtype == torch.float32:
                    torch.mm(g_NO[span].T, x_NI[span], out=weights[row])
                else:
                    weights[row] = g_NO[span].T @ x_NI[span].to(g_NO.dtype)
            self._measure(weights)
            if module.bias is not None:
                biases = self._rows_of(module.bias)
                for row, span in enumerate(self._spans):
                    biases[row] = g_NO[span].sum(0, dtype=torch.float32)
                self._measure(biases)

        out.register_hook(arrived)

    def _norm(self, module: RMSNorm, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        x_ND = inputs[0].detach()

        def arrived(g_ND: Tensor) -> None:
            unit_ND = F.rms_norm(x_ND.float(), (x_ND.shape[-1],), eps=module.eps)
            unit_ND *= g_ND
            weights = self._rows_of(module.weight)
            for row, span in enumerate(self._spans):
                weights[row] = unit_ND[span].sum(0)
            self._measure(weights)

        out.register_hook(arrived)

    def _measure(self, rows: Tensor) -> None:
        """Add to the squares of all norms, while what was written is still in the caches."""
        # Float32 sums are exact enough over a thousand numbers, not over millions; float64 costs twenty times as much.
        self._squares += torch.linalg.vector_norm(rows, dim=-1).double().square().reshape(len(rows), -1).sum(1)

    def _rows_of(self, weight: Tensor) -> Tensor:
        """Every patient's gradient of a parameter, to be written: a view [S, *shape]."""
        start = self._places[id(weight)]
        self._written.append(id(weight))
        return self.rows[:, start : start + weight.numel()].unflatten(1, weight.shape)


def _refuse_strangers(decoder: Decoder, weights: dict[str, nn.Parameter]) -> None:
    """Refuse parameters that belong to no layer with a rule."""
    known: set[int] = set()
    for module in decoder.modules():
        if type(module) in (nn.Linear, nn.Embedding, RMSNorm):
            known |= {id(weight) for weight in module.parameters(recurse=False)}
    if strange := [name for name, weight in weights.items() if id(weight) not in known]:
        raise ConfigError(
            f"clipping: there is no exact rule for {', '.join(strange)}; train without privacy, or add one"
        )


def _picked(batch: "Batch", places: np.ndarray) -> "Batch":
    starts = np.cumsum(batch.lengths) - batch.lengths
    at = np.concatenate([np.arange(starts[place], starts[place] + batch.lengths[place]) for place in places])
    return replace(
        batch, tokens=batch.tokens[at], targets=batch.targets[at],
        lengths=batch.lengths[places], patients=batch.patients[places],
    )  # fmt: skip


@contextmanager
def _frozen(decoder: Decoder) -> Iterator[None]:
    """No gradient of a weight is computed: only those of activations."""
    weights = [weight for weight in decoder.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
