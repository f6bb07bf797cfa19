"""How likely a drafted token is to be accepted: what a source says, corrected by what verification found.

Estimates are kept by bins; each is the mean of a beta law that starts from the source's own word (Beta-Bernoulli).
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Hashable

# Edges of the bins of the head's confidence.
EDGES = (0.02, 0.05, 0.1, 0.15, 0.22, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
# As many verified drafts outweigh the source's own word.
PRIOR_DRAFTS = 8.0


class Estimates:
    """Running counts by bin."""

    def __init__(self) -> None:
        self._counts: dict[Hashable, list[float]] = {}

    def probability(self, bin_of: Hashable, said: float) -> float:
        """Of acceptance, if everything before was accepted."""
        accepted, verified = self._counts.get(bin_of, (0.0, 0.0))
        return (PRIOR_DRAFTS * said + accepted) / (PRIOR_DRAFTS + verified)

    def learn(self, bin_of: Hashable, accepted: bool) -> None:
        """A draft whose path was accepted was verified."""
        counts = self._counts.setdefault(bin_of, [0.0, 0.0])
        counts[0] += accepted
        counts[1] += 1.0


def confidence_bin(confidence: float) -> int:
    return bisect(EDGES, confidence)
