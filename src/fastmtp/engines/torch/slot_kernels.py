"""Triton: what a step of many slots does between its matrix products, in few kernels.

Norms and rotary embeddings of queries and keys with the writes of keys and values, decode attention of each slot up
to its own length, the residual stream's sums with their norms, and the gate of the feed-forward network.

Shapes: S slots, L room for tokens, Q query heads, K key/value heads, D size of a head, H hidden, I intermediate;
J = Q + 2 K heads that are computed together, G = 2 I columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.torch.running_softmax import TILE, add_keys, block_of
from fastmtp.engines.torch.slot_parts import HeadNorms, Norm

# Columns of one program of the gate.
_COLUMNS = 1024


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
        most, total, sums = add_keys(query, keys, values, cells, is_held, seen[None, :], scale, most, total, sums)
    tl.store(output + program * GROUP * D + own, (sums / total[:, None]).to(output.dtype.element_ty), mask=is_own)


@triton.jit  # type: ignore[untyped-decorator]
def _place(  # type: ignore[no-untyped-def]
    joint,
    query_gains,
    key_gains,
    cosines,
    sines,
    positions,
    queries,
    keys,
    values,
    room,
    epsilon,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    NORMED: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for a slot and a head of the joint product: queries, then keys, then values."""
    slot, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(positions + slot)
    columns = tl.arange(0, COLUMNS)
    is_own = columns < D
    # The other half of the head: of a rotation's two numbers each needs both.
    other = tl.where(columns < D // 2, columns + D // 2, columns - D // 2)
    source = joint + (slot.to(tl.int64) * (Q + 2 * K) + head) * D
    found = tl.load(source + columns, mask=is_own, other=0.0).to(tl.float32)
    if head < Q + K:
        partner = tl.load(source + other, mask=is_own, other=0.0).to(tl.float32)
        if NORMED:
            scale = 1 / tl.sqrt(tl.sum(found * found, 0) / D + epsilon)
            if head < Q:
                gains = tl.load(query_gains + columns, mask=is_own, other=0.0)
                other_gains = tl.load(query_gains + other, mask=is_own, other=0.0)
            else:
                gains = tl.load(key_gains + columns, mask=is_own, other=0.0)
                other_gains = tl.load(key_gains + other, mask=is_own, other=0.0)
            found = found * scale * gains
            partner = partner * scale * other_gains
        partner = tl.where(columns < D // 2, -partner, partner)
        cosine = tl.load(cosines + position * D + columns, mask=is_own, other=0.0).to(tl.float32)
        sine = tl.load(sines + position * D + columns, mask=is_own, other=0.0).to(tl.float32)
        found = found * cosine + partner * sine
    found = found.to(queries.dtype.element_ty)
    if head < Q:
        tl.store(queries + (slot.to(tl.int64) * Q + head) * D + columns, found, mask=is_own)
    elif head < Q + K:
        row = (slot.to(tl.int64) * K + head - Q) * room + position
        tl.store(keys + row * D + columns, found, mask=is_own)
    else:
        row = (slot.to(tl.int64) * K + head - Q - K) * room + position
        tl.store(values + row * D + columns, found, mask=is_own)


def place_slots(
    joint_SJD: Tensor,
    norms: HeadNorms | None,
    cosines_LD: Tensor,
    sines_LD: Tensor,
    positions_S: Tensor,
    keys_SKLD: Tensor,
    values_SKLD: Tensor,
) -> Tensor:
    """`StepPlacement` of slot_parts.py."""
    slots, key_heads, room, size = keys_SKLD.shape
    heads = joint_SJD.shape[1] - 2 * key_heads
    assert all(part.is_contiguous() for part in (joint_SJD, cosines_LD, sines_LD, keys_SKLD, values_SKLD))
    queries_SQD = torch.empty(slots, heads, size, dtype=joint_SJD.dtype, device=joint_SJD.device)
    gains = (cosines_LD, cosines_LD) if norms is None else (norms[0].gains, norms[1].gains)
    _place[(slots, heads + 2 * key_heads)](
        joint_SJD,
        *gains,
        cosines_LD,
        sines_LD,
        positions_S,
        queries_SQD,
        keys_SKLD,
        values_SKLD,
        room,
        0.0 if norms is None else norms[0].epsilon,
        heads,
        key_heads,
        size,
        norms is not None,
        triton.next_power_of_2(size),
    )
    return queries_SQD


@triton.jit  # type: ignore[untyped-decorator]
def _add_norm(  # type: ignore[no-untyped-def]
    hidden,
    added,
    outer_gains,
    gains,
    total,
    output,
    outer_epsilon,
    epsilon,
    H: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for a slot."""
    columns = tl.arange(0, COLUMNS)
    is_own = columns < H
    row = tl.program_id(0).to(tl.int64) * H
    more = tl.load(added + row + columns, mask=is_own, other=0.0).to(tl.float32)
    if HAS_OUTER:
        outer = tl.load(outer_gains + columns, mask=is_own, other=0.0)
        more = more * (1 / tl.sqrt(tl.sum(more * more, 0) / H + outer_epsilon)) * outer
    kept = tl.load(hidden + row + columns, mask=is_own, other=0.0).to(tl.float32) + more
    kept = kept.to(total.dtype.element_ty)
    tl.store(total + row + columns, kept, mask=is_own)
    # As the next layers read it.
    x = kept.to(tl.float32)
    found = x * (1 / tl.sqrt(tl.sum(x * x, 0) / H + epsilon)) * tl.load(gains + columns, mask=is_own, other=0.0)
    tl.store(output + row + columns, found.to(output.dtype.element_ty), mask=is_own)


def add_norm_slots(hidden_SH: Tensor, added_SH: Tensor, outer: Norm | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """`add_norm` of `LayerParts`."""
    assert hidden_SH.is_contiguous() and added_SH.is_contiguous()
    total_SH, output_SH = torch.empty_like(hidden_SH), torch.empty_like(hidden_SH)
    slots, size = hidden_SH.shape
    _add_norm[(slots,)](
        hidden_SH,
        added_SH,
        (outer or norm).gains,
        norm.gains,
        total_SH,
        output_SH,
        (outer or norm).epsilon,
        norm.epsilon,
        size,
        outer is not None,
        triton.next_power_of_2(size),
    )
    return total_SH, output_SH


@triton.jit  # type: ignore[untyped-decorator]
def _gate(joint, output, INNER: tl.constexpr, GELU: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program for a slot and some columns."""
    slot = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < INNER
    gate = tl.load(joint + slot * 2 * INNER + columns, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(joint + slot * 2 * INNER + INNER + columns, mask=is_column, other=0.0).to(tl.float32)
    inner = gate
    if GELU:
        # tanh(z) = 2 sigmoid(2 z) - 1, so (1 + tanh(z)) / 2 = sigmoid(2 z).
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    found = gate * tl.sigmoid(inner) * up
    tl.store(output + slot * INNER + columns, found.to(output.dtype.element_ty), mask=is_column)


def gate_slots(joint_SG: Tensor, gelu: bool) -> Tensor:
    """`gate` of `LayerParts`."""
    slots, inner = joint_SG.shape[0], joint_SG.shape[1] // 2
    assert joint_SG.is_contiguous()
    output_SI = torch.empty(slots, inner, dtype=joint_SG.dtype, device=joint_SG.device)
    _gate[(slots, triton.cdiv(inner, _COLUMNS))](joint_SG, output_SI, inner, gelu, _COLUMNS)
    return output_SI


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
    columns, block = block_of(keys_SKLD)
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
        max(TILE, triton.next_power_of_2(group)),
        size,
        columns,
        block,
    )
    return output_SQD
