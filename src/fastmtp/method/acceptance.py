"""Acceptance statistics of speculative decoding, by whichever way it was measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Acceptance:
    """Over rounds: how many there were, and in how many the first k drafts were kept, for k = 1..K."""

    rounds: int
    kept: tuple[int, ...]

    @classmethod
    def of(cls, accepted: Iterable[int], draft_steps: int) -> Acceptance:
        """From the number of kept drafts of each round."""
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
        """By step k, the share of rounds that kept the first k drafts."""
        return [count / max(1, self.rounds) for count in self.kept]

    @property
    def tau(self) -> float:
        """Acceptance length: tokens per target forward, that is accepted drafts + 1."""
        return 1 + sum(self.cumulative)
