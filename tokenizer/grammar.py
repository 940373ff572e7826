"""Which token may follow which: the grammar of timelines as a machine that many rows drive at once.

A state is one integer: what came last, and the last age told. While a code is being spelled, "what came last" is the
node of the trie of codes that its pieces have reached. Nodes number all that an event can be: a code's first token is
a node with the token's own id, deeper nodes follow. So a mask over nodes names events where a mask over tokens can't:
pieces are shared by many codes.

Held to: static tokens come first; an interval stands between two events, never before the first one; only the longest
is repeated; an age stands behind an interval or before the first event, rises, and an event follows it; pieces lead to
codes that the codebook knows, and a category that is no code itself needs one; a value follows a code with bins, and
is one of its bins; the end of the timeline follows an event or the static tokens, and nothing follows it. Not held to:
the order of static tokens and that of events at one time.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Classes of states; the last and those beyond are "after an event whose value has that many bins".
_NOTHING, _FIRST, _WAITED, _WAITED_LONG, _AGED, _EVENT = range(6)
# Modes behind the nodes.
_START, _SHORT, _LONG, _AGE, _VALUE, _END, _DEAD = range(7)


@dataclass(frozen=True)
class Words:
    """What a grammar must know of a vocabulary of V tokens and its M nodes.

    Attributes:
        kinds: [V], each token's kind.
        longest: the interval that may be repeated.
        eot: the end of the timeline.
        ends: bool [M], whether an event may end at a node.
        bins: int64 [M], bins of the value that may follow the event that ends there, 0 for none.
        edges: (parent, token, child), int64 [E] each: where a piece leads from a node.
    """

    kinds: NDArray[np.str_]
    longest: int
    eot: int
    ends: Bools
    bins: Ints
    edges: tuple[Ints, Ints, Ints]


class Grammar:
    """The grammar of a codebook; V tokens, M nodes.

    Attributes:
        start: the state before the first token.
        nodes: M.
        count: how many states there are; they are numbered from 0.
        is_piece: bool [V], tokens that go on with a code.
    """

    def __init__(self, words: Words) -> None:
        kinds, vocab, self.nodes = words.kinds, len(words.kinds), len(words.ends)
        self._vocab, self.is_piece, self._is_age = vocab, kinds == "piece", kinds == "age"
        self._slots = int(self._is_age.sum()) + 1
        self.start = (self.nodes + _START) * self._slots
        self._dead = (self.nodes + _DEAD) * self._slots
        self.count = (self.nodes + _DEAD + 1) * self._slots
        # The slot of an age token is its rank, from 1; 0 stands for "none told".
        self._slot = np.where(self._is_age, np.cumsum(self._is_age), 0)
        self._first_age = int(self._is_age.argmax())
        self._class = np.concatenate(
            [
                np.where(words.ends, _EVENT + words.bins, _NOTHING),
                [_FIRST, _WAITED, _WAITED_LONG, _AGED, _EVENT, _NOTHING, _NOTHING],
            ]
        )
        self._base = _base(words, int(words.bins.max(initial=0)))
        self._mode_after = self._modes(words)
        parent, token, child = words.edges
        key = parent * vocab + token
        order = np.argsort(key)
        self._edge, self._edge_token, self._child = key[order], token[order], child[order]
        self._parent_of_edge = parent[order]
        self._first_edge = np.searchsorted(self._parent_of_edge, np.arange(self.nodes + _DEAD + 2))
        self._ends = words.ends

    def step(self, state: Ints, token: Ints) -> Ints:
        """The states after one more token each, int64 [B]; a state in which nothing is allowed if it wasn't."""
        return np.where(self.permits(state, token), self.follow(state, token), self._dead)

    def follow(self, state: Ints, token: Ints) -> Ints:
        """The same without asking whether the tokens are allowed, which finds its way back after an error."""
        mode, slot = np.divmod(state, self._slots)
        after = self._mode_after[token]
        at = np.flatnonzero(self.is_piece[token])
        after[at] = self._descend(mode[at], token[at])
        return after * self._slots + np.maximum(slot, self._slot[token])

    def permits(self, state: Ints, token: Ints) -> Bools:
        """Whether each token may follow in each state: bool [B]."""
        mode, slot = np.divmod(state, self._slots)
        kind = self._class[mode]
        good = self._base[kind, token]
        aging = np.flatnonzero(self._is_age[token])
        good[aging] &= self._may_age(kind[aging], slot[aging]) & (self._slot[token[aging]] > slot[aging])
        pieces = np.flatnonzero(self.is_piece[token])
        good[pieces] = self._descend(mode[pieces], token[pieces]) < self.nodes
        return good

    def allowed(self, state: Ints) -> Bools:
        """The tokens that may follow in each state: bool [B, V]."""
        mode, slot = np.divmod(state, self._slots)
        kind = self._class[mode]
        mask = self._base[kind]
        aging = np.flatnonzero(np.isin(kind, (_FIRST, _WAITED, _WAITED_LONG)))
        ages = slice(self._first_age, self._first_age + self._slots - 1)
        ranks = np.arange(1, self._slots)
        mask[aging, ages] &= self._may_age(kind[aging], slot[aging])[:, None] & (ranks > slot[aging, None])
        rows, tokens, _ = self.children(state)
        mask[rows, tokens] = True
        return mask

    def children(self, state: Ints) -> tuple[Ints, Ints, Ints]:
        """The pieces that may follow in each state: int64 [K] each, its row, the piece, and the node it leads to."""
        mode = state // self._slots
        first, last = self._first_edge[mode], self._first_edge[mode + 1]
        at = _ranges(first, last - first)
        return np.repeat(np.arange(len(mode)), last - first), self._edge_token[at], self._child[at]

    def same_mask(self, state: Ints) -> Ints:
        """A state with the same allowed tokens, equal for many states: int64 [B]."""
        mode, slot = np.divmod(state, self._slots)
        matters = np.isin(self._class[mode], (_FIRST, _WAITED, _WAITED_LONG))
        return mode * self._slots + np.where(matters, slot, 0)

    def states(self, tokens: NDArray[np.integer], *, strict: bool = True) -> Ints:
        """The state after each token of one timeline, int64 [N]; after a wrong token all are dead if `strict`."""
        told: Ints = tokens.astype(np.int64)
        state = self._path(told) * self._slots + np.maximum.accumulate(self._slot[told])
        if strict and len(told):
            wrong = np.flatnonzero(~self.permits(np.append(self.start, state[:-1]), told))
            state[wrong[0] if len(wrong) else len(told) :] = self._dead
        return state

    def accepts(self, tokens: NDArray[np.integer]) -> bool:
        """Whether a whole timeline, or the beginning of one, follows the grammar."""
        return not len(tokens) or int(self.states(tokens)[-1]) != self._dead

    def is_dead(self, state: Ints) -> Bools:
        """Whether a wrong token led to each state: bool [B]."""
        return state // self._slots == self.nodes + _DEAD

    def node(self, state: Ints) -> Ints:
        """The node that each state has reached, int64 [B]; -1 where the last token told no part of an event."""
        mode = state // self._slots
        return np.where(mode < self.nodes, mode, -1)

    def state_of(self, node: Ints) -> Ints:
        """A state that has reached each node."""
        return node * self._slots

    def events(self, tokens: NDArray[np.integer]) -> tuple[Ints, Ints]:
        """Where the events of a timeline end, and what they are.

        Returns:
            places: int64 [K], of the last token of each event's code.
            nodes: int64 [K].
        """
        told: Ints = tokens.astype(np.int64)
        node = self._path(told)
        more = np.append(self.is_piece[told[1:]] & (node[1:] < self.nodes), False)[: len(told)]
        places = np.flatnonzero((node < self.nodes) & ~more)
        return places, node[places]

    def decided(self, classes: Ints) -> Ints:
        """The class of events that are known before their code is spelled out.

        Args:
            classes: int64 [M], of the event that ends at each node.

        Returns:
            int64 [M], the class that all events at or below the node share; -2 where they differ.
        """
        low = np.where(self._ends, classes, np.iinfo(np.int64).max)
        high = np.where(self._ends, classes, np.iinfo(np.int64).min)
        # Deeper nodes have higher numbers than what is above them.
        for edge in np.argsort(-self._child, kind="stable"):
            parent, child = self._parent_of_edge[edge], self._child[edge]
            low[parent] = min(low[parent], low[child])
            high[parent] = max(high[parent], high[child])
        return np.where(low == high, low, -2)

    def holds(self, marked: Bools) -> Bools:
        """Whether an event that ends at or below each node is marked: bool [M, K] for bool [M, K]."""
        found = marked & self._ends[:, None]
        for edge in np.argsort(-self._child, kind="stable"):
            found[self._parent_of_edge[edge]] |= found[self._child[edge]]
        return found

    def path(self, node: int) -> list[int]:
        """The tokens that spell a node."""
        above = np.flatnonzero(self._child == node)
        if not len(above):
            return [node]
        return [*self.path(int(self._parent_of_edge[above[0]])), int(self._edge_token[above[0]])]

    def _modes(self, words: Words) -> Ints:
        """The mode after each token, int64 [V]; the tokens of pieces, which depend on the state, are dead."""
        mode = np.full(self._vocab, _DEAD, np.int64)
        mode[words.kinds == "static"] = _START
        mode[words.kinds == "interval"] = _SHORT
        mode[words.longest] = _LONG
        mode[words.kinds == "age"] = _AGE
        mode[words.kinds == "value"] = _VALUE
        mode[words.eot] = _END
        starts = np.isin(words.kinds, ("code", "other"))
        return np.where(starts, np.arange(self._vocab), self.nodes + mode)

    def _path(self, tokens: Ints) -> Ints:
        """The mode after each token of a timeline, whether or not they are allowed."""
        mode = self._mode_after[tokens]
        piece = self.is_piece[tokens]
        # The first pieces of all runs, then the second ones, and so on.
        at = np.flatnonzero(piece & ~np.append(False, piece[:-1]))
        while len(at):
            mode[at] = np.where(at > 0, self._descend(mode[at - 1], tokens[at]), self.nodes + _DEAD)
            at = at[at + 1 < len(tokens)] + 1
            at = at[piece[at]]
        return mode

    def _descend(self, mode: Ints, token: Ints) -> Ints:
        """The nodes below given ones; the dead mode where there is none."""
        if not len(self._edge):
            return np.full(len(mode), self.nodes + _DEAD)
        key = mode * self._vocab + token
        place = np.minimum(np.searchsorted(self._edge, key), len(self._edge) - 1)
        return np.where(self._edge[place] == key, self._child[place], self.nodes + _DEAD)

    def _may_age(self, kind: Ints, slot: Ints) -> Bools:
        """Who tells no age at the first event has no known birth, and never tells one."""
        return (kind == _FIRST) | (slot > 0)


def _base(words: Words, most_bins: int) -> Bools:
    """What each class of states allows, pieces aside and whatever the age: bool [classes, V]."""
    kinds = words.kinds
    base = np.zeros((_EVENT + most_bins + 1, len(kinds)), bool)
    event, age = np.isin(kinds, ("code", "other")), kinds == "age"
    end = np.arange(len(kinds)) == words.eot
    base[_FIRST] = (kinds == "static") | age | event | end
    base[_WAITED] = age | event
    base[_WAITED_LONG] = age | event
    base[_WAITED_LONG, words.longest] = True
    base[_AGED] = event
    base[_EVENT:] = event | (kinds == "interval") | end
    values = np.flatnonzero(kinds == "value")
    for bins in range(1, most_bins + 1):
        base[_EVENT + bins, values[:bins]] = True
    return base


def _ranges(starts: Ints, lengths: Ints) -> Ints:
    """The integers of all ranges [start, start + length), one after the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
