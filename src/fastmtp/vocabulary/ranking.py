"""Ranked tokens from token counts.

Shapes: V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Probabilities = NDArray[np.float64]

# The weight of the back-off, in tokens.
PRIOR_TOKENS = 1000.0


def merge_order(vocabulary_size: int) -> Probabilities:
    """Zipf's law over token ids, [V]: tokenizers number tokens in the order of merges, so low ids are commoner."""
    weights_V = 1.0 / np.arange(2, vocabulary_size + 2)
    ordered_V: Probabilities = weights_V / weights_V.sum()
    return ordered_V


def smoothed(counts: Counter[int], backoff_V: Probabilities) -> Probabilities:
    """Probabilities [V] from counts, drawn towards `backoff_V` where counts are low.

    The posterior mean under a Dirichlet prior (MacKay and Peto, 1995): tokens counted once or never are ordered by
    the back-off, not by chance.
    """
    counted_V = PRIOR_TOKENS * backoff_V
    counted_V[list(counts)] += list(counts.values())
    probabilities_V: Probabilities = counted_V / counted_V.sum()
    return probabilities_V


def ranked(probabilities_V: Probabilities, always: Iterable[int]) -> list[int]:
    """All tokens: `always` first in the given order, then the others by probability, equal ones by id."""
    order = np.argsort(-probabilities_V, kind="stable").tolist()
    return list(dict.fromkeys([*always, *order]))


def coverage(counts: Counter[int], ranking: list[int]) -> NDArray[np.float64]:
    """Share of the counted tokens that the first 0, 1, 2, ... tokens of a ranking make up, [V + 1]."""
    found = np.array([0, *(counts[token] for token in ranking)], np.float64)
    shares: NDArray[np.float64] = found.cumsum() / max(1, counts.total())
    return shares
