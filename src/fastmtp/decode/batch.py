"""Plain decoding of many sequences together: the throughput engine of self-distillation.

Shapes: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from fastmtp.config import SamplingConfig
from fastmtp.decode.sampling import candidates, invert
from fastmtp.engines.protocol import Batch

PREFILL_TOKENS = 8192
LOOP_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class Request:
    """One sequence to decode; `key` is the caller's own."""

    key: Any
    prompt: list[int]
    max_new_tokens: int
    sampling: SamplingConfig
    end_ids: frozenset[int]
    generator: torch.Generator


@dataclass(frozen=True)
class Completion:
    """The tokens of a request, the end token included; not finished if cut at the limit or in a loop."""

    request: Request
    tokens: list[int]
    finished: bool


@dataclass
class _Row:
    request: Request
    tokens: list[int] = field(default_factory=list)

    def ended(self) -> bool | None:
        """True: at its end token; False: cut; None: goes on."""
        if self.tokens[-1] in self.request.end_ids:
            return True
        cut = len(self.tokens) >= self.request.max_new_tokens or is_looping(self.tokens)
        return False if cut else None


def decode_batch(engine: Batch, queue: deque[Request], slots: int) -> Iterator[Completion]:
    """Decode every request in the queue, `slots` at a time, in order of completion.

    The caller may append to the queue whenever a completion comes out. Every request draws from its own
    generator, so what it gives does not depend on its neighbours but through rounding.
    """
    engine.reset(slots)
    rows: dict[int, _Row] = {}
    while queue or rows:
        free = [slot for slot in range(slots) if slot not in rows]
        # Prompts are prefilled several at a time: a forward of one short prompt wastes most of its cost.
        if queue and (not rows or len(free) >= min(len(queue), max(1, slots // 16))):
            fresh = _admit(queue, free)
            rows |= fresh
            logits_RV = engine.prefill({slot: row.request.prompt for slot, row in fresh.items()})
            active = list(fresh)
        else:
            active = list(rows)
            logits_RV = engine.step({slot: row.tokens[-1] for slot, row in rows.items()})
        for slot, token in zip(active, _draw([rows[slot] for slot in active], logits_RV), strict=True):
            row = rows[slot]
            row.tokens.append(token)
            finished = row.ended()
            if finished is not None:
                del rows[slot]
                yield Completion(row.request, row.tokens, finished)


def is_looping(tokens: list[int]) -> bool:
    """Whether the last tokens repeat with a short period; looked at now and then only."""
    if len(tokens) < LOOP_TOKENS or len(tokens) % 16:
        return False
    tail = tokens[-LOOP_TOKENS:]
    return any(tail[period:] == tail[:-period] for period in range(1, LOOP_TOKENS // 2 + 1))


def _admit(queue: deque[Request], free: list[int]) -> dict[int, _Row]:
    fresh: dict[int, _Row] = {}
    longest = 0
    while queue and len(fresh) < len(free):
        longest = max(longest, len(queue[0].prompt))
        if fresh and longest * (len(fresh) + 1) > PREFILL_TOKENS:
            break
        fresh[free[len(fresh)]] = _Row(queue.popleft())
    return fresh


def _draw(rows: list[_Row], logits_RV: Tensor) -> list[int]:
    """One token for each row, from the row's own generator."""
    tokens = [0] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: repr(rows[index].request.sampling))
    for _, group in groupby(order, key=lambda index: rows[index].request.sampling):
        indices = list(group)
        requests = [rows[index].request for index in indices]
        probabilities, ids = candidates(logits_RV[indices], requests[0].sampling)
        draws = [torch.rand(1, generator=request.generator, dtype=torch.float64) for request in requests]
        chosen = invert(probabilities, torch.cat(draws).to(probabilities.device))
        for index, token in zip(indices, ids.gather(-1, chosen[:, None])[:, 0].tolist(), strict=True):
            tokens[index] = token
    return tokens
