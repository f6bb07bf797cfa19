"""What to draft: a tree whose every node is worth its cost.

Nodes come from the head and from the text itself. The head is asked along one path, a node at a time, always the
child that is likeliest to go on; all that it names are candidates (after EAGLE-2, arXiv 2406.16858). What a round
costs is known (Costs) and what it brings estimated, so each decision is one comparison: expected tokens against
milliseconds times the rate of tokens that decoding has anyway (Dinkelbach's way to the best ratio).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import DRAWN_AMONG
from fastmtp.decode.drafting.estimates import Estimates, both_bin, head_bin, text_bin
from fastmtp.decode.drafting.lookup import Lookup
from fastmtp.decode.sampling import race
from fastmtp.engines.costs import Costs
from fastmtp.engines.protocol import Candidates, HeadBackend
from fastmtp.engines.tree import Node, Tree, add, part, scale

# The largest tree, its depth, and the candidates of a node.
MAX_NODES, MAX_DEPTH, WIDTH = 16, 8, 4
# A candidate that is less likely is not worth being thought about.
LEAST = 0.02
# After so many rounds without the head it is tried again; after twice as many if that did not pay, and so on.
PROBE, RAREST_PROBE = 32, 1024
# Least share of the newest round in the running means: of the rate, and of what asking the head is worth.
NEWEST_RATE, NEWEST_WORTH = 0.02, 0.04
# What planning takes for each time that the head is asked, measured once (docs/experiments.md).
PLANNING_MS = 0.1
# Costs are those of the nearest multiple of so many tokens of context.
CONTEXT_STEP = 64


@dataclass
class Mean:
    """A running mean that starts as if it had seen `count` values; later ones have at least the share `newest`."""

    value: float
    count: float
    newest: float

    def learn(self, value: float) -> None:
        self.count += 1
        self.value += max(self.newest, 1 / self.count) * (value - self.value)


@dataclass
class Learned:
    """What is learned of one way to choose tokens, and stays from one sequence to the next."""

    estimates: Estimates
    rate: Mean  # tokens a millisecond
    # By depth of what it is asked for: what asking the head brings, less what verifying that costs, a unit of
    # probability that it is needed.
    worth: list[Mean] = field(default_factory=lambda: [Mean(0.5, 10, NEWEST_WORTH) for _ in range(MAX_DEPTH + 1)])
    rounds_without_head: int = 0
    probe_after: int = PROBE


class Adaptive:
    """Plans the trees of one sequence at a time, and learns from what becomes of them."""

    depth = MAX_DEPTH

    def __init__(self, costs: Costs, estimates: Estimates | None = None) -> None:
        """Know what rounds cost, and what is known of the drafts beforehand."""
        self._costs = costs
        self._ask_ms = costs.ask_ms + PLANNING_MS
        self._known = estimates or Estimates()
        self.learned: dict[SamplingConfig, Learned] = {}
        self._forward_ms: dict[int, list[float]] = {}

    def start(self, prompt: Sequence[int], sampling: SamplingConfig) -> None:
        self._sampling = sampling
        way = SamplingConfig(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        if way not in self.learned:
            # What is known beforehand is of greedy answers; of drawn ones it says too much.
            known = self._known.copy() if sampling.temperature == 0 else Estimates()
            # A head that is worth having makes decoding half as fast again, or more.
            self.learned[way] = Learned(known, Mean(1.5 / self._costs.forward(1), 4, NEWEST_RATE))
        self._now = self.learned[way]
        self._lookup = Lookup()
        self._lookup.extend(prompt)

    def propose(self, backend: HeadBackend, token: int, room: int) -> Tree:
        self._lookup.extend([token])
        forward_ms = self._forward_of(len(backend.tokens))
        nodes, agreement = self._look_up(token)
        asked = self._draft(backend, nodes, agreement)
        chosen = self._worthwhile(nodes, min(room, MAX_NODES), forward_ms)
        self._learn_worth(nodes, asked, chosen, forward_ms)
        return part(nodes, chosen, len(asked), forward_ms[len(chosen)] + len(asked) * self._ask_ms)

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        self._lookup.extend([tree.nodes[place].token for place in path[1:]])
        for depth, place in enumerate(path, 1):
            for child in tree.after(place):
                for bin_of in tree.nodes[child].bins:
                    self._now.estimates.learn(bin_of, depth < len(path) and child == path[depth])
        rate = self._now.rate
        rate.learn(len(path) / tree.milliseconds)
        rate.value = max(rate.value, 1 / self._forward_of(len(self._lookup.tokens))[1])

    def _forward_of(self, context: int) -> list[float]:
        """Milliseconds of a forward by its tokens, from 0 on."""
        step = round(context / CONTEXT_STEP)
        if step not in self._forward_ms:
            costs = [self._costs.forward(count, step * CONTEXT_STEP) for count in range(1, MAX_NODES + 1)]
            self._forward_ms[step] = [0.0, *costs]
        return self._forward_ms[step]

    def _look_up(self, token: int) -> tuple[list[Node], int]:
        """The nodes that the text gives, and how well it agrees with what goes before them."""
        nodes, parent = [Node(token, -1, 0, 1.0)], 0
        agreement, tokens = self._lookup.continuation(MAX_DEPTH)
        for depth, following in enumerate(tokens, 1):
            chance = self._now.estimates.of_text(depth, agreement)
            parent = add(nodes, parent, following, chance, text_bin(depth, agreement), True)
        return nodes, agreement

    def _draft(self, backend: HeadBackend, nodes: list[Node], agreement: int) -> list[tuple[int, float]]:
        """Ask the head what follows, a node at a time while that pays: the nodes asked, each with its `_open`."""
        now, place, node = self._now, len(backend.tokens) + 1, 0
        width = DRAWN_AMONG if self._sampling.temperature > 0 else WIDTH
        asked: list[tuple[int, float]] = []
        probe = now.rounds_without_head + 1 == now.probe_after
        while nodes[node].depth < MAX_DEPTH:
            open_, depth = _open(nodes, node), nodes[node].depth + 1
            pays = open_ * now.worth[depth].value > now.rate.value * self._ask_ms
            if not pays and (asked or not probe):
                break
            if asked:
                found = backend.extend_tree([len(asked) - 1], [nodes[node].token], width)[0]
            else:
                now.probe_after = PROBE if pays else min(2 * now.probe_after, RAREST_PROBE)
                found = backend.start_tree(nodes[0].token, width)
            asked.append((node, open_))
            self._name(nodes, node, found, agreement, place + nodes[node].depth)
            if not nodes[node].children:
                break
            node = max(nodes[node].children.values(), key=lambda child: _open(nodes, child))
        now.rounds_without_head = 0 if asked else now.rounds_without_head + 1
        return asked

    def _name(self, nodes: list[Node], parent: int, found: Candidates, agreement: int, place: int) -> None:
        """Add what the head names after a node; what it says of the text's token there changes both."""
        estimates, depth = self._now.estimates, nodes[parent].depth + 1
        tokens, confidences = race(found.tokens, found.confidences, self._sampling, place)
        left = 1.0
        for token, child in list(nodes[parent].children.items()):
            said = confidences[tokens.index(token)] if token in tokens else 0.0
            chance = min(0.995, estimates.of_both(depth, agreement, said))
            scale(nodes, child, nodes[parent].estimate * chance / nodes[child].estimate)
            nodes[child].bins.append(both_bin(depth, agreement, said))
            # The head's other candidates share what the text leaves.
            left = min(1.5, (1 - chance) / (1 - min(0.97, said)))
        for token, confidence in zip(tokens[:WIDTH], confidences, strict=False):
            if nodes[parent].estimate * confidence < LEAST:
                break
            if token not in nodes[parent].children:
                chance = left * estimates.of_head(depth, confidence)
                add(nodes, parent, token, chance, head_bin(depth, confidence), False)

    def _worthwhile(self, nodes: list[Node], room: int, forward_ms: Sequence[float]) -> list[int]:
        """The nodes to verify: of the likeliest 1, 2, 3, ... those that bring most for their time."""
        order = sorted(range(len(nodes)), key=lambda index: -nodes[index].estimate)[:room]
        gain, most, count = 0.0, 0.0, 1
        for size, index in enumerate(order[1:], 2):
            gain += self._gain(nodes[index], size, forward_ms)
            if gain > most:
                most, count = gain, size
        return order[:count]

    def _gain(self, node: Node, size: int, forward_ms: Sequence[float]) -> float:
        """Tokens that a node brings to a tree of `size` nodes with it, less what decoding makes in its time."""
        return node.estimate - self._now.rate.value * (forward_ms[size] - forward_ms[size - 1])

    def _learn_worth(
        self,
        nodes: Sequence[Node],
        asked: Sequence[tuple[int, float]],
        chosen: Sequence[int],
        forward_ms: Sequence[float],
    ) -> None:
        """What asking the head brought into the tree, at each node and after it, for each unit of `_open`."""
        brought = dict.fromkeys((node for node, _ in asked), 0.0)
        for size, index in enumerate(chosen[1:], 2):
            if not nodes[index].from_text and nodes[index].parent in brought:
                brought[nodes[index].parent] += self._gain(nodes[index], size, forward_ms)
        for node, open_ in reversed(asked):
            self._now.worth[nodes[node].depth + 1].learn(brought[node] / max(LEAST, open_))
            if node:
                brought[nodes[node].parent] += brought[node] - self._now.rate.value * self._ask_ms


def _open(nodes: Sequence[Node], index: int) -> float:
    """Probability that a node is reached, and that none of its children is what follows."""
    return nodes[index].estimate - sum(nodes[child].estimate for child in nodes[index].children.values())
