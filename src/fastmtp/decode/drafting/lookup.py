"""Drafts from the text itself: what followed the last tokens when they came before.

Prompt lookup (Saxena, 2023; arXiv 2304.04487 calls it inference with reference): it needs no model, and pays where
an answer repeats its prompt or itself.
"""

from __future__ import annotations

from collections.abc import Sequence

# Longest and shortest run of tokens that is looked up, and how far a run that is found is followed back.
LONGEST, SHORTEST, FOLLOWED = 4, 2, 24


class Lookup:
    """Where each run of tokens ended last; extending by a token costs the same at any length of the text."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # The run that ends the text is not its own continuation: it is indexed once a token follows.
            end, last = len(self.tokens), tuple(self.tokens[-LONGEST:])
            for size in range(SHORTEST, len(last) + 1):
                self._ends[last[-size:]] = end
            self.tokens.append(token)

    def continuation(self, limit: int) -> tuple[int, list[int]]:
        """Up to `limit` tokens that followed the end of the text last time, and how many tokens before them agree.

        The longest run of up to LONGEST tokens counts; agreement is counted up to FOLLOWED.
        """
        for size in range(min(LONGEST, len(self.tokens)), SHORTEST - 1, -1):
            end = self._ends.get(tuple(self.tokens[-size:]))
            if end is not None:
                return self._agreement(end, size), self.tokens[end : end + limit]
        return 0, []

    def _agreement(self, end: int, size: int) -> int:
        tokens, most = self.tokens, min(FOLLOWED, end)
        while size < most and tokens[end - size - 1] == tokens[-size - 1]:
            size += 1
        return size
