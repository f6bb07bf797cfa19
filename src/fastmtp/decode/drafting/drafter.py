"""What drafts: the tree that a round verifies. A chain is a tree without branches."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.constrained import MOST_FORCED, add_forced, only_allowed
from fastmtp.decode.grammar import Grammar
from fastmtp.decode.sampling import race
from fastmtp.engines.protocol import Ask, Candidates, DraftingSequence
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


# Yields what it asks the head, is sent the candidates, and returns the tree: its caller may ask for several texts
# in one call.
Planning = Generator[Ask, list[Candidates], Tree]


class Drafter(Protocol):
    """The drafts of one text. `depth` is the most that a round can accept."""

    depth: int

    def propose(self, length: int, token: int, room: int, load: Load = ALONE) -> Planning:
        """A tree after `length` tokens and then `token`; at most `room` of its nodes are to be verified."""
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


def planned(planning: Planning, sequence: DraftingSequence) -> Tree:
    """The tree, with what it asks asked of one sequence."""
    try:
        ask = next(planning)
        while True:
            ask = planning.send(sequence.ask(ask))
    except StopIteration as done:
        tree: Tree = done.value
        return tree


class Chain:
    """K tokens in a row in every round (FastMTP); where a grammar forces tokens, these."""

    def __init__(self, steps: int, sampling: SamplingConfig, grammar: Grammar | None = None) -> None:
        self.depth = max(steps, MOST_FORCED) if grammar else steps
        self._steps, self._sampling, self._grammar = steps, sampling, grammar

    def steps_in(self, room: int) -> int:
        """How many tokens of the head it drafts in a round, whatever the text; under a grammar 0."""
        return min(self._steps, room - 1) if self._grammar is None else 0

    def propose(self, length: int, token: int, room: int, load: Load = ALONE) -> Planning:
        tree, width = Tree(token), 1
        if self._grammar is not None or self._sampling.temperature > 0:
            width = DRAWN_AMONG
        if self._grammar is not None:
            tree.forced = add_forced(tree, 0, self._grammar, min(MOST_FORCED, room - 1))
        for node in range(0 if tree.forced else min(self._steps, room - 1)):
            (found,) = yield Ask(tree, [node], width)
            tree.asked.append(node)
            if self._grammar is not None:
                found = only_allowed(found, tree, node, self._grammar)
            likely, _ = race(found.tokens, found.confidences, self._sampling, length + 1 + node)
            if not likely:
                break
            tree.add(node, likely[0])
        tree.select(range(len(tree.nodes)))
        return tree

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        pass


def chains(steps: int) -> NewDrafter:
    """Chains of K tokens for every text."""
    return lambda prompt, sampling, grammar=None: Chain(steps, sampling, grammar)
