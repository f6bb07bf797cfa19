"""A draft tree: while it grows, and as it is verified."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from fastmtp.sampling import Guess


@dataclass
class Node:
    """A token of a growing tree; its estimate is the probability that it is reached and accepted."""

    token: int
    parent: int
    depth: int
    estimate: float
    # Where what becomes of it is counted, and whether the text named it (it may not have been alone).
    bins: list[Hashable] = field(default_factory=list)
    from_text: bool = False
    # Nodes by token.
    children: dict[int, int] = field(default_factory=dict)
    # Where tokens are drawn: what the children were drawn from, in the order in which they are tried.
    guesses: list[Guess] = field(default_factory=list)
    # Whether the head was asked what follows.
    asked: bool = False


@dataclass(frozen=True)
class Tree:
    """Tokens to verify, the sequence's next one first, and for each the one before it (-1: the sequence).

    `milliseconds` is what its round is expected to take.
    """

    nodes: list[Node]
    parents: list[int]
    levels: int = 0
    milliseconds: float = 0.0

    @property
    def tokens(self) -> list[int]:
        return [node.token for node in self.nodes]

    @property
    def is_chain(self) -> bool:
        return self.parents == list(range(-1, len(self.parents) - 1))

    def child(self, place: int, token: int) -> int | None:
        """The place of this token after a node, if it is there."""
        return next((child for child in self.after(place) if self.nodes[child].token == token), None)

    def after(self, place: int) -> list[int]:
        """The places of the nodes that follow one, in order."""
        return [child for child, parent in enumerate(self.parents) if parent == place]


def add(nodes: list[Node], parent: int, token: int, conditional: float, bin_of: Hashable, from_text: bool) -> int:
    """Where the node is; one that another source has named already is as likely as the hopeful one says."""
    found = nodes[parent].children.get(token)
    estimate = nodes[parent].estimate * min(conditional, 0.995)
    if found is None:
        found = nodes[parent].children[token] = len(nodes)
        nodes.append(Node(token, parent, nodes[parent].depth + 1, estimate))
    node = nodes[found]
    node.estimate = max(node.estimate, estimate)
    node.bins.append(bin_of)
    node.from_text |= from_text
    return found


def part(nodes: Sequence[Node], chosen: Sequence[int], levels: int, milliseconds: float) -> Tree:
    """The tree of chosen nodes, each after its parent."""
    places = {-1: -1} | {index: place for place, index in enumerate(chosen)}
    parents = [places[nodes[index].parent] for index in chosen]
    return Tree([nodes[index] for index in chosen], parents, levels, milliseconds)
