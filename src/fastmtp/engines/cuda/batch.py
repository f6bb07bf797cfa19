"""Many sequences in the CUDA engine, one in each slot.

Shapes: R sequences, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch

from fastmtp.engines.cuda.machine import Machine, Text
from fastmtp.engines.protocol import Logits


class CudaBatch:
    """`Batch` on a GPU. A sequence's logits do not depend on its neighbours, to the bit."""

    def __init__(self, machine: Machine, slots: int) -> None:
        self._machine = machine
        self._rooms = [machine.pool.room() for _ in range(slots)]
        self._lengths = [0] * slots
        for room in self._rooms:
            weakref.finalize(self, machine.pool.give_back, room)

    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        ends = []
        for slot, prompt in prompts.items():
            ends.append(self._machine.forward([Text(self._rooms[slot], 0, prompt)])[0][-1:])
            self._lengths[slot] = len(prompt)
        return self._machine.scoring.logits(torch.cat(ends))

    def step(self, tokens: Mapping[int, int]) -> Logits:
        texts = [Text(self._rooms[slot], self._lengths[slot], [token]) for slot, token in tokens.items()]
        states_RH = torch.cat(self._machine.forward(texts))
        for slot in tokens:
            self._lengths[slot] += 1
        return self._machine.scoring.logits(states_RH)
