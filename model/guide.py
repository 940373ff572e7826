"""Holds trajectories to the codebook's grammar, and tells which of the events asked for they have reached.

Each row has a state of the grammar. Its mask of forbidden tokens is computed once per distinct state and kept on the
device. An outcome is a mask over events, not tokens: several tokens may spell a code, and a row has reached an outcome
as soon as every way to go on spells one of its codes. Where a code is an outcome and a longer one isn't (or the other
way), the token after it tells which it was.

Chances count a code that is begun (N17, of N17.9) as what will probably come of it, and take that back when the next
token tells: otherwise a code of several tokens would have no chance until its first ones are drawn, and a rare outcome
none in most trajectories. What a beginning is worth are fixed numbers from the decoder (`Guide.look_ahead`). Whatever
they are, what is added and taken back has mean zero (a control variate; Glasserman, Monte Carlo Methods in Financial
Engineering, 2003, section 4.1); the better they fit, the less varies.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tokenizer.errors import DataError

if TYPE_CHECKING:
    from tokenizer.grammar import Grammar

# Masks kept at once (58 MB at a vocabulary of 7,105); more distinct ones than that are met rarely.
_MOST_MASKS = 2048
# A mask that leaves at most so many tokens is narrow: their scores alone cost less than all.
FEW = 64


class Masks:
    """What may be drawn: a table of distinct masks on the device, filled as states are met.

    Args:
        never: bool [V], tokens that are forbidden in any state; mask 0 forbids no others.
        states: how many states there can be.
        device: where scores are.
    """

    def __init__(self, never: np.ndarray, states: int, device: torch.device) -> None:
        self._never, self._device = never, device
        self._place = np.empty(states, dtype=np.int32)
        self._forget()

    def _forget(self) -> None:
        self._place.fill(-1)
        self._known: dict[bytes, int] = {}
        self._bias = torch.empty(0, len(self._never), device=self._device)
        self._few = np.empty((0, FEW), dtype=np.int64)
        self._count = np.empty(0, dtype=np.int64)
        self._add(~self._never[None])

    def places(self, states: np.ndarray, allowed: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Place of each state's mask in the table, int64 [B]; `allowed` gives bool [S, V] for states not met before."""
        place = self._place[states]
        if (place < 0).any():
            new = np.unique(states[place < 0])
            if len(new) + len(self._bias) > _MOST_MASKS:
                self._forget()
                new = np.unique(states)
            self._place[new] = self._add(allowed(new) & ~self._never)
            place = self._place[states]
        return place.astype(np.int64)

    def _add(self, allowed: np.ndarray) -> list[int]:
        """Place of each mask (bool [S, V]) in the table; equal masks share one."""
        contents, fresh = [mask.tobytes() for mask in np.packbits(allowed, axis=1)], []
        for n, content in enumerate(contents):
            if content not in self._known:
                self._known[content] = len(self._known)
                fresh.append(n)
        bias = np.where(allowed[fresh], np.float32(0), np.float32(-np.inf))
        self._bias = torch.cat([self._bias, torch.from_numpy(bias).to(self._device)])
        few = np.zeros((len(fresh), FEW), dtype=np.int64)
        for n, mask in enumerate(allowed[fresh]):
            some = np.flatnonzero(mask)[:FEW]
            few[n, : len(some)] = some
        self._few = np.concatenate([self._few, few])
        self._count = np.concatenate([self._count, allowed[fresh].sum(1)])
        return [self._known[content] for content in contents]

    def hide_(self, scores_BV: Tensor, places: np.ndarray) -> None:
        """Set the scores of forbidden tokens to minus infinity."""
        if (places == places[0]).all():
            scores_BV += self._bias[places[0]]
        else:
            scores_BV += self._bias.index_select(0, torch.from_numpy(places).to(self._device))

    def forbids(self, places: np.ndarray) -> np.ndarray:
        """Forbidden tokens: bool [B, V]."""
        return torch.isinf(self._bias[torch.from_numpy(places).to(self._device)]).cpu().numpy()

    def is_narrow(self, places: np.ndarray) -> np.ndarray:
        """Masks that leave at most `FEW` tokens, but one at least: bool [B]."""
        count = self._count[places]
        return (count > 0) & (count <= FEW)

    def few(self, places: np.ndarray) -> tuple[Tensor, Tensor]:
        """Tokens that narrow masks allow, int64 [B, A], and 0 or, behind their ends, minus infinity: float32 [B, A]."""
        count = self._count[places]
        most = int(count.max())
        bias = np.where(np.arange(most) < count[:, None], np.float32(0), np.float32(-np.inf))
        return tuple(torch.from_numpy(x).to(self._device) for x in (self._few[places, :most], bias))  # type: ignore[return-value]


