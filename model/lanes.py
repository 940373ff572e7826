"""Keys and values of trajectories that are under way.

A lane holds some windows (prompts, computed once) and the rows (trajectories) that continue them. All rows of one
window attend to the same stored keys; what a row has sampled since lies in its own suffix. The two partial attentions
are joined through their log-sum-exps, which is exact. A row that ends is overwritten by the last one, so a lane is
always dense. Two lanes merge by padding the shorter suffixes on the left.

Shapes: W windows, T longest window, B rows, C columns of the suffix, L layers, H query heads, G key/value heads, K head
width. Storage is `[L, 2, W, G, T, K]` and `[L, 2, B, G, C, K]`, where the 2 are keys and values.
"""

from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from model.cache import Boarding, filled, prefill, take_rows
from model.decoder import Decoder

# Masked scores; finite, so that a block of masked keys alone can't make 0/0 inside the fused kernel.
_HIDDEN = -1e30
_FIRST_COLUMNS = 32
_MOST_LANES = 6
_NO_ROWS = np.empty(0, dtype=np.int64)


class Lanes:
    """A `model.cache.Cache`: rows that boarded together share a lane, and small neighbours in age are merged.

    Args:
        decoder: whose keys and values they are.
        most: rows under way at once.
    """

    def __init__(self, decoder: Decoder, most: int) -> None:
        self._decoder, self._most = decoder, most
        self._lanes: list[Lane] = []

    @property
    def rows(self) -> np.ndarray:
        """int64 [B], the caller's numbers of the rows under way."""
        return np.concatenate([_NO_ROWS, *(lane.rows for lane in self._lanes)])

    def take(self, waiting: deque[Boarding]) -> list[Boarding]:
        """Take from the front what should board now."""
        return take_rows(waiting, len(self.rows), self._most)

    def board(self, tasks: Sequence[Boarding]) -> Tensor:
        """Compute windows and let their rows in: their last hidden states, float32 [sum R, D]."""
        lengths = np.array([len(task.window) for task in tasks])
        owner = np.repeat(np.arange(len(tasks)), [len(task.rows) for task in tasks])
        config, weight = self._decoder.config, self._decoder.embed_tokens.weight
        prefix = weight.new_zeros(config.layers, 2, len(tasks), config.kv_heads, int(lengths.max()), config.head_width)

        def store(layer: int, window: Tensor, position: Tensor, k: Tensor, v: Tensor) -> None:
            prefix[layer, 0][window, :, position] = k
            prefix[layer, 1][window, :, position] = v

        last_WD = prefill(self._decoder, [task.window for task in tasks], store)
        self._lanes.append(Lane(prefix, lengths, owner, np.concatenate([task.rows for task in tasks])))
        return last_WD.index_select(0, torch.from_numpy(owner).to(weight.device))

    def advance(self, tokens: np.ndarray) -> Tensor:
        """Run each row's newest token (int64 [B]) through the decoder: hidden states, float32 [B, D]."""
        sizes = [len(lane) for lane in self._lanes]
        device, positions = self._decoder.embed_tokens.weight.device, self.positions()
        for lane in self._lanes:
            lane.reserve()

        def attend(layer: int, *qkv: Tensor) -> Tensor:
            parts = zip(self._lanes, *(x.split(sizes) for x in qkv), strict=True)
            return torch.cat([lane.attend(layer, q, k, v) for lane, q, k, v in parts])

        token_B, position_B = (torch.from_numpy(x).to(device) for x in (tokens, positions))
        return self._decoder.run(token_B, position_B, attend)

    def drop(self, rows: np.ndarray) -> None:
        """Forget rows by their numbers, and merge lanes while there are too many."""
        for lane in self._lanes:
            dead = np.isin(lane.rows, rows)
            if dead.any():
                lane.drop(dead)
        lanes = [lane for lane in self._lanes if len(lane)]
        while len(lanes) > _MOST_LANES:
            pair = min(range(len(lanes) - 1), key=lambda place: len(lanes[place]) + len(lanes[place + 1]))
            lanes[pair].absorb(lanes.pop(pair + 1))
        self._lanes = lanes

    def positions(self) -> np.ndarray:
        """int64 [B], the position that each row's next token takes in its window."""
        return np.concatenate([_NO_ROWS, *(lane.positions() for lane in self._lanes)])


