"""What to draft: a tree whose every node is worth its cost.

Nodes come from the head and from the text itself. The head is asked along one path, a node at a time, always after
the child that is likeliest to be accepted; all that it names are candidates (after EAGLE-2, arXiv 2406.16858). The
cost of a round is known (Costs) and its gain is estimated, so each decision is one comparison: expected tokens
against milliseconds times the rate of tokens that decoding has anyway (Dinkelbach's method for the best ratio).
Where sequences are decoded together, cost and rate are those of all of them: a token more for one delays every one.
Tokens that a grammar forces come first, and are treated as those of a prompt: they have to be computed anyway.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.constrained import MOST_FORCED, add_forced, is_allowed, is_over, only_allowed
from fastmtp.decode.drafting.drafter import ALONE, DRAWN_AMONG, Load, Planning
from fastmtp.decode.drafting.estimates import DEEPEST, both_bin, head_bin, text_bin
from fastmtp.decode.drafting.learned import MAX_DEPTH, MAX_NODES, PROBE, RAREST_PROBE, Learned
from fastmtp.decode.drafting.lookup import Lookup
from fastmtp.decode.grammar import Grammar
from fastmtp.decode.sampling import race
from fastmtp.engines.protocol import Ask, Candidates
from fastmtp.engines.tree import Tree

# Candidates of the head after a node.
WIDTH = 4
# A less likely candidate is not considered.
LEAST = 0.02
# No draft is surer than this, unless a grammar forces it.
SUREST = 0.995
# What a grammar forces after a less likely node is not looked for.
FOLLOWED = 0.2

_Drafting = Generator[Ask, list[Candidates], list[float]]


class Adaptive:
    """Plans the trees of one text, and learns from what becomes of them for all texts."""

    def __init__(
        self, learned: Learned, prompt: Sequence[int], sampling: SamplingConfig, grammar: Grammar | None = None
    ) -> None:
        self.depth = MAX_DEPTH if grammar is None else MAX_DEPTH + MOST_FORCED
        self._learned, self._sampling, self._grammar = learned, sampling, grammar
        self._beside(ALONE)
        self._lookup = Lookup()
        self._lookup.extend(prompt)

    def propose(self, length: int, token: int, room: int, load: Load = ALONE) -> Planning:
        self._lookup.extend([token])
        if load is not self._load:
            self._beside(load)
        tree = Tree(token)
        self._begin(tree, room)
        forward_ms = self._learned.forward_ms(length, load.tokens + load.prefill + tree.forced)
        agreement = self._look_up(tree)
        open_when_asked = yield from self._draft(tree, agreement, length + 1)
        chosen = self._worthwhile(tree, min(room, MAX_NODES + tree.forced), forward_ms)
        if tree.asked:
            self._learn_worth(tree, open_when_asked, chosen, forward_ms)
        tree.select(chosen)
        # As if the others asked as often. Prompts and forced tokens are left out: the rate is that of decoding.
        decoding_ms = self._learned.forward_ms(length, load.tokens)[len(chosen) - tree.forced]
        followed = tree.forced if tree.asked else 0
        asked_ms = load.sequences * (len(tree.asked) - followed) * self._ask_ms
        tree.expected_ms = decoding_ms + asked_ms + followed * self._learned.follow_ms
        return tree

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        self._lookup.extend(tree.tokens_of(path[1 + tree.forced :]))
        accepted = set(path)
        for node in path:
            for child in tree.children(node):
                for bin_of in tree.nodes[child].bins:
                    self._now.estimates.learn(bin_of, child in accepted)
        rate, sequences = self._now.rate, self._load.sequences
        rate.learn(sequences * (len(path) - tree.forced) / tree.expected_ms)
        plain_ms = self._learned.forward_ms(len(self._lookup.tokens), sequences - 1)[1]
        rate.value = max(rate.value, sequences / plain_ms)

    def _beside(self, load: Load) -> None:
        """Plan from now on for this load."""
        self._load, self._now = load, self._learned.experience(self._sampling, load.sequences)
        self._ask_ms = self._learned.ask_ms(load.sequences)

    def _begin(self, tree: Tree, room: int) -> None:
        """Add the tokens that a grammar forces after the root; they belong to the text already."""
        if self._grammar is not None:
            tree.forced = add_forced(tree, 0, self._grammar, min(MOST_FORCED, room - 1))
            self._lookup.extend(tree.tokens_of(range(1, len(tree.nodes))))

    def _look_up(self, tree: Tree) -> int:
        """Add the nodes that the text gives, if they are allowed; returns how many tokens before them agree."""
        agreement, tokens = self._lookup.continuation(MAX_DEPTH)
        # Deeper nodes share the last one.
        bins = [text_bin(depth, agreement) for depth in range(1, min(len(tokens), DEEPEST) + 1)]
        chances = [min(SUREST, self._now.estimates.of_text(bin_of)) for bin_of in bins]
        node = tree.forced
        for depth, token in enumerate(tokens, 1):
            if (forced := tree.nodes[node].children.get(token)) is not None:
                node = forced
                continue
            if self._grammar is not None and not is_allowed(tree, node, token, self._grammar):
                break
            level = min(depth, len(bins)) - 1
            node = tree.add(node, token, chances[level], bins[level], "text")
            self._follow(tree, node)
        return agreement

    def _follow(self, tree: Tree, node: int) -> None:
        """Add the tokens that a grammar forces after a node."""
        if self._grammar is not None and tree.nodes[node].estimate >= FOLLOWED:
            add_forced(tree, node, self._grammar, MAX_DEPTH + tree.forced - tree.nodes[node].depth)

    def _draft(self, tree: Tree, agreement: int, position: int) -> _Drafting:
        """Ask the head what follows, a node at a time while that pays; returns `_open` of each node when asked."""
        now, node = self._now, tree.forced
        if self._grammar is not None and is_over(tree, node, self._grammar):
            return []
        width = DRAWN_AMONG if self._sampling.temperature > 0 or self._grammar is not None else WIDTH
        found: list[float] = []
        # Threads share the count, so it may pass the round in which the head is due.
        probe = not tree.forced and now.rounds_without_head + 1 >= now.probe_after
        while (depth := tree.nodes[node].depth) < MAX_DEPTH + tree.forced:
            open_ = _open(tree, node)
            # Before its first question the head has to follow what is forced, a token at a time.
            ask_ms = self._ask_ms + (0 if tree.asked else tree.forced * self._learned.follow_ms)
            pays = open_ * now.worth[_level(depth)].value > now.rate.value * ask_ms
            if not pays and (tree.asked or not probe):
                break
            if not tree.asked:
                now.probe_after = PROBE if pays else min(2 * now.probe_after, RAREST_PROBE)
                for before in range(tree.forced):
                    yield Ask(tree, [before], 0)
                    tree.asked.append(before)
            (candidates,) = yield Ask(tree, [node], width)
            tree.asked.append(node)
            found.append(open_)
            self._add(tree, node, candidates, agreement, position + depth)
            children = tree.nodes[node].children
            if not children:
                break
            node = max(children.values(), key=lambda child: _open(tree, child))
        now.rounds_without_head = 0 if tree.asked else now.rounds_without_head + (tree.forced == 0)
        return found

    def _add(self, tree: Tree, parent: int, candidates: Candidates, agreement: int, position: int) -> None:
        """Add the head's candidates after a node, and correct the estimate of the text's token there by them."""
        estimates, before = self._now.estimates, tree.nodes[parent]
        depth = before.depth + 1
        if self._grammar is not None:
            candidates = only_allowed(candidates, tree, parent, self._grammar)
        tokens, confidences = race(candidates.tokens, candidates.confidences, self._sampling, position)
        left = 1.0
        for token, child in before.children.items():
            confidence = confidences[tokens.index(token)] if token in tokens else 0.0
            bin_of = both_bin(depth, agreement, confidence)
            chance = min(SUREST, estimates.of_both(bin_of, confidence))
            tree.scale(child, before.estimate * chance / tree.nodes[child].estimate)
            tree.nodes[child].bins.append(bin_of)
            # The head's other candidates share what the text leaves.
            left = min(1.5, (1 - chance) / (1 - min(0.97, confidence)))
        for token, confidence in zip(tokens[:WIDTH], confidences, strict=False):
            if before.estimate * confidence < LEAST:
                break
            if token not in before.children:
                bin_of = head_bin(depth, confidence)
                chance = min(SUREST, left * estimates.of_head(bin_of, confidence))
                self._follow(tree, tree.add(parent, token, chance, bin_of))

    def _worthwhile(self, tree: Tree, room: int, forward_ms: Sequence[float]) -> list[int]:
        """The nodes to verify: of the likeliest 1, 2, 3, ... those that gain most."""
        estimates = [-node.estimate for node in tree.nodes]
        order = sorted(range(len(estimates)), key=estimates.__getitem__)[:room]
        gain, most, count = 0.0, 0.0, 1
        for size, node in enumerate(order[1 + tree.forced :], 2):
            gain += self._gain(tree, node, size, forward_ms)
            if gain > most:
                most, count = gain, size
        return order[: tree.forced + count]

    def _gain(self, tree: Tree, node: int, size: int, forward_ms: Sequence[float]) -> float:
        """Expected tokens of a node in a tree of `size` nodes with it, less what decoding makes in its time."""
        return tree.nodes[node].estimate - self._now.rate.value * (forward_ms[size] - forward_ms[size - 1])

    def _learn_worth(
        self, tree: Tree, open_when_asked: Sequence[float], chosen: Sequence[int], forward_ms: Sequence[float]
    ) -> None:
        """The gain of asking the head at each node, and at those after it, for each unit of `_open`."""
        asked = tree.asked[tree.forced :]
        gains = dict.fromkeys(asked, 0.0)
        for size, node in enumerate(chosen[1 + tree.forced :], 2):
            # What is forced after a candidate comes with it.
            candidate = node
            while tree.nodes[candidate].source == "grammar":
                candidate = tree.nodes[candidate].parent
            parent = tree.nodes[candidate].parent
            if tree.nodes[candidate].source == "head" and parent in gains:
                gains[parent] += self._gain(tree, node, size, forward_ms)
        for node, open_ in zip(reversed(asked), reversed(open_when_asked), strict=True):
            self._now.worth[_level(tree.nodes[node].depth)].learn(gains[node] / max(LEAST, open_))
            if node != tree.forced:
                gains[tree.nodes[node].parent] += gains[node] - self._now.rate.value * self._ask_ms


class FromText(Adaptive):
    """Trees from the text alone, without a head."""

    def _draft(self, tree: Tree, agreement: int, position: int) -> _Drafting:
        yield from ()
        return []


def _level(depth: int) -> int:
    """Where the worth of the candidates after a node of this depth is learned."""
    return min(depth + 1, MAX_DEPTH)


def _open(tree: Tree, node: int) -> float:
    """Probability that a node is accepted, and that none of its children is what follows."""
    children = tree.nodes[node].children.values()
    return tree.nodes[node].estimate - sum(tree.nodes[child].estimate for child in children)
