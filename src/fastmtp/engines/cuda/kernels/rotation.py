"""Rotary embeddings, and keys and values written to their places.

Shapes: R rows in whole tiles, A query heads, B key heads, D size of a head, P parts of a product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait
from fastmtp.engines.cuda.kernels.rows import Pages, Rows
from fastmtp.engines.cuda.kernels.shapes import PAGE


# A kernel is compiled once for all numbers of rows: Triton would choose other layouts for some of them, and add up
# in another order.
@triton.jit(do_not_specialize=["COUNT"])
def _rotate(
    PARTS,
    BIAS,
    GAINS,
    COS,
    SIN,
    FACTS,
    TABLES,
    QUERIES,
    KEYS,
    VALUES,
    R,
    COUNT,
    width,
    epsilon,
    A: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    P: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    PAGE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    # One key head, its value head, and the query heads that attend to it.
    row, head = tl.program_id(0), tl.program_id(1)
    group: tl.constexpr = A // B
    half: tl.constexpr = D // 2
    members = tl.arange(0, BM)
    lanes = tl.arange(0, BD)
    is_query, is_key, is_value = members < group, members == group, members == group + 1
    heads = tl.where(is_query, head * group + members, tl.where(is_key, A + head, A + B + head))
    inside = (members < group + 2)[:, None] & (lanes < half)[None, :]
    place = heads[:, None] * D + lanes[None, :]
    # What the kernel before does not write is on its way while that one ends.
    if BIASED:
        bias = tl.load(BIAS + place, mask=inside, other=0.0).to(tl.float32)
        second_bias = tl.load(BIAS + place + half, mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        gain = tl.where(is_query, 0, D)[:, None] + lanes[None, :]
        known = inside & (is_query | is_key)[:, None]
        gains = tl.load(GAINS + gain, mask=known, other=1.0)
        second_gains = tl.load(GAINS + gain + half, mask=known, other=1.0)
    position = tl.load(FACTS + COUNT + row)
    at = tl.load(FACTS + 2 * COUNT + row)
    table = tl.load(FACTS + 4 * COUNT + row)
    cos = tl.load(COS + position * half + lanes, mask=lanes < half, other=0.0)[None, :]
    sin = tl.load(SIN + position * half + lanes, mask=lanes < half, other=0.0)[None, :]
    page = tl.load(TABLES + table * width + at // PAGE).to(tl.int64)
    wait(OVERLAPS)
    release(OVERLAPS)
    first = tl.full([BM, BD], 0.0, tl.float32)
    second = tl.full([BM, BD], 0.0, tl.float32)
    for part in tl.static_range(P):
        source = PARTS + (part * R + row) * ((A + 2 * B) * D) + place
        first += tl.load(source, mask=inside, other=0.0)
        second += tl.load(source + half, mask=inside, other=0.0)
    if BIASED:
        first += bias
        second += second_bias
    if NORMED:
        squares = tl.sum(first * first, 1) + tl.sum(second * second, 1)
        factor = tl.where(is_value, 1.0, 1 / tl.sqrt(squares / D + epsilon))[:, None]
        first = first * factor * gains
        second = second * factor * second_gains
    kind = QUERIES.dtype.element_ty
    turned = (first * cos - second * sin).to(kind)
    turned_second = (second * cos + first * sin).to(kind)
    query = QUERIES + row * A * D + place
    tl.store(query, turned, mask=inside & is_query[:, None])
    tl.store(query + half, turned_second, mask=inside & is_query[:, None])
    slot = page * PAGE + at % PAGE
    cached = (slot * B + head) * D + lanes[None, :] + members[:, None] * 0
    tl.store(KEYS + cached, turned, mask=inside & is_key[:, None])
    tl.store(KEYS + cached + half, turned_second, mask=inside & is_key[:, None])
    tl.store(VALUES + cached, first.to(kind), mask=inside & is_value[:, None])
    tl.store(VALUES + cached + half, second.to(kind), mask=inside & is_value[:, None])


def rotate(
    parts_PRN: Tensor,
    bias_N: Tensor | None,
    gains_2D: Tensor | None,
    rope: tuple[Tensor, Tensor],
    rows: Rows,
    pages: Pages,
    queries_RAD: Tensor,
    epsilon: float,
) -> None:
    """Queries [R, A, D], and keys and values in their places, from the parts of their common product.

    Args:
        gains_2D: of the norms of queries and keys.
        rope: cosines and sines [positions, D / 2].
    """
    (_, heads, size), key_heads = queries_RAD.shape, pages.keys.shape[1]
    _rotate[(len(rows), key_heads)](
        parts_PRN,
        parts_PRN if bias_N is None else bias_N,
        parts_PRN if gains_2D is None else gains_2D,
        *rope,
        rows.facts,
        pages.tables,
        queries_RAD,
        pages.keys,
        pages.values,
        parts_PRN.shape[1],
        len(rows),
        pages.tables.shape[1],
        epsilon,
        heads,
        key_heads,
        size,
        triton.next_power_of_2(heads // key_heads + 2),
        triton.next_power_of_2(size // 2),
        parts_PRN.shape[0],
        bias_N is not None,
        gains_2D is not None,
        PAGE,
        **overlap(queries_RAD),
        num_warps=4,
    )
