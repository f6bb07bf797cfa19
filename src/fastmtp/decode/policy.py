"""What to draft: a tree whose every node is worth its cost.

Nodes come from the head, best-first by estimated acceptance (after EAGLE-2, arXiv 2406.16858), and from the text
itself. A round's cost is known (Costs) and its gain estimated, so each decision is one comparison: expected tokens
against milliseconds times the rate of tokens that decoding has anyway (Dinkelbach's way to the best ratio).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from fastmtp.decode.backend import Backend, Candidates
from fastmtp.decode.costs import Costs
from fastmtp.decode.estimates import Estimates, confidence_bin
from fastmtp.decode.lookup import Lookup

# The largest tree, its depth, the candidates of a node, and the nodes of one level that the head goes on from.
MAX_NODES, MAX_DEPTH, WIDTH, BEAM = 16, 8, 4, 4
# A candidate that is less likely is not worth being thought about.
LEAST = 0.02
# After so many plain rounds drafting is tried again.
PROBE = 32
# Share of the newest round in the running means: of the rate, and of what the candidates of a depth hit.
NEWEST, NEWEST_HIT = 0.02, 0.04
# Deeper nodes share the estimates of this depth.
DEEPEST_BIN = 4


@dataclass
class Node:
    """A token of a tree; its estimate is the probability that it is reached and accepted."""

    token: int
    parent: int
    depth: int
    estimate: float
    bin: Hashable = None
    children: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tree:
    """Tokens to verify, the sequence's next one first, and for each the one before it (-1: the sequence)."""

    tokens: list[int]
    parents: list[int]
    bins: list[Hashable]
    milliseconds: float


class Policy:
    """Plans the trees of one sequence, and learns from what becomes of them.

    What it has learned stays when another sequence starts.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._draft_ms = costs.draft_ms[min(costs.draft_ms)]
        self._plain_rate = 1 / costs.forward(1)
        self._rate = self._plain_rate
        self._estimates = Estimates()
        # By depth, how often one of a node's candidates is right; hopeful at first, so that it is tried.
        self._hits = [0.6] * (MAX_DEPTH + 1)
        self._plain_rounds = 0
        self._lookup = Lookup()

    def start(self, prompt: Sequence[int]) -> None:
        self._lookup = Lookup()
        self._lookup.extend(prompt)

    def plan(self, backend: Backend, token: int, room: int) -> Tree:
        """A tree after `token`, of at most `room` tokens."""
        self._lookup.extend([token])
        nodes = [Node(token, -1, 0, 1.0)]
        self._look_up(nodes)
        levels = self._draft(backend, nodes)
        return self._select(nodes, levels, min(room, MAX_NODES))

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        """Take what verification found: the path of nodes that stay."""
        self._lookup.extend([tree.tokens[node] for node in path[1:]])
        kept = set(path)
        for node, parent in enumerate(tree.parents):
            if parent in kept:
                self._estimates.learn(tree.bins[node], node in kept)
        # Every node of the path but the last has a child that was kept; the last one's children, if any, missed.
        tried = len(path) - (path[-1] not in tree.parents)
        for depth in range(1, tried + 1):
            self._hits[depth] += NEWEST_HIT * ((depth < len(path)) - self._hits[depth])
        self._rate += NEWEST * (len(path) / tree.milliseconds - self._rate)
        self._rate = max(self._rate, self._plain_rate)

    def _look_up(self, nodes: list[Node]) -> None:
        size, tokens = self._lookup.continuation(MAX_DEPTH)
        parent = 0
        for depth, token in enumerate(tokens, 1):
            bin_of = ("lookup", size, min(depth, DEEPEST_BIN))
            said = 0.3 if depth == 1 else 0.6
            parent = _add(nodes, parent, token, self._estimates.probability(bin_of, said), bin_of)

    def _draft(self, backend: Backend, nodes: list[Node]) -> int:
        """Ask the head, a level at a time while that pays; returns the number of levels."""
        pays = self._hits[1] > self._rate * self._draft_ms
        self._plain_rounds = 0 if pays else self._plain_rounds + 1
        if not pays and self._plain_rounds % PROBE:
            return 0
        fresh = self._grow(nodes, 0, backend.start_tree(nodes[0].token, WIDTH))
        drafted = {0: 0}
        levels = 1
        while fresh and levels < MAX_DEPTH:
            best = sorted(fresh, key=lambda index: -nodes[index].estimate)[:BEAM]
            best = [index for index in best if nodes[index].estimate > 0.25 * nodes[best[0]].estimate]
            gain = sum(nodes[index].estimate for index in best) * self._hits[levels + 1]
            if gain <= self._rate * self._draft_ms:
                break
            parents = [drafted[nodes[index].parent] for index in best]
            for index in best:
                drafted[index] = len(drafted)
            found = backend.extend_tree(parents, [nodes[index].token for index in best], WIDTH)
            fresh = [
                child
                for index, candidates in zip(best, found, strict=True)
                for child in self._grow(nodes, index, candidates)
            ]
            levels += 1
        return levels

    def _grow(self, nodes: list[Node], parent: int, candidates: Candidates) -> list[int]:
        """Add a node's candidates; returns where they are."""
        depth = nodes[parent].depth + 1
        added = []
        for token, confidence in zip(candidates.tokens, candidates.confidences, strict=True):
            if nodes[parent].estimate * confidence < LEAST:
                break
            bin_of = (min(depth, DEEPEST_BIN), confidence_bin(confidence))
            added.append(_add(nodes, parent, token, self._estimates.probability(bin_of, confidence), bin_of))
        return added

    def _select(self, nodes: list[Node], levels: int, room: int) -> Tree:
        """The nodes that are worth their place in the verification, best first."""
        order = sorted(range(len(nodes)), key=lambda index: -nodes[index].estimate)
        chosen = order[:1]
        for index in order[1:room]:
            extra_ms = self._costs.forward(len(chosen) + 1) - self._costs.forward(len(chosen))
            if nodes[index].estimate <= self._rate * extra_ms:
                break
            chosen.append(index)
        places = {-1: -1} | {index: place for place, index in enumerate(chosen)}
        return Tree(
            tokens=[nodes[index].token for index in chosen],
            parents=[places[nodes[index].parent] for index in chosen],
            bins=[nodes[index].bin for index in chosen],
            milliseconds=self._costs.forward(len(chosen)) + levels * self._draft_ms,
        )


def _add(nodes: list[Node], parent: int, token: int, conditional: float, bin_of: Hashable) -> int:
    """Where the node is; one that another source has named already is as likely as the hopeful one says."""
    found = nodes[parent].children.get(token)
    estimate = nodes[parent].estimate * min(conditional, 0.995)
    if found is None:
        found = nodes[parent].children[token] = len(nodes)
        nodes.append(Node(token, parent, nodes[parent].depth + 1, estimate, bin_of))
    elif estimate > nodes[found].estimate:
        nodes[found].estimate, nodes[found].bin = estimate, bin_of
    return found
