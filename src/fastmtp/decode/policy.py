"""What to draft: a tree whose every node is worth its cost.

Nodes come from the head, best-first by estimated acceptance (after EAGLE-2, arXiv 2406.16858), and from the text
itself. A round's cost is known (Costs) and its gain estimated, so each decision is one comparison: expected tokens
against milliseconds times the rate of tokens that decoding has anyway (Dinkelbach's way to the best ratio).

Greedily, a tree is pruned once it has grown. Where tokens are drawn, the head's are drawn too, so how many follow a
node is decided before they are known, and all of them are verified: else their law would be another.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from fastmtp.config import SamplingConfig
from fastmtp.decode.backend import Backend, Candidates
from fastmtp.decode.costs import Costs
from fastmtp.decode.estimates import Estimates, confidence_bin
from fastmtp.decode.lookup import Lookup
from fastmtp.decode.tree import Node, Tree, add, part
from fastmtp.models.calibration import Calibration, Line, calibrated
from fastmtp.sampling import Dice, Guess, guess_law, without

# The largest tree, its depth, the candidates of a node, and the nodes of one level that the head goes on from.
MAX_NODES, MAX_DEPTH, WIDTH, BEAM = 16, 8, 4, 4
# The head's likeliest tokens, among which the candidates of a node are drawn.
DRAWN_AMONG = 32
# A candidate that is less likely is not worth being thought about.
LEAST = 0.02
# After so many plain rounds drafting is tried again.
PROBE = 32
# Share of the newest round in the running means: of the rate, and of what the candidates of a depth hit.
NEWEST, NEWEST_HIT = 0.02, 0.04
# Deeper nodes share the estimates of this depth.
DEEPEST_BIN = 4
# How likely the first of several draws is kept, by the share of the likeliest token, and the next ones against it.
LATER_DRAWS = (1.0, 0.35, 0.23, 0.17)


@dataclass
class _Learned:
    """Running estimates for one way to choose tokens."""

    rate: float
    estimates: Estimates = field(default_factory=Estimates)
    # By depth, how often one of the head's candidates is right where the text's is not; hopeful at first.
    hits: list[float] = field(default_factory=lambda: [0.6] * (MAX_DEPTH + 2))
    plain_rounds: int = 0


class Policy:
    """Plans the trees of one sequence, and learns from what becomes of them.

    What it has learned stays when another sequence starts.
    """

    def __init__(self, costs: Costs, calibration: Calibration | None = None) -> None:
        self._forward_ms = [costs.forward(count) for count in range(MAX_NODES + 1)]
        self._draft_ms = costs.draft_ms[min(costs.draft_ms)]
        # What planning itself takes for a level, a running mean.
        self._planning_ms = 0.05
        self._calibration = calibration or Calibration()
        self._learned: dict[SamplingConfig, _Learned] = {}
        self.start([], SamplingConfig(), None)

    def start(self, prompt: Sequence[int], sampling: SamplingConfig, dice: Dice | None) -> None:
        """A new sequence; at a temperature drafts are drawn with the dice."""
        self._sampling, self._dice = sampling, dice
        way = SamplingConfig(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        self._now = self._learned.setdefault(way, _Learned(1 / self._forward_ms[1]))
        self._lookup = Lookup()
        self._lookup.extend(prompt)

    def plan(self, backend: Backend, token: int, room: int) -> Tree:
        """A tree after `token`, of at most `room` tokens."""
        started = time.perf_counter()
        self._engine_seconds = 0.0
        self._lookup.extend([token])
        nodes, room = [Node(token, -1, 0, 1.0)], min(room, MAX_NODES)
        self._look_up(nodes, room)
        levels = self._draft(backend, nodes, room)
        chosen = range(len(nodes)) if self._drawn else self._worthwhile(nodes, room)
        if levels:
            own_ms = 1e3 * (time.perf_counter() - started - self._engine_seconds)
            self._planning_ms += NEWEST * (own_ms / levels - self._planning_ms)
        return part(nodes, chosen, levels, self._forward_ms[len(chosen)] + levels * self._level_ms)

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        """Take what verification found: the path of nodes that stay."""
        self._lookup.extend([tree.nodes[place].token for place in path[1:]])
        now = self._now
        for depth, place in enumerate(path, 1):
            hit = depth < len(path)
            for child in tree.after(place):
                kept = hit and child == path[depth]
                for bin_of in tree.nodes[child].bins:
                    now.estimates.learn(bin_of, kept)
                if kept and self._drawn:
                    # The draws after it were not tried.
                    break
            if tree.nodes[place].asked and not (hit and tree.nodes[path[depth]].from_text):
                now.hits[depth] += NEWEST_HIT * (hit - now.hits[depth])
        now.rate += NEWEST * (len(path) / tree.milliseconds - now.rate)
        now.rate = max(now.rate, 1 / self._forward_ms[1])

    @property
    def _level_ms(self) -> float:
        return self._draft_ms + self._planning_ms

    @property
    def _drawn(self) -> bool:
        return self._sampling.temperature > 0

    def _worth(self, estimate: float, count: int, room: int) -> bool:
        """Whether one token more is worth verifying beside `count` others."""
        return count < room and estimate > self._now.rate * (self._forward_ms[count + 1] - self._forward_ms[count])

    def _look_up(self, nodes: list[Node], room: int) -> None:
        size, tokens = self._lookup.continuation(MAX_DEPTH)
        parent = 0
        for depth, token in enumerate(tokens, 1):
            bin_of = ("text", size, min(depth, DEEPEST_BIN))
            chance = self._now.estimates.probability(bin_of, 0.3 if depth == 1 else 0.6)
            if self._drawn:
                if not self._worth(nodes[parent].estimate * chance, len(nodes), room):
                    break
                nodes[parent].guesses.append(Guess(token, {token: 1.0}))
            parent = add(nodes, parent, token, chance, bin_of, True)

    def _draft(self, backend: Backend, nodes: list[Node], room: int) -> int:
        """Ask the head, a level at a time while that pays; returns the number of levels."""
        now, best, levels = self._now, [0], 0
        pays = self._gain(nodes, best, 1) > now.rate * self._level_ms
        now.plain_rounds = 0 if pays else now.plain_rounds + 1
        if now.plain_rounds % PROBE:
            return 0
        places = {0: 0}
        while best and levels < MAX_DEPTH:
            if levels and self._gain(nodes, best, levels + 1) <= now.rate * self._level_ms:
                break
            found = self._ask(backend, nodes, best, places)
            levels += 1
            for index, candidates in zip(best, found, strict=True):
                nodes[index].asked = True
                if self._drawn:
                    self._draw(nodes, index, candidates, room)
                else:
                    self._name(nodes, index, candidates)
            open_ = {child: _open(nodes, child) for index in best for child in nodes[index].children.values()}
            best = sorted(open_, key=open_.__getitem__, reverse=True)[:BEAM]
            best = [index for index in best if open_[index] > 0.25 * open_[best[0]]]
        return levels

    def _gain(self, nodes: list[Node], level: Sequence[int], depth: int) -> float:
        """Tokens that the head's candidates after these nodes are expected to bring beside the text's."""
        return sum(_open(nodes, index) for index in level) * self._now.hits[depth]

    def _ask(
        self, backend: Backend, nodes: list[Node], level: Sequence[int], places: dict[int, int]
    ) -> list[Candidates]:
        """The head's candidates after each node; `places` are those of the nodes in the head's own tree."""
        width = DRAWN_AMONG if self._drawn else WIDTH
        started = time.perf_counter()
        if level == [0]:
            found = [backend.start_tree(nodes[0].token, width)]
        else:
            parents = [places[nodes[index].parent] for index in level]
            for index in level:
                places[index] = len(places)
            found = backend.extend_tree(parents, [nodes[index].token for index in level], width)
        self._engine_seconds += time.perf_counter() - started
        return found

    def _name(self, nodes: list[Node], parent: int, candidates: Candidates) -> None:
        """Add a node's candidates."""
        depth = nodes[parent].depth + 1
        line = _line(self._calibration.greedy, depth)
        for token, confidence in zip(candidates.tokens, candidates.confidences, strict=True):
            if nodes[parent].estimate * confidence < LEAST:
                break
            bin_of = ("head", min(depth, DEEPEST_BIN), confidence_bin(confidence))
            chance = self._now.estimates.probability(bin_of, calibrated(line, confidence))
            add(nodes, parent, token, chance, bin_of, False)

    def _draw(self, nodes: list[Node], parent: int, candidates: Candidates, room: int) -> None:
        """Draw candidates without replacement, as many as are worth verifying, after the text's own."""
        assert self._dice is not None
        node, estimates = nodes[parent], self._now.estimates
        depth = node.depth + 1
        line = _line(self._calibration.drawn, depth)
        law = guess_law(candidates.tokens, candidates.confidences, self._sampling)
        top, left = max(law.values()), _open(nodes, parent)
        for guess in node.guesses:
            law = without(law, guess.token)
        for rank, share in enumerate(LATER_DRAWS):
            bin_of = ("draw", min(depth, DEEPEST_BIN), rank, confidence_bin(top))
            chance = estimates.probability(bin_of, share * calibrated(line, top))
            if not law or not self._worth(left * chance, len(nodes), room):
                break
            token = list(law)[self._dice.among(list(law.values()))]
            node.guesses.append(Guess(token, law))
            # What it is decides whether to go on from it, no longer whether it is verified.
            drawn_bin = ("drawn", min(depth, DEEPEST_BIN), min(rank, 1), confidence_bin(law[token]))
            likely = estimates.probability(drawn_bin, chance + (1 - chance) * law[token])
            index = add(nodes, parent, token, left / node.estimate * likely, drawn_bin, False)
            nodes[index].bins.append(bin_of)
            left *= 1 - chance
            law = without(law, token)

    def _worthwhile(self, nodes: list[Node], room: int) -> list[int]:
        """The nodes that are worth their place in the verification, best first."""
        order = sorted(range(len(nodes)), key=lambda index: -nodes[index].estimate)
        chosen = order[:1]
        for index in order[1:]:
            if not self._worth(nodes[index].estimate, len(chosen), room):
                break
            chosen.append(index)
        return chosen


def _open(nodes: Sequence[Node], index: int) -> float:
    """Probability that a node is reached, and that none of its children is what follows."""
    return nodes[index].estimate - sum(nodes[child].estimate for child in nodes[index].children.values())


def _line(lines: Sequence[Line], depth: int) -> Line:
    return lines[min(depth, len(lines)) - 1]
