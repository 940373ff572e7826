"""Sample the future of patients: many trajectories per prompt, each until its question is answered.

Notable choices:
- A prompt is computed once and shared by its trajectories (`model.lanes`, on GPUs `model.pool`). Rows that end leave at
  once and the next prompts move in, so a few long trajectories don't hold the others up.
- Every draw is a function of (seed, prompt key, trajectory, step) (`model.sampling`). Which rows share a batch changes
  logits by rounding only (about 1e-6), so a trajectory changes only if a draw falls that close to a boundary.
- When a window is full, its oldest tokens go, header tokens stay, and the rest is computed anew. What the decoder
  then sees is what it would see from scratch; no stale state survives.
- How long an interval lasts is drawn from the gaps of its class, which may be wide: with one time for all of "2-6mo",
  no event that follows it could come within 90 days. That a horizon passes is told as a chance, from all its times.
- The prompt's patient is known to have had no event between the last one and the prediction. While a trajectory's clock
  is before the prediction, only intervals that reach it (or the end of the timeline) can be drawn, each as probable as
  the model finds it times the share of its class that is as long: nothing is simulated into a time that is already
  known to be empty.
- Only tokens that the codebook's grammar allows can be drawn (`model.guide`): every trajectory is a valid timeline.

The module knows codes by masks only; what an outcome is, tasks decide.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from model.attention import has_kernels
from model.cache import Boarding, Cache
from model.clock import Clock
from model.decoder import Decoder
from model.guide import Guide, states_after
from model.head import Head
from model.lanes import Lanes
from model.machine import choose_precision
from model.sampling import pick, uniforms
from model.settings import Machine
from tokenizer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizer.codebook import Codebook
    from tokenizer.grammar import Grammar

# A full window keeps this share of the context: header tokens and the newest others.
_KEPT_SHARE = 0.75
# Trajectories under way at once, unless told otherwise.
_ROWS = 256
_ROWS_ON_DEVICES = 4096
ENCOUNTER_ENDS = ("ENCOUNTER_END", "HOSPITAL_DISCHARGE")
_NO_TOKENS = np.empty(0, dtype=np.int32)
_NO_TIMES = np.empty(0, dtype=np.int64)


class Reason(IntEnum):
    """Why a trajectory ended."""

    EVENT = 0
    HORIZON = 1
    END = 2
    CAP = 3


@dataclass(frozen=True)
class Prompt:
    """What is known of a patient at the prediction.

    Attributes:
        tokens: int64 [T], the history, header first; a history longer than the context loses its oldest events.
        elapsed_us: time from the last event to the prediction.
        key: number that the draws follow from; None takes the prompt's place in the list.
    """

    tokens: np.ndarray
    elapsed_us: int = 0
    key: int | None = None


@dataclass(frozen=True)
class Stop:
    """When a trajectory ends.

    Attributes:
        outcomes: bool [M] masks of the events that end it, over the nodes of the codebook's grammar (over tokens, [V],
            with a mere clock); the first that holds an event counts.
        horizon_us: time from the prediction after which nothing is of interest; None is no limit.
        max_tokens: most tokens of one trajectory.
        grid_us: ascending times from the prediction, by which chances are told apart; none for no such curve.
    """

    outcomes: Sequence[np.ndarray]
    horizon_us: int | None
    max_tokens: int
    grid_us: tuple[int, ...] = ()

    @classmethod
    def at_encounter_end(cls, codebook: "Codebook", *, horizon_us: int | None = None, max_tokens: int) -> "Stop":
        """A stop where the encounter ends: outcome 0 is its end, outcome 1 a death that comes first.

        Raises:
            ConfigError: the codebook knows no event that ends an encounter.
        """
        ends, death = codebook.matching(ENCOUNTER_ENDS), codebook.matching(("MEDS_DEATH",))
        if not ends.any():
            raise ConfigError(f"the codebook knows no end of an encounter ({' or '.join(ENCOUNTER_ENDS)})")
        return cls([ends, death & ~ends], horizon_us, max_tokens)


@dataclass(frozen=True)
class Rollouts:
    """How P x R trajectories ended.

    Attributes:
        reason: int8 [P, R], a `Reason`.
        event: int32 [P, R], index of the outcome that ended it, or -1.
        elapsed_us: int64 [P, R], time from the prediction to its end.
        tokens_sampled: int32 [P, R].
        chances: float64 [P, R, K + 1], for each of the K outcomes, and last for the horizon: the probabilities that
            the next token brings it, summed over the steps of the trajectory. Their mean over trajectories is the
            chance that a trajectory ends so. Where codes have several tokens, single ones may be below 0
            (`model.guide`).
        altered: what made the draws differ from the model's own probabilities (temperature, top_p); empty if nothing.
        tokens: int32 [sum], all sampled tokens in the order of `offsets`; None unless kept.
        passed_us: int64 [sum], the time that passes with each of them; None unless kept.
        offsets: int64 [P * R + 1]; None unless kept.
        curve: float64 [P, R, K, G], chances of each outcome by when it would come: cell g is behind `grid_us[g - 1]`
            and by `grid_us[g]`; None without a grid.
    """

    reason: np.ndarray
    event: np.ndarray
    elapsed_us: np.ndarray
    tokens_sampled: np.ndarray
    chances: np.ndarray
    altered: str = ""
    tokens: np.ndarray | None = None
    offsets: np.ndarray | None = None
    curve: np.ndarray | None = None
    passed_us: np.ndarray | None = None

    def trajectory(self, prompt: int, trajectory: int) -> np.ndarray:
        """Sampled tokens, int32, of one trajectory.

        Raises:
            ConfigError: when the rollout kept no tokens.
        """
        return self._of(self.tokens, prompt, trajectory)

    def passed(self, prompt: int, trajectory: int) -> np.ndarray:
        """Time in us, int64, that passes with each sampled token of one trajectory.

        Raises:
            ConfigError: when the rollout kept no tokens.
        """
        return self._of(self.passed_us, prompt, trajectory)

    def _of(self, kept: np.ndarray | None, prompt: int, trajectory: int) -> np.ndarray:
        if kept is None or self.offsets is None:
            raise ConfigError("this rollout kept no tokens; run it with keep_tokens=True")
        row = prompt * self.reason.shape[1] + trajectory
        return kept[self.offsets[row] : self.offsets[row + 1]]


@torch.inference_mode()
def rollout(
    decoder: Decoder,
    codebook: "Codebook | Clock",
    prompts: Sequence[Prompt],
    *,
    trajectories: int,
    stop: Stop,
    seed: int,
    first: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_rows: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    keep_tokens: bool = False,
    grammar: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Rollouts:
    """Sample `trajectories` continuations of every prompt.

    Args:
        decoder: the model, on any device.
        codebook: the codebook that the prompts were written with, or a clock, which knows no grammar.
        prompts: histories; no order is needed.
        trajectories: continuations per prompt (R).
        stop: when one ends.
        seed: of all draws.
        first: number of the first trajectory: 8 from 0 and 8 from 8 are the same draws as 16 from 0.
        temperature: divides the scores; 1 samples what the model believes.
        top_p: draw only from the most probable tokens that together reach this probability, among those that the
            grammar allows; 1 draws from all.
        batch_rows: most trajectories under way at once; memory is at most that many contexts of keys and values. None
            takes 256 on a CPU, and 4,096 on a GPU as far as its memory holds them.
        precision: of products and cache on GPUs; "auto" is bfloat16 where there are units for it. CPUs use float32.
        keep_tokens: return the sampled tokens too.
        grammar: draw only what the codebook's grammar allows.
        progress: called with (ended, all) trajectories whenever some have ended.

    Returns:
        Arrays of shape [P, R].

    Raises:
        ConfigError: for settings out of range, or masks of another vocabulary than the decoder's.
        DataError: for an empty prompt, one that breaks the grammar, tokens outside of the vocabulary, or scores that
            are not finite.
    """
    clock, rules = (codebook, None) if isinstance(codebook, Clock) else (Clock.of(codebook), codebook.grammar)
    if batch_rows is None:
        batch_rows = _ROWS if decoder.embed_tokens.weight.device.type == "cpu" else _ROWS_ON_DEVICES
    settings = _Settings(
        stop, trajectories, batch_rows, seed, first, temperature, top_p, precision, keep_tokens, grammar
    )
    settings.check(decoder, clock, rules)
    _check_prompts(prompts, decoder.config.vocab)
    run = _Run(decoder, clock, rules, prompts, settings)
    waiting = deque(_tasks(prompts, clock, decoder.config.context, trajectories, batch_rows))
    ended = 0
    while waiting or len(run.cache.rows):
        if tasks := run.cache.take(waiting):
            run.board(tasks)
        else:
            run.advance()
        waiting.extendleft(run.unload_full())
        if progress is not None and (now := int((run.reason >= 0).sum())) > ended:
            progress(ended := now, len(run.reason))
    return run.result()


@dataclass(frozen=True)
class _Settings:
    stop: Stop
    trajectories: int
    batch_rows: int
    seed: int
    first: int
    temperature: float
    top_p: float
    precision: Literal["auto", "fp32", "bf16"]
    keep_tokens: bool
    grammar: bool

    def altered(self) -> str:
        changes = {"temperature": self.temperature, "top_p": self.top_p}
        return ", ".join(f"{name} {value:g}" for name, value in changes.items() if value != 1.0)

    def check(self, decoder: Decoder, clock: Clock, rules: "Grammar | None") -> None:
        vocab, stop = decoder.config.vocab, self.stop
        if len(clock.never) != vocab:
            raise ConfigError(f"rollout: the codebook has {len(clock.never)} tokens, the decoder {vocab}")
        events = vocab if rules is None else rules.nodes
        for place, mask in enumerate(stop.outcomes):
            if mask.shape != (events,) or mask.dtype != np.bool_:
                raise ConfigError(f"rollout: outcome {place} is not a mask over {events} events")
        if min(stop.max_tokens, self.trajectories, self.batch_rows) < 1:
            raise ConfigError("rollout: max_tokens, trajectories and batch_rows must be at least 1")
        if self.temperature <= 0:
            raise ConfigError(f"rollout: the temperature is {self.temperature}; it must be positive")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"rollout: top_p is {self.top_p}; it must lie in (0, 1]")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"rollout: precision is auto, fp32 or bf16, not {self.precision!r}")
        if list(stop.grid_us) != sorted(stop.grid_us):
            raise ConfigError("rollout: the times of the grid must ascend")
        if stop.horizon_us is not None and stop.horizon_us < 0:
            raise ConfigError(f"rollout: the horizon is {stop.horizon_us} us; it must not be negative")


class _Run:
    """State of all rows; row p * R + r is trajectory r of prompt p."""

    def __init__(
        self,
        decoder: Decoder,
        clock: Clock,
        rules: "Grammar | None",
        prompts: Sequence[Prompt],
        settings: _Settings,
    ) -> None:
        stop, trajectories = settings.stop, settings.trajectories
        self._decoder, self._clock, self._settings = decoder, clock, settings
        self._shape = (len(prompts), trajectories)
        self._device = decoder.embed_tokens.weight.device
        behind = np.zeros(len(prompts), dtype=np.int64)
        if rules is not None:
            behind = states_after(rules, [prompt.tokens for prompt in prompts], strict=settings.grammar)
        self._guide = Guide(
            rules,
            stop.outcomes,
            np.repeat(behind, trajectories),
            masked=settings.grammar,
            never=clock.never,
            device=self._device,
        )
        self._guide.look_ahead(self._after)
        most = max(1, min(settings.batch_rows, len(prompts) * trajectories))
        self._head = Head(decoder, settings.temperature, settings.top_p, most)
        self.cache = _cache(decoder, most, settings, [len(prompt.tokens) for prompt in prompts])
        keys = [place if prompt.key is None else prompt.key for place, prompt in enumerate(prompts)]
        self._key = np.repeat(np.array(keys, dtype=np.int64), trajectories)
        self._trajectory = settings.first + np.tile(np.arange(trajectories), len(prompts))
        rows = len(self._key)
        self._now_us = -np.repeat(np.array([prompt.elapsed_us for prompt in prompts], dtype=np.int64), trajectories)
        self._count = np.zeros(rows, dtype=np.int64)
        self._newest = np.zeros(rows, dtype=np.int64)
        self._event = np.full(rows, -1, dtype=np.int32)
        self._chances = np.zeros((rows, len(stop.outcomes) + 1))
        self._grid = np.array(stop.grid_us, dtype=np.int64)
        self._curve = np.zeros((rows, len(stop.outcomes), len(self._grid)))
        self.reason = np.full(rows, -1, dtype=np.int8)
        # Of rows under way: the tokens drawn, in a slot each; the window, and how many of the drawn ones it holds.
        self._drawn = np.empty((most, stop.max_tokens), dtype=np.int32)
        self._passed = np.empty((most, stop.max_tokens if settings.keep_tokens else 0), dtype=np.int64)
        self._slot = np.full(rows, -1, dtype=np.int64)
        self._free_slots = list(range(most))
        self._window: dict[int, tuple[np.ndarray, int]] = {}
        self._kept: list[tuple[np.ndarray, np.ndarray]] | None = None
        if settings.keep_tokens:
            self._kept = [(_NO_TOKENS, _NO_TIMES)] * rows

    def _after(self, paths: Sequence[Sequence[int]]) -> np.ndarray:
        """Chances of the next token after some tokens of a patient of whom little else is known: float64 [S, V]."""
        header = self._clock.header()
        paths = [[*header, *path] for path in paths]
        lengths = torch.tensor([len(path) for path in paths])
        tokens = torch.tensor([token for path in paths for token in path], device=self._device)
        hidden = self._decoder(tokens, lengths)[lengths.cumsum(0).to(self._device) - 1]
        return torch.softmax(self._decoder.logits(hidden).double(), 1).cpu().numpy()

    def board(self, tasks: Sequence[Boarding]) -> None:
        """Compute windows and draw the first token of every row."""
        for task in tasks:
            for row in task.rows.tolist():
                self._window[row] = (task.window, int(self._count[row]))
                if self._slot[row] < 0:
                    self._slot[row] = self._free_slots.pop()
        hidden_BD = self.cache.board(tasks)
        self._draw(np.concatenate([task.rows for task in tasks]), hidden_BD)

    def advance(self) -> None:
        """Run the newest token of every row through the decoder and draw the next."""
        rows = self.cache.rows
        self._draw(rows, self.cache.advance(self._newest[rows]))

    def unload_full(self) -> list[Boarding]:
        """Take out the rows whose window has no place for the newest token; their shorter windows follow."""
        context = self._decoder.config.context
        full = self.cache.rows[self.cache.positions() >= context]
        tasks = []
        for row in full.tolist():
            window, held = self._window[row]
            grown = np.concatenate([window, self._drawn[self._slot[row], held : self._count[row]]])
            tasks.append(Boarding(self._clock.crop(grown, _kept_length(context)), np.array([row])))
        if tasks:
            self.cache.drop(full)
        return tasks

    def result(self) -> Rollouts:
        """Everything in the shape [P, R]."""
        reason, event, now_us, count = (
            x.reshape(self._shape) for x in (self.reason, self._event, self._now_us, self._count.astype(np.int32))
        )
        chances = self._chances.reshape(*self._shape, self._chances.shape[1])
        result = Rollouts(reason, event, now_us, count, chances, self._settings.altered())
        if len(self._grid):
            result = replace(result, curve=self._curve.reshape(*self._shape, *self._curve.shape[1:]))
        if self._kept is None:
            return result
        offsets = np.concatenate([[0], np.cumsum(self._count)])
        tokens, passed_us = (np.concatenate(part) for part in zip((_NO_TOKENS, _NO_TIMES), *self._kept, strict=True))
        return replace(result, tokens=tokens, offsets=offsets, passed_us=passed_us)

    def _draw(self, rows: np.ndarray, hidden_BD: Tensor) -> None:
        """Draw a token for each of `rows`, move their clocks, and drop those that end from the cache."""
        uniform = uniforms(self._settings.seed, self._key[rows], self._trajectory[rows], self._count[rows])
        token, end_chances = self._choose(rows, hidden_BD, uniform[0])
        self._chances[rows] += end_chances
        cell = np.searchsorted(self._grid, np.maximum(self._now_us[rows], 0), side="left")
        told = cell < len(self._grid)
        self._curve[rows[told], :, cell[told]] += end_chances[told, :-1]
        event, before = self._guide.advance(rows, token)
        # A token that only told what the one before it was is no part of the trajectory.
        self._newest[rows] = token
        more = rows[~before]
        passed_us = np.where(before, 0, self._clock.waits.draw(token, uniform[1], -self._now_us[rows]))
        self._drawn[self._slot[more], self._count[more]] = token[~before]
        if self._kept is not None:
            self._passed[self._slot[more], self._count[more]] = passed_us[~before]
        self._count[more] += 1
        self._now_us[rows] += passed_us
        reason = self._reasons(rows, token, event)
        self._event[rows] = np.where(reason == Reason.EVENT, event, -1)
        self.reason[rows] = reason
        ends = reason >= 0
        if ends.any():
            self._close(rows[ends])
            self.cache.drop(rows[ends])

    def _close(self, rows: np.ndarray) -> None:
        self._free_slots.extend(self._slot[rows].tolist())
        for row in rows.tolist():
            self._window.pop(row)
            if self._kept is not None:
                slot, count = self._slot[row], self._count[row]
                self._kept[row] = self._drawn[slot, :count].copy(), self._passed[slot, :count].copy()

    def _choose(self, rows: np.ndarray, hidden_BD: Tensor, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw the next tokens, int64 [B], and tell the chances of what may end each row, float64 [B, K + 1]."""
        places = self._guide.places(rows)
        narrow = np.zeros(len(rows), dtype=bool)
        if self._device.type == "cpu":  # on GPUs the product with all tokens costs less than sorting the rows
            narrow = self._guide.masks.is_narrow(places) & (self._now_us[rows] >= 0)
        # Rows whose next token is one of few stand last.
        order = np.argsort(narrow, kind="stable")
        if narrow.any():
            hidden_BD = hidden_BD[self._to_device(order)]
        token = np.empty(len(rows), dtype=np.int64)
        end_chances = np.empty((len(rows), self._chances.shape[1]))
        wide = len(rows) - int(narrow.sum())
        block = self._head.block
        for first in range(0, len(rows), block):
            part = order[first : first + block]
            before = max(0, min(wide - first, len(part)))
            chances_BV = self._head.chances(
                hidden_BD[first : first + block],
                self._guide.masks,
                places[part],
                before,
                self._silence(rows[part[:before]], places[part[:before]]),
            )
            token[part] = pick(chances_BV, uniform[part])
            end_chances[part] = self._end_chances(chances_BV[:, : self._decoder.config.vocab], rows[part])
        return token, end_chances

    def _end_chances(self, chances_BV: Tensor, rows: np.ndarray) -> np.ndarray:
        """Chance that the next token brings each outcome or, last, passes the horizon: float64 [B, K + 1]."""
        found, before = self._guide.chances(rows, chances_BV)
        late = np.zeros((len(rows), 1))
        waits, horizon_us = self._clock.waits, self._settings.stop.horizon_us
        if horizon_us is not None and len(waits.tokens):
            passing = chances_BV[:, self._to_device(waits.tokens)].cpu().numpy()
            now_us = self._now_us[rows]
            # Of the times that can be drawn: before the prediction, only those that reach it.
            share = waits.beyond(horizon_us - now_us) / waits.beyond(np.maximum(-now_us, 0) - 1).clip(min=1)
            late = (passing * share * ~before[:, None]).sum(1, keepdims=True)
        return np.concatenate([found, late], axis=1)

    def _reasons(self, rows: np.ndarray, token: np.ndarray, event: np.ndarray) -> np.ndarray:
        """Why each row ends at this token, or -1: a horizon that has passed hides the event behind it."""
        late = np.zeros(len(rows), dtype=bool)
        if self._settings.stop.horizon_us is not None:
            late = self._now_us[rows] > self._settings.stop.horizon_us
        conditions = {
            Reason.HORIZON: late,
            Reason.EVENT: event >= 0,
            Reason.END: token == self._clock.eot,
            Reason.CAP: self._count[rows] >= self._settings.stop.max_tokens,
        }
        return np.select(list(conditions.values()), [int(reason) for reason in conditions], -1).astype(np.int8)

    def _silence(self, rows: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of the rows lie before the prediction, int64 [E], and what that leaves of chances, float32 [E, V].

        These are logarithms: of the share of its class's times that reach the prediction, and -inf for all that takes
        no time. A code that is being spelled, or the event that an age announces, comes first: no time passes within.
        """
        now_us, waits = self._now_us[rows], self._clock.waits
        early = np.flatnonzero(now_us < 0) if len(waits.tokens) else np.empty(0, dtype=np.int64)
        left = np.full((len(early), self._decoder.config.vocab), -np.inf, dtype=np.float32)
        if not len(early):
            return early, left
        # A time that exceeds all classes takes several of the longest.
        enough = waits.beyond(np.minimum(-now_us[early], waits.times_us[-1, -1]) - 1)
        with np.errstate(divide="ignore"):
            left[:, waits.tokens] = np.log(enough / waits.times_us.shape[1])
        left[:, self._clock.eot] = 0.0
        stuck = (np.isneginf(left) | self._guide.masks.forbids(places[early])).all(1)
        return early[~stuck], left[~stuck]

    def _to_device(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(numbers).to(self._device)


def _cache(decoder: Decoder, most: int, settings: _Settings, lengths: Sequence[int]) -> Cache:
    """Pages on GPUs that Triton knows, lanes elsewhere."""
    device, config = decoder.embed_tokens.weight.device, decoder.config
    if not has_kernels(decoder.embed_tokens.weight):
        return Lanes(decoder, most)
    from model.pool import Pool

    precision = choose_precision(settings.precision, Machine(str(device)), config)
    # The token that tells what the one before it was comes on top.
    room = settings.stop.max_tokens + 1
    return Pool(decoder, most, room, [min(length, config.context) for length in lengths], precision)


def _check_prompts(prompts: Sequence[Prompt], vocab: int) -> None:
    for place, prompt in enumerate(prompts):
        if not len(prompt.tokens) or prompt.tokens.min() < 0 or prompt.tokens.max() >= vocab:
            raise DataError(f"prompt {place} is empty or holds tokens outside of 0..{vocab - 1}")
        if prompt.elapsed_us < 0:
            raise DataError(f"prompt {place}: its last event lies {-prompt.elapsed_us} us after the prediction")


def _tasks(
    prompts: Sequence[Prompt], clock: Clock, context: int, trajectories: int, batch_rows: int
) -> Iterator[Boarding]:
    """The prompts' windows, longest first so that similar lengths share a lane, with at most `batch_rows` rows each."""
    for place in sorted(range(len(prompts)), key=lambda place: -len(prompts[place].tokens)):
        tokens = prompts[place].tokens.astype(np.int64)
        window = clock.crop(tokens, _kept_length(context)) if len(tokens) > context else tokens
        rows = place * trajectories + np.arange(trajectories)
        for first in range(0, trajectories, batch_rows):
            yield Boarding(window, rows[first : first + batch_rows])


def _kept_length(context: int) -> int:
    return max(1, int(context * _KEPT_SHARE))
