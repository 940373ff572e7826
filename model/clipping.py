"""Per-patient gradients of the decoder, clipped one by one and summed: what differential privacy needs of a step.

Every patient's gradient is made in full. Windows of some patients go through the decoder together, and when the
gradient of a layer's output arrives, the layer's weight gradient is made for each window apart (`model.shares`):
written into that patient's row of a buffer, or, on GPUs, made by kernels a tile at a time. That is the arithmetic of a
plain step in another order: no norms by inner products of activations ("ghost" norms), so no rule that
could be wrong where a weight is used twice. A tied embedding gets what both of its uses give, added up before the norm
is taken.

Notable choices:
- How many rows there are at once follows from a budget of bytes; large models have one at a time.
- Only layers that are known here get a gradient, and every parameter must belong to one: anything else is refused,
  because a parameter that is passed over would make the bound on a patient's share void without a sign.
- A patient's share is scaled by its own norm, and made smaller by more than rounding can make it larger.
- On CPUs a few threads take windows side by side, each with its part of the cores: the product of one short window is
  too small for all of them. Which thread takes which windows, and the order of sums, follow from lengths and threads.
- Dropout is refused: masks go by the place in the batch, so one patient more would change what others give.

What each patient gives depends on that patient's window only, but for rounding: which windows share a product can
change its last bits.

The idea of splitting the weight gradient by example inside the backward pass: Goodfellow, arXiv 1510.01799; Bu et al.,
arXiv 2210.00038, call it book-keeping where norms are taken without it.

Shapes: N flat tokens, S windows (one of each patient), P parameters, D width, V vocabulary.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from model.attention import has_kernels
from model.decoder import Decoder, Linear, RMSNorm
from model.loss import OutputLayer, products_of
from model.shares import Factored, Pass, Places, Rows, chunks
from tokenizer.errors import ConfigError

if TYPE_CHECKING:
    from tokenizer.windows import Batch

# Bytes of gradients of single patients that are alive at once: on CPUs, and on other devices, which need more work
# at a time to be busy.
BUDGET_BYTES = {"cpu": 256 << 20, "other": 4 << 30}
# Tokens that go through the decoder together, so that activations and rows don't add up to more than a plain step.
_GROUP_TOKENS = {"cpu": 2048, "other": 32768}
# Threads that take windows side by side. Between operations they wait for the interpreter's lock, so more gain little.
_MOST_TEAMS = 4
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
    factored: bool | None = None,
    autocast: Autocast = nullcontext,
) -> Clipped:
    """Sum the gradients of each patient's mean loss, each clipped to the norm `clip`.

    Args:
        decoder: its weights are not changed, and their `grad` is not touched.
        batch: one window of each patient.
        clip: largest Euclidean norm of a patient's share, over all parameters together.
        budget_bytes: for gradients of single patients; one at least is held. None takes `BUDGET_BYTES`.
        factored: whether gradients are kept as products (`model.shares`), for which there is no budget and which need
            Triton. None does so on GPUs where Triton is: whatever the batch, since a choice that one patient's window
            could tip would round everybody else's share in another way.
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
    weights = dict(decoder.named_parameters())
    _refuse_strangers(decoder, weights)
    places = Places(list(weights.values()))
    threads = torch.get_num_threads()
    device = decoder.embed_tokens.weight.device
    on_cpu = device.type == "cpu"
    if factored is None:
        factored = has_kernels(decoder.embed_tokens.weight)
    teams = max(1, min(_MOST_TEAMS, threads, len(batch.lengths))) if on_cpu and not factored else 1
    held = BUDGET_BYTES["cpu" if on_cpu else "other"] if budget_bytes is None else budget_bytes
    most = len(batch.lengths) if factored else max(1, held // (places.size * 4 * teams))
    shifts = _shifts(batch.lengths, teams, most, _GROUP_TOKENS["cpu" if on_cpu else "other"] // teams)
    norms, losses = np.zeros(len(batch.lengths)), np.zeros(len(batch.lengths))
    with _watched(decoder) as watch:

        def work(groups: list[np.ndarray]) -> Tensor:
            watch.book = book = _Book(decoder, places, factored)
            total = torch.zeros(places.size, device=device)
            for some in groups:  # grows
                losses[some] = book.fill(batch, some, autocast)
                groups += book.share(some, clip, norms, total)
            return total

        if teams == 1:
            return Clipped(places.split(work(shifts[0])), norms, losses)
        torch.set_num_threads(threads // teams)
        try:
            with ThreadPoolExecutor(teams) as pool:
                total, *others = pool.map(work, shifts)
        finally:
            torch.set_num_threads(threads)
    for other in others:
        total += other
    return Clipped(places.split(total), norms, losses)


def _shifts(lengths: np.ndarray, teams: int, most: int, tokens: int) -> list[list[np.ndarray]]:
    """What each team has to do: about as many tokens each, in groups of places that go together.

    A group has at most `most` windows of similar length, with at most so many tokens together, or one.
    """
    shifts: list[list[np.ndarray]] = [[] for _ in range(teams)]
    mine: list[list[int]] = [[] for _ in range(teams)]
    loads = [0] * teams
    for place in np.argsort(-lengths, kind="stable").tolist():
        team = loads.index(min(loads))
        mine[team].append(place)
        loads[team] += int(lengths[place])
    for shift, places in zip(shifts, mine, strict=True):
        ends = np.cumsum(lengths[places])
        first = 0
        while first < len(places):
            before = ends[first - 1] if first else 0
            fit = int(np.searchsorted(ends, before + tokens, side="right")) - first
            last = first + min(max(fit, 1), most)
            shift.append(np.array(places[first:last]))
            first = last
    return shifts


class _Book:
    """The rules that give each patient's gradient, layer by layer, to what keeps them; one for each thread."""

    def __init__(self, decoder: Decoder, places: Places, factored: bool) -> None:
        self._decoder = decoder
        self._device = decoder.embed_tokens.weight.device
        self._places = places
        self._kept: Rows | Factored = Factored(places) if factored else Rows(places)
        self._written: list[int] = []
        self._members_SN = torch.zeros(0, 0)
        self._leaf_ND = torch.zeros(0, 0)

    def fill(self, batch: "Batch", places: np.ndarray, autocast: Autocast) -> np.ndarray:
        """Keep the gradients of some windows' mean losses; gives these losses, float64 [S]."""
        part = _picked(batch, places)
        starts = np.cumsum(part.lengths) - part.lengths
        windows = Pass(part.lengths, np.add.reduceat(part.targets >= 0, starts, dtype=np.int64), self._device)
        self._written, self._members_SN = [], windows.members()
        self._kept.open(windows)
        tokens = torch.from_numpy(part.tokens).to(self._device)
        with autocast():
            hidden = self._decoder(tokens, torch.from_numpy(part.lengths))
            losses, grad = self._head(hidden.detach(), torch.from_numpy(part.targets).to(self._device), windows.asked)
        hidden.backward(grad)
        self._embedding(tokens, self._leaf_ND.grad)
        if sorted(self._written) != sorted(self._places.starts):
            raise ConfigError("clipping: a layer took no part in the step, or took part twice; its norm is unknown")
        return losses

    def share(self, places: np.ndarray, clip: float, norms: np.ndarray, total: Tensor) -> list[np.ndarray]:
        """Add clipped gradients of the windows that are kept to `total` [P] and note their norms.

        Returns:
            Windows to look at again, each alone: one of them is not finite, and which is seen only then.
        """
        norm = self._kept.squares().sqrt()
        norms[places] = norm.cpu().numpy()
        scale = (clip * (1.0 - _SAFETY) / norm.clamp(min=clip)).float()
        wrong = ~np.isfinite(norms[places])
        scale[torch.from_numpy(wrong)] = 0.0
        self._kept.add_(total, scale)
        return [places[[at]] for at in np.flatnonzero(wrong)] if len(places) > 1 else []

    def _head(self, hidden_ND: Tensor, targets: Tensor, counts: np.ndarray) -> tuple[np.ndarray, Tensor]:
        """Each window's mean loss, and the gradient of their sum; the output layer's own gradients are kept."""
        weight = self._wrote(self._decoder.head_weight)
        layer = OutputLayer(weight, products_of(weight))
        self._kept.begin_head(weight, layer)
        asked = (targets >= 0).nonzero().squeeze(1)
        part_A1 = torch.from_numpy(np.repeat(1.0 / np.maximum(counts, 1), counts)).to(hidden_ND)[:, None]
        nll_A = torch.empty(len(asked), device=self._device)
        grad_ND = torch.zeros_like(hidden_ND)
        with torch.autocast(self._device.type, enabled=False):
            for chunk in chunks(counts, layer.rows):
                some = asked[chunk]
                h_CD = hidden_ND[some]
                nll_A[chunk], g_CW = layer.surprise(h_CD, targets[some])
                grad_ND[some] = layer.back(g_CW).mul_(part_A1[chunk]).to(grad_ND.dtype)
                self._kept.head(chunk, g_CW, h_CD.mul_(part_A1[chunk]))
        shares = (nll_A * part_A1[:, 0]).double().cpu().split(counts.tolist())
        return np.array([float(share.sum()) for share in shares]), grad_ND

    def _embedding(self, tokens: Tensor, grad_ND: Tensor | None) -> None:
        assert grad_ND is not None
        weight, tied = self._decoder.embed_tokens.weight, self._decoder.lm_head is None
        if not tied:
            self._wrote(weight)
        self._kept.embedding(weight, tokens, grad_ND, tied)

    def embedded(self, out_ND: Tensor) -> Tensor:
        """Take the embedded tokens; gives the leaf that everything follows from."""
        self._leaf_ND = out_ND.detach().requires_grad_()
        return self._leaf_ND

    def linear(self, module: nn.Linear, x_NI: Tensor, out: Tensor) -> None:
        """Write the gradients of a layer down as soon as that of its output comes."""
        x_NI = x_NI.detach()

        def arrived(g_NO: Tensor) -> None:
            self._kept.linear(self._wrote(module.weight), g_NO, x_NI)
            if module.bias is not None:
                self._kept.summed(self._wrote(module.bias), self._members_SN @ g_NO.float())

        out.register_hook(arrived)

    def norm(self, module: RMSNorm, x_ND: Tensor, out: Tensor) -> None:
        """Write the gradient of a norm's weight down as soon as that of its output comes."""
        x_ND = x_ND.detach()

        def arrived(g_ND: Tensor) -> None:
            unit_ND = F.rms_norm(x_ND.float(), (x_ND.shape[-1],), eps=module.eps)
            self._kept.summed(self._wrote(module.weight), self._members_SN @ unit_ND.mul_(g_ND))

        out.register_hook(arrived)

    def _wrote(self, weight: Tensor) -> Tensor:
        self._written.append(id(weight))
        return weight


def _refuse_strangers(decoder: Decoder, weights: dict[str, nn.Parameter]) -> None:
    """Refuse parameters that belong to no layer with a rule."""
    known: set[int] = set()
    for module in decoder.modules():
        if type(module) in (Linear, nn.Embedding, RMSNorm):
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


class _Watch(threading.local):
    """Whose gradients a thread makes: hooks are the decoder's, which all threads share."""

    book: _Book


@contextmanager
def _watched(decoder: Decoder) -> Iterator[_Watch]:
    """Hand what layers do to the book of the thread that does it; no gradient of a weight is computed otherwise."""
    watch = _Watch()
    handles = [decoder.embed_tokens.register_forward_hook(lambda _module, _inputs, out: watch.book.embedded(out))]
    for module in decoder.modules():
        if isinstance(module, nn.Linear) and module is not decoder.lm_head:
            handles.append(module.register_forward_hook(lambda layer, x, out: watch.book.linear(layer, x[0], out)))
        elif isinstance(module, RMSNorm):
            handles.append(module.register_forward_hook(lambda layer, x, out: watch.book.norm(layer, x[0], out)))
    weights = [weight for weight in decoder.parameters() if weight.requires_grad]
    for weight in weights:
        weight.requires_grad_(False)
    try:
        yield watch
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        for handle in handles:
            handle.remove()
