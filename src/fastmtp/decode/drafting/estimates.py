"""How likely a drafted token is to be right: what its source says, corrected by what verification found.

Drafts are counted in bins; an estimate is the mean of a beta distribution that starts from the source's own word.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmtp.engines.tree import Bin
from fastmtp.files import read_json, write_json

FILE = "estimates.json"
FORMAT_VERSION = 1
# As many verified drafts weigh as much as the source's own word.
PRIOR_DRAFTS = 20.0
# Of a bin that comes with a head, as many drafts are believed at most.
BELIEVED = 40.0
# The head's word is believed as a whole at first as if so many drafts had come true that it promised.
PROMISED = 3.0
# Edges of the bins of the head's confidence, and of the number of tokens that agree before one of the text.
CONFIDENCES = (0.02, 0.05, 0.1, 0.15, 0.22, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
AGREEMENTS = (2, 3, 4, 5, 6, 8, 11, 16, 24)
# Deeper nodes share the bins of this depth.
DEEPEST = 4
# Chances of a token of the text that the head was not asked about: the first, and those after a right one.
TEXT_FIRST, TEXT_NEXT = 0.3, 0.6

# What a head says in each bin of its confidence, about.
_MIDDLES = [(low + high) / 2 for low, high in zip((0.0, *CONFIDENCES), (*CONFIDENCES, 1.0), strict=True)]

# Of a bin: drafts that were right, and drafts that were verified.
Counts = dict[Bin, list[float]]


def head_bin(depth: int, confidence: float) -> Bin:
    """Of a token that the head names."""
    return "head", min(depth, DEEPEST), bisect(CONFIDENCES, confidence), 0


def text_bin(depth: int, agreement: int) -> Bin:
    """Of a token of the text, before the head is asked."""
    return "text", min(depth, DEEPEST), 0, bisect(AGREEMENTS, agreement)


def both_bin(depth: int, agreement: int, confidence: float) -> Bin:
    """Of a token of the text, when the head has said what it thinks of it."""
    return "both", min(depth, DEEPEST), bisect(CONFIDENCES, confidence), bisect(AGREEMENTS, agreement)


# Where all of the head's drafts are counted: those that were right, and those that it promised.
PROMISES: Bin = ("promises", 0, 0, 0)


@dataclass(frozen=True)
class Estimates:
    """Counts by bin."""

    counts: Counts = field(default_factory=dict)

    def of_head(self, depth: int, confidence: float) -> float:
        """Starts from the head's word, less if it is not kept in general: a useless head is soon known."""
        right, promised = self.counts.get(PROMISES, (0.0, 0.0))
        kept = min(1.0, (PROMISED + right) / (PROMISED + promised))
        return self._mean(head_bin(depth, confidence), kept * confidence)

    def of_text(self, depth: int, agreement: int) -> float:
        return self._mean(text_bin(depth, agreement), TEXT_FIRST if depth == 1 else TEXT_NEXT)

    def of_both(self, depth: int, agreement: int, confidence: float) -> float:
        """Starts from both words as if they were independent, the odds multiplied."""
        text, head = (min(0.99, max(0.003, chance)) for chance in (self.of_text(depth, agreement), confidence))
        odds = text / (1 - text) * head / (1 - head) * (1 - TEXT_FIRST) / TEXT_FIRST
        return self._mean(both_bin(depth, agreement, confidence), odds / (1 + odds))

    def learn(self, bin_of: Bin, right: bool) -> None:
        """A draft whose path was accepted was verified."""
        source, _, confidence, _ = bin_of
        counted = [(bin_of, 1.0)]
        if source == "head":
            counted.append((PROMISES, _MIDDLES[confidence]))
        for name, weight in counted:
            counts = self.counts.setdefault(name, [0.0, 0.0])
            counts[0] += right
            counts[1] += weight

    def copy(self) -> Estimates:
        return Estimates({bin_of: list(counts) for bin_of, counts in self.counts.items()})

    def _mean(self, bin_of: Bin, said: float) -> float:
        right, verified = self.counts.get(bin_of, (0.0, 0.0))
        return (PRIOR_DRAFTS * said + right) / (PRIOR_DRAFTS + verified)


def save(estimates: Estimates, directory: Path, provenance: Mapping[str, Any]) -> None:
    """Into a head's directory, in place of those that are there."""
    kept = {bin_of: counts for bin_of, counts in estimates.counts.items() if bin_of != PROMISES}
    named = {"/".join(map(str, bin_of)): counts for bin_of, counts in sorted(kept.items())}
    facts = {"format_version": FORMAT_VERSION, "counts": named, "provenance": dict(provenance)}
    write_json(directory / FILE, facts, indent=None)


def load(directory: Path) -> Estimates:
    """Those of a head's directory, each bin believed up to BELIEVED drafts; a head without them knows nothing yet.

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
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: `counts` must hold two numbers for each bin, as head/1/10/0") from error
    for name, (right, seen) in stored.items():
        if not 0 <= right <= seen < 1e12:
            raise ValueError(f"{path}: counts of {'/'.join(map(str, name))} must be right and verified drafts")
    weights = {name: min(1.0, BELIEVED / max(1.0, seen)) for name, (_, seen) in stored.items()}
    return Estimates({name: [weights[name] * count for count in counts] for name, counts in stored.items()})


def _bin(name: str) -> Bin:
    source, depth, confidence, agreement = name.split("/")
    return source, int(depth), int(confidence), int(agreement)
