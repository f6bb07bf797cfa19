"""The draft vocabulary of one sequence: the lists that fit its text, and its own tokens, which the lists lack.

Names, numbers and rare words of a document recur in the answer (after MicroSpec, arXiv 2605.26444).
Shapes: D tokens of the lists, G own tokens of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from fastmtp.vocabulary.choosing import Choice, Chooser
from fastmtp.vocabulary.lists import VocabularyLists

# A page of text has some dozens of tokens outside a list of 8k; scoring 256 more costs about 1 %.
OWN_TOKENS = 256

Union = tuple[NDArray[np.int32], frozenset[int]]


@dataclass(frozen=True, eq=False)
class DraftLists:
    """Draft lists, and how many tokens of its own a sequence may add to them.

    Shared by all sequences: the chooser's tables and the unions of lists are made once.
    """

    lists: VocabularyLists
    vocabulary_size: int
    own_tokens: int = OWN_TOKENS
    _unions: dict[tuple[str, ...], Union] = field(default_factory=dict)

    @cached_property
    def chooser(self) -> Chooser:
        return Chooser(self.lists, self.vocabulary_size)

    def union(self, names: tuple[str, ...]) -> Union:
        """The tokens [D] of some lists, as an array and as a set; the same objects at each call."""
        if names not in self._unions:
            ids = self.lists.union(names)
            self._unions.setdefault(names, (np.array(ids, np.int32), frozenset(ids)))
        return self._unions[names]


def draft_vocabulary(lists: DraftLists | None) -> DraftVocabulary | None:
    """The draft vocabulary of a new sequence; None, which means all tokens, without lists."""
    return DraftVocabulary(lists) if lists is not None and lists.lists.lists else None


class DraftVocabulary:
    """The token of each draft logit: first those of the lists (`ids_D`), then the own tokens (`own_ids`)."""

    def __init__(self, shared: DraftLists) -> None:
        self._shared = shared
        self._choice = Choice(shared.chooser)
        self._own_ids_G = np.zeros(shared.own_tokens, np.int32)
        # The slot of each own token, the least recently seen token first.
        self._own: dict[int, int] = {}
        self._use(self._choice.names)

    @property
    def own_tokens(self) -> int:
        """The maximum number of own tokens."""
        return self._shared.own_tokens

    @property
    def most_listed(self) -> int:
        """The number of tokens of all lists together."""
        every, _ = self._shared.union(tuple(self._shared.chooser.names))
        return len(every)

    @property
    def own_ids(self) -> NDArray[np.int32]:
        """The own tokens by slot."""
        return self._own_ids_G[: len(self._own)]

    def token(self, index: int) -> int:
        """The token of a draft logit."""
        listed = len(self.ids_D)
        return int(self.ids_D[index] if index < listed else self._own_ids_G[index - listed])

    def start(self, prompt: Sequence[int]) -> dict[int, int]:
        """Forget the own tokens and start with a prompt; returns what `see` returns."""
        self._own.clear()
        self._choice.start(prompt)
        self._use(self._choice.names)
        return self._grow(prompt)

    def see(self, tokens: Sequence[int]) -> dict[int, int]:
        """Take tokens of the sequence's text; returns the new token of each slot that changed.

        `ids_D` becomes another array if other lists fit now. If all slots are taken, the least recently seen token
        is replaced.
        """
        if self._choice.see(tokens):
            self._use(self._choice.names)
        return self._grow(tokens)

    def _use(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.ids_D, self._listed = self._shared.union(names)

    def _grow(self, tokens: Sequence[int]) -> dict[int, int]:
        changed: dict[int, int] = {}
        if not self.own_tokens:
            return changed
        for token in tokens:
            if token in self._listed:
                continue
            slot = self._own.pop(token, None)
            if slot is None:
                full = len(self._own) == self.own_tokens
                slot = self._own.pop(next(iter(self._own))) if full else len(self._own)
                self._own_ids_G[slot] = changed[slot] = token
            self._own[token] = slot
        return changed
