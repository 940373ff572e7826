"""Keys and values of trajectories on a GPU: pages from one pool, and a decode step that is one CUDA graph.

Windows (prompts, computed once) and rows (trajectories) have tables of pages (Kwon et al., PagedAttention, SOSP 2023).
When rows end, the others move together by their numbers alone; nothing is copied. A row's pages are set aside when it
boards, so a step never waits for memory. Linear layers and the cache are bfloat16 where that is asked for; the residual
stream, norms and softmax stay float32.

Shapes: B rows, W windows, L layers, G key/value heads, K head width, D width, P pages.
"""

import copy
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from model.cache import Boarding, filled, prefill, take_rows
from model.decoder import Decoder
from model.pages import PAGE, own, rows_per_tile, shared
from model.settings import Precision
from tokenizer.errors import ConfigError

# Of the memory that is free, what the cache may take.
_MEMORY_SHARE = 0.8
_MOST_PARTS = 8
_SMALLEST_GRAPH = 8
_NOWHERE = -1


class Pool:
    """A `model.cache.Cache` for CUDA devices (and, without a graph and slowly, for Triton's interpreter on CPUs).

    Args:
        decoder: whose keys and values they are.
        most: rows under way at once, if memory allows.
        room: most tokens that a row appends.
        windows: tokens in each of the windows that will board, as far as known.
        precision: of the linear layers and the cache.

    Raises:
        ConfigError: when memory doesn't hold even one full context.
    """

    def __init__(self, decoder: Decoder, most: int, room: int, windows: Sequence[int], precision: Precision) -> None:
        config, self._device = decoder.config, decoder.embed_tokens.weight.device
        self._config, self._most, self._room, self._narrow = config, most, room, precision == "bf16"
        self._decoder = _narrowed(decoder) if self._narrow else decoder
        row_pages, window_pages = _pages(min(room, config.context)), _pages(config.context)
        wanted = most * row_pages + sum(sorted(map(_pages, windows))[-most:])
        pages = self._affordable(wanted, row_pages + window_pages)
        dtype = torch.bfloat16 if self._narrow else torch.float32
        shape = (config.layers, 2, pages, config.kv_heads, PAGE, config.head_width)
        self._cache = torch.empty(shape, dtype=dtype, device=self._device)
        self._free = np.arange(pages)[::-1].copy()
        self._available = pages
        # Windows by their slots.
        self._window_length = np.zeros(most, dtype=np.int64)
        self._window_table = np.zeros((most, window_pages), dtype=np.int32)
        self._rows_of_window = np.zeros(most, dtype=np.int64)
        # Rows by their places.
        self.rows = np.empty(0, dtype=np.int64)
        self._window = np.empty(0, dtype=np.int64)
        self._own = np.empty(0, dtype=np.int64)
        self._held = np.empty(0, dtype=np.int64)
        self._table = np.zeros((0, max(row_pages, 1)), dtype=np.int32)
        tile_rows = rows_per_tile(config.heads, config.kv_heads)
        self._on_device = _Numbers(most, self._table.shape[1], window_pages, tile_rows, self._device)
        self._moved = True
        self._tiles = 0
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def take(self, waiting: deque[Boarding]) -> list[Boarding]:
        """Take from the front what should board now and finds pages; a window with many rows may board in parts."""
        tasks, available = take_rows(waiting, len(self.rows), self._most), self._available
        taken: list[Boarding] = []
        for place, task in enumerate(tasks):
            window, each = _pages(len(task.window)), self._pages_of_row(task)
            fits = len(task.rows) if each == 0 else min(len(task.rows), (available - window) // each)
            if fits < len(task.rows):
                waiting.extendleft(reversed(tasks[place + 1 :]))
                fits = 0 if taken else max(fits, 0)
                waiting.appendleft(Boarding(task.window, task.rows[fits:]))
                return [*taken, Boarding(task.window, task.rows[:fits])] if fits else taken
            taken.append(task)
            available -= window + each * len(task.rows)
        return taken

    def board(self, tasks: Sequence[Boarding]) -> Tensor:
        """Compute windows and let their rows in: their last hidden states, float32 [sum R, D]."""
        slots = np.flatnonzero(self._rows_of_window == 0)[: len(tasks)]
        for slot, task in zip(slots, tasks, strict=True):
            pages = self._claim(_pages(len(task.window)))
            self._window_table[slot, : len(pages)] = pages
            self._window_length[slot] = len(task.window)
            self._rows_of_window[slot] = len(task.rows)
        self._on_device.windows(self._window_length, self._window_table)
        table = torch.from_numpy(self._window_table[slots]).to(self._device)

        def store(layer: int, window: Tensor, position: Tensor, *kv: Tensor) -> None:
            page = table[window, position // PAGE].long()
            for kind, x_NGK in enumerate(kv):
                self._cache[layer, kind][page, :, position % PAGE] = x_NGK.to(self._cache.dtype)

        with self._autocast():
            last_WD = prefill(self._decoder, [task.window for task in tasks], store)
        counts = np.array([len(task.rows) for task in tasks])
        held = np.repeat([self._pages_of_row(task) for task in tasks], counts)
        table_new = np.zeros((len(held), self._table.shape[1]), dtype=np.int32)
        for row, many in enumerate(held):
            table_new[row, :many] = self._claim(many)
        self.rows = np.concatenate([self.rows, *(task.rows for task in tasks)])
        self._window = np.concatenate([self._window, np.repeat(slots, counts)])
        self._own = np.concatenate([self._own, np.zeros(len(held), dtype=np.int64)])
        self._held = np.concatenate([self._held, held])
        self._table = np.concatenate([self._table, table_new])
        self._moved = True
        owner = torch.from_numpy(np.repeat(np.arange(len(tasks)), counts)).to(self._device)
        return last_WD.float().index_select(0, owner)

    def advance(self, tokens: np.ndarray) -> Tensor:
        """Run each row's newest token (int64 [B]) through the decoder: float32 [B, D], until the next call."""
        size, numbers = _graph_size(len(tokens), self._most), self._on_device
        if self._moved:
            self._tiles = numbers.place(self._window, self._table)
            self._moved = False
        numbers.next(tokens, self.positions(), self._own)
        programs = self._tiles * self._config.kv_heads
        parts = 1
        while parts < _MOST_PARTS and parts * programs < _processors(self._device):
            parts *= 2
        hidden_BD = self._step(size, parts)
        self._own += 1
        return hidden_BD[: len(tokens)]

    def drop(self, rows: np.ndarray) -> None:
        """Forget rows by their numbers; the others close the gaps."""
        dead = np.isin(self.rows, rows)
        for place in np.flatnonzero(dead):
            self._release(self._table[place, : self._held[place]])
        slots, gone = np.unique(self._window[dead], return_counts=True)
        self._rows_of_window[slots] -= gone
        for slot in slots[self._rows_of_window[slots] == 0]:
            self._release(self._window_table[slot, : _pages(self._window_length[slot])])
        order = filled(dead)
        self.rows, self._window, self._own, self._held, self._table = (
            x[order] for x in (self.rows, self._window, self._own, self._held, self._table)
        )
        self._moved = True

    def positions(self) -> np.ndarray:
        """int64 [B], the position that each row's next token takes in its window."""
        return self._window_length[self._window] + self._own

    def _affordable(self, wanted: int, least: int) -> int:
        """As many pages as are wanted and fit."""
        config = self._config
        bytes_per_page = config.layers * 2 * config.kv_heads * PAGE * config.head_width * (2 if self._narrow else 4)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            fits = int(torch.cuda.mem_get_info(self._device)[0] * _MEMORY_SHARE) // bytes_per_page
            if fits < least:
                needed, found = (many * bytes_per_page / 2**30 for many in (least, fits))
                raise ConfigError(
                    f"rollout: a context of {config.context} tokens needs {needed:.1f} GiB for keys and values, and "
                    f"{found:.1f} GiB can be had on {self._device}; free memory there, or take a larger GPU"
                )
            return min(max(wanted, least), fits)
        return max(wanted, least)

    def _pages_of_row(self, task: Boarding) -> int:
        return _pages(min(self._room, self._config.context - len(task.window)))

    def _claim(self, many: int) -> np.ndarray:
        self._available -= many
        return self._free[self._available : self._available + many]

    def _release(self, pages: np.ndarray) -> None:
        self._free[self._available : self._available + len(pages)] = pages
        self._available += len(pages)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._narrow)

    def _step(self, size: int, parts: int) -> Tensor:
        if self._device.type != "cuda":
            return self._decode(size, parts)
        if (size, parts) not in self._graphs:
            # What a graph records must have run before: kernels are compiled, libraries are set up.
            side = torch.cuda.Stream(self._device)
            side.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(side):
                self._decode(size, parts)
            torch.cuda.current_stream(self._device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            memory = next((known.pool() for known, _ in self._graphs.values()), None)
            with torch.cuda.graph(graph, pool=memory):
                hidden_BD = self._decode(size, parts)
            self._graphs[size, parts] = (graph, hidden_BD)
        graph, hidden_BD = self._graphs[size, parts]
        graph.replay()
        return hidden_BD

    def _decode(self, size: int, parts: int) -> Tensor:
        numbers = self._on_device

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pages, dtype = self._cache[layer], self._cache.dtype
            q, k, v = (x.to(dtype) for x in (q, k, v))
            partial = shared(q.contiguous(), pages, numbers.window_table, numbers.window_length, numbers.tiles, parts)
            return own((q, k, v), pages, numbers.table, numbers.own[:size], partial)

        with self._autocast():
            return self._decoder.run(numbers.tokens[:size], numbers.positions[:size], attend).float()


class _Numbers:
    """What a step reads, at fixed places of the device's memory."""

    def __init__(self, most: int, row_pages: int, window_pages: int, tile_rows: int, device: torch.device) -> None:
        self._steps = _Mirror((3, most), np.int64, device)
        self._rows = _Mirror((most, row_pages), np.int32, device)
        self._windows = _Mirror((most, window_pages), np.int32, device)
        self._lengths = _Mirror((most,), np.int32, device)
        # A tile begins with each window and wherever one is full: never more than rows.
        self._members = _Mirror((most, tile_rows), np.int32, device)
        self._tile_window = _Mirror((most,), np.int32, device)
        self._count = _Mirror((1,), np.int32, device)
        self._tile_rows = tile_rows
        self.tokens, self.positions, self.own = self._steps.device
        self.table, self.window_table = self._rows.device, self._windows.device
        self.window_length = self._lengths.device
        self.tiles = (self._members.device, self._tile_window.device, self._count.device)

    def next(self, tokens: np.ndarray, positions: np.ndarray, own_tokens: np.ndarray) -> None:
        """Bring the next step's numbers to the device."""
        host = self._steps.host
        host[:2] = 0
        host[2] = _NOWHERE
        host[:, : len(tokens)] = tokens, positions, own_tokens
        self._steps.send()

    def windows(self, lengths: np.ndarray, table: np.ndarray) -> None:
        """Bring the windows' lengths and pages to the device; no row meets a window that is gone."""
        self._lengths.host[:] = lengths
        self._windows.host[:] = table
        self._lengths.send()
        self._windows.send()

    def place(self, window: np.ndarray, table: np.ndarray) -> int:
        """Bring the rows' pages to the device and sort the rows into tiles; gives the number of tiles."""
        order = np.argsort(window, kind="stable")
        slots, counts = np.unique(window, return_counts=True)
        rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        tiles_each = -(-counts // self._tile_rows)
        first_tile = np.cumsum(tiles_each) - tiles_each
        tile = np.repeat(first_tile, counts) + rank // self._tile_rows
        count = int(tiles_each.sum())
        self._members.host[:count] = _NOWHERE
        self._members.host[tile, rank % self._tile_rows] = order
        self._tile_window.host[:count] = np.repeat(slots, tiles_each)
        self._count.host[0] = count
        self._rows.host[: len(table)] = table
        for mirror in (self._members, self._tile_window, self._count, self._rows):
            mirror.send()
        return count


class _Mirror:
    """An array here and its copy on the device, written in one go from memory that stays where it is."""

    def __init__(self, shape: tuple[int, ...], dtype: type, device: torch.device) -> None:
        numbers = torch.from_numpy(np.zeros(shape, dtype=dtype))
        self._pinned = numbers.pin_memory() if device.type == "cuda" else numbers
        self.host = self._pinned.numpy()
        self.device = torch.zeros(shape, dtype=numbers.dtype, device=device)

    def send(self) -> None:
        """Copy; the array may be written again only after the device has caught up."""
        self.device.copy_(self._pinned, non_blocking=True)


def _narrowed(decoder: Decoder) -> Decoder:
    """A copy whose linear layers are bfloat16; embedding and norms stay as they are."""
    narrow = copy.deepcopy(decoder)
    for module in narrow.layers.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return narrow


def _pages(tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-int(tokens) // PAGE)


def _graph_size(rows: int, most: int) -> int:
    """The rows of the graph that serves: two sizes per doubling, so that at most a third stands idle."""
    size = _SMALLEST_GRAPH
    while size < rows:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return min(size, most)


def _processors(device: torch.device) -> int:
    return 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
