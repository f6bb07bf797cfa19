"""A sequence that measures where the time of an answer goes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastmtp.config import SamplingConfig
from fastmtp.engines.protocol import Ask, Candidates, Logits, TokenSequence
from fastmtp.engines.tree import Tree

# The first call for drafts includes the head's prefill, so it is measured apart, as `prompt`.
PARTS = ("prompt", "draft", "verify", "keep")

_T = TypeVar("_T")


class MeasuredSequence:
    """A wrapped sequence, with the times and numbers of its calls since `forget`."""

    def __init__(self, sequence: TokenSequence) -> None:
        self._sequence = sequence
        self.forget()

    def forget(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._prompt_read = False
        # Number of forwards by tokens verified; calls of `ask` after the first.
        self.verified: Counter[int] = Counter()
        self.draft_steps = 0

    @property
    def tokens(self) -> Sequence[int]:
        return self._sequence.tokens

    @property
    def texts(self) -> int:
        return self._sequence.texts

    @property
    def draft_size(self) -> int:
        return self._sequence.draft_size

    @property
    def context_limit(self) -> int:
        return self._sequence.context_limit

    def reset(self) -> None:
        self._sequence.reset()

    def prefill(self, prompt: Sequence[int]) -> Logits:
        return self._sequence.prefill(prompt)

    def verify(self, tree: Tree) -> Logits:
        self.verified[len(tree.verified)] += 1
        return self._timed("verify", lambda: self._sequence.verify(tree))

    def verify_greedy(self, tree: Tree) -> list[int]:
        self.verified[len(tree.verified)] += 1
        return self._timed("verify", lambda: self._sequence.verify_greedy(tree))

    def verify_drawn(self, tree: Tree, sampling: SamplingConfig) -> Sequence[int | None] | None:
        found = self._timed("verify", lambda: self._sequence.verify_drawn(tree, sampling))
        if found is not None:
            self.verified[len(tree.verified)] += 1
        return found

    def verify_chain(
        self, token: int, steps: int, sampling: SamplingConfig
    ) -> tuple[Tree, Sequence[int | None]] | None:
        """Drafting and verifying in one call would count as verifying: asked for one by one, they are apart."""
        return None

    def logits(self, node: int) -> Logits:
        return self._timed("verify", lambda: self._sequence.logits(node))

    def commit(self, path: Sequence[int]) -> None:
        self._timed("keep", lambda: self._sequence.commit(path))

    def ask(self, ask: Ask) -> list[Candidates]:
        part = "draft" if self._prompt_read else "prompt"
        self.draft_steps += self._prompt_read
        self._prompt_read = True
        return self._timed(part, lambda: self._sequence.ask(ask))

    def _timed(self, part: str, run: Callable[[], _T]) -> _T:
        started = time.perf_counter()
        try:
            return run()
        finally:
            self.seconds[part] += time.perf_counter() - started
