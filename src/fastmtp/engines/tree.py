"""A tree of tokens that may follow a text: grown by a drafter, verified by an engine, followed by acceptance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

# Where the outcomes of drafts are counted (decode/drafting/estimates.py).
Bin = tuple[str, int, int, int]
# What proposed a node: the head, the text looked up in itself, or a grammar that allows nothing else there.
Source = Literal["head", "text", "grammar"]


@dataclass(slots=True)
class Node:
    """A token after another node; `parent` is -1 for the root.

    `estimate` is the probability that the node is accepted, `bins` are where its outcome is counted, and `children`
    are nodes by token.
    """

    token: int
    parent: int
    depth: int
    estimate: float
    source: Source = "head"
    bins: list[Bin] = field(default_factory=list)
    children: dict[int, int] = field(default_factory=dict)


class Tree:
    """A node is known by its number in `nodes`, from proposal to kernel; node 0 is the sequence's next token.

    Attributes:
        verified: the nodes that the target runs over, each after its parent; row i of its output is of verified[i].
        asked: the nodes after which the head was asked for candidates.
        forced: how many nodes after the root, the first ones, are certain to be accepted: nothing else is allowed.
        rows: the row of each verified node.
        is_chain: whether the verified nodes follow one another.
        expected_ms: predicted duration of the round; 0 where nothing was predicted.
    """

    def __init__(self, token: int) -> None:
        self.nodes = [Node(token, -1, 0, 1.0)]
        self.asked: list[int] = []
        self.forced = 0
        self.expected_ms = 0.0
        self.verified, self.rows, self.is_chain = [0], {0: 0}, True

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Tree:
        """Tokens one after the other, all of them to be verified."""
        tree = cls(tokens[0])
        for token in tokens[1:]:
            tree.add(len(tree.nodes) - 1, token)
        tree.select(range(len(tokens)))
        return tree

    def add(
        self, parent: int, token: int, chance: float = 1.0, bin_of: Bin | None = None, source: Source = "head"
    ) -> int:
        """Append a node; `chance` is its probability if its parent is accepted. Returns its number."""
        before = self.nodes[parent]
        before.children[token] = len(self.nodes)
        bins = [] if bin_of is None else [bin_of]
        self.nodes.append(Node(token, parent, before.depth + 1, before.estimate * chance, source, bins))
        return len(self.nodes) - 1

    def scale(self, node: int, factor: float) -> None:
        """Multiply the estimates of a node and of all after it."""
        self.nodes[node].estimate *= factor
        for child in self.nodes[node].children.values():
            self.scale(child, factor)

    def select(self, nodes: Iterable[int]) -> None:
        """Choose the nodes to verify, the root first, each after its parent.

        The first path among them is put first: if it is accepted, its keys and values are in place already.
        """
        chosen = list(nodes)
        path = [0]
        for node in chosen[1:]:
            if self.nodes[node].parent == path[-1]:
                path.append(node)
        self.is_chain = len(path) == len(chosen)
        self.verified = path if self.is_chain else [*path, *(node for node in chosen if node not in path)]
        self.rows = {node: row for row, node in enumerate(self.verified)}

    def path(self, node: int) -> list[int]:
        """The nodes from the root to one."""
        nodes = [node]
        while nodes[-1]:
            nodes.append(self.nodes[nodes[-1]].parent)
        return nodes[::-1]

    def tokens_of(self, nodes: Iterable[int]) -> list[int]:
        return [self.nodes[node].token for node in nodes]

    def tokens_after_root(self, node: int) -> list[int]:
        """Of the path to a node, without the root's."""
        return self.tokens_of(self.path(node)[1:])

    @property
    def tokens(self) -> list[int]:
        """Of the verified nodes."""
        return self.tokens_of(self.verified)

    @property
    def parents(self) -> list[int]:
        """By row, the row of the node before; -1 for the root."""
        return [self.rows.get(self.nodes[node].parent, -1) for node in self.verified]

    def children(self, node: int) -> Iterator[int]:
        """The verified nodes after one."""
        return (child for child in self.nodes[node].children.values() if child in self.rows)

    def child(self, node: int, token: int) -> int | None:
        """The verified node of this token after another; None if there is none."""
        child = self.nodes[node].children.get(token)
        return child if child in self.rows else None
