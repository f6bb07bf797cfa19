"""Triton: attention of a prefill's chunks over the caches of slots, from a position that only the device knows.

Shapes: S slots, R slots of a prefill, C tokens of a chunk, N = R C rows, L room for tokens, Q query heads,
K key/value heads, D size of a head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.torch.running_softmax import add_keys, block_of

# Blocks of keys under way: queries take as much of a small GPU's shared memory as one.
_STAGES = 2


@triton.jit  # type: ignore[untyped-decorator]
def _attention(  # type: ignore[no-untyped-def]
    queries,
    keys,
    values,
    slots,
    start,
    output,
    scale,
    tokens,
    room,
    window,
    stride,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for some tokens of a slot's chunk and a query head: over tiles of keys with a running softmax."""
    head, first = tl.program_id(1), tl.program_id(2) * ROWS
    row = tl.program_id(0).to(tl.int64) * tokens + first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    is_own = (first + tl.arange(0, ROWS)[:, None] < tokens) & (columns < D)
    query = tl.load(queries + row * stride + head * D + columns, mask=is_own, other=0.0)
    # Of the first token, of each, and behind the last.
    position = tl.load(start) + first
    positions = position + tl.arange(0, ROWS)[:, None]
    end = position + tl.minimum(ROWS, tokens - first)
    most = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, COLUMNS], tl.float32)
    base = (tl.load(slots + tl.program_id(0)).to(tl.int64) * K + head // GROUP) * room * D
    for block in range(tl.maximum(position - window + 1, 0) // ROWS * ROWS, end, ROWS):
        at = block + tl.arange(0, ROWS)
        cells = base + at[:, None] * D + columns
        is_held = (at[:, None] < end) & (columns < D)
        seen = (at[None, :] <= positions) & (at[None, :] > positions - window)
        most, total, sums = add_keys(query, keys, values, cells, is_held, seen, scale, most, total, sums)
    place = output + row * K * GROUP * D + head * D + columns
    tl.store(place, (sums / total[:, None]).to(output.dtype.element_ty), mask=is_own)


def attend_chunks(
    queries_NQD: Tensor,
    keys_SKLD: Tensor,
    values_SKLD: Tensor,
    slots_R: Tensor,
    start: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """`ChunkAttention` of slot_attention.py."""
    (rows, heads, size), (_, key_heads, room, _) = queries_NQD.shape, keys_SKLD.shape
    # The heads of a row lie together; keys that were computed with them may lie between rows.
    assert queries_NQD.stride()[1:] == (size, 1) and slots_R.is_contiguous()
    assert keys_SKLD.is_contiguous() and values_SKLD.is_contiguous()
    tokens = rows // len(slots_R)
    columns, tile = block_of(keys_SKLD)
    output_NQD = torch.empty(queries_NQD.shape, dtype=queries_NQD.dtype, device=queries_NQD.device)
    _attention[(len(slots_R), heads, triton.cdiv(tokens, tile))](
        queries_NQD,
        keys_SKLD,
        values_SKLD,
        slots_R,
        start,
        output_NQD,
        scale,
        tokens,
        room,
        room if window is None else window,
        queries_NQD.stride(0),
        key_heads,
        heads // key_heads,
        size,
        tile,
        columns,
        num_stages=_STAGES,
    )
    return output_NQD
