"""Preallocated key/value caches with rollback, which transformers' attention classes write to.

Shapes: B batch, N key/value heads, T new tokens, L tokens held, D size of a key or of a value. Latent attention
stores its two parts, which differ in size, as the key and the value of one head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class KVCache:
    """Keys and values of a batch of sequences of equal length.

    A forward is one `update` per layer, and then `advance(T)`.
    """

    def __init__(self, capacity: int = 256) -> None:
        self.length = 0
        self._capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, key_BNTD: Tensor, value_BNTD: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values; returns all of the layer's, [B, N, L + T, D] each."""
        end = self.length + key_BNTD.shape[2]
        keys, values = self._storage(layer, (key_BNTD, value_BNTD), end)
        keys[:, :, self.length : end] = key_BNTD
        values[:, :, self.length : end] = value_BNTD
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, tokens: int) -> None:
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Drop everything from position `length` on."""
        assert 0 <= length <= self.length
        self.length = length

    def commit(self, start: int, rows: Sequence[int]) -> None:
        """From position `start` on, drop all tokens but these, which are ascending and counted from `start`."""
        positions = [start + row for row in rows]
        self.length = start + len(positions)
        for layer in self._layers.values():
            for part in layer:
                part[:, :, start : self.length] = part[:, :, positions]

    def copy(self, length: int) -> KVCache:
        """A cache of its own with the first `length` tokens of this one."""
        copied = KVCache(self._capacity)
        copied.length = length
        copied._layers = {index: _grown(held, held, self._capacity, length) for index, held in self._layers.items()}
        return copied

    def held(self) -> Iterable[tuple[Tensor, Tensor]]:
        """The memory of each layer's keys and values."""
        return self._layers.values()

    def layers(self) -> dict[int, tuple[Tensor, Tensor]]:
        """By layer, the keys and values held, [B, N, L, D] each."""
        return {
            layer: (keys[:, :, : self.length], values[:, :, : self.length])
            for layer, (keys, values) in self._layers.items()
        }

    def _storage(self, layer: int, like: tuple[Tensor, Tensor], end: int) -> tuple[Tensor, Tensor]:
        while self._capacity < end:
            self._capacity *= 2
        held = self._layers.get(layer)
        if held is None or held[0].shape[2] < end:
            self._layers[layer] = _grown(held, like, self._capacity, self.length)
        return self._layers[layer]


class SlotCache:
    """Keys and values of `slots` sequences of different lengths, which grow by one token at a time."""

    def __init__(self, slots: int, capacity: int = 256) -> None:
        self.lengths = torch.zeros(slots, dtype=torch.long)
        self._slots = slots
        self._capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._span = 0

    def insert(self, slot: int, cache: KVCache, row: int, length: int) -> None:
        """Copy the first `length` tokens of one row of a prefilled cache into a slot."""
        self._grow(length)
        for layer, (keys, values) in cache.layers().items():
            if layer not in self._layers:
                one_key, one_value = (part[:1].expand(self._slots, -1, -1, -1) for part in (keys, values))
                self._layers[layer] = _grown(None, (one_key, one_value), self._capacity, 0)
            held_keys, held_values = self._layers[layer]
            held_keys[slot, :, :length] = keys[row, :, :length]
            held_values[slot, :, :length] = values[row, :, :length]
        self.lengths[slot] = length

    def reserve(self) -> None:
        """Make room for one token in every slot."""
        self._span = int(self.lengths.max()) + 1
        self._grow(self._span)

    def mask(self, window: int | None) -> Tensor:
        """Which keys the reserved token of each slot attends to, [B, 1, 1, L] of bool."""
        keys, newest = torch.arange(self._span), self.lengths[:, None]
        mask = keys <= newest
        if window is not None:
            mask &= keys > newest - window
        return mask[:, None, None, :]

    def update(self, key_BN1D: Tensor, value_BN1D: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._layers[layer]
        slots = torch.arange(self._slots)
        keys[slots, :, self.lengths] = key_BN1D[:, :, 0]
        values[slots, :, self.lengths] = value_BN1D[:, :, 0]
        return keys[:, :, : self._span], values[:, :, : self._span]

    def _grow(self, length: int) -> None:
        if length <= self._capacity:
            return
        filled = self._capacity
        while self._capacity < length:
            self._capacity *= 2
        for layer, held in self._layers.items():
            self._layers[layer] = _grown(held, held, self._capacity, filled)


def _grown(
    held: tuple[Tensor, Tensor] | None, like: tuple[Tensor, Tensor], capacity: int, filled: int
) -> tuple[Tensor, Tensor]:
    """Room for `capacity` tokens, with the first `filled` ones copied over."""
    keys, values = (part.new_zeros(*part.shape[:2], capacity, part.shape[3]) for part in like)
    if held is not None:
        keys[:, :, :filled] = held[0][:, :, :filled]
        values[:, :, :filled] = held[1][:, :, :filled]
    return keys, values
