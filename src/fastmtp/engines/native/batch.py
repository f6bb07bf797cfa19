"""Many sequences in the native CPU engine, one in each slot.

Shapes: R sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fastmtp.engines.native.runner import forward, logits
from fastmtp.engines.native.target import NativeTarget
from fastmtp.engines.protocol import Logits


class NativeBatch:
    """`Batch` on a CPU. A sequence's logits do not depend on its neighbours, to the bit."""

    def __init__(self, target: NativeTarget, slots: int) -> None:
        self._target = target
        self._caches = [target.model.new_cache() for _ in range(slots)]
        self._lengths = [0] * slots

    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        ends = []
        for slot, prompt in prompts.items():
            ends.append(forward(self._target, [self._caches[slot]], [0], [prompt])[-1:])
            self._lengths[slot] = len(prompt)
        return logits(self._target, np.concatenate(ends))

    def step(self, tokens: Mapping[int, int]) -> Logits:
        caches = [self._caches[slot] for slot in tokens]
        starts = [self._lengths[slot] for slot in tokens]
        states_RH = forward(self._target, caches, starts, [[token] for token in tokens.values()])
        for slot in tokens:
            self._lengths[slot] += 1
        return logits(self._target, states_RH)
