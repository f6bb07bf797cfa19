"""Many sequences in the native CPU engine, one in each slot.

Shapes: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from fastmtp import _native
from fastmtp.engines.native.sequence import States, forward, scores
from fastmtp.engines.native.target import NativeTarget


class NativeBatch:
    """`Batch` on a CPU. What a sequence gives does not depend on its neighbours, to the bit."""

    def __init__(self, target: NativeTarget) -> None:
        self.target = target
        self.reset(0)

    def reset(self, slots: int) -> None:
        self._caches: list[_native.Cache] = [self.target.model.new_cache() for _ in range(slots)]
        self._lengths = [0] * slots

    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> Tensor:
        ends = []
        for slot, prompt in prompts.items():
            ends.append(forward(self.target, [self._caches[slot]], [0], [prompt])[-1:])
            self._lengths[slot] = len(prompt)
        return self._logits(np.concatenate(ends))

    def step(self, tokens: Mapping[int, int]) -> Tensor:
        caches = [self._caches[slot] for slot in tokens]
        starts = [self._lengths[slot] for slot in tokens]
        states_RH = forward(self.target, caches, starts, [[token] for token in tokens.values()])
        for slot in tokens:
            self._lengths[slot] += 1
        return self._logits(states_RH)

    def _logits(self, states_RH: States) -> Tensor:
        return scores(self.target.runtime, self.target.lm_head, states_RH)
