"""Attention of rows of any sequences (rows.py), each to its own text, in spans of positions whose softmax sums are
added up in order.

Shapes: R rows, A query heads, B key heads, D size of a head, S spans.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait
from fastmtp.engines.cuda.kernels.rows import Pages, Rows
from fastmtp.engines.cuda.kernels.shapes import PAGE, PATH, SPAN, padded
from fastmtp.engines.cuda.kernels.steps import multiply_add

# Before the first key, the largest score; the softmax of keys that are not attended to is exactly zero.
NONE = tl.constexpr(-1e30)
# Spans that are read at once.
_TOGETHER = 16


@triton.jit
def larger(largest, own):
    """The larger of two scores, and the factors of what was summed up beside each of them.

    Softmax sums are added up span by span, with `tl.fma`: no kernel's compiler then chooses another order.
    """
    found = tl.maximum(largest, own)
    return found, tl.exp(largest - found), tl.exp(own - found)


@triton.jit
def softmax_sums(q, k, v, seen, scale):
    """Of queries [M, D] in a span of keys: the largest score, the sum of the weights, and that of weighted values.

    Args:
        seen: which keys are attended to, [1, span] or [M, span]; what the others hold must be finite.
    """
    scores = multiply_add(q, tl.trans(k), tl.full([q.shape[0], k.shape[0]], 0.0, tl.float32)) * scale
    scores = tl.where(seen, scores, NONE)
    largest = tl.max(scores, 1)
    likely = tl.where(seen, tl.exp(scores - largest[:, None]), 0.0)
    total = multiply_add(likely.to(v.dtype), v, tl.full(q.shape, 0.0, tl.float32))
    return largest, tl.sum(likely, 1), total


@triton.jit(do_not_specialize=["COUNT"])
def _attend(
    QUERIES,
    KEYS,
    VALUES,
    FACTS,
    PATHS,
    TABLES,
    SUMS,
    SCALES,
    COUNT,
    width,
    scale,
    WINDOW: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    BG: tl.constexpr,
    BD: tl.constexpr,
    PAGE: tl.constexpr,
    PATH: tl.constexpr,
    SPAN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row, head, span = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(FACTS + COUNT + row)
    least = 0
    if WINDOW > 0:
        least = tl.maximum(position - WINDOW + 1, 0)
    begin = span * SPAN
    is_needed = (begin <= position) & (begin + SPAN > least)
    start = tl.load(FACTS + 3 * COUNT + row)
    table = tl.load(FACTS + 4 * COUNT + row)
    places = begin + tl.arange(0, SPAN)
    seen = (places <= position) & (places >= least)
    in_tree = seen & (places >= start)
    rows = tl.load(PATHS + row * PATH + places - start, mask=in_tree, other=0)
    at = tl.where(in_tree, start + rows, places)
    pages = tl.load(TABLES + table * width + at // PAGE, mask=seen, other=0)
    slots = pages.to(tl.int64) * PAGE + at % PAGE
    lanes = tl.arange(0, BD)
    key = (slots * B + head)[:, None] * D + lanes[None, :]
    # Keys and values that are not of this forward's rows are on their way while the kernel before ends.
    is_old = seen & (places < tl.minimum(start, position - COUNT + 1))
    mask = is_old[:, None] & (lanes < D)[None, :]
    k = tl.load(KEYS + key, mask=mask, other=0.0)
    v = tl.load(VALUES + key, mask=mask, other=0.0)
    wait(OVERLAPS)
    release(OVERLAPS)
    if is_needed:
        group: tl.constexpr = A // B
        members = tl.arange(0, BG)
        inside = (members < group)[:, None] & (lanes < D)[None, :]
        query = (row * A + head * group + members)[:, None] * D + lanes[None, :]
        q = tl.load(QUERIES + query, mask=inside, other=0.0)
        mask = (seen & ~is_old)[:, None] & (lanes < D)[None, :]
        k = tl.where(is_old[:, None], k, tl.load(KEYS + key, mask=mask, other=0.0))
        v = tl.where(is_old[:, None], v, tl.load(VALUES + key, mask=mask, other=0.0))
        largest, weight, total = softmax_sums(q, k, v, seen[None, :], scale)
        spans = tl.num_programs(2)
        out = (row * A + head * group + members) * spans + span
        tl.store(SUMS + out[:, None] * D + lanes[None, :], total, mask=inside)
        tl.store(SCALES + out * 2, largest, mask=members < group)
        tl.store(SCALES + out * 2 + 1, weight, mask=members < group)


@triton.jit(do_not_specialize=["COUNT", "spans"])
def _combine(
    SUMS,
    SCALES,
    FACTS,
    OUT,
    COUNT,
    spans,
    WINDOW: tl.constexpr,
    A: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    SPAN: tl.constexpr,
    TOGETHER: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(FACTS + COUNT + row)
    wait(OVERLAPS)
    release(OVERLAPS)
    lanes = tl.arange(0, BD)
    is_lane = lanes < D
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0) // SPAN
    last = position // SPAN
    largest, weight = tl.full([1], NONE, tl.float32), tl.full([1], 0.0, tl.float32)
    total = tl.full([BD], 0.0, tl.float32)
    for begin in range(first, last + 1, TOGETHER):
        nothing = ((largest,) * TOGETHER)[:0]
        owns, own_weights, own_totals = nothing, nothing, nothing
        for number in tl.static_range(TOGETHER):
            span = tl.full([1], number, tl.int32) + begin
            source, is_there = (row * A + head) * spans + span, span <= last
            owns += (tl.load(SCALES + source * 2, mask=is_there, other=NONE),)
            own_weights += (tl.load(SCALES + source * 2 + 1, mask=is_there, other=0.0),)
            own_totals += (tl.load(SUMS + source * D + lanes, mask=is_lane & is_there, other=0.0),)
        for number in tl.static_range(TOGETHER):
            largest, before, after = larger(largest, owns[number])
            weight = tl.fma(weight, before, own_weights[number] * after)
            total = tl.fma(total, before, own_totals[number] * after)
    tl.store(OUT + (row * A + head) * D + lanes, (total / weight).to(OUT.dtype.element_ty), mask=is_lane)


def attend(
    queries_RAD: Tensor,
    rows: Rows,
    pages: Pages,
    out_RN: Tensor,
    memory: tuple[Tensor, Tensor],
    scale: float,
    window: int | None,
    spans: int,
) -> None:
    """Attention of each row to its own text, [R, A * D].

    Args:
        memory: float32, of R * A * S * D and of R * A * S * 2 numbers, for the softmax sums of each span.
        window: how many last positions a row attends to; None is all.
        spans: enough of them for every row's position.
    """
    (_, heads, size), key_heads, sums, scales = queries_RAD.shape, pages.keys.shape[1], *memory
    _attend[(len(rows), key_heads, spans)](
        queries_RAD,
        pages.keys,
        pages.values,
        rows.facts,
        rows.paths,
        pages.tables,
        sums,
        scales,
        len(rows),
        pages.tables.shape[1],
        scale,
        window or 0,
        heads,
        key_heads,
        size,
        padded(heads // key_heads),
        padded(size),
        PAGE,
        PATH,
        SPAN,
        **overlap(queries_RAD),
        num_warps=4,
    )
    _combine[(len(rows), heads)](
        sums,
        scales,
        rows.facts,
        out_RN,
        len(rows),
        spans,
        window or 0,
        heads,
        size,
        triton.next_power_of_2(size),
        SPAN,
        min(_TOGETHER, spans),
        **overlap(queries_RAD),
        num_warps=4,
    )
