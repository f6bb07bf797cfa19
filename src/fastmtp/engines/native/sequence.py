"""The native CPU engine behind the backend protocol (docs/native-engine.md).

A token's logits are the same to the bit however many tokens are computed with it, so greedy speculative output is
plain output, not almost always but always.
Shapes: T tokens, H hidden, D draft vocabulary, N nodes of a draft tree, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmtp import _native
from fastmtp.engines.native.target import NativeHead, NativeTarget, check_memory
from fastmtp.engines.protocol import Candidates
from fastmtp.engines.sequence import SequenceBackend
from fastmtp.vocabulary.draft import PLACES, DraftVocabulary
from fastmtp.vocabulary.lists import VocabularyLists

States = NDArray[np.float32]

# Rows of one call: enough to be as fast as it gets, few enough for Ctrl-C to be heard at once.
CHUNK = 256


class NativeBackend(SequenceBackend[States]):
    """Target cache and draft cache of one sequence."""

    def __init__(
        self,
        target: NativeTarget,
        head: NativeHead | None = None,
        draft_vocabulary: VocabularyLists | None = None,
        *,
        places: int = PLACES,
    ) -> None:
        """Start with an empty sequence; the last two as for `SequenceBackend`."""
        size, hidden = target.vocabulary_size, int(target.config.hidden_size)
        super().__init__(
            context_limit=target.context_limit,
            vocabulary_size=size,
            no_states=np.empty((0, hidden), np.float32) if head else None,
            draft_vocabulary=draft_vocabulary,
            places=places,
        )
        self._target = target
        self._head = head
        # Rows of the draft step, and their tokens; rows of the sequence's own tokens, filled as they come.
        self._rows, self._row_ids = target.lm_head, np.arange(size, dtype=np.int32)
        self._own_rows = target.matrix(max(1, places), hidden)
        self._cache = target.model.new_cache()
        self._draft_cache = self._drafter = None
        if head:
            self._draft_cache = head.native.new_cache()
            self._drafter = _native.Drafter(head.native, self._draft_cache)
        if self._vocabulary is not None:
            self._fit_rows(self._vocabulary, {})

    @property
    def name(self) -> str:
        runtime = self._target.runtime
        return f"native ({runtime.kernels}, {self._target.weight_type}, {runtime.threads} threads)"

    # The greedy ways do in one call what would otherwise be a dozen calls of numpy and torch: after a forward the
    # processor's caches hold weights, no code, and every call that is not in them costs some microseconds.

    def choices(self, tokens: Sequence[int], parents: Sequence[int] | None = None) -> list[int]:
        return self._target.model.argmax(self._append(tokens, parents))

    def _chain(self, start: int, states_TH: States, inputs: Sequence[int], steps: int) -> list[int]:
        drafter, last = self._ready(start, states_TH, inputs, steps)
        return drafter.chain(*last, self._draft_rows(), steps)

    def _start_tree(self, start: int, states_TH: States, inputs: Sequence[int], width: int) -> Candidates:
        drafter, last = self._ready(start, states_TH, inputs, _native.PAGE_TOKENS)
        return _candidates(drafter.start(*last, self._draft_rows(), width))[0]

    def extend_tree(self, parents: Sequence[int], tokens: Sequence[int], width: int) -> list[Candidates]:
        assert self._drafter is not None
        return _candidates(self._drafter.extend(parents, tokens, self._draft_rows(), width))

    def _ready(
        self, start: int, states_TH: States, inputs: Sequence[int], more: int
    ) -> tuple[_native.Drafter, tuple[int, Sequence[int], States]]:
        """The drafter, with room for `more` tokens, and the last of the input, which is left to it."""
        assert self._drafter is not None
        self._head_and_cache(start + len(inputs) + more)
        many = max(0, len(inputs) - CHUNK)
        if many:
            self._head_forward(start, states_TH[:many], inputs[:many])
        return self._drafter, (start + many, inputs[many:], states_TH[many:])

    def _forward(self, start: int, tokens: Sequence[int], parents: Sequence[int] | None) -> States:
        return forward(self._target, [self._cache], [start], [tokens], parents or ())

    def _keep_path(self, start: int, nodes: Sequence[int]) -> None:
        self._cache.commit(start, [start + node for node in nodes])

    def _head_forward(self, start: int, states_TH: States, tokens: Sequence[int]) -> States:
        head, cache = self._head_and_cache(start + len(tokens))
        after_TH = np.empty_like(states_TH)
        for begin, end in _chunks(len(tokens)):
            head.native.forward(cache, start + begin, tokens[begin:end], states_TH[begin:end], after_TH[begin:end])
        return after_TH

    def _logits(self, states_TH: States) -> Tensor:
        return scores(self._target.runtime, self._target.lm_head, states_TH)

    def _draft_logits(self, states_TH: States) -> Tensor:
        parts = [scores(self._target.runtime, rows, states_TH)[:, : len(ids)] for rows, ids in self._draft_rows()]
        return torch.cat(parts, dim=1)

    def _fit_rows(self, vocabulary: DraftVocabulary, changed: dict[int, int]) -> None:
        if vocabulary.ids_D is not self._row_ids:
            self._rows, self._row_ids = self._target.lm_head_rows(vocabulary.ids_D), vocabulary.ids_D
        if changed:
            places, ids = np.array(list(changed), np.int32), np.array(list(changed.values()), np.int32)
            self._own_rows.copy(places, self._target.lm_head, ids)

    def _join(self, states_TH: States, more_TH: States) -> States:
        return np.concatenate([states_TH, more_TH])

    def _draft_rows(self) -> list[tuple[_native.Matrix, NDArray[np.int32]]]:
        """The LM head's rows that the draft step scores, and the token of each."""
        parts = [(self._rows, self._row_ids)]
        if self._vocabulary is not None and len(self._vocabulary.own_ids):
            parts.append((self._own_rows, self._vocabulary.own_ids))
        return parts

    def _head_and_cache(self, tokens: int) -> tuple[NativeHead, _native.Cache]:
        """The head, and its cache with room for so many tokens."""
        assert self._head is not None and self._draft_cache is not None
        reserve(self._draft_cache, tokens)
        return self._head, self._draft_cache


