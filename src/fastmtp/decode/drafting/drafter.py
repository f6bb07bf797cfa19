"""What drafts: the tree that a round verifies. A chain is a tree without branches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.constrained import MOST_FORCED, add_forced, only_allowed
from fastmtp.decode.grammar import Grammar
from fastmtp.decode.sampling import race
from fastmtp.engines.protocol import DraftingSequence
from fastmtp.engines.tree import Tree

# At a temperature or under a grammar, a draft is drawn from so many of the head's likeliest tokens.
DRAWN_AMONG = 32


@dataclass(frozen=True)
class Load:
    """What is in a forward besides the tree that is planned: others' trees, and prompts.

    Attributes:
        sequences: that decode together, the planned one included.
        tokens: of the others' trees.
        prefill: tokens of prompts, which take time and settle nothing.
    """

    sequences: int = 1
    tokens: int = 0
    prefill: int = 0


ALONE = Load()


class Drafter(Protocol):
    """The drafts of one text. `depth` is the most that a round can accept."""

    depth: int

    def propose(self, sequence: DraftingSequence, token: int, room: int, load: Load = ALONE) -> Tree:
        """A tree after `token`, the sequence's next one; at most `room` of its nodes are to be verified."""
        ...

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        """Take what verification found: the path of accepted nodes."""
        ...


class NewDrafter(Protocol):
    """Makes the drafter of a text."""

    def __call__(
        self, prompt: Sequence[int], sampling: SamplingConfig, grammar: Grammar | None = None, /
    ) -> Drafter:
        """
        Args:
            grammar: what the text after the prompt must fit; whoever decodes keeps it up with the text.
        """
        ...


class Chain:
    """K tokens in a row in every round (FastMTP); where a grammar forces tokens, these."""

    def __init__(self, steps: int, sampling: SamplingConfig, grammar: Grammar | None = None) -> None:
        self.depth = max(steps, MOST_FORCED) if grammar else steps
        self._steps, self._sampling, self._grammar = steps, sampling, grammar

    def propose(self, sequence: DraftingSequence, token: int, room: int, load: Load = ALONE) -> Tree:
        steps = min(self._steps, room - 1)
        if self._grammar is not None:
            tree = Tree(token)
            tree.forced = add_forced(tree, 0, self._grammar, min(MOST_FORCED, room - 1))
            if not tree.forced:
                self._draw(sequence, tree, steps)
        elif self._sampling.temperature == 0:
            tree = Tree.chain([token, *(sequence.draft(token, steps) if steps else [])])
            tree.asked = list(range(steps))
        else:
            tree = Tree(token)
            self._draw(sequence, tree, steps)
        tree.select(range(len(tree.nodes)))
        return tree

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        pass

    def _draw(self, sequence: DraftingSequence, tree: Tree, steps: int) -> None:
        """Draw one token after the other among the head's candidates, as long as there are some."""
        position = len(sequence.tokens) + 1
        for node in range(steps):
            found = sequence.ask(tree, [node], DRAWN_AMONG)[0]
            tree.asked.append(node)
            if self._grammar is not None:
                found = only_allowed(found, tree, node, self._grammar)
                if not found.tokens:
                    break
            likely, _ = race(found.tokens, found.confidences, self._sampling, position + node)
            tree.add(node, likely[0])


def chains(steps: int) -> NewDrafter:
    """Chains of K tokens for every text."""
    return lambda prompt, sampling, grammar=None: Chain(steps, sampling, grammar)
