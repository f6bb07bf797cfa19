"""Weights of GGUF files in four bits as numbers on a grid, which int4 packs without rounding them again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

# Weights that share a step.
GROUP = 32
GRIDDED = (Kind.Q4_0, Kind.Q4_1, Kind.Q4_K)


@dataclass(frozen=True)
class Grid:
    """Rows of weights: least + step * number.

    Attributes:
        numbers: [rows, inputs], from 0 to 15.
        steps, least: [rows, inputs / GROUP]; steps are not negative.
    """

    numbers: NDArray[np.uint8]
    steps: NDArray[np.float32]
    least: NDArray[np.float32]

    def values(self) -> NDArray[np.float32]:
        """The weights [rows, inputs]."""
        found = self.numbers.reshape(*self.steps.shape, GROUP).astype(np.float32)
        found *= self.steps[..., None]
        found += self.least[..., None]
        return found.reshape(self.numbers.shape)


def grid(kind: Kind, data: NDArray[np.uint8]) -> Grid:
    """The grid of rows of blocks [rows, bytes], of a kind in GRIDDED, in ggml's layouts."""
    rows = len(data)
    if kind == Kind.Q4_K:
        blocks = data.reshape(rows, -1, 144)
        scale, scale_of_least = np.moveaxis(_halves(blocks[..., :4]), -1, 0)
        step_counts, least_counts = _six_bits(blocks[..., 4:16])
        numbers = _nibbles(blocks[..., 16:].reshape(rows, -1, 4, 32))
        return _flat(numbers, scale[..., None] * step_counts, -scale_of_least[..., None] * least_counts)
    scales = 1 if kind == Kind.Q4_0 else 2
    blocks = data.reshape(rows, -1, 2 * scales + 16)
    halves = _halves(blocks[..., : 2 * scales])
    numbers, steps = _nibbles(blocks[..., 2 * scales :]), halves[..., 0]
    if kind == Kind.Q4_1:
        return _flat(numbers, steps, halves[..., 1])
    # The step of a Q4_0 block may be negative: then its numbers are counted from the other end.
    falling = steps < 0
    numbers = np.where(falling[..., None], 15 - numbers, numbers)
    return _flat(numbers, np.abs(steps), np.where(falling, np.float32(7), np.float32(-8)) * steps)


def _flat(numbers: NDArray[np.uint8], steps: NDArray[np.float32], least: NDArray[np.float32]) -> Grid:
    rows = len(numbers)
    steps, least = (np.ascontiguousarray(scales.reshape(rows, -1)) for scales in (steps, least))
    return Grid(numbers.reshape(rows, -1), steps, least)


def _halves(data: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def _nibbles(data: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The low halves of all bytes along the last axis, and then the high ones."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _six_bits(data: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Eight scales and eight least weights of six bits each, from twelve bytes."""
    first, second, third = data[..., :4], data[..., 4:8], data[..., 8:]
    return (
        np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=-1),
        np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=-1),
    )
