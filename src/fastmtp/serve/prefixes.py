"""The beginnings of texts that requests share: what one of them has computed, another one takes over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastmtp.engines.protocol import EngineSequence
from fastmtp.engines.sequence import common_prefix

# A shorter beginning is computed again: copying the page that it is on would take longer.
LEAST_TOKENS = 16
# Memory for finished requests' caches where nobody says another.
PREFIX_BYTES = 1 << 30


class Prefixes:
    """Sequences of finished requests, the least recently used first, within a number of bytes.

    Sequences share pages of their caches, which are counted once, and freed with the last sequence that has them.
    """

    def __init__(self, most_bytes: int) -> None:
        """
        Args:
            most_bytes: 0 keeps nothing, and shares nothing between running requests.
        """
        self.bytes = 0
        self._most_bytes = most_bytes
        self._kept: list[EngineSequence] = []

    def __len__(self) -> int:
        return len(self._kept)

    def share(self, sequence: EngineSequence, prompt: Sequence[int], running: Iterable[EngineSequence]) -> None:
        """Give a new sequence the longest beginning of a prompt that a kept or a running one has."""
        if self._most_bytes == 0:
            return
        found = [(common_prefix(one.tokens, prompt), one) for one in (*self._kept, *running)]
        shared, best = max(found, key=lambda pair: pair[0], default=(0, sequence))
        if shared < LEAST_TOKENS:
            return
        sequence.share(best, shared)
        if best in self._kept:
            self._kept.remove(best)
            self._kept.append(best)

    def comes_soon(self, prompt: Sequence[int], filling: Iterable[tuple[Sequence[int], int]]) -> bool:
        """Whether a beginning of a prompt is about to be computed for others, which are better waited for.

        Args:
            filling: the prompts that are being computed, and how many of their tokens are.
        """
        if self._most_bytes == 0:
            return False
        return any(common_prefix(other, prompt) >= done + LEAST_TOKENS for other, done in filling)

    def keep(self, sequence: EngineSequence) -> None:
        """Keep a finished request's sequence, instead of those that it continues."""
        if self._most_bytes == 0 or len(sequence.tokens) < LEAST_TOKENS:
            return
        tokens = sequence.tokens
        self._kept = [one for one in self._kept if common_prefix(one.tokens, tokens) < len(one.tokens)]
        self._kept.append(sequence)
        while (used := self._used()) > self._most_bytes:
            del self._kept[0]
        self.bytes = used

    def _used(self) -> int:
        pages: dict[int, int] = {}
        for one in self._kept:
            pages |= one.pages()
        return sum(pages.values())
