"""What drafts: the tokens that a round verifies, as a tree, and what becomes of them.

A chain is a tree without branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fastmtp.config import SamplingConfig
from fastmtp.decode.sampling import race
from fastmtp.engines.protocol import HeadBackend
from fastmtp.engines.tree import Node, Tree, add

# The head's likeliest tokens, among which the next one is guessed where tokens are drawn.
DRAWN_AMONG = 32


class Drafter(Protocol):
    """The drafts of one sequence at a time. `depth` is the most that a round can accept."""

    depth: int

    def start(self, prompt: Sequence[int], sampling: SamplingConfig) -> None:
        """A new sequence."""
        ...

    def propose(self, backend: HeadBackend, token: int, room: int) -> Tree:
        """A tree after `token`, the sequence's next one; of at most `room` tokens with it."""
        ...

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        """Take what verification found: the path of nodes that stay."""
        ...


class Chain:
    """K tokens in a row in every round (FastMTP)."""

    def __init__(self, steps: int) -> None:
        self.depth = steps

    def start(self, prompt: Sequence[int], sampling: SamplingConfig) -> None:
        self._sampling = sampling

    def propose(self, backend: HeadBackend, token: int, room: int) -> Tree:
        steps = min(self.depth, room - 1)
        drafted = self._drafted(backend, token, steps) if steps else []
        nodes = [Node(token, -1, 0, 1.0)]
        for parent, drafted_token in enumerate(drafted):
            add(nodes, parent, drafted_token, 1.0, None, False)
        return Tree(nodes, list(range(-1, len(drafted))), levels=steps)

    def learn(self, tree: Tree, path: Sequence[int]) -> None:
        pass

    def _drafted(self, backend: HeadBackend, token: int, steps: int) -> list[int]:
        if self._sampling.temperature == 0:
            return backend.draft(token, steps)
        drafted: list[int] = []
        place = len(backend.tokens) + 1
        found = backend.start_tree(token, DRAWN_AMONG)
        while True:
            drafted.append(race(found.tokens, found.confidences, self._sampling, place + len(drafted))[0][0])
            if len(drafted) == steps:
                return drafted
            found = backend.extend_tree([len(drafted) - 1], drafted[-1:], DRAWN_AMONG)[0]