class Guide:
    """The states of all rows of a rollout.

    Args:
        grammar: of the codebook; None where only tokens are known: then nothing is forbidden, and events are tokens.
        outcomes: bool masks [M] over the grammar's nodes (or [V] over tokens); the first that holds an event counts.
        starts: int64 [rows], the state behind each row's prompt.
        masked: whether tokens that the grammar doesn't allow are forbidden.
        never: bool [V], tokens that are forbidden in any state.
        device: where logits are.
    """

    def __init__(
        self,
        grammar: "Grammar | None",
        outcomes: Sequence[np.ndarray],
        starts: np.ndarray,
        *,
        masked: bool,
        never: np.ndarray,
        device: torch.device,
    ) -> None:
        self._grammar, self._masked = grammar, masked and grammar is not None
        self._state = starts.copy()
        self._fresh = np.ones(len(starts), dtype=bool)
        count = len(never) if grammar is None else grammar.nodes
        stacked = np.stack([*outcomes, np.ones(count, dtype=bool)])
        first = stacked.argmax(0).astype(np.int64)
        classes = np.where(first < len(outcomes), first, -1)
        self._known = classes if grammar is None else grammar.decided(classes)
        self._late = np.where(self._known == -2, classes, -1)
        self._known = np.maximum(self._known, -1)
        # One column per outcome: 1 for what brings it whatever comes before or after, less for what it may begin with.
        self._worth = (self._known[:, None] == np.arange(len(outcomes))).astype(np.float64)
        self._device = device
        self._members = self._worth_of_tokens(len(never))
        self.masks = Masks(never, 1 if grammar is None else grammar.count, device)

    def look_ahead(self, after: Callable[[Sequence[Sequence[int]]], np.ndarray]) -> None:
        """Find what beginnings of outcomes' codes are worth.

        Args:
            after: chances of the next token, float64 [S, V], after some sequences.
        """
        if self._grammar is None:
            return
        wanted = self._grammar.holds(np.maximum(self._late, self._known)[:, None] == np.arange(self._worth.shape[1]))
        begun = np.flatnonzero(wanted.any(1) & (self._known < 0))
        if not len(begun):
            return
        chances, states = after([self._grammar.path(node) for node in begun.tolist()]), self._grammar.state_of(begun)
        if self._masked:
            chances *= self._grammar.allowed(states)
            chances /= chances.sum(1, keepdims=True)
        row, token, child = self._grammar.children(states)
        for place in range(len(begun))[::-1]:  # longer beginnings have higher numbers
            node, goes_on = begun[place], row == place
            pieces = chances[place, token[goes_on]]
            self._worth[node] = pieces @ self._worth[child[goes_on]]
            if self._late[node] >= 0:
                self._worth[node, self._late[node]] += max(0.0, 1.0 - pieces.sum())
        self._members = self._worth_of_tokens(len(self._members))

    def _worth_of_tokens(self, vocab: int) -> Tensor:
        return torch.from_numpy(self._worth[:vocab].astype(np.float32)).to(self._device)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """Which of `masks` holds in each row: int64 [B]."""
        if self._grammar is None or not self._masked:
            return np.zeros(len(rows), dtype=np.int64)
        return self.masks.places(self._grammar.same_mask(self._state[rows]), self._grammar.allowed)

    def chances(self, rows: np.ndarray, chances_BV: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """How probable the next token makes each outcome, less what was told of that before; see the module.

        Args:
            rows: int64 [B].
            chances_BV: float32 [B, V], of the next token.

        Returns:
            found: float64 [B, K].
            before: bool [B], rows that have an outcome unless their code goes on.
        """
        found = (chances_BV @ self._members).cpu().numpy().astype(np.float64)
        before = np.zeros(len(rows), dtype=bool)
        if self._grammar is None or not self._grammar.is_piece.any():
            return found, before
        late = self._late_class(rows)
        before = late >= 0
        row, token, node = self._grammar.children(self._state[rows])
        index = torch.from_numpy(np.stack([row, token])).to(chances_BV.device)
        pieces = chances_BV[index[0], index[1]].cpu().numpy().astype(np.float64)
        on = np.bincount(row, weights=pieces, minlength=len(rows))
        found[before] = 0.0
        found[before, late[before]] = np.maximum(1.0 - on[before], 0.0)
        np.add.at(found, row, pieces[:, None] * self._worth[node])
        begun = self._begun(rows)
        open_ = (begun >= 0) & (self._known[begun] < 0)  # what is known was no mere chance
        found[open_] -= self._worth[begun[open_]]
        return found, before

    def _late_class(self, rows: np.ndarray) -> np.ndarray:
        """The outcome that each row has reached if its code ends here, int64 [B]; -1 for none or one told already."""
        node = self._begun(rows)
        return np.where(node >= 0, self._late[node], -1)

    def _begun(self, rows: np.ndarray) -> np.ndarray:
        """The node that each row has reached, int64 [B]; -1 for none, as what the prompt told is no future event."""
        assert self._grammar is not None
        return np.where(self._fresh[rows], -1, self._grammar.node(self._state[rows]))

    def advance(self, rows: np.ndarray, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Move the rows on by one token each.

        Returns:
            event: int64 [B], index of the outcome that a row has reached, or -1.
            before: bool [B], whether it was reached before this token, which only told so.
        """
        if self._grammar is None:
            return self._known[token], np.zeros(len(rows), dtype=bool)
        late = self._late_class(rows)
        state = self._grammar.follow(self._state[rows], token)
        self._state[rows], self._fresh[rows] = state, False
        new = self._grammar.node(state)
        goes_on = self._grammar.is_piece[token] & (new >= 0)
        late = np.where(goes_on, -1, late)
        known = np.where(new >= 0, self._known[new], -1)
        return np.where(late >= 0, late, known), late >= 0


def states_after(grammar: "Grammar", prompts: Sequence[np.ndarray], *, strict: bool) -> np.ndarray:
    """The state behind each prompt, int64 [P].

    Raises:
        DataError: a prompt that breaks the grammar, if `strict`.
    """
    ends = np.full(len(prompts), grammar.start, dtype=np.int64)
    for place, tokens in enumerate(prompts):
        states = grammar.states(tokens, strict=strict)
        if strict and grammar.is_dead(states[-1:])[0]:
            at = int(np.flatnonzero(grammar.is_dead(states))[0])
            raise DataError(
                f"prompt {place}: token {at} ({int(tokens[at])}) can't stand there by the codebook's grammar; "
                "encode the history with this codebook, or roll out with grammar=False"
            )
        ends[place] = states[-1]
    return ends
