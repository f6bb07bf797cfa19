"""The likeliest tokens after a row, in order, and their probabilities.

The next one is in the block with the largest maximum. Taken out of it, it leaves another maximum there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait
from fastmtp.engines.cuda.kernels.scores import BLOCK, BlockScores
from fastmtp.engines.cuda.kernels.shapes import TILE

# Logits that are added up at a time.
_STEP = 4096


@triton.jit
def _likeliest(
    LOGITS,
    BEST,
    IDS,
    ANSWER,
    N,
    blocks,
    stride,
    W: tl.constexpr,
    BW: tl.constexpr,
    LISTED: tl.constexpr,
    TILE: tl.constexpr,
    BN: tl.constexpr,
    BB: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    release(OVERLAPS)
    tile = tl.program_id(0)
    row = tile * TILE + tl.program_id(1)
    LOGITS += row.to(tl.int64) * N
    IDS += tile * N
    number, steps, lanes, places = tl.arange(0, BB), tl.arange(0, STEP), tl.arange(0, BN), tl.arange(0, BW)
    best = tl.load(BEST + row * blocks + number, mask=number < blocks, other=float("-inf"))
    most = tl.max(best, 0)
    weights = tl.zeros([STEP], tl.float32)
    for start in range(0, N, STEP):
        logits = tl.load(LOGITS + start + steps, mask=start + steps < N, other=float("-inf"))
        weights += tl.exp(logits - most)
    total = tl.sum(weights, 0)
    tokens, chances = tl.full([BW], -1, tl.int32), tl.zeros([BW], tl.float32)
    count, left = 0, most
    while (count < W) & (left > float("-inf")):
        block = tl.min(tl.where(best == left, number, BB), 0)
        columns = block * BN + lanes
        logits = tl.load(LOGITS + columns, mask=columns < N, other=float("-inf"))
        column = tl.min(tl.where(logits == left, columns, N), 0)
        token = column
        if LISTED:
            token = tl.load(IDS + column)
        # A list may name a token twice.
        is_new = tl.max((tokens == token).to(tl.int32), 0) == 0
        is_place = (places == count) & is_new
        tokens = tl.where(is_place, token, tokens)
        chances = tl.where(is_place, tl.exp(left - most) / total, chances)
        count += is_new.to(tl.int32)
        tl.store(LOGITS + column, float("-inf"))
        tl.debug_barrier()
        best = tl.where(number == block, tl.max(tl.where(columns == column, float("-inf"), logits), 0), best)
        left = tl.max(best, 0)
    answer = ANSWER + (tile * tl.num_programs(1) + tl.program_id(1)) * stride + places
    tl.store(answer, tokens.to(tl.float32), mask=places < W)
    tl.store(answer + W, chances, mask=places < W)


def likeliest(scores: BlockScores, ids_SN: Tensor | None, answer_M2W: Tensor) -> None:
    """Of the first rows of each of S tiles, tokens (-1 where there are no more) and then their probabilities.

    Args:
        scores: of the tiles; the logits of the likeliest tokens are lost.
        ids_SN: the tokens that each tile has scored; None is all.
    """
    (rows, count), (wanted, numbers), blocks = scores.logits_RN.shape, answer_M2W.shape, scores.best.shape[1]
    tiles, width = rows // TILE, numbers // 2
    ids = scores.best if ids_SN is None else ids_SN
    _likeliest[(tiles, wanted // tiles)](
        scores.logits_RN, scores.best, ids, answer_M2W, count, blocks, answer_M2W.stride(0), width,
        triton.next_power_of_2(width), ids_SN is not None, TILE, BLOCK, triton.next_power_of_2(blocks), _STEP,
        **overlap(ids), num_warps=8,
    )  # fmt: skip
