"""Triton: attention over blocks of keys with a running softmax, for steps and for chunks of slots."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Tensor cores multiply tiles of at least 16 x 16.
TILE = 16
# A block of keys: so many, or as many bytes, for the pipeline of a small GPU's shared memory.
_KEYS, _KEY_BYTES = 64, 1 << 14


def block_of(keys_SKLD: Tensor) -> tuple[int, int]:
    """The columns of a head's numbers, and how many keys there are in a block."""
    columns = max(TILE, triton.next_power_of_2(keys_SKLD.shape[-1]))
    return columns, max(TILE, min(_KEYS, _KEY_BYTES // (columns * keys_SKLD.element_size())))


@triton.jit
def add_keys(query, keys, values, cells, is_held, seen, scale, most, total, sums):  # type: ignore[no-untyped-def]
    """The largest score, the sum of the weights and that of weighted values, with a block of keys.

    What is added up before a query sees a key, the first score that it sees shrinks to nothing.
    """
    key = tl.load(keys + cells, mask=is_held, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    scores = tl.where(seen, scores, -1e30)
    higher = tl.maximum(most, tl.max(scores, 1))
    weights = tl.exp(scores - higher[:, None])
    shrink = tl.exp(most - higher)
    value = tl.load(values + cells, mask=is_held, other=0.0)
    total = total * shrink + tl.sum(weights, 1)
    sums = sums * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return higher, total, sums
