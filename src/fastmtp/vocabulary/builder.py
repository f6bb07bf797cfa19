"""Building lists from counts of its own words, by language and domain.

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

# Of text with fewer tokens no list is made: it would be chance, and what it has is in the union.
LEAST_TOKENS = 10000


@dataclass(frozen=True)
class LabelledCounts:
    """Counts of a label's tokens, and of those of its texts that are kept aside to measure on.

    `samples` are some of those texts: token ids, and the place of the first one that counts.
    """

    counted: Counter[int]
    held_out: Counter[int]
    samples: list[tuple[list[int], int]] = field(default_factory=list)

    @property
    def total(self) -> Counter[int]:
        return self.counted + self.held_out


@dataclass(frozen=True)
class Built:
    """The lists, and by label: the tokens counted, and the share of the text kept aside that its list covers."""

    lists: VocabularyLists
    tokens: dict[str, int]
    coverage: dict[str, float]


@dataclass(frozen=True)
class Ranking:
    """A label's tokens, the likeliest of its counted text first, and what there is to choose a size by."""

    label: str
    ids: list[int]
    coverage: NDArray[np.float64]  # of the text kept aside, by the first 0, 1, 2, ... tokens
    samples: Sequence[tuple[list[int], int]]


# How many tokens of a ranking make the list.
SizeOf = Callable[[Ranking], int]


def build(
    labelled: Mapping[str, LabelledCounts], always: Collection[int], vocabulary_size: int, size_of: SizeOf
) -> Built:
    """A list for every label with enough text.

    Args:
        always: tokens that are in every list.
    Raises:
        ValueError: too little text, or a size below what is always listed.
    """
    kept = {name: found for name, found in labelled.items() if found.total.total() >= LEAST_TOKENS}
    if not kept:
        most = max((found.total.total() for found in labelled.values()), default=0)
        raise ValueError(
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
    """The smallest list above `least` that covers this share of the text kept aside.

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
    """Lists beside each other and beside texts, all as shares from 0 to 1.

    `overlap[a][b]`: of list a's tokens, how many b has; `coverage[label][a]`: of a text's tokens, how many list a
    has, or "all lists" have; `left_out[label]`: a text's most frequent tokens that are in no list.
    """

    sizes: dict[str, int]
    overlap: dict[str, dict[str, float]]
    coverage: dict[str, dict[str, float]]
    left_out: dict[str, list[int]]


def coverage_curves(
    vocabulary: VocabularyLists, texts: Mapping[str, Counter[int]]
) -> dict[str, NDArray[np.float64]]:
    """By label of a text, the share of it that the first 0, 1, 2, ... tokens of a list cover.

    The list is the label's own, or where there is none the one that covers most.
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
