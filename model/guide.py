"""Holds trajectories to the codebook's grammar, and tells which of the events asked for they have reached.

Each row has a state of the grammar. Its mask of forbidden tokens is computed once per distinct state and kept on the
device. An outcome is a mask over events, not tokens: several tokens may spell a code, and a row has reached an outcome
as soon as every way to go on spells one of its codes. Where a code is an outcome and a longer one isn't (or the other
way), the token after it tells which it was.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tokenizer.errors import DataError

if TYPE_CHECKING:
    from tokenizer.grammar import Grammar

# Masks kept at once; states beyond are met rarely.
_MOST_MASKS = 4096


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
        self._never = torch.from_numpy(never).to(device)
        self._outcomes = len(outcomes)
        self._members: dict[int, Tensor] = {}
        tokens = np.arange(len(never))
        start = np.full(len(tokens), 0 if grammar is None else grammar.start)
        self._usual = self._membership(self._reached(start, np.ones(len(tokens), dtype=bool), tokens)[1])
        if grammar is not None:
            self._unusual = (self._late >= 0) | grammar.has_pieces
        self._place: dict[int, int] = {}
        self._table = self._never[None]

    def forbidden(self, rows: np.ndarray) -> Tensor:
        """Tokens that may not follow in each row: bool [B, V] on the device."""
        if self._grammar is None or not self._masked:
            return self._never.expand(len(rows), -1)
        keys = self._grammar.same_mask(self._state[rows])
        distinct = np.unique(keys)
        if len(self._place) + len(distinct) > _MOST_MASKS:
            self._place, self._table = {}, self._never[None]
        new = np.array([key for key in distinct.tolist() if key not in self._place], dtype=np.int64)
        if len(new):
            masks = torch.from_numpy(~self._grammar.allowed(new)).to(self._never.device) | self._never
            self._place |= {key: len(self._table) + n for n, key in enumerate(new.tolist())}
            self._table = torch.cat([self._table, masks])
        places = torch.tensor([self._place[key] for key in keys.tolist()], device=self._never.device)
        return self._table[places]

    def advance(self, rows: np.ndarray, token: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Move the rows on by one token each.

        Returns:
            event: int64 [B], index of the outcome that a row has reached, or -1.
            before: bool [B], whether it was reached before this token, which only told so.
        """
        state, event, before = self._reached(self._state[rows], self._fresh[rows], token)
        self._state[rows], self._fresh[rows] = state, False
        return event, before

    def chances(self, rows: np.ndarray, chances_BV: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """How probable it is that the next token tells of each outcome.

        Args:
            rows: int64 [B].
            chances_BV: float32 [B, V], of the tokens.

        Returns:
            found: float32 [B, K].
            settled: bool [B], whether any token that doesn't go on with the code tells that an outcome was reached.
        """
        found = (chances_BV @ self._usual).cpu().numpy()
        settled = np.zeros(len(rows), dtype=bool)
        if self._grammar is None:
            return found, settled
        node = self._grammar.node(self._state[rows])
        unusual = np.flatnonzero((node >= 0) & self._unusual[node])
        kinds = 2 * node[unusual] + self._fresh[rows[unusual]]
        for kind in np.unique(kinds).tolist():
            here = unusual[kinds == kind]
            if kind not in self._members:
                tokens = np.arange(len(self._never))
                state = np.full(len(tokens), self._state[rows[here[0]]])
                fresh = np.full(len(tokens), kind % 2 == 1)
                self._members[kind] = self._membership(self._reached(state, fresh, tokens)[1])
            at = torch.from_numpy(here).to(self._never.device)
            found[here] = (chances_BV[at] @ self._members[kind]).cpu().numpy()
            settled[here] = self._late[kind // 2] >= 0 and kind % 2 == 0
        return found, settled

    def _reached(
        self, state: np.ndarray, fresh: np.ndarray, token: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The states after one more token each, and the rest as `advance` tells it."""
        if self._grammar is None:
            return state, self._known[token], np.zeros(len(token), dtype=bool)
        old = self._grammar.node(state)
        state = self._grammar.follow(state, token)
        new = self._grammar.node(state)
        goes_on = self._grammar.is_piece[token] & (new >= 0)
        # What the prompt told is no event of the future.
        late = np.where((old >= 0) & ~fresh & ~goes_on, self._late[old], -1)
        known = np.where(new >= 0, self._known[new], -1)
        return state, np.where(late >= 0, late, known), late >= 0

    def _membership(self, event: np.ndarray) -> Tensor:
        """Float32 [V, K], 1 where a token tells of an outcome."""
        one_hot = event[:, None] == np.arange(self._outcomes)
        return torch.from_numpy(one_hot.astype(np.float32)).to(self._never.device)


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
