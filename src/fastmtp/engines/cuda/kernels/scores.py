"""Scores of tokens by the LM head, and the largest of them.

Shapes: R rows in whole tiles, M of a tile wanted, N tokens scored, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait
from fastmtp.engines.cuda.kernels.shapes import TILE
from fastmtp.engines.cuda.kernels.steps import add_step, no_sums, scaled
from fastmtp.engines.cuda.matrices import Matrix

# Tokens of one program.
BLOCK = 64
# Bytes of a token's row that are read at a time, and those of a quantised one: fewer leave room for more programs.
_STEP_BYTES, _QUANTISED_STEP_BYTES = 256, 128
_BEYOND = tl.constexpr(2**31 - 1)


@triton.jit(do_not_specialize=["M"])
def _scores(
    STATES,
    W,
    SCALES,
    IDS,
    LOGITS,
    BEST,
    PLACES,
    N,
    M,
    H: tl.constexpr,
    KIND: tl.constexpr,
    LISTED: tl.constexpr,
    KEEPS: tl.constexpr,
    PICKS: tl.constexpr,
    EACH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    block = tl.program_id(1)
    columns = block * BN + tl.arange(0, BN)
    is_token = columns < N
    tokens = columns
    depth = H
    wait(OVERLAPS)
    if LISTED:
        if EACH:
            IDS += tl.program_id(0) * N
        tokens = tl.load(IDS + columns, mask=is_token, other=-1)
        is_token = tokens >= 0
        # Where a list has ended there is nothing to multiply.
        depth = tl.where(tl.max(tokens, 0) >= 0, H, 0)
    places, of_tile = tokens.to(tl.int64), tl.arange(0, 16)
    totals = no_sums(1, BN)
    for step in range(0, depth, BK):
        totals = add_step(
            STATES + rows[:, None] * H, W, SCALES, of_tile, places, M, is_token, step, totals, H, KIND, BK
        )
    release(OVERLAPS)
    total = scaled(SCALES, places, is_token, totals[0], KIND)
    total = tl.where(is_token[None, :], total, float("-inf"))
    if PICKS:
        best = tl.max(total, 1)
        places = tl.min(tl.where(total == best[:, None], columns[None, :], _BEYOND), 1)
        of_row = rows * tl.num_programs(1) + block
        tl.store(BEST + of_row, best)
        tl.store(PLACES + of_row, places)
    if KEEPS:
        is_kept = (of_tile < M)[:, None] & (columns < N)[None, :]
        tl.store(LOGITS + rows[:, None].to(tl.int64) * N + columns[None, :], total, mask=is_kept)


@triton.jit
def _pick(
    BEST, PLACES, IDS, TOKENS, CODES, N, blocks, LISTED: tl.constexpr, BB: tl.constexpr, OVERLAPS: tl.constexpr
):
    wait(OVERLAPS)
    release(OVERLAPS)
    row = tl.program_id(0)
    number = tl.arange(0, BB)
    is_block = number < blocks
    best = tl.load(BEST + row * blocks + number, mask=is_block, other=float("-inf"))
    places = tl.load(PLACES + row * blocks + number, mask=is_block, other=_BEYOND)
    token = tl.min(tl.where(best == tl.max(best, 0), places, _BEYOND), 0)
    # Scores that are not numbers are equal to none.
    token = tl.minimum(token, N - 1)
    if LISTED:
        token = tl.load(IDS + token)
    tl.store(TOKENS + row, token)
    tl.store(CODES + row, token)


@dataclass(frozen=True)
class BlockScores:
    """Memory of logits [R, N], and of the largest of each block of a row with its place, [R, N / 64] each."""

    logits_RN: Tensor
    best: Tensor
    places: Tensor

    @classmethod
    def empty(cls, rows: int, count: int, device: torch.device) -> BlockScores:
        best = torch.zeros(rows, triton.cdiv(count, BLOCK), device=device)
        return cls(torch.zeros(rows, count, device=device), best, torch.zeros_like(best, dtype=torch.int32))


def scores(states_RH: Tensor, weight: Matrix, ids_N: Tensor | None, out_RN: Tensor) -> None:
    """Logits of some tokens in float32; a token below 0 has -inf.

    Args:
        ids_N: the tokens, or those of each tile, [R / 16, N]; None is all of them.
    """
    memory = out_RN, out_RN
    _launch_scores(states_RH, weight, ids_N, out_RN.shape[1], out_RN, memory, wanted=TILE, keeps=True, picks=False)


def block_scores(states_RH: Tensor, weight: Matrix, ids_N: Tensor | None, out: BlockScores, kept: int) -> None:
    """`scores` of the first rows of each tile, and the largest of each block."""
    memory, count = (out.best, out.places), out.logits_RN.shape[1]
    _launch_scores(states_RH, weight, ids_N, count, out.logits_RN, memory, wanted=kept, keeps=True, picks=True)


def argmax(
    states_RH: Tensor,
    weight: Matrix,
    ids_N: Tensor | None,
    memory: tuple[Tensor, Tensor],
    tokens_M: Tensor,
    codes_M: Tensor,
) -> None:
    """The token of the largest logit of each of the first M rows, of equal ones the first in the list; twice.

    Args:
        memory: float32 and int32, of one number for each row and block of tokens.
    """
    count = weight.outputs if ids_N is None else len(ids_N)
    ids, blocks, listed = tokens_M if ids_N is None else ids_N, triton.cdiv(count, BLOCK), ids_N is not None
    wanted = min(len(tokens_M), TILE)
    _launch_scores(states_RH, weight, ids_N, count, states_RH, memory, wanted=wanted, keeps=False, picks=True)
    _pick[(len(tokens_M),)](
        *memory, ids, tokens_M, codes_M, count, blocks, listed, triton.next_power_of_2(blocks), **overlap(ids)
    )


def _launch_scores(
    states_RH: Tensor,
    weight: Matrix,
    ids_N: Tensor | None,
    count: int,
    logits: Tensor,
    memory: tuple[Tensor, Tensor],
    *,
    wanted: int,
    keeps: bool,
    picks: bool,
) -> None:
    """Keep the logits of each tile's first M rows, or pick the largest of each block and its place, or both."""
    rows, hidden = states_RH.shape
    ids, listed = states_RH if ids_N is None else ids_N, ids_N is not None
    each = listed and ids.ndim == 2
    step = 8 * (_STEP_BYTES if weight.kind is None else _QUANTISED_STEP_BYTES) // weight.bits
    _scores[(rows // TILE, triton.cdiv(count, BLOCK))](
        states_RH, weight.values, weight.scales, ids, logits, *memory, count, wanted, hidden, weight.code,
        listed, keeps, picks, each, BLOCK, step, **overlap(states_RH), num_warps=4, num_stages=4,
    )  # fmt: skip
