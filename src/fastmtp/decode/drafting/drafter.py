"""What drafts: the tree that a round verifies. A chain is a tree without branches."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastmtp.config import SamplingConfig
from fastmtp.decode.sampling import race
from fastmtp.engines.protocol import Ask, Candidates, DraftingSequence
from fastmtp.engines.tree import Tree

# At a temperature, a draft is drawn from so many of the head's likeliest tokens.
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


# Makes the drafter of a text from its prompt.
NewDrafter = Callable[[Sequence[int], SamplingConfig], Drafter]


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
    """K tokens in a row in every round (FastMTP)."""

    def __init__(self, steps: int, sampling: SamplingConfig) -> None:
        self.depth = steps
        self._sampling = sampling

    def propose(self, length: int, token: int, room: int, load: Load = ALONE) -> Planning:
        tree, width = Tree(token), DRAWN_AMONG if self._sampling.temperature > 0 else 1
        for node in range(min(self.depth, room - 1)):
            (found,) = yield Ask(tree, [node], width)
            likely, _ = race(found.tokens, found.confidences, self._sampling, length + 1 + node)
            tree.asked.append(node)
            tree.add(node, likely[0])
        tree.select(range(len(tree.nodes)))
        return tree

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        pass


def chains(steps: int) -> NewDrafter:
    """Chains of K tokens for every text."""
    return lambda prompt, sampling: Chain(steps, sampling)
