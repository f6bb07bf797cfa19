"""What is measured against plain decoding: our own ways to draft, and other engines on the same weights.

All get the same token ids and say what came out and how long it took, prefill apart.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Protocol

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Chain, Drafter
from fastmtp.decode.generation import Generation
from fastmtp.engines.costs import TOGETHER, ask_task, draft_task, forward_task, least_ms, some_ids
from fastmtp.engines.protocol import Backend
from fastmtp.evaluate.measured import MeasuredBackend
from fastmtp.evaluate.records import PLAIN, Answer
from fastmtp.models.info import TargetInfo

_REPEATS = 3


class Competitor(Protocol):
    """One way to decode. `reference` names the one whose greedy tokens it must give; None is one itself."""

    name: str
    version: str
    reference: str | None

    def answer(self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingConfig) -> Answer: ...

    def close(self) -> None: ...


class Own:
    """Our decoding: plainly, in chains, or in trees."""

    def __init__(
        self,
        name: str,
        backend: Backend,
        target: TargetInfo,
        drafter: Drafter | None,
        show: Callable[[str], None] | None = None,
    ) -> None:
        """Wrap a backend; `show` gets each piece of text as it comes."""
        self.name = name
        self.version = f"fastmtp {importlib.metadata.version('fastmtp')}, {backend.name}"
        self.reference = None if name == PLAIN else PLAIN
        self.backend = backend
        self._backend, self._target, self._drafter = MeasuredBackend(backend), target, drafter
        self._show = show

    def answer(self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingConfig) -> Answer:
        # No competitor may profit from another one's prompt cache.
        self._backend.reset()
        self._backend.forget()
        generation = self._generation(prompt, max_new_tokens, sampling)
        for piece in generation:
            if self._show is not None:
                self._show(piece)
        result = generation.result
        return Answer(
            tokens=result.tokens,
            text=result.text,
            prefill_seconds=result.prefill_seconds,
            decode_seconds=result.decode_seconds,
            rounds=_cut(self._backend.rounds, len(result.tokens) - 1) if self._drafter else [],
            verified=dict(self._backend.verified),
            draft_steps=self._backend.draft_steps,
            seconds=dict(self._backend.seconds),
        )

    def sample(self, prompt: Sequence[int], new_tokens: int, sampling: SamplingConfig) -> tuple[int, ...]:
        """A few tokens, untimed; the prompt's cache is used if it is there."""
        return tuple(self._generation(prompt, new_tokens, sampling).run().tokens)

    def close(self) -> None:
        pass

    def _generation(self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingConfig) -> Generation:
        return Generation(
            self._backend,
            self._target,
            prompt,
            drafter=self._drafter,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
        )

    def forward_ms(self, context: int) -> dict[str, float]:
        """Milliseconds of a forward by its tokens, after so many tokens of context; the least of some turns."""
        ids = some_ids(self._target.vocabulary_size, context)
        found = least_ms({count: forward_task(self._backend, ids, count) for count in TOGETHER}, _REPEATS)
        return {str(count): milliseconds for count, milliseconds in found.items()}

    def draft_ms(self, context: int) -> float:
        """Milliseconds of a draft step, or of a level of a tree; 0 if nothing is drafted."""
        ids = some_ids(self._target.vocabulary_size, context)
        if self._drafter is None:
            return 0.0
        chain = isinstance(self._drafter, Chain)
        task = draft_task(self._backend, ids, self._drafter.depth) if chain else ask_task(self._backend, ids)
        return least_ms({0: task}, _REPEATS)[0]


def _cut(rounds: Sequence[int], tokens: int) -> list[int]:
    """The end of the answer cuts its last round."""
    cut: list[int] = []
    for settled in rounds:
        cut.append(min(settled, tokens - sum(cut)))
    return cut
