"""The acceptance rule, and statistics of accepted drafts.

A draft is accepted if it is the token of plain decoding at its position: the argmax, or at a temperature the token
that the position's random numbers draw (decode/sampling.py). So drafts do not change the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass


def follow(choice: Callable[[int], int], child: Callable[[int, int], int | None]) -> tuple[list[int], int]:
    """The accepted path through a tree, from node 0 on, and the token after it.

    Args:
        choice: the target's token after a node; called once for each node of the path.
        child: the node of a token after a node; None if it was not drafted.
    """
    path = [0]
    while True:
        token = choice(path[-1])
        after = child(path[-1], token)
        if after is None:
            return path, token
        path.append(after)


@dataclass(frozen=True)
class Acceptance:
    """The number of rounds, and for k = 1..K the number of those that accepted the first k drafts."""

    rounds: int
    kept: tuple[int, ...]

    @classmethod
    def of(cls, accepted: Iterable[int], draft_steps: int) -> Acceptance:
        """From the number of accepted drafts of each round."""
        counts = list(accepted)
        kept = tuple(sum(count >= k for count in counts) for k in range(1, draft_steps + 1))
        return cls(len(counts), kept)

    @classmethod
    def total(cls, parts: Iterable[Acceptance]) -> Acceptance:
        listed = list(parts)
        kept = zip(*(part.kept for part in listed), strict=True)
        return cls(sum(part.rounds for part in listed), tuple(map(sum, kept)))

    @property
    def cumulative(self) -> list[float]:
        """For k = 1..K, the share of rounds that accepted the first k drafts."""
        return [count / max(1, self.rounds) for count in self.kept]

    @property
    def tau(self) -> float:
        """Acceptance length: tokens per target forward, that is accepted drafts + 1."""
        return 1 + sum(self.cumulative)
