"""What lies between the forwards of a round: which tokens and states go on to the next one, and acceptance.

Drafting begins with the rows that the head has not consumed yet: `state` holds the position of the first of them,
their number, and their sequence's table; `found` the token after each. Of a chain, a round drafts K tokens and then
verifies K + 1 rows; of a tree, it verifies M rows and then drafts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait
from fastmtp.engines.cuda.kernels.rows import NEVER, Rows
from fastmtp.engines.cuda.kernels.shapes import PATH


@triton.jit
def _describe(FACTS, lanes, rows, position, table, NEVER: tl.constexpr):
    mask = lanes < rows
    tl.store(FACTS + rows + lanes, position + lanes, mask=mask)
    tl.store(FACTS + 2 * rows + lanes, position + lanes, mask=mask)
    tl.store(FACTS + 3 * rows + lanes, tl.full(lanes.shape, NEVER, tl.int32), mask=mask)
    tl.store(FACTS + 4 * rows + lanes, tl.zeros_like(lanes) + table, mask=mask)


@triton.jit
def _begin(
    STATE,
    FOUND,
    WAITING,
    STEPS,
    VERIFIED,
    W: tl.constexpr,
    S: tl.constexpr,
    M: tl.constexpr,
    BW: tl.constexpr,
    NEVER: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    release(OVERLAPS)
    lanes = tl.arange(0, BW)
    first, count, table = tl.load(STATE), tl.load(STATE + 1), tl.load(STATE + 2)
    length = first + count
    tl.store(WAITING + lanes, tl.load(FOUND + lanes, mask=lanes < W, other=0), mask=lanes < W)
    _describe(WAITING, lanes, W, first, table, NEVER)
    if M > 0:
        _describe(VERIFIED, lanes, M, length, table, NEVER)
        tl.store(VERIFIED, tl.load(FOUND + count - 1))
    for step in tl.static_range(S):
        _describe(STEPS + step * 5, lanes, 1, length + step, table, NEVER)


@triton.jit
def _hand_on(
    STATE,
    STATES,
    TOKENS,
    GIVEN,
    STEP,
    VERIFIED,
    H: tl.constexpr,
    BH: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    release(OVERLAPS)
    row = 0
    if FIRST:
        row = tl.load(STATE + 1) - 1
    token = tl.load(TOKENS + row)
    tl.store(VERIFIED, token)
    if not LAST:
        tl.store(STEP, token)
        columns = tl.arange(0, BH)
        tl.store(
            GIVEN + columns, tl.load(STATES + row * H + columns, mask=columns < H, other=0.0), mask=columns < H
        )


@triton.jit
def _accept(STATE, FOUND, TOLD, VERIFIED, ANSWER, K: tl.constexpr, BK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait(OVERLAPS)
    release(OVERLAPS)
    lanes = tl.arange(0, BK)
    tokens = tl.load(FOUND + lanes, mask=lanes <= K, other=-1)
    drafts = tl.load(VERIFIED + 1 + lanes, mask=lanes < K, other=-1)
    accepted = tl.min(tl.where((lanes < K) & (tokens == drafts), BK, lanes), 0)
    tl.store(STATE, tl.load(VERIFIED + K + 1))
    tl.store(STATE + 1, accepted + 1)
    tl.store(ANSWER + lanes, drafts, mask=lanes < K)
    tl.store(ANSWER + K + lanes, tl.load(TOLD + lanes, mask=lanes <= K), mask=lanes <= K)


@triton.jit
def _follow(
    FACTS,
    PATHS,
    FOUND,
    STATE,
    TAKEN,
    AFTER,
    M: tl.constexpr,
    BM: tl.constexpr,
    W: tl.constexpr,
    BW: tl.constexpr,
    PATH: tl.constexpr,
    NEVER: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    release(OVERLAPS)
    lanes = tl.arange(0, BM)
    steps = tl.arange(0, BW)
    is_row = lanes < M
    tokens = tl.load(FACTS + lanes, mask=is_row, other=-1)
    positions = tl.load(FACTS + M + lanes, mask=is_row, other=-1)
    root = tl.load(FACTS + M)
    depths = positions - root
    parents = lanes - 1
    if tl.load(FACTS + 3 * M) != NEVER:
        parents = tl.load(PATHS + lanes * PATH + depths - 1, mask=is_row & (depths > 0), other=-1)
    row, count = 0, 1
    taken = tl.zeros([BW], tl.int32)
    for step in range(1, M):
        # Rows that only fill the graph are at no position after the root's.
        is_next = (parents == row) & (depths == step) & (tokens == tl.load(FOUND + row))
        following = tl.min(tl.where(is_next & is_row, lanes, BM), 0)
        count = tl.where(following < BM, step + 1, count)
        row = tl.where(following < BM, following, row)
        taken = tl.where((steps == step) & (following < BM), row, taken)
    tl.store(STATE, root)
    tl.store(STATE + 1, count)
    tl.store(STATE + 2, tl.load(FACTS + 4 * M))
    tl.store(TAKEN + steps, taken, mask=steps < W)
    tl.store(AFTER + steps, tl.load(FOUND + taken), mask=steps < W)


def begin(state: Tensor, found: Tensor, waiting: Rows, steps: Tensor, verified: Rows | None) -> None:
    """Describe all rows of the round.

    Args:
        steps: [S, 5], the facts of the draft steps after the first.
        verified: of a chain, the rows to verify.
    """
    count = len(waiting)
    _begin[(1,)](
        state,
        found,
        waiting.facts,
        steps,
        waiting.facts if verified is None else verified.facts,
        count,
        len(steps),
        0 if verified is None else len(verified),
        triton.next_power_of_2(max(count, 0 if verified is None else len(verified))),
        NEVER,
        **overlap(state),
        num_warps=1,
    )


def follow(rows: Rows, found: Tensor, state: Tensor, taken: Tensor, after: Tensor) -> None:
    """The path through a tree that the target accepts: its rows in `taken`, the token after each in `after`.

    `state` is where the head goes on. What is in `taken` and `after` beyond the path's end belongs to no row.

    Args:
        found: the target's token after each of the rows.
    """
    count = len(rows)
    _follow[(1,)](
        rows.facts,
        rows.paths,
        found,
        state,
        taken,
        after,
        count,
        triton.next_power_of_2(count),
        len(taken),
        triton.next_power_of_2(len(taken)),
        PATH,
        NEVER,
        **overlap(state),
        num_warps=1,
    )


def hand_on(
    state: Tensor,
    states_RH: Tensor,
    tokens: Tensor,
    given_RH: Tensor,
    step: Rows | None,
    verified: Rows,
    number: int,
) -> None:
    """Take draft `number`, from 0 on: into the rows to verify and, with its state, to the next draft step.

    Args:
        tokens: the likeliest after each of the states.
        step: the next step's row; None after the last draft.
    """
    hidden = states_RH.shape[1]
    _hand_on[(1,)](
        state,
        states_RH,
        tokens,
        given_RH,
        verified.facts if step is None else step.facts,
        verified.facts[0, number + 1 :],
        hidden,
        triton.next_power_of_2(hidden),
        number == 0,
        step is None,
        **overlap(state),
    )


def accept(state: Tensor, found: Tensor, told: Tensor, verified: Rows, answer: Tensor) -> None:
    """From the target's tokens, the next round's beginning, and [2 K + 1] numbers: the drafts, and what is told."""
    count = len(verified) - 1
    block = triton.next_power_of_2(count + 1)
    _accept[(1,)](state, found, told, verified.facts, answer, count, block, **overlap(state), num_warps=1)
