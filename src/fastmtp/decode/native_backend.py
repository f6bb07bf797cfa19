"""The native CPU engine behind the backend protocol (docs/native-engine.md).

A token's logits are the same to the bit however many tokens are computed with it, so greedy speculative output is
plain output, not almost always but always.
Shapes: T tokens, H hidden, D draft vocabulary, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fastmtp import _native
from fastmtp.decode.sequence import SequenceBackend
from fastmtp.models.native import NativeHead, NativeTarget, check_memory

# Rows of one call: enough to be as fast as it gets, few enough for Ctrl-C to be heard at once.
CHUNK = 256


class NativeBackend(SequenceBackend):
    """Target cache and draft cache of one sequence."""

    # Eight tokens are verified at about the cost of one (`fastmtp bench-engine`).
    cheap_draft_steps = 7

    def __init__(
        self,
        target: NativeTarget,
        head: NativeHead | None = None,
        draft_vocabulary: Sequence[int] | None = None,
    ) -> None:
        hidden = int(target.config.hidden_size)
        super().__init__(
            device=torch.device("cpu"),
            context_limit=target.context_limit,
            vocabulary_size=target.vocabulary_size,
            no_states=torch.empty(0, hidden) if head else None,
            draft_ids=draft_vocabulary,
        )
        self._target = target
        self._head = head
        draft_rows = target.lm_head if draft_vocabulary is None else target.lm_head_rows(draft_vocabulary)
        self._cache = target.stack.new_cache()
        self._draft_cache = head.stack.new_cache() if head else None
        self._verified = Scores(target, target.lm_head)
        self._drafts = Scores(target, draft_rows)

    @property
    def name(self) -> str:
        runtime = self._target.runtime
        return f"native ({runtime.kernels}, {self._target.weight_type}, {runtime.threads} threads)"

    def _forward(self, start: int, tokens: Sequence[int]) -> Tensor:
        return forward(self._target, [self._cache], [start], [tokens])

    def _head_forward(self, start: int, states_TH: Tensor, tokens: Sequence[int]) -> Tensor:
        assert self._head is not None and self._draft_cache is not None
        target, head, cache = self._target, self._head, self._draft_cache
        reserve(cache, start + len(tokens))
        after_TH = torch.empty_like(states_TH)
        for begin, end in _chunks(len(tokens)):
            _native.head_forward(
                target.runtime,
                head.stack,
                head.projection,
                target.embedding,
                target.embedding_scale,
                [cache],
                np.array([start + begin], np.int32),
                np.array([end - begin], np.int32),
                np.array(tokens[begin:end], np.int32),
                states_TH[begin:end].numpy(),
                after_TH[begin:end].numpy(),
            )
        return after_TH

    def _logits(self, states_TH: Tensor) -> Tensor:
        return self._verified(states_TH)

    def _draft_logits(self, state_H: Tensor) -> Tensor:
        return self._drafts(state_H[None])[0]


def forward(
    target: NativeTarget, caches: list[_native.Cache], starts: list[int], tokens: Sequence[Sequence[int]]
) -> Tensor:
    """The target's states [T, H] of the tokens of one or more sequences, each from a position of its own on.

    Raises:
        MemoryError: a cache cannot grow; the caches are as they were.
    """
    for cache, start, own in zip(caches, starts, tokens, strict=True):
        reserve(cache, start + len(own))
    states_TH = torch.empty(sum(map(len, tokens)), int(target.config.hidden_size))

    def run(starts: list[int], tokens: Sequence[Sequence[int]], states_TH: Tensor) -> None:
        _native.target_forward(
            target.runtime,
            target.stack,
            target.embedding,
            target.embedding_scale,
            caches,
            np.array(starts, np.int32),
            np.array([len(own) for own in tokens], np.int32),
            np.array([token for own in tokens for token in own], np.int32),
            states_TH.numpy(),
        )

    if len(caches) > 1:
        run(starts, tokens, states_TH)
        return states_TH
    for begin, end in _chunks(len(tokens[0])):
        run([starts[0] + begin], [tokens[0][begin:end]], states_TH[begin:end])
    return states_TH


class Scores:
    """States times a matrix, into memory that is used again."""

    def __init__(self, target: NativeTarget, matrix: _native.Matrix) -> None:
        self._runtime, self._matrix = target.runtime, matrix
        self._out = torch.empty(0, matrix.stride)

    def __call__(self, states_TH: Tensor) -> Tensor:
        """[T, outputs]"""
        if len(states_TH) > len(self._out):
            self._out = torch.empty(len(states_TH), self._matrix.stride)
        _native.scores(self._runtime, self._matrix, states_TH.numpy(), self._out.numpy())
        return self._out[: len(states_TH), : self._matrix.outputs]


def reserve(cache: _native.Cache, tokens: int) -> None:
    """Room for `tokens` in a cache.

    Raises:
        MemoryError: it would not fit; what is held stays.
    """
    missing = -(-(tokens - cache.capacity) // _native.PAGE_TOKENS)
    if missing > 0:
        check_memory(missing * cache.page_bytes, f"a context of {tokens} tokens", "a shorter context")
        cache.reserve(tokens)


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(total, begin + CHUNK)) for begin in range(0, total, CHUNK))
