"""Our own ways to decode as competitors in a benchmark; other_engines.py has those on the same weights.

All get the same token ids and give an answer with its times, prefill apart.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Protocol

from fastmtp.config import SamplingConfig
from fastmtp.decode.drafting.drafter import Chain
from fastmtp.decode.drafting.open import Drafting
from fastmtp.decode.generation import Generation
from fastmtp.engines.costs import TOGETHER, ask_task, forward_task, least_ms, some_ids
from fastmtp.evaluate.measured import MeasuredSequence
from fastmtp.evaluate.names import OwnName
from fastmtp.evaluate.records import Answer

_REPEATS = 3


class Competitor(Protocol):
    """One way to decode. `reference` names the competitor whose greedy tokens it must give, if there is one."""

    name: str
    version: str
    reference: str | None

    def answer(self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingConfig) -> Answer: ...

    def close(self) -> None: ...


class Own:
    """Our decoding: plain, with chains, or with trees."""

    def __init__(self, name: str, drafting: Drafting, show: Callable[[str], None] | None = None) -> None:
        """`show` is called with each piece of text as it is decoded."""
        self.name = name
        self.engine, self._drafting = drafting.engine, drafting
        self.version = f"fastmtp {importlib.metadata.version('fastmtp')}, {self.engine.name}"
        plain = OwnName.of(name).plain
        self.reference = None if name == plain else plain
        self.sequence = drafting.new_sequence()
        self._measured = MeasuredSequence(self.sequence)
        self._show = show

    def answer(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: SamplingConfig, grammar: str | None = None
    ) -> Answer:
        # No competitor may reuse the prompt cache of another one's answer.
        self._measured.reset()
        self._measured.forget()
        generation = Generation(
            self._measured,
            self.engine.target,
            prompt,
            new_drafter=self._drafting.drafters(grammar is not None),
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            grammar=grammar,
        )
        for piece in generation:
            if self._show is not None:
                self._show(piece)
        result = generation.result
        return Answer(
            tokens=result.tokens,
            text=result.text,
            prefill_seconds=result.prefill_seconds,
            decode_seconds=result.decode_seconds,
            rounds=result.rounds if self._drafting.new_drafter else [],
            verified=dict(self._measured.verified),
            draft_steps=self._measured.draft_steps,
            seconds=dict(self._measured.seconds),
        )

    def close(self) -> None:
        pass

    def forward_ms(self, context: int) -> dict[int, float]:
        """Milliseconds of a forward, by its number of tokens, after `context` tokens; the least of some runs."""
        ids = some_ids(self.engine.target.vocabulary_size, context)
        return least_ms({count: forward_task(self.sequence, ids, count) for count in TOGETHER}, _REPEATS)

    def draft_ms(self, context: int) -> float:
        """Milliseconds of a draft step of a chain, or of asking the head once; 0 if nothing is drafted."""
        ids = some_ids(self.engine.target.vocabulary_size, context)
        if self._drafting.new_drafter is None or self._drafting.head is None:
            return 0.0
        drafter = self._drafting.new_drafter(ids, SamplingConfig())
        chain = isinstance(drafter, Chain)
        task = ask_task(self.sequence, ids, drafter.depth, 1) if chain else ask_task(self.sequence, ids)
        return least_ms({0: task}, _REPEATS)[0]
