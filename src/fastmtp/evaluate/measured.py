"""A backend that notes where the time of an answer goes, and in what pieces the answer came."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from fastmtp.engines.protocol import Backend, Candidates

# Where the time goes: in the first call for drafts the head reads the prompt, which is a cost of its own.
PARTS = ("prompt", "draft", "verify", "keep")

_T = TypeVar("_T")


class MeasuredBackend:
    """The Backend that it wraps, and what was asked of it since `forget`."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.forget()

    def forget(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._prompt_read = False
        # Forwards by the tokens that each verified; draft steps or levels of draft trees, after the first call.
        self.verified: Counter[int] = Counter()
        self.draft_steps = 0
        # Tokens that each round settled.
        self.rounds: list[int] = []

    @property
    def name(self) -> str:
        return self._backend.name

    @property
    def draft_size(self) -> int:
        return self._backend.draft_size

    @property
    def tokens(self) -> Sequence[int]:
        return self._backend.tokens

    @property
    def context_limit(self) -> int:
        return self._backend.context_limit

    def reset(self) -> None:
        self._backend.reset()

    def prefill(self, prompt: Sequence[int]) -> Tensor:
        return self._backend.prefill(prompt)

    def verify(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> Tensor:
        self.verified[len(tokens)] += 1
        return self._timed("verify", lambda: self._backend.verify(tokens, parents))

    def choices(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> list[int]:
        self.verified[len(tokens)] += 1
        return self._timed("verify", lambda: self._backend.choices(tokens, parents))

    def keep(self, nodes: Sequence[int]) -> None:
        self.rounds.append(len(nodes))
        self._timed("keep", lambda: self._backend.keep(nodes))

    def draft(self, token: int, steps: int) -> list[int]:
        return self._drafting(steps, lambda: self._backend.draft(token, steps))

    def start_tree(self, token: int, width: int) -> Candidates:
        return self._drafting(1, lambda: self._backend.start_tree(token, width))

    def extend_tree(self, parents: Sequence[int], tokens: Sequence[int], width: int) -> list[Candidates]:
        return self._drafting(1, lambda: self._backend.extend_tree(parents, tokens, width))

    def _drafting(self, steps: int, run: Callable[[], _T]) -> _T:
        if not self._prompt_read:
            self._prompt_read = True
            return self._timed("prompt", run)
        self.draft_steps += steps
        return self._timed("draft", run)

    def _timed(self, part: str, run: Callable[[], _T]) -> _T:
        started = time.perf_counter()
        try:
            return run()
        finally:
            self.seconds[part] += time.perf_counter() - started
