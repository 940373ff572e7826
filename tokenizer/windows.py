"""Batches of token windows for training and scoring: a pure function of (seed, step).

A timeline that fits the context is one window. A longer one is cut into consecutive pieces with
another random phase in every epoch; each piece starts with the header (the static tokens and the
last age told before the piece), so the model always knows whom it reads. Pieces overlap by one
token, the last target of one being the first input of the next, so that every token after the
header is a target exactly once per epoch, but for the first one of a timeline.

A batch is a row of windows without padding; `lengths` tells where one ends, and attention must not
cross. Windows are shuffled, sorted by length inside pools of about 50 batches, and the batches
shuffled again: a batch holds windows of similar length, and every epoch mixes patients anew. No
polars, no torch.

Where some timelines are far longer than others, few patients would make most windows. With `per_patient` a patient has
at most so many in an epoch: the pieces of a longer timeline take turns, and are cut anew when all have had theirs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from tokenizer.codebook import Codebook
from tokenizer.errors import ConfigError
from tokenizer.store import TokenSplit

Ints = NDArray[np.int64]

NO_TARGET = -1
_POOL_BATCHES = 50


@dataclass(frozen=True)
class Batch:
    """Windows, one after the other.

    Attributes:
        tokens: int64 [N].
        targets: int64 [N], the next token; NO_TARGET in the header and at the end of a window.
        lengths: int64 [S], tokens per window; they sum to N.
        patients: int64 [S], each window's place in the split.
    """

    tokens: Ints
    targets: Ints
    lengths: Ints
    patients: Ints

    def windows(self, first: int, last: int) -> "Batch":
        """The windows from `first` up to, not including, `last`, as a batch of their own; nothing is copied."""
        ends = np.concatenate([[0], np.cumsum(self.lengths)])
        span = slice(ends[first], ends[last])
        return Batch(self.tokens[span], self.targets[span], self.lengths[first:last], self.patients[first:last])


@dataclass(frozen=True)
class _Plan:
    """An epoch: window w reads `length[w]` body tokens from `start[w]`; a batch is a run of `order`."""

    patient: Ints
    start: Ints
    length: Ints
    order: Ints
    bounds: Ints


class Windows:
    """Windows over a split.

    Args:
        split: The timelines.
        codebook: The codebook of its tokens.
        context: Longest window, header and all.
        batch_tokens: Most tokens in a batch.
        seed: Same seed, same batches.
        per_patient: Most windows of a patient in one epoch; None is all.

    Raises:
        ConfigError: A batch smaller than the context, or a context that a header fills.
    """

    def __init__(
        self,
        split: TokenSplit,
        codebook: Codebook,
        *,
        context: int,
        batch_tokens: int,
        seed: int,
        per_patient: int | None = None,
    ) -> None:
        if batch_tokens < context:
            raise ConfigError(
                f"A batch of {batch_tokens} tokens can't hold a window of {context}."
                " Raise batch_tokens or lower the context."
            )
        self._split, self._codebook = split, codebook
        self._context, self._batch_tokens, self._seed = context, batch_tokens, seed
        self._per_patient = per_patient
        kinds = np.array([token.kind for token in codebook.tokens])
        self._is_age = kinds == "age"
        self._statics, self._headers = self._measure_headers(kinds == "static")
        self._starts = [0]
        self._plans: dict[int, _Plan] = {}

    def steps(self, epoch: int) -> int:
        """Batches in an epoch; epochs differ by a few, as their windows are cut anew."""
        return len(self._plan(epoch).bounds) - 1

    def epoch(self, epoch: int) -> Sequence[Batch]:
        """The batches of an epoch, made one at a time as they are asked for."""
        return _Epoch(self, epoch)

    def batch(self, step: int) -> Batch:
        """The batch at a global step, counted over epochs from 0.

        Raises:
            IndexError: A negative step, or no window in the split.
        """
        epoch, at = self.locate(step)
        return self._make(epoch, at)

    def draw(self, patients: Ints, uniform: NDArray[np.float64]) -> Batch:
        """One window of each patient, all pieces alike: what a private step takes.

        Args:
            patients: int64 [S], places in the split; those without anything to predict are left out.
            uniform: float64 [S, 2] in [0, 1): where a timeline is cut, and which piece is taken.
        """
        offsets = np.asarray(self._split.offsets)
        targets = np.diff(offsets)[patients] - self._headers[patients] - 1
        keep = targets > 0
        patients, uniform, targets = patients[keep], uniform[keep], targets[keep]
        stride = np.maximum(self._context - self._headers[patients] - 1, 1)
        first = np.where(targets > stride, 1 + (uniform[:, 0] * stride).astype(np.int64), targets)
        nth = (uniform[:, 1] * (1 - (first - targets) // stride)).astype(np.int64)
        done = np.where(nth > 0, first + (nth - 1) * stride, 0)
        here = np.where(nth > 0, stride, first)
        start = offsets[patients] + self._headers[patients] + done
        return self._batch_of(patients, start, np.minimum(here, targets - done) + 1)

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch of a global step, and its place in there."""
        if step < 0:
            raise IndexError(f"step {step}")
        while self._starts[-1] <= step:
            fresh = self.steps(len(self._starts) - 1)
            if fresh == 0:
                raise IndexError("the split holds no window to train on")
            self._starts.append(self._starts[-1] + fresh)
        epoch = int(np.searchsorted(self._starts, step, side="right")) - 1
        return epoch, step - self._starts[epoch]

    def _measure_headers(self, is_static: NDArray[np.bool_]) -> tuple[Ints, Ints]:
        """Static tokens per timeline, and with the age that follows them."""
        offsets = self._split.offsets
        begin, end = offsets[:-1].astype(np.int64), offsets[1:]
        statics = np.zeros(len(begin), np.int64)
        growing = np.arange(len(begin))
        while len(growing):
            # EOT ends every timeline, so a run of statics stops before the end.
            here = self._split.tokens[begin[growing] + statics[growing]]
            growing = growing[is_static[here]]
            statics[growing] += 1
        headers = statics + self._is_age[self._split.tokens[begin + statics]]
        cut = (end - begin > self._context) & (headers > self._context - 2)
        if cut.any():
            raise ConfigError(
                f"A context of {self._context} tokens has no room beside a header of"
                f" {int(headers[cut].max())}. Choose a longer context."
            )
        return statics, headers

    def _plan(self, epoch: int) -> _Plan:
        if epoch not in self._plans:
            while len(self._plans) > 1:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = self._make_plan(epoch)
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> _Plan:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, epoch])))
        patient, start, length = self._cut(rng, epoch)
        total = self._headers[patient] + length
        order = rng.permutation(len(patient))
        filled = np.cumsum(total[order])
        pool = (filled - total[order]) // (_POOL_BATCHES * self._batch_tokens)
        order = order[np.lexsort((total[order], pool))]
        filled = np.cumsum(total[order])
        bounds = [0]
        while bounds[-1] < len(order):
            before = filled[bounds[-1] - 1] if bounds[-1] else 0
            bounds.append(int(np.searchsorted(filled, before + self._batch_tokens, side="right")))
        sizes = np.diff(bounds)
        shuffled = rng.permutation(len(sizes))
        firsts = np.array(bounds[:-1], np.int64)[shuffled]
        order = order[_ranges(firsts, sizes[shuffled])]
        return _Plan(patient, start, length, order, np.concatenate([[0], np.cumsum(sizes[shuffled])]))

    def _cut(self, rng: np.random.Generator, epoch: int) -> tuple[Ints, Ints, Ints]:
        """Windows in the order of patients: patient, place of the first body token, body tokens."""
        offsets = np.asarray(self._split.offsets)
        targets = np.diff(offsets) - self._headers - 1
        stride = np.maximum(self._context - self._headers - 1, 1)
        long = targets > stride
        # A long timeline's first piece has 1 to `stride` targets, later ones `stride`, the last the
        # rest.
        phase = rng.integers(1, stride, endpoint=True) if len(stride) else stride
        turn, epochs = self._turns(targets, stride, epoch)
        phase = np.where(epochs > 1, 1 + _hashed(self._seed, turn) % stride, phase)
        first = np.where(long, phase, targets)
        pieces = np.where(targets > 0, 1 + -(-(targets - first) // stride), 0)
        taken = pieces if self._per_patient is None else np.minimum(pieces, self._per_patient)
        patient = np.repeat(np.arange(len(pieces)), taken)
        nth = np.arange(len(patient)) - np.repeat(np.cumsum(taken) - taken, taken)
        if self._per_patient is not None:
            begin = epoch % np.maximum(epochs, 1) * self._per_patient
            nth = (begin[patient] + nth) % np.maximum(pieces, 1)[patient]
        done = np.where(nth > 0, first[patient] + (nth - 1) * stride[patient], 0)
        here = np.where(nth > 0, stride[patient], first[patient])
        start = (offsets[:-1] + self._headers)[patient] + done
        return patient, start, np.minimum(here, targets[patient] - done) + 1

    def _turns(self, targets: Ints, stride: Ints, epoch: int) -> tuple[Ints, Ints]:
        """How many epochs each patient's pieces need to have had their turn, and which turn this epoch is in."""
        if self._per_patient is None:
            return np.zeros_like(targets), np.ones_like(targets)
        most = 1 + -(-np.maximum(targets - 1, 0) // stride)
        epochs = np.where(targets > stride, -(-most // self._per_patient), 1)
        return epoch // epochs, epochs

    def _make(self, epoch: int, at: int) -> Batch:
        plan = self._plan(epoch)
        windows = plan.order[plan.bounds[at] : plan.bounds[at + 1]]
        return self._batch_of(plan.patient[windows], plan.start[windows], plan.length[windows])

    def _batch_of(self, patients: Ints, start: Ints, body: Ints) -> Batch:
        begin = np.asarray(self._split.offsets)[patients]
        statics = self._statics[patients]
        aged = self._headers[patients] - statics
        age = np.array(
            [
                self._last_age(*span) if has_age else 0
                for *span, has_age in zip(begin + statics, start, aged, strict=True)
            ],
            np.int64,
        )
        # Three runs a window: statics, age, body.
        places = _ranges(np.stack([begin, age, start], 1).ravel(), np.stack([statics, aged, body], 1).ravel())
        tokens = self._split.tokens[places].astype(np.int64)
        lengths = statics + aged + body
        ends = np.cumsum(lengths)
        targets = np.append(tokens[1:], NO_TARGET)[: len(tokens)]
        targets[_ranges(ends - lengths, statics + aged)] = NO_TARGET
        targets[ends - 1] = NO_TARGET
        return Batch(tokens, targets, lengths, patients)

    def _last_age(self, low: int, high: int) -> int:
        """Place of the last age token in [low, high); there is one at `low`."""
        if high - low == 1:
            return low
        return low + int(np.flatnonzero(self._is_age[self._split.tokens[low:high]])[-1])


class _Epoch(Sequence[Batch]):
    def __init__(self, windows: Windows, epoch: int) -> None:
        self._windows, self._epoch = windows, epoch

    def __len__(self) -> int:
        return self._windows.steps(self._epoch)

    @overload
    def __getitem__(self, at: int) -> Batch: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Batch]: ...
    def __getitem__(self, at: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(at, slice):
            return [self[place] for place in range(len(self))[at]]
        return self._windows._make(self._epoch, range(len(self))[at])

    def __iter__(self) -> Iterator[Batch]:
        for at in range(len(self)):
            yield self[at]


def _hashed(seed: int, turn: Ints) -> Ints:
    """A random number, 0 to 2^62, for every patient and its turn (the mixer of Steele et al., OOPSLA 2014)."""
    x: NDArray[Any] = (turn.astype(np.uint64) << np.uint64(40)) + np.arange(len(turn), dtype=np.uint64)
    x = (x + np.uint64(seed % 2**63)) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(2)).astype(np.int64)


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """The integers of all ranges [start, start + length), one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