class Lane:
    """Rows in lockstep: each call of the decoder appends one token to every row.

    Args:
        prefix: float32 [L, 2, W, G, T, K], keys and values of the windows, zeros behind their ends.
        window: int64 [W], tokens in each window.
        owner: int64 [B], the window that each row continues.
        rows: int64 [B], the caller's number of each row.
    """

    def __init__(self, prefix: Tensor, window: np.ndarray, owner: np.ndarray, rows: np.ndarray) -> None:
        self.rows = rows
        self._prefix = prefix
        self._window = window
        self._columns = 0
        layers, two, _, kv_heads, _, head_width = prefix.shape
        self._suffix = prefix.new_empty(layers, two, len(owner), kv_heads, _FIRST_COLUMNS, head_width)
        self._owner = owner
        self._pad = np.zeros(len(owner), dtype=np.int64)
        self._arrange()

    def __len__(self) -> int:
        return len(self._owner)

    def positions(self) -> np.ndarray:
        """int64 [B], the position that each row's next token takes in its window."""
        return self._window[self._owner] + self._columns - self._pad

    def reserve(self) -> None:
        """Make room for one more column; call once before each pass of the decoder."""
        if self._columns == self._suffix.shape[4]:
            layers, two, _, kv_heads, columns, width = self._suffix.shape
            grown = self._suffix.new_empty(layers, two, len(self), kv_heads, 2 * columns, width)
            grown[..., :columns, :] = self._suffix[:, :, : len(self)]
            self._suffix = grown
        self._columns += 1

    def attend(self, layer: int, q_BHK: Tensor, k_BGK: Tensor, v_BGK: Tensor) -> Tensor:
        """Store the newest keys and values of a layer; attend to window and suffix: `[B, H, K]`."""
        rows, heads, width = q_BHK.shape
        kv_heads = k_BGK.shape[1]
        # Rows x heads beside each other: keys and values [B G, C, K] are views of the storage.
        keys, values = self._suffix[layer, :, :rows].flatten(1, 2)[:, :, : self._columns]
        keys[:, -1], values[:, -1] = k_BGK.flatten(0, 1), v_BGK.flatten(0, 1)
        first = int(self._pad.min())
        own, own_lse = attention_of_few(
            q_BHK.reshape(rows * kv_heads, -1, width), keys[:, first:], values[:, first:], self._row_bias(first)
        )
        grid = q_BHK.new_zeros(self._grid * len(self._window), heads, width)
        grid[self._place] = q_BHK
        # The query heads that share a key head stand beside the rows that share a window: one block of queries.
        grid = grid.view(-1, self._grid, kv_heads, heads // kv_heads, width).transpose(1, 2).flatten(2, 3)
        keys, values = self._prefix[layer]
        shared, shared_lse = attention_with_lse(grid, keys, values, self._window_bias)
        return _join(
            own.reshape(rows, heads, width),
            own_lse.reshape(rows, heads),
            self._to_rows(shared),
            self._to_rows(shared_lse),
        )

    def drop(self, dead: np.ndarray) -> None:
        """Remove rows (bool [B]), and windows without rows; the others change places."""
        order = filled(dead)
        _gather_rows_(self._suffix, order)
        self.rows, self._owner, self._pad = self.rows[order], self._owner[order], self._pad[order]
        used = np.zeros(len(self._window), dtype=bool)
        used[self._owner] = True
        if not used.all():
            windows = filled(~used)
            _gather_rows_(self._prefix, windows)
            self._prefix = self._prefix[:, :, : len(windows)]
            self._window = self._window[windows]
            new_index = np.empty(len(used), dtype=np.int64)
            new_index[windows] = np.arange(len(windows))
            self._owner = new_index[self._owner]
        self._arrange()

    def absorb(self, other: "Lane") -> None:
        """Take over the rows of another lane, behind the own ones."""
        sizes = [(lane._prefix.shape[2], lane._prefix.shape[4]) for lane in (self, other)]
        layers, two, _, kv_heads, _, width = self._prefix.shape
        shape = (layers, two, sizes[0][0] + sizes[1][0], kv_heads, max(t for _, t in sizes), width)
        prefix = self._prefix.new_zeros(shape)
        prefix[:, :, : sizes[0][0], :, : sizes[0][1]] = self._prefix
        prefix[:, :, sizes[0][0] :, :, : sizes[1][1]] = other._prefix
        columns = max(self._columns, other._columns)
        room = max(self._suffix.shape[4], other._suffix.shape[4])
        suffix = self._suffix.new_zeros(layers, two, len(self) + len(other), kv_heads, room, width)
        for lane, rows in ((self, slice(0, len(self))), (other, slice(len(self), None))):
            used = lane._suffix[:, :, : len(lane), :, : lane._columns]
            suffix[:, :, rows, :, columns - lane._columns : columns] = used
        self._pad = np.concatenate([lane._pad + columns - lane._columns for lane in (self, other)])
        self.rows = np.concatenate([self.rows, other.rows])
        self._owner = np.concatenate([self._owner, other._owner + len(self._window)])
        self._window = np.concatenate([self._window, other._window])
        self._prefix, self._suffix, self._columns = prefix, suffix, columns
        self._arrange()

    def _arrange(self) -> None:
        """Recompute where rows lie in the grid [W, rows per window] and which keys are padding."""
        count = np.bincount(self._owner, minlength=len(self._window))
        order = np.argsort(self._owner, kind="stable")
        rank = np.empty(len(order), dtype=np.int64)
        rank[order] = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
        device = self._prefix.device
        self._grid = int(count.max()) if len(order) else 0
        self._place = torch.from_numpy(self._owner * self._grid + rank).to(device)
        self._window_bias: Tensor | None = None
        longest = int(self._window.max()) if len(self._window) else 0
        self._prefix = self._prefix[:, :, :, :, :longest]
        if (self._window < longest).any():
            hidden = np.where(np.arange(longest) < self._window[:, None], 0.0, _HIDDEN).astype(np.float32)
            self._window_bias = torch.from_numpy(hidden).to(device)[:, None, None]
        self._padded = torch.from_numpy(self._pad).to(device) if self._pad.any() else None

    def _row_bias(self, first: int) -> Tensor | None:
        if self._padded is None:
            return None
        column = torch.arange(first, self._columns, device=self._padded.device)
        hidden = torch.where(column < self._padded[:, None], _HIDDEN, 0.0).to(self._suffix.dtype)
        return hidden.repeat_interleave(self._suffix.shape[3], 0)[:, None]

    def _to_rows(self, grid: Tensor) -> Tensor:
        """`[W, G, rows x heads, ...]` of the grid back to `[B, H, ...]`."""
        split = grid.unflatten(2, (self._grid, -1)).transpose(1, 2).flatten(2, 3)
        return split.flatten(0, 1)[self._place]


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention of a few queries to many keys, and the log-sum-exp of its scores.

    Args:
        q: float32 [B, G, Q, K].
        k: float32 [B, G, T, K].
        v: float32 [B, G, T, K].
        bias: float32 [B, 1, 1, T], added to the scores; None adds nothing.

    Returns:
        Output [B, G, Q, K] and natural log-sum-exp [B, G, Q].
    """
    if q.device.type == "cpu":
        # The kernel behind scaled_dot_product_attention, called by name because only so it gives the log-sum-exp.
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, attn_mask=bias)
        return out, lse
    return plain_attention_with_lse(q, k, v, bias)


def attention_of_few(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same for one or few queries per block, where the fused kernel wastes most of its tile.

    Args:
        q: float32 [N, Q, K].
        k: float32 [N, T, K].
        v: float32 [N, T, K].
        bias: float32 [N, 1, T], added to the scores; None adds nothing.

    Returns:
        Output [N, Q, K] and natural log-sum-exp [N, Q, 1].
    """
    scores = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2))
    if bias is not None:
        scores += bias
    most = scores.amax(2, keepdim=True)
    total = scores.sub_(most).exp_().sum(2, keepdim=True)
    return torch.bmm(scores, v).div_(total), total.log_().add_(most)


def plain_attention_with_lse(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by its definition, for devices without the kernel."""
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


def _join(own: Tensor, own_lse: Tensor, shared: Tensor, shared_lse: Tensor) -> Tensor:
    share = torch.sigmoid(own_lse - shared_lse)[..., None]
    return torch.lerp(shared, own, share)


def _gather_rows_(storage: Tensor, order: np.ndarray) -> None:
    moved = np.flatnonzero(order != np.arange(len(order)))
    if len(moved):
        storage[:, :, torch.from_numpy(moved)] = storage[:, :, torch.from_numpy(order[moved])]
