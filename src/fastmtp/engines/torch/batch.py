"""Sequences that PyTorch decodes together, one in each slot.

Shapes: R sequences, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from fastmtp.engines.protocol import Logits
from fastmtp.engines.torch.kv_cache import KVCache, SlotCache
from fastmtp.engines.torch.target import Target
from fastmtp.models.tensors import windows


class TorchBatch:
    """`Batch` on any device."""

    def __init__(self, target: Target, slots: int) -> None:
        self._target, self._slots = target, slots
        self._cache = SlotCache(slots)

    @torch.inference_mode()
    def prefill(self, prompts: Mapping[int, Sequence[int]]) -> Logits:
        device = self._target.device
        longest = max(map(len, prompts.values()))
        # Causal attention never sees the padding on the right.
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts.values()]
        prefilled = KVCache(longest)
        states_RTH = self._target.forward(torch.tensor(padded, device=device), prefilled)
        for index, (slot, prompt) in enumerate(prompts.items()):
            self._cache.insert(slot, prefilled, index, len(prompt))
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts.values()], device=device)
        return self._logits(states_RTH[torch.arange(len(prompts), device=device), ends])

    @torch.inference_mode()
    def step(self, tokens: Mapping[int, int]) -> Logits:
        active, cache, device = list(tokens), self._cache, self._target.device
        for slot in set(range(self._slots)) - set(active):
            cache.lengths[slot] = 0
        cache.reserve()
        masks = {kind: cache.mask(size).to(device) for kind, size in windows(self._target.config).items()}
        inputs = torch.tensor([[tokens.get(slot, 0)] for slot in range(self._slots)], device=device)
        states = self._target.states(inputs, cache.lengths[:, None].to(device), masks, cache)
        cache.lengths[active] += 1
        return self._logits(states[active, 0])

    def _logits(self, states_RH: Tensor) -> Logits:
        return cast(Logits, self._target.logits(states_RH).float().cpu().numpy())
