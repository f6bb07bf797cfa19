"""Lists from token counts of texts, by language and domain.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fastmtp.vocabulary.lists import VocabularyLists
from fastmtp.vocabulary.ranking import coverage, merge_order, ranked, smoothed

# No list is made from fewer tokens: its counts would be chance.
LEAST_TOKENS = 10000


@dataclass(frozen=True)
class LabelledCounts:
    """Token counts of a label's texts, and of the held-out ones, on which lists are measured.

    `samples` are some of the held-out texts: token ids, and the index of the first one that counts.
    """

    counted: Counter[int]
    held_out: Counter[int]
    samples: list[tuple[list[int], int]] = field(default_factory=list)

    @property
    def total(self) -> Counter[int]:
        return self.counted + self.held_out


@dataclass(frozen=True)
class Built:
    """The lists, and by label: the number of tokens, and the share of the held-out text that its list covers."""

    lists: VocabularyLists
    tokens: dict[str, int]
    coverage: dict[str, float]


@dataclass(frozen=True)
class Ranking:
    """A label's tokens, the likeliest first, and measurements by which to choose a size."""

    label: str
    ids: list[int]
    coverage: NDArray[np.float64]  # share of the held-out text that the first 0, 1, 2, ... tokens cover
    samples: Sequence[tuple[list[int], int]]


# The number of tokens of a ranking that make the list.
SizeOf = Callable[[Ranking], int]


class TooLittleTextError(ValueError):
    """No label has enough text for a list."""


def build(
    labelled: Mapping[str, LabelledCounts], always: Collection[int], vocabulary_size: int, size_of: SizeOf
) -> Built:
    """A list for every label with enough text.

    Args:
        always: tokens that are in every list.
    Raises:
        TooLittleTextError: there is too little text.
        ValueError: a size is not above the number of `always`.
    """
    kept = {name: found for name, found in labelled.items() if found.total.total() >= LEAST_TOKENS}
    if not kept:
        most = max((found.total.total() for found in labelled.values()), default=0)
        raise TooLittleTextError(
            f"no language or domain has {LEAST_TOKENS} tokens (the most is {most}); add --data or --text"
        )
    everything: Counter[int] = Counter()
    for found in labelled.values():
        everything.update(found.counted)
    union_V = smoothed(everything, merge_order(vocabulary_size))
    lists, counts, tokens, shares = {}, {}, {}, {}
    for name, found in sorted(kept.items(), key=lambda item: -item[1].total.total()):
        ids = ranked(smoothed(found.counted, union_V), always)
        measured = coverage(found.held_out, ids)
        size = min(size_of(Ranking(name, ids, measured, found.samples)), vocabulary_size)
        if size <= len(always):
            raise ValueError(f"size is {size}; {len(always)} tokens (special ones and bytes) are always listed")
        total = found.total
        lists[name] = ranked(smoothed(total, union_V), always)[:size]
        counts[name] = [total[token] for token in lists[name]]
        tokens[name], shares[name] = total.total(), float(measured[size])
    return Built(VocabularyLists(lists, counts), tokens, shares)


def of_size(size: int) -> SizeOf:
    """The same size for every list."""
    return lambda ranking: size


def by_coverage(share: float, least: int) -> SizeOf:
    """The smallest list above `least` that covers this share of the held-out text.

    Raises:
        ValueError: (when called) no list does.
    """

    def size_of(ranking: Ranking) -> int:
        reached = int((ranking.coverage < share).sum())
        if reached == len(ranking.coverage):
            most = ranking.coverage[-1]
            raise ValueError(f"coverage is {share}; no list of {ranking.label!r} covers more than {most:.4f}")
        return max(reached, least + 1)

    return size_of


@dataclass(frozen=True)
class Comparison:
    """Lists compared with each other and with texts, as shares from 0 to 1.

    Attributes:
        overlap: by lists a and b, the share of a's tokens that are in b.
        coverage: by label of a text and list (or "all lists"), the share of the text's tokens in the list.
        left_out: by label of a text, its most frequent tokens that are in no list.
    """

    sizes: dict[str, int]
    overlap: dict[str, dict[str, float]]
    coverage: dict[str, dict[str, float]]
    left_out: dict[str, list[int]]


def coverage_curves(
    vocabulary: VocabularyLists, texts: Mapping[str, Counter[int]]
) -> dict[str, NDArray[np.float64]]:
    """By label of a text, the share of it that the first 0, 1, 2, ... tokens of a list cover.

    The list is the label's own, or without one the list that covers most.
    """

    def of(label: str, counts: Counter[int]) -> NDArray[np.float64]:
        chosen = [label] if label in vocabulary.lists else vocabulary.lists
        return max((coverage(counts, vocabulary.lists[name]) for name in chosen), key=lambda shares: shares[-1])

    return {label: of(label, counts) for label, counts in texts.items()}


def compare(vocabulary: VocabularyLists, texts: Mapping[str, Counter[int]], missing: int) -> Comparison:
    """Compare lists with each other, and with counts of texts by label."""
    sets = {name: set(ids) for name, ids in vocabulary.lists.items()}
    union = set(vocabulary.union())
    everything = {**sets, "all lists": union}
    return Comparison(
        sizes={name: len(ids) for name, ids in sets.items()},
        overlap={
            name: {other: len(ids & others) / len(ids) for other, others in sets.items()}
            for name, ids in sets.items()
        },
        coverage={
            label: {name: sum(counts[token] for token in ids) / counts.total() for name, ids in everything.items()}
            for label, counts in texts.items()
        },
        left_out={
            label: [token for token, _ in counts.most_common() if token not in union][:missing]
            for label, counts in texts.items()
        },
    )
