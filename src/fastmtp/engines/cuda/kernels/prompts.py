"""Attention of many rows of one text, in order: the bits of attention.py, without its memory for spans.

A program reads the keys and values of a span once for some tiles of rows, and adds the spans up as it goes.

Shapes: R rows in whole tiles, A query heads, B key heads, D size of a head.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.attention import NONE, larger, softmax_sums
from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait
from fastmtp.engines.cuda.kernels.rows import Pages, Rows
from fastmtp.engines.cuda.kernels.shapes import PAGE, SPAN, TILE, padded

# The size of a program's queries that registers hold, and programs of a head that are better than larger ones.
_MOST, _ENOUGH = 256, 16


@triton.jit(do_not_specialize=["COUNT"])
def _attend_in_order(
    QUERIES,
    KEYS,
    VALUES,
    FACTS,
    TABLES,
    OUT,
    COUNT,
    width,
    scale,
    WINDOW: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    TILES: tl.constexpr,
    SPAN: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    # The last rows see most, and begin first.
    block, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    rows = block * TILES * 16 + tl.arange(0, 16)
    lanes = tl.arange(0, BD)
    is_lane = (lanes < D)[None, :]
    table = tl.load(FACTS + 4 * COUNT + block * TILES * 16)
    wait(OVERLAPS)
    release(OVERLAPS)
    none, nothing = tl.full([16], NONE, tl.float32), tl.full([16], 0.0, tl.float32)
    largest, weights = (none,) * TILES, (nothing,) * TILES
    positions, queries, totals = largest[:0], largest[:0], largest[:0]
    last, least = 0, 1 << 30
    for tile in tl.static_range(TILES):
        row = rows + tile * 16
        position = tl.load(FACTS + COUNT + row)
        positions += (position,)
        query = (row * A + head)[:, None] * D + lanes[None, :]
        queries += (tl.load(QUERIES + query, mask=is_lane, other=0.0),)
        totals += (tl.full([16, BD], 0.0, tl.float32),)
        last = tl.maximum(last, tl.max(position, 0))
        least = tl.minimum(least, tl.min(position, 0))
    first = 0
    if WINDOW > 0:
        first = tl.maximum(least - WINDOW + 1, 0) // SPAN
    for span in range(first, last // SPAN + 1):
        places = span * SPAN + tl.arange(0, SPAN)
        page = tl.load(TABLES + table * width + span).to(tl.int64)
        key = ((page * SPAN + tl.arange(0, SPAN)) * B + head // (A // B))[:, None] * D + lanes[None, :]
        mask = (places <= last)[:, None] & is_lane
        k = tl.load(KEYS + key, mask=mask, other=0.0)
        v = tl.load(VALUES + key, mask=mask, other=0.0)
        now_largest, now_weights, now_totals = largest[:0], largest[:0], largest[:0]
        for tile in tl.static_range(TILES):
            ends = positions[tile][:, None]
            seen = places[None, :] <= ends
            if WINDOW > 0:
                seen = seen & (places[None, :] > ends - WINDOW)
            own, own_weight, own_total = softmax_sums(queries[tile], k, v, seen, scale)
            found, before, after = larger(largest[tile], own)
            now_largest += (found,)
            now_weights += (tl.fma(weights[tile], before, own_weight * after),)
            now_totals += (tl.fma(totals[tile], before[:, None], own_total * after[:, None]),)
        largest, weights, totals = now_largest, now_weights, now_totals
    for tile in tl.static_range(TILES):
        found = (totals[tile] / weights[tile][:, None]).to(OUT.dtype.element_ty)
        tl.store(OUT + ((rows + tile * 16) * A + head)[:, None] * D + lanes[None, :], found, mask=is_lane)


def attend_in_order(
    queries_RAD: Tensor, rows: Rows, pages: Pages, out_RN: Tensor, scale: float, window: int | None
) -> None:
    """Attention of each row to its own text, [R, A * D].

    Args:
        rows: of one text and of no tree, in whole tiles; those that are left over have another table or place.
        window: how many last positions a row attends to; None is all.
    """
    assert PAGE == SPAN and len(rows) % TILE == 0
    _, heads, size = queries_RAD.shape
    every = len(rows) // TILE
    tiles = gcd(every, max(1, _MOST // padded(size)), max(1, every // _ENOUGH))
    _attend_in_order[(every // tiles, heads)](
        queries_RAD,
        pages.keys,
        pages.values,
        rows.facts,
        pages.tables,
        out_RN,
        len(rows),
        pages.tables.shape[1],
        scale,
        window or 0,
        heads,
        pages.keys.shape[1],
        size,
        padded(size),
        tiles,
        SPAN,
        **overlap(queries_RAD),
        num_warps=4,
    )
