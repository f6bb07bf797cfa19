"""The probability that a draft is accepted: a prior of its source, corrected by what verification found.

Drafts are counted in bins; an estimate is the mean of a beta distribution.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmtp.engines.tree import Bin
from fastmtp.errors import PARSING
from fastmtp.files import read_json, write_json

FILE = "estimates.json"
FORMAT_VERSION = 1
# The prior weighs as much as so many verified drafts.
PRIOR_DRAFTS = 20.0
# Counts of a bin that come with a head weigh as much as so many drafts at most.
BELIEVED = 40.0
# The head's probabilities are trusted at first as if so many drafts had been accepted as they predicted.
TRUSTED = 3.0
# Edges of the bins of the head's probability, and of the number of tokens that agree before one of the text.
CONFIDENCES = (0.02, 0.05, 0.1, 0.15, 0.22, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
AGREEMENTS = (2, 3, 4, 5, 6, 8, 11, 16, 24)
# Deeper nodes share the bins of this depth.
DEEPEST = 4
# Priors of a token of the text that the head was not asked about: the first, and those after an accepted one.
TEXT_FIRST, TEXT_NEXT = 0.3, 0.6

# The middle of each bin of the head's probability.
_MIDDLES = [(low + high) / 2 for low, high in zip((0.0, *CONFIDENCES), (*CONFIDENCES, 1.0), strict=True)]

# By bin, how many drafts were accepted, and how many were verified.
Counts = dict[Bin, list[float]]


def head_bin(depth: int, confidence: float) -> Bin:
    """Of a token that the head proposes."""
    return "head", min(depth, DEEPEST), bisect(CONFIDENCES, confidence), 0


def text_bin(depth: int, agreement: int) -> Bin:
    """Of a token of the text, before the head is asked."""
    return "text", min(depth, DEEPEST), 0, bisect(AGREEMENTS, agreement)


def both_bin(depth: int, agreement: int, confidence: float) -> Bin:
    """Of a token of the text to which the head gave a probability."""
    return "both", min(depth, DEEPEST), bisect(CONFIDENCES, confidence), bisect(AGREEMENTS, agreement)


# Where all of the head's drafts are counted: how many were accepted, and how many it predicted to be.
PREDICTED: Bin = ("predicted", 0, 0, 0)


@dataclass(frozen=True)
class Estimates:
    """Counts by bin."""

    counts: Counts = field(default_factory=dict)

    def of_head(self, bin_of: Bin, confidence: float) -> float:
        """The prior is the head's probability, lowered if its drafts are accepted less often than predicted."""
        accepted, predicted = self.counts.get(PREDICTED, (0.0, 0.0))
        trust = min(1.0, (TRUSTED + accepted) / (TRUSTED + predicted))
        return self._mean(bin_of, trust * confidence)

    def of_text(self, bin_of: Bin) -> float:
        return self._mean(bin_of, TEXT_FIRST if bin_of[1] == 1 else TEXT_NEXT)

    def of_both(self, bin_of: Bin, confidence: float) -> float:
        """The prior multiplies the odds of both, as if they were independent."""
        _, depth, _, agreement = bin_of
        of_text = self.of_text(("text", depth, 0, agreement))
        text, head = (min(0.99, max(0.003, chance)) for chance in (of_text, confidence))
        odds = text / (1 - text) * head / (1 - head) * (1 - TEXT_FIRST) / TEXT_FIRST
        return self._mean(bin_of, odds / (1 + odds))

    def learn(self, bin_of: Bin, accepted: bool) -> None:
        """Count a draft whose parent was accepted."""
        source, _, confidence, _ = bin_of
        self._count(bin_of, accepted, 1.0)
        if source == "head":
            self._count(PREDICTED, accepted, _MIDDLES[confidence])

    def copy(self) -> Estimates:
        return Estimates({bin_of: list(counts) for bin_of, counts in self.counts.items()})

    def _count(self, bin_of: Bin, accepted: bool, weight: float) -> None:
        counts = self.counts.setdefault(bin_of, [0.0, 0.0])
        counts[0] += accepted
        counts[1] += weight

    def _mean(self, bin_of: Bin, prior: float) -> float:
        accepted, verified = self.counts.get(bin_of, (0.0, 0.0))
        return (PRIOR_DRAFTS * prior + accepted) / (PRIOR_DRAFTS + verified)


def save(estimates: Estimates, directory: Path, provenance: Mapping[str, Any]) -> None:
    """Write them into a head's directory, in place of others."""
    kept = {bin_of: counts for bin_of, counts in estimates.counts.items() if bin_of != PREDICTED}
    named = {"/".join(map(str, bin_of)): counts for bin_of, counts in sorted(kept.items())}
    facts = {"format_version": FORMAT_VERSION, "counts": named, "provenance": dict(provenance)}
    write_json(directory / FILE, facts, indent=None)


def load(directory: Path) -> Estimates:
    """Those of a head's directory, each bin scaled down to BELIEVED drafts; empty without a file.

    Raises:
        ValueError: the file is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return Estimates()
    facts = read_json(path)
    if facts.get("format_version") != FORMAT_VERSION:
        raise ValueError(f"{path}: format_version must be {FORMAT_VERSION}")
    try:
        stored = {_bin(name): (float(right), float(seen)) for name, (right, seen) in facts["counts"].items()}
    except PARSING as error:
        raise ValueError(f"{path}: `counts` must hold two numbers for each bin, as head/1/10/0") from error
    for name, (right, seen) in stored.items():
        if not _known(name):
            raise ValueError(f"{path}: {'/'.join(map(str, name))} is no bin that drafts are counted in")
        if not 0 <= right <= seen < 1e12:
            raise ValueError(f"{path}: counts of {'/'.join(map(str, name))} must be right and verified drafts")
    weights = {name: min(1.0, BELIEVED / max(1.0, seen)) for name, (_, seen) in stored.items()}
    return Estimates({name: [weights[name] * count for count in counts] for name, counts in stored.items()})


def _known(bin_of: Bin) -> bool:
    source, depth, confidence, agreement = bin_of
    return (
        source in ("head", "text", "both")
        and 1 <= depth <= DEEPEST
        and 0 <= confidence <= len(CONFIDENCES)
        and 0 <= agreement <= len(AGREEMENTS)
    )


def _bin(name: str) -> Bin:
    source, depth, confidence, agreement = name.split("/")
    return source, int(depth), int(confidence), int(agreement)
