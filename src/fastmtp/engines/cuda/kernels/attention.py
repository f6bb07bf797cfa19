"""Rotary embeddings, writing to the caches, and attention, for rows of any sequences.

A row has a position, and a place `at` which its key and value are written to: its position, or in a tree the number
of the row after the text. Places lie in pages, which a sequence's table lists. A row attends to the places before
`start` and, from there on, to those on its path: `PATHS` holds the rows of the tree by depth. So whatever else is
in a tree, a row sees its own text's keys in the order of their positions.

Shapes: R rows in whole tiles, A query heads, B key heads, D size of a head, P parts of a product, S spans.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait
from fastmtp.engines.cuda.kernels.shapes import PAGE, PATH, SPAN, padded
from fastmtp.engines.cuda.kernels.steps import multiply_add

# Before the first key, the largest score; the softmax of keys that are not attended to is exactly zero.
_NONE = tl.constexpr(-1e30)


# Spans that are added up together.
_TOGETHER = 16
# Where the tree of a row begins that is in none.
NEVER = 1 << 30


@dataclass(frozen=True)
class Rows:
    """What kernels know of R rows, in int32 each.

    Attributes:
        facts: [5, R]: token, position, place, where its tree starts, number of its sequence's table.
        paths: [R, PATH]: by depth in the tree, the row.
    """

    facts: Tensor
    paths: Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> Rows:
        facts = torch.zeros(5, rows, dtype=torch.int32, device=device)
        return cls(facts, torch.zeros(rows, PATH, dtype=torch.int32, device=device))

    @property
    def tokens(self) -> Tensor:
        return self.facts[0]

    @property
    def positions(self) -> Tensor:
        return self.facts[1]

    def __len__(self) -> int:
        return self.facts.shape[1]


@dataclass(frozen=True)
class Pages:
    """One layer's keys and values [pages * PAGE, B, D], and the pages of each table [tables, pages of a text]."""

    keys: Tensor
    values: Tensor
    tables: Tensor


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
        scores = multiply_add(q, tl.trans(k), tl.full([BG, SPAN], 0.0, tl.float32)) * scale
        scores = tl.where(seen[None, :], scores, _NONE)
        largest = tl.max(scores, 1)
        likely = tl.where(seen[None, :], tl.exp(scores - largest[:, None]), 0.0)
        total = multiply_add(likely.to(v.dtype), v, tl.full([BG, BD], 0.0, tl.float32))
        spans = tl.num_programs(2)
        out = (row * A + head * group + members) * spans + span
        tl.store(SUMS + out[:, None] * D + lanes[None, :], total, mask=inside)
        tl.store(SCALES + out * 2, largest, mask=members < group)
        tl.store(SCALES + out * 2 + 1, tl.sum(likely, 1), mask=members < group)


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
    largest = tl.full([1], _NONE, tl.float32)
    weight = tl.full([1], 0.0, tl.float32)
    total = tl.full([BD], 0.0, tl.float32)
    # Which spans are added up together depends on their numbers alone.
    for begin in range(first // TOGETHER * TOGETHER, last + 1, TOGETHER):
        number = begin + tl.arange(0, TOGETHER)
        is_there = (number >= first) & (number <= last)
        source = (row * A + head) * spans + number
        own = tl.load(SCALES + source * 2, mask=is_there, other=_NONE)
        weights = tl.load(SCALES + source * 2 + 1, mask=is_there, other=0.0)
        sums = tl.load(
            SUMS + source[:, None] * D + lanes[None, :], mask=is_there[:, None] & is_lane[None, :], other=0.0
        )
        larger = tl.maximum(largest, tl.max(own, 0))
        before, after = tl.exp(largest - larger), tl.exp(own - larger)
        weight = weight * before + tl.sum(weights * after, 0)
        total = total * before + tl.sum(sums * after[:, None], 0)
        largest = larger
    tl.store(OUT + (row * A + head) * D + lanes, (total / weight).to(OUT.dtype.element_ty), mask=is_lane)


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
        _TOGETHER,
        **overlap(queries_RAD),
        num_warps=4,
    )
