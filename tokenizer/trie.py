"""The trie of spelled codes: which node a path of tokens leads to, and which event ends there."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tokenizer import spelling


@dataclass(frozen=True)
class Event:
    """A code, or any code below it."""

    text: str
    below: bool


@dataclass(frozen=True)
class Trie:
    """Nodes of spelled codes: a node's id is its first token's, or follows the vocabulary.

    Attributes:
        edges: (parent, token) to child.
        texts: the deeper nodes' events.
        ends: nodes at which a code may end.
        node_of: node per text of a code or of a part of it.
    """

    edges: dict[tuple[int, int], int]
    texts: tuple[Event, ...]
    ends: frozenset[int]
    node_of: dict[str, int]

    @classmethod
    def plant(
        cls,
        paths: Mapping[str, Sequence[tuple[str, int]]],
        codes: Collection[str],
        prefixes: Collection[str],
        vocab: int,
        below: int,
    ) -> "Trie":
        """Plant codes, and prefixes of rarer codes.

        Args:
            paths: per code or prefix, the text up to each of its tokens and the token's id.
            codes: those of them that are codes.
            prefixes: those that stand for rarer codes; one text can be both.
            vocab: number of tokens; deeper nodes are numbered from here, children after their parents.
            below: id of the token that stands for a code below a node.
        """
        edges: dict[tuple[int, int], int] = {}
        node_of: dict[str, int] = {}
        # What can stand for a code below it: a level of its system's hierarchy with something below.
        inner = set(prefixes)
        for text, path in paths.items():
            node = -1
            for part, token in path:
                node = token if node < 0 else edges.setdefault((node, token), vocab + len(edges))
                node_of[part] = node
            levels = set(spelling.ancestors(text))
            inner |= {part for part, _ in path if part in levels}
        deeper = sorted((node, part) for part, node in node_of.items() if node >= vocab)
        texts = [Event(part, below=part not in codes) for _, part in deeper]
        ends = {node_of[text] for text in codes}
        for part in sorted(inner):
            ends.add(edges.setdefault((node_of[part], below), vocab + len(edges)))
            texts.append(Event(part, below=True))
        return cls(edges, tuple(texts), frozenset(ends), node_of)
