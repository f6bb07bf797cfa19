"""Triton: decode attention over many slots, each up to its own length.

Shapes: S slots, L room for tokens, Q query heads, K key/value heads, D size of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tensor cores multiply tiles of at least 16 x 16.
_TILE = 16
# A block of keys: so many, or as many bytes, for the pipeline of a small GPU's shared memory.
_KEYS, _KEY_BYTES = 64, 1 << 14


@triton.jit  # type: ignore[untyped-decorator]
def _attention(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    positions,
    output,
    scale,
    room,
    window,
    stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program for a slot and a key head: its group of queries, over blocks of keys with a running softmax."""
    program = tl.program_id(0)
    end = tl.load(positions + program // K) + 1
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    own = rows[:, None] * D + columns[None, :]
    is_own = (rows[:, None] < GROUP) & (columns[None, :] < D)
    query = tl.load(queries + (program // K) * stride + (program % K) * GROUP * D + own, mask=is_own, other=0.0)
    most = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    base = program.to(tl.int64) * room * D
    first = tl.maximum(end - window, 0)
    for start in range(first // BLOCK * BLOCK, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        seen = (at >= first) & (at < end)
        cells = base + at[:, None] * D + columns[None, :]
        is_held = seen[:, None] & (columns[None, :] < D)
        key = tl.load(keys + cells, mask=is_held, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, -1e30)
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(most - higher)
        value = tl.load(values + cells, mask=is_held, other=0.0)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        most = higher
    tl.store(output + program * GROUP * D + own, (sums / total[:, None]).to(output.dtype.element_ty), mask=is_own)


def attend_slots(
    queries_SQD: Tensor,
    keys_SKLD: Tensor,
    values_SKLD: Tensor,
    positions_S: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """`StepAttention` of slot_attention.py."""
    slots, key_heads, room, size = keys_SKLD.shape
    group = queries_SQD.shape[1] // key_heads
    # The heads of a slot lie together; keys that were computed with them may lie between slots.
    assert queries_SQD.stride()[1:] == (size, 1)
    columns = max(_TILE, triton.next_power_of_2(size))
    block = max(_TILE, min(_KEYS, _KEY_BYTES // (columns * keys_SKLD.element_size())))
    output_SQD = torch.empty(queries_SQD.shape, dtype=queries_SQD.dtype, device=queries_SQD.device)
    _attention[(slots * key_heads,)](
        queries_SQD,
        keys_SKLD,
        values_SKLD,
        positions_S,
        output_SQD,
        scale,
        room,
        room if window is None else window,
        queries_SQD.stride(0),
        key_heads,
        group,
        max(_TILE, triton.next_power_of_2(group)),
        size,
        columns,
        block,
    )
    return output_SQD
