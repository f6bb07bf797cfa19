"""The draft vocabulary of one sequence: the lists that fit its text, and the text's own tokens that they lack.

Names, numbers and rare words of a document come again in its answer (after MicroSpec, arXiv 2605.26444).
Shapes: D tokens of the lists, G places of the sequence's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastmtp.vocabulary.choosing import Choice, Chooser
from fastmtp.vocabulary.lists import VocabularyLists

# A page of text has some dozens of tokens outside a list of 8k; scoring so many more costs a hundredth.
PLACES = 256


class DraftVocabulary:
    """Where each token that may be drafted has its logit: the lists' first, then the own tokens'."""

    def __init__(self, lists: VocabularyLists, vocabulary_size: int, places: int = PLACES) -> None:
        """
        Args:
            places: how many own tokens there may be; 0 never grows.
        """
        self.places = places
        self._lists = lists
        self._choice = Choice(Chooser(lists, vocabulary_size))
        self._unions: dict[tuple[str, ...], tuple[NDArray[np.int32], frozenset[int]]] = {}
        self._own_ids_G = np.zeros(places, np.int32)
        # From own token to its place, the one that was seen longest ago first.
        self._own: dict[int, int] = {}
        self._use(self._choice.names)

    @property
    def own_ids(self) -> NDArray[np.int32]:
        """The own tokens by place."""
        return self._own_ids_G[: len(self._own)]

    def token(self, place: int) -> int:
        listed = len(self.ids_D)
        return int(self.ids_D[place] if place < listed else self._own_ids_G[place - listed])

    def start(self, prompt: Sequence[int]) -> dict[int, int]:
        """Forget the own tokens, and choose and grow for a prompt; returns what `see` returns."""
        self._own.clear()
        self._choice.start(prompt)
        self._use(self._choice.names)
        return self._grow(prompt)

    def see(self, tokens: Sequence[int]) -> dict[int, int]:
        """Take tokens of the sequence's text; returns the own places that changed, and what is there now.

        `ids_D` is another array if other lists fit now. Where there is no place left for an own token, the one goes
        that was seen longest ago.
        """
        self._choice.see(tokens)
        self._use(self._choice.names)
        return self._grow(tokens)

    def _use(self, names: tuple[str, ...]) -> None:
        if names not in self._unions:
            ids = self._lists.union(names)
            self._unions[names] = np.array(ids, np.int32), frozenset(ids)
        self.names = names
        self.ids_D, self._listed = self._unions[names]

    def _grow(self, tokens: Sequence[int]) -> dict[int, int]:
        changed: dict[int, int] = {}
        if not self.places:
            return changed
        for token in tokens:
            if token in self._listed:
                continue
            place = self._own.pop(token, None)
            if place is None:
                full = len(self._own) == self.places
                place = self._own.pop(next(iter(self._own))) if full else len(self._own)
                self._own_ids_G[place] = changed[place] = token
            self._own[token] = place
        return changed