def forward(
    target: NativeTarget,
    caches: list[_native.Cache],
    starts: list[int],
    tokens: Sequence[Sequence[int]],
    parents: Sequence[int] = (),
    last_inputs_TH: States | None = None,
) -> States:
    """The target's states [T, H] of the tokens of one or more sequences, each from a position of its own on.

    Args:
        parents: where one sequence's tokens are a tree (models/trees.py).
        last_inputs_TH: filled with what the last layer is given.
    Raises:
        MemoryError: a cache cannot grow; the caches are as they were.
    """
    for cache, start, own in zip(caches, starts, tokens, strict=True):
        reserve(cache, start + len(own))
    states_TH = np.empty((sum(map(len, tokens)), int(target.config.hidden_size)), np.float32)

    def run(starts: list[int], tokens: Sequence[Sequence[int]], begin: int, end: int) -> None:
        target.model.forward(
            caches,
            starts,
            [len(own) for own in tokens],
            [token for own in tokens for token in own],
            states_TH[begin:end],
            parents,
            None if last_inputs_TH is None else last_inputs_TH[begin:end],
        )

    if len(caches) > 1 or parents:
        run(starts, tokens, 0, len(states_TH))
        return states_TH
    for begin, end in _chunks(len(tokens[0])):
        run([starts[0] + begin], [tokens[0][begin:end]], begin, end)
    return states_TH


def scores(runtime: _native.Runtime, matrix: _native.Matrix, states_TH: States) -> Tensor:
    """States times a matrix, [T, outputs]."""
    out = np.empty((len(states_TH), matrix.stride), np.float32)
    _native.scores(runtime, matrix, states_TH, out)
    return torch.from_numpy(out)[:, : matrix.outputs]


def reserve(cache: _native.Cache, tokens: int) -> None:
    """Room for `tokens` in a cache.

    Raises:
        MemoryError: it would not fit; what is held stays.
    """
    missing = -(-(tokens - cache.capacity) // _native.PAGE_TOKENS)
    if missing > 0:
        check_memory(missing * cache.page_bytes, f"a context of {tokens} tokens", "a shorter context")
        cache.reserve(tokens)


def _candidates(found: list[_native.Candidates]) -> list[Candidates]:
    return [Candidates(one.tokens, one.confidences) for one in found]


def _chunks(total: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(total, begin + CHUNK)) for begin in range(0, total, CHUNK))
