"""Choosing the lists that fit a text, from its token ids alone.

Naive Bayes with the lists' own frequencies: every chunk of the text votes for the list that makes it likeliest, and
the union of the lists with a vote among the last chunks is used. So a mixed text gets several lists, and a list
remains in use for some chunks after its last vote.
Shapes: L lists, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastmtp.vocabulary.lists import VocabularyLists

CHUNK = 32
VOTES = 8
# The count that is assumed for a token outside a list.
UNSEEN = 0.1


class Chooser:
    """Log-probabilities of all tokens under each list; shared by all texts."""

    def __init__(self, lists: VocabularyLists, vocabulary_size: int) -> None:
        self.names = list(lists.lists)
        self._log_p_LV = np.stack(
            [_log_probabilities(ids, lists.counts.get(name), vocabulary_size) for name, ids in lists.lists.items()]
        )

    def best(self, tokens: Sequence[int]) -> str:
        """The list that makes the tokens likeliest; the first of equal ones."""
        return self.names[int(self._log_p_LV[:, list(tokens)].sum(1).argmax())]


class Choice:
    """The lists chosen for one text, updated as it grows."""

    def __init__(self, chooser: Chooser) -> None:
        self._chooser = chooser
        self._votes: deque[str] = deque(maxlen=VOTES)
        self._pending: list[int] = []

    @property
    def names(self) -> tuple[str, ...]:
        """The lists with a vote, in the order of all lists; all of them before the first vote."""
        voted = set(self._votes)
        return tuple(name for name in self._chooser.names if name in voted or not voted)

    def start(self, prompt: Sequence[int]) -> None:
        """Choose by the last chunks of a prompt; a prompt shorter than a chunk votes as a whole."""
        self._votes.clear()
        self._pending.clear()
        self.see(prompt[-CHUNK * VOTES :])
        if not self._votes:
            self._votes.append(self._chooser.best(prompt))

    def see(self, tokens: Sequence[int]) -> bool:
        """Take the tokens that follow; returns whether there was a vote."""
        self._pending += tokens
        if len(self._pending) < CHUNK:
            return False
        while len(self._pending) >= CHUNK:
            self._votes.append(self._chooser.best(self._pending[:CHUNK]))
            del self._pending[:CHUNK]
        return True


def _log_probabilities(
    ids: Sequence[int], counts: Sequence[int] | None, vocabulary_size: int
) -> NDArray[np.float32]:
    counted_V = np.zeros(vocabulary_size)
    # Without counts, Zipf's law.
    counted_V[list(ids)] = counts if counts is not None else 1e6 / (np.arange(len(ids)) + 1)
    counted_V += UNSEEN
    log_p_V: NDArray[np.float32] = np.log(counted_V / counted_V.sum()).astype(np.float32)
    return log_p_V
