"""Building lists from counts of its own words, by language and domain.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fastmtp.vocabulary.lists import VocabularyLists
from fastmtp.vocabulary.ranking import coverage, merge_order, ranked, smoothed

# Of text with fewer tokens no list is made: it would be chance, and what it has is in the union.
LEAST_TOKENS = 10000


@dataclass(frozen=True)
class LabelledCounts:
    """Counts of a label's tokens, and of those of its texts that are kept aside to measure on."""

    counted: Counter[int]
    held_out: Counter[int]

    @property
    def total(self) -> Counter[int]:
        return self.counted + self.held_out


@dataclass(frozen=True)
class Built:
    """The lists, and by label: the tokens counted, and the share of the text kept aside that its list covers."""

    lists: VocabularyLists
    tokens: dict[str, int]
    coverage: dict[str, float]


def build(
    labelled: Mapping[str, LabelledCounts],
    always: Collection[int],
    vocabulary_size: int,
    *,
    size: int,
    covered: float | None = None,
) -> Built:
    """A list for every label with enough text.

    Args:
        always: tokens that are in every list.
        size: tokens in each list.
        covered: instead of `size`, the share of the text kept aside that each list must cover.
    Raises:
        ValueError: too little text, a size below what is always listed, or a share that no list reaches.
    """
    if covered is None and size <= len(always):
        raise ValueError(f"size is {size}; {len(always)} tokens (special ones and bytes) are always listed")
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
        measured = coverage(found.held_out, ranked(smoothed(found.counted, union_V), always))
        wanted = size if covered is None else _size_for(name, measured, covered, len(always))
        wanted = min(wanted, vocabulary_size)
        total = found.total
        lists[name] = ranked(smoothed(total, union_V), always)[:wanted]
        counts[name] = [total[token] for token in lists[name]]
        tokens[name], shares[name] = total.total(), float(measured[wanted])
    return Built(VocabularyLists(lists, counts), tokens, shares)


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


def _size_for(name: str, measured: Any, covered: float, least: int) -> int:
    reached = int((measured < covered).sum())
    if reached == len(measured):
        raise ValueError(f"coverage is {covered}; no list of {name!r} covers more than {measured[-1]:.4f}")
    return max(reached, least + 1)
