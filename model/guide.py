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
        # One column per outcome: the tokens that bring it whatever came before.
        members = self._known[: len(never), None] == np.arange(len(outcomes))
        self._members = torch.from_numpy(members.astype(np.float32)).to(device)
        self._never = torch.from_numpy(never).to(device)
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

    def chances(self, rows: np.ndarray, chances_BV: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """How probable it is that the next token brings each outcome.

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
        told = self._known[node] >= 0
        np.add.at(found, (row[told], self._known[node[told]]), pieces[told])
        return found, before

    def _late_class(self, rows: np.ndarray) -> np.ndarray:
        """The outcome that each row has reached if its code ends here, int64 [B]; -1 for none or one told already."""
        assert self._grammar is not None
        node = self._grammar.node(self._state[rows])
        # What the prompt told is no event of the future.
        return np.where((node >= 0) & ~self._fresh[rows], self._late[node], -1)

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
