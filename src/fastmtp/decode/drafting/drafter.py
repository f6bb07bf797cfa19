"""What drafts: the tree that a round verifies. A chain is a tree without branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from fastmtp.config import SamplingConfig
from fastmtp.decode.sampling import race
from fastmtp.engines.protocol import DraftingSequence
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


class Drafter(Protocol):
    """The drafts of one text. `depth` is the most that a round can accept."""

    depth: int

    def propose(self, sequence: DraftingSequence, token: int, room: int, load: Load = ALONE) -> Tree:
        """A tree after `token`, the sequence's next one; at most `room` of its nodes are to be verified."""
        ...

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        """Take what verification found: the path of accepted nodes."""
        ...


# Makes the drafter of a text from its prompt.
NewDrafter = Callable[[Sequence[int], SamplingConfig], Drafter]


class Chain:
    """K tokens in a row in every round (FastMTP)."""

    def __init__(self, steps: int, sampling: SamplingConfig) -> None:
        self.depth = steps
        self._sampling = sampling

    def propose(self, sequence: DraftingSequence, token: int, room: int, load: Load = ALONE) -> Tree:
        steps = min(self.depth, room - 1)
        if self._sampling.temperature == 0:
            tree = Tree.chain([token, *(sequence.draft(token, steps) if steps else [])])
        else:
            tree = self._drawn(sequence, token, steps)
        tree.asked = list(range(steps))
        return tree

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        pass

    def _drawn(self, sequence: DraftingSequence, token: int, steps: int) -> Tree:
        tree, position = Tree(token), len(sequence.tokens) + 1
        for node in range(steps):
            found = sequence.ask(tree, [node], DRAWN_AMONG)[0]
            likely, _ = race(found.tokens, found.confidences, self._sampling, position + node)
            tree.add(node, likely[0])
        tree.select(range(len(tree.nodes)))
        return tree


def chains(steps: int) -> NewDrafter:
    """Chains of K tokens for every text."""
    return lambda prompt, sampling: Chain(steps, sampling)
