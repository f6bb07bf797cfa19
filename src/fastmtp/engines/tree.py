"""A draft tree: while it grows, and as it is verified."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastmtp.decode.drafting.estimates import Bin


@dataclass
class Node:
    """A token of a growing tree; its estimate is the probability that it is reached and accepted."""

    token: int
    parent: int
    depth: int
    estimate: float
    # Where what becomes of it is counted, and whether the text named it (it may not have been alone).
    bins: list[Bin] = field(default_factory=list)
    from_text: bool = False
    # Nodes by token.
    children: dict[int, int] = field(default_factory=dict)


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


def add(nodes: list[Node], parent: int, token: int, conditional: float, bin_of: Bin | None, from_text: bool) -> int:
    """Append a node, whose probability if its parent is reached is given; returns its index."""
    nodes[parent].children[token] = len(nodes)
    estimate = nodes[parent].estimate * min(conditional, 0.995)
    bins = [] if bin_of is None else [bin_of]
    nodes.append(Node(token, parent, nodes[parent].depth + 1, estimate, bins, from_text))
    return len(nodes) - 1


def scale(nodes: list[Node], index: int, factor: float) -> None:
    """Change the estimates of a node and of all after it."""
    nodes[index].estimate *= factor
    for child in nodes[index].children.values():
        scale(nodes, child, factor)


def part(nodes: Sequence[Node], chosen: Sequence[int], levels: int, milliseconds: float) -> Tree:
    """The tree of nodes that are chosen, the likeliest first, each after its parent.

    The likeliest path comes first: if it is accepted, its keys and values are in their place already.
    """
    path = [0]
    for index in chosen[1:]:
        if nodes[index].parent == path[-1]:
            path.append(index)
    order = [*path, *(index for index in chosen if index not in path)]
    places = {-1: -1} | {index: place for place, index in enumerate(order)}
    parents = [places[nodes[index].parent] for index in order]
    return Tree([nodes[index] for index in order], parents, levels, milliseconds)
