"""Plain decoding of many sequences together: the throughput engine of self-distillation.

Shapes: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmtp.config import SamplingConfig
from fastmtp.decode.sampler import Sampler
from fastmtp.decode.sampling import derived_seed
from fastmtp.engines.protocol import Engine
from fastmtp.models.info import TargetInfo

PREFILL_TOKENS = 8192
LOOP_TOKENS = 64
# Tokens between two looks whether a text loops.
LOOP_EVERY = 16


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What the caller is likely to ask next when a request has ended: an engine may begin it beforehand."""

    max_new_tokens: int
    sampling: SamplingConfig
    end_ids: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to decode; `key` is the caller's own. Its draws depend on its own seed only."""

    key: Any
    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingConfig
    end_ids: frozenset[int]
    then: Continuation | None = None

    def again(self) -> Request:
        """The same with another seed."""
        return replace(self, sampling=self.sampling.seeded(derived_seed(self.sampling.seed, 1)))


@dataclass(frozen=True)
class Completion:
    """The tokens of a request, the end token included; not finished if cut at a limit or in a loop."""

    request: Request
    tokens: list[int]
    finished: bool


@dataclass
class _Row:
    request: Request
    room: int
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sampler = Sampler(self.request.sampling, self.request.prompt)

    def draw(self, logits_V: NDArray[np.float32]) -> None:
        self.tokens.append(self._sampler.draw(logits_V))
        self._sampler.extend(self.tokens[-1:])

    def ended(self) -> bool | None:
        """True: at its end token; False: cut; None: goes on."""
        if self.tokens[-1] in self.request.end_ids:
            return True
        cut = len(self.tokens) >= self.room or is_looping(self.tokens)
        return False if cut else None


def decode_batch(engine: Engine, queue: deque[Request], slots: int) -> Iterator[Completion]:
    """Decode every request in the queue, `slots` at a time, in order of completion.

    The caller may append to the queue whenever a completion comes out. What a request gives does not depend on its
    neighbours but through an engine's rounding. An answer is cut where the context ends.

    Raises:
        ValueError: a prompt leaves no room for an answer.
    """
    batch = engine.batch(slots)
    rows: dict[int, _Row] = {}
    while queue or rows:
        free = [slot for slot in range(slots) if slot not in rows]
        # Prompts are prefilled several at a time: a forward of one short prompt wastes most of its cost.
        if queue and (not rows or len(free) >= min(len(queue), max(1, slots // 16))):
            fresh = _admit(engine.target, queue, free)
            rows |= fresh
            logits_RV = batch.prefill({slot: row.request.prompt for slot, row in fresh.items()})
            active = list(fresh)
        else:
            active = list(rows)
            logits_RV = batch.step({slot: row.tokens[-1] for slot, row in rows.items()})
        for slot, logits_V in zip(active, logits_RV, strict=True):
            row = rows[slot]
            row.draw(logits_V)
            finished = row.ended()
            if finished is not None:
                del rows[slot]
                yield Completion(row.request, row.tokens, finished)


def is_looping(tokens: list[int]) -> bool:
    """Whether the last tokens repeat with a short period; looked at now and then only."""
    if len(tokens) < LOOP_TOKENS or len(tokens) % LOOP_EVERY:
        return False
    tail = tokens[-LOOP_TOKENS:]
    return any(tail[period:] == tail[:-period] for period in range(1, LOOP_TOKENS // 2 + 1))


def _admit(target: TargetInfo, queue: deque[Request], free: list[int]) -> dict[int, _Row]:
    fresh: dict[int, _Row] = {}
    longest = 0
    while queue and len(fresh) < len(free):
        longest = max(longest, len(queue[0].prompt))
        if fresh and longest * (len(fresh) + 1) > PREFILL_TOKENS:
            break
        request = queue.popleft()
        room = target.room(len(request.prompt), request.max_new_tokens)
        fresh[free[len(fresh)]] = _Row(request, room)
    return fresh
