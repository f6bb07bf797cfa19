"""Triton: head norms and rotary embeddings of queries and keys, forward and backward.

Shapes: B texts, T tokens of each, N = B T rows, Q query heads, K key/value heads, G = Q / K, D size of a head,
J = Q + 2 K heads that are computed together, P programs of a backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastmtp.engines.torch.text_kernels import turned_heads
from fastmtp.train.head_parts import HeadNorms
from fastmtp.train.norm_kernels import SIZES

# Numbers of one program, which takes several heads of a row.
_NUMBERS = 2048
# Programs of a backward pass with gains, each with a sum of its own rows.
_PROGRAMS = 1024


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _rotate(  # type: ignore[no-untyped-def]
    joint,
    query_gains,
    key_gains,
    cosines,
    sines,
    queries,
    keys,
    values,
    tokens,
    query_epsilon,
    key_epsilon,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    NORMED: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for a row and some of its heads: queries, keys, then values."""
    row = tl.program_id(0).to(tl.int64)
    text = row // tokens
    position = row % tokens
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    is_own = (heads < Q + 2 * K) & (columns < D)
    is_query, is_value = is_own & (heads < Q), is_own & (heads >= Q + K)
    is_key = is_own & (heads >= Q) & (heads < Q + K)
    place = position * D
    given, found = turned_heads(
        joint + row * (Q + 2 * K) * D + heads * D, query_gains, key_gains, cosines + place, sines + place,
        heads, columns, is_own, query_epsilon, key_epsilon, Q, K, D, NORMED,
    )  # fmt: skip
    tl.store(values + ((text * K + heads - Q - K) * tokens + position) * D + columns, given, mask=is_value)
    tl.store(queries + ((text * Q + heads) * tokens + position) * D + columns, found, mask=is_query)
    tl.store(keys + ((text * K + heads - Q) * tokens + position) * D + columns, found, mask=is_key)


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _rotate_backward(  # type: ignore[no-untyped-def]
    joint,
    query_gains,
    key_gains,
    cosines,
    sines,
    queries,
    keys,
    values,
    query_text,
    query_key,
    query_group,
    query_token,
    key_text,
    key_head,
    key_token,
    value_text,
    value_head,
    value_token,
    found,
    sums,
    rows,
    tokens,
    query_epsilon,
    key_epsilon,
    Q: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    NORMED: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for every P-th row and some of its heads; the strides of the three gradients come after them."""
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    is_own = (heads < Q + 2 * K) & (columns < D)
    is_query, is_value = is_own & (heads < Q), is_own & (heads >= Q + K)
    is_key = is_own & (heads >= Q) & (heads < Q + K)
    other = tl.where(columns < D // 2, columns + D // 2, columns - D // 2)
    query_at = heads // (Q // K) * query_key + heads % (Q // K) * query_group
    key_at, value_at = (heads - Q) * key_head, (heads - Q - K) * value_head
    query_sums = tl.zeros([COLUMNS], tl.float32)
    key_sums = tl.zeros([COLUMNS], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        text = row // tokens
        position = row % tokens
        query = queries + text * query_text + position * query_token + query_at
        key = keys + text * key_text + position * key_token + key_at
        value = values + text * value_text + position * value_token + value_at
        slope = tl.load(query + columns, mask=is_query, other=0.0).to(tl.float32)
        slope += tl.load(key + columns, mask=is_key, other=0.0).to(tl.float32)
        partner = tl.load(query + other, mask=is_query, other=0.0).to(tl.float32)
        partner += tl.load(key + other, mask=is_key, other=0.0).to(tl.float32)
        # The rotation back.
        cosine = tl.load(cosines + position * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        sine = tl.load(sines + position * D + other, mask=columns < D, other=0.0).to(tl.float32)
        slope = slope * cosine + tl.where(columns < D // 2, partner, -partner) * sine
        own = row * (Q + 2 * K) * D + heads * D + columns
        if NORMED:
            epsilon = tl.where(heads < Q, query_epsilon, key_epsilon)
            x = tl.load(joint + own, mask=is_own, other=0.0).to(tl.float32)
            scale = 1 / tl.sqrt(tl.sum(x * x, 1)[:, None] / D + epsilon)
            x = x * scale
            query_sums += tl.sum(tl.where(is_query, slope * x, 0.0), 0)
            key_sums += tl.sum(tl.where(is_key, slope * x, 0.0), 0)
            gains = tl.load(query_gains + columns, mask=is_query, other=0.0)
            slope = slope * (gains + tl.load(key_gains + columns, mask=is_key, other=0.0))
            slope = scale * (slope - x * (tl.sum(slope * x, 1)[:, None] / D))
        slope += tl.load(value + columns, mask=is_value, other=0.0).to(tl.float32)
        tl.store(found + own, slope.to(found.dtype.element_ty), mask=is_own)
    if NORMED:
        every = tl.arange(0, COLUMNS)
        at = sums + (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * 2 * D + every
        tl.store(at, query_sums, mask=every < D)
        tl.store(at + D, key_sums, mask=every < D)


class _Rotate(Function):
    """Queries [B, K, G, T, D], and keys and values [B, K, T, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        joint_NJD: Tensor,
        key_heads: int,
        cosines_TD: Tensor,
        sines_TD: Tensor,
        query_gains_D: Tensor | None,
        key_gains_D: Tensor | None,
        epsilons: tuple[float, float],
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert joint_NJD.is_contiguous() and cosines_TD.is_contiguous() and sines_TD.is_contiguous()
        rows, joint, size = joint_NJD.shape
        tokens, query_heads = len(cosines_TD), joint - 2 * key_heads
        texts, group = rows // tokens, query_heads // key_heads
        queries = joint_NJD.new_empty(texts, key_heads, group, tokens, size)
        keys, values = (joint_NJD.new_empty(texts, key_heads, tokens, size) for _ in range(2))
        grid, shape = _heads_of(joint, size)
        _rotate[(rows, grid)](
            joint_NJD,
            *_or((query_gains_D, key_gains_D), cosines_TD),
            cosines_TD,
            sines_TD,
            queries,
            keys,
            values,
            tokens,
            *epsilons,
            query_heads,
            key_heads,
            size,
            query_gains_D is not None,
            *shape,
        )
        normed = query_gains_D is not None
        ctx.save_for_backward(joint_NJD if normed else None, cosines_TD, sines_TD, query_gains_D, key_gains_D)
        ctx.epsilons = epsilons
        return queries, keys, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor | None, ...]:
        joint_NJD, cosines_TD, sines_TD, query_gains_D, key_gains_D = ctx.saved_tensors
        assert queries.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
        texts, key_heads, group, tokens, size = queries.shape
        rows, joint = texts * tokens, key_heads * (group + 2)
        found_NJD = queries.new_empty(rows, joint, size)
        grid, shape = _heads_of(joint, size)
        normed = query_gains_D is not None
        programs = min(rows, _PROGRAMS) if normed else rows
        sums = torch.empty(programs, grid, 2, size, device=queries.device) if normed else found_NJD
        _rotate_backward[(programs, grid)](
            joint_NJD if normed else found_NJD,
            *_or((query_gains_D, key_gains_D), cosines_TD),
            cosines_TD,
            sines_TD,
            queries,
            keys,
            values,
            *queries.stride()[:-1],
            *keys.stride()[:-1],
            *values.stride()[:-1],
            found_NJD,
            sums,
            rows,
            tokens,
            *ctx.epsilons,
            key_heads * group,
            key_heads,
            size,
            normed,
            *shape,
        )
        gains = sums.sum((0, 1)) if normed else (None, None)
        return found_NJD, None, None, None, gains[0], gains[1], None


def _heads_of(joint: int, size: int) -> tuple[int, tuple[int, int]]:
    """Programs for the heads of a row, and how many heads and columns each takes."""
    columns = triton.next_power_of_2(size)
    heads = min(triton.next_power_of_2(joint), max(1, _NUMBERS // columns))
    return triton.cdiv(joint, heads), (heads, columns)


def _or(tensors: tuple[Tensor | None, ...], unread: Tensor) -> tuple[Tensor, ...]:
    return tuple(unread if one is None else one for one in tensors)


def rotate(
    joint_NJD: Tensor, norms: HeadNorms | None, key_heads: int, cosines_TD: Tensor, sines_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`Rotation`."""
    gains, epsilons = zip(*norms, strict=True) if norms else ((None, None), (0.0, 0.0))
    arguments = (joint_NJD, key_heads, cosines_TD, sines_TD, *gains, epsilons)
    queries, keys, values = _Rotate.apply(*arguments)  # type: ignore[no-untyped-call]
    return queries, keys, values
