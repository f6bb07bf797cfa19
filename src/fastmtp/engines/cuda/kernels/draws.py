"""Draws at a temperature: the token that decode/sampling.py draws, with the same random numbers.

A token wins the race with the least E / w: w is its weight, E its exponential number at the row's position. The
arithmetic is not the host's to the bit. So the draws that another rounding could change are told from the others:
where two times, or a weight and a limit, are closer than `_SLACK` in proportion. The host draws these from the
logits.

Three kernels: `_scores` (scores.py) has the logits, and the largest of each block of them; `_race` the sum of the
weights and the two least times of each chunk; `_settle` the winner among those that top-k, min-p and top-p keep.
These have the largest logits: if a winner is not kept, nothing below it is, and the race is run again above it, in
the blocks that reach there.

Shapes: R rows in whole tiles, M rows drawn, N tokens scored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait
from fastmtp.engines.cuda.kernels.race import kept_of, log_times, random_key, temperature_of, two_least
from fastmtp.engines.cuda.kernels.scores import BLOCK, BlockScores, block_scores
from fastmtp.engines.cuda.matrices import Matrix

# Tokens of a program of `_race`, and of a step of `_settle`.
_CHUNK, _STEP = 1024, 2048
# More than what rounding changes of a weight or a time, here and on the host together, in proportion.
_SLACK = tl.constexpr(1e-4)
_LEAST_CHANCE = tl.constexpr(1e-30)
# Below every logarithm of a weight but that of 0.
_NO_CUT = tl.constexpr(-1e30)
# The integer of -inf in the order of floating-point numbers.
_LEAST_KEY = tl.constexpr(-(2**31) + 2**23 - 1)


@dataclass(frozen=True)
class DrawMemory:
    """Of R rows: their scores, and what `_race` finds of each chunk of tokens."""

    scores: BlockScores
    sums: Tensor
    times: Tensor
    seconds: Tensor
    winners: Tensor

    @classmethod
    def empty(cls, rows: int, count: int, device: torch.device) -> DrawMemory:
        shape = rows, triton.cdiv(count, _CHUNK)
        sums, times, seconds = torch.zeros(3, *shape, device=device)
        winners = torch.zeros(shape, dtype=torch.int32, device=device)
        return cls(BlockScores.empty(rows, count, device), sums, times, seconds, winners)


@triton.jit
def _float_of(key):
    """The number at a place in the order of floating-point numbers."""
    key = key.to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _key_of(number):
    bits = number.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _step(SCORES, LIST, start, listed, N, BN: tl.constexpr, STEP: tl.constexpr):
    """The logits of some of the listed blocks, and their columns."""
    lanes = tl.arange(0, STEP)
    number = start + lanes // BN
    columns = tl.load(LIST + number, mask=number < listed, other=0) * BN + lanes % BN
    logits = tl.load(SCORES + columns, mask=(number < listed) & (columns < N), other=float("-inf"))
    return logits, columns


@triton.jit
def _count(SCORES, LIST, listed, N, least, BN: tl.constexpr, STEP: tl.constexpr):
    """How many logits are not less."""
    counts = tl.zeros([STEP], tl.int32)
    for start in range(0, listed, STEP // BN):
        logits, _ = _step(SCORES, LIST, start, listed, N, BN, STEP)
        counts += (logits >= least).to(tl.int32)
    return tl.sum(counts, 0)


@triton.jit
def _narrowed(low, high, middle, count, top_k):
    """Where the greatest key is that `top_k` numbers reach, if so many reach the middle; exactly as many end it."""
    low = tl.where(count >= top_k, middle, low)
    return low, tl.where(count > top_k, high, tl.where(count == top_k, middle, middle - 1))


@triton.jit
def _before(SCORES, LIST, listed, N, most, temperature, least, cut, place, BN: tl.constexpr, STEP: tl.constexpr):
    """Of the tokens that may be drawn: the weight of those surely likelier than one, and of all that may be so.

    The host orders weights after rounding, which can make those of different logits equal.
    """
    chosen = (tl.load(SCORES + place) - most) / temperature
    surely, perhaps = tl.zeros([STEP], tl.float32), tl.zeros([STEP], tl.float32)
    for start in range(0, listed, STEP // BN):
        logits, columns = _step(SCORES, LIST, start, listed, N, BN, STEP)
        log_weights = (logits - most) / temperature
        weights = tl.where((logits >= least) & (log_weights >= cut), tl.exp(log_weights), 0.0)
        surely += tl.where(log_weights > chosen + _SLACK, weights, 0.0)
        perhaps += tl.where((log_weights > chosen - _SLACK) & (columns != place), weights, 0.0)
    return tl.sum(surely, 0), tl.sum(perhaps, 0)


@triton.jit
def _race_again(
    SCORES,
    LIST,
    IDS,
    listed,
    N,
    key,
    most,
    temperature,
    least,
    cut,
    above,
    LISTED: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
):
    """Among the tokens that may be drawn above a logit: two least times, and the sum of the weights.

    And how many logits are not below `least`, and the sum of the weights that are too close to the cut. The time of
    such a token is a second one, whether it is kept or not: nothing that wins by less is sure.
    """
    time, place, following, total, kept, close = float("inf"), 0, float("inf"), 0.0, 0, 0.0
    for start in range(0, listed, STEP // BN):
        logits, columns = _step(SCORES, LIST, start, listed, N, BN, STEP)
        tokens = columns
        if LISTED:
            tokens = tl.load(IDS + columns, mask=columns < N, other=0)
        log_weights = (logits - most) / temperature
        is_above = (logits >= least) & (logits > above)
        is_kept, is_close = is_above & (log_weights >= cut), is_above & (tl.abs(log_weights - cut) < _SLACK)
        weights = tl.exp(log_weights)
        total += tl.sum(tl.where(is_kept, weights, 0.0), 0)
        kept += tl.sum((logits >= least).to(tl.int32), 0)
        close += tl.sum(tl.where(is_close, weights, 0.0), 0)
        times = log_times(key, tokens, log_weights)
        one, column, two = two_least(tl.where(is_kept, times, float("inf")), columns)
        two = tl.minimum(two, tl.min(tl.where(is_close, times, float("inf")), 0))
        following = tl.minimum(tl.maximum(time, one), tl.minimum(following, two))
        place = tl.where(one < time, column, place)
        time = tl.minimum(time, one)
    return time, place, following, total, kept, close


@triton.jit
def _race(
    LOGITS,
    BEST,
    IDS,
    HOW,
    POSITIONS,
    SUMS,
    TIMES,
    SECONDS,
    WINNERS,
    N,
    blocks,
    chunks,
    AHEAD: tl.constexpr,
    LISTED: tl.constexpr,
    BB: tl.constexpr,
    CHUNK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    release(OVERLAPS)
    row, chunk = tl.program_id(0), tl.program_id(1)
    number = tl.arange(0, BB)
    most = tl.max(tl.load(BEST + row * blocks + number, mask=number < blocks, other=float("-inf")), 0)
    columns = chunk * CHUNK + tl.arange(0, CHUNK)
    logits = tl.load(LOGITS + row.to(tl.int64) * N + columns, mask=columns < N, other=float("-inf"))
    tokens = columns
    if LISTED:
        tokens = tl.load(IDS + columns, mask=columns < N, other=0)
    log_weights = (logits - most) / temperature_of(HOW, row)
    times = log_times(random_key(HOW, row, tl.load(POSITIONS + row) + AHEAD), tokens, log_weights)
    time, column, following = two_least(times, columns)
    place = row * chunks + chunk
    tl.store(SUMS + place, tl.sum(tl.exp(log_weights), 0))
    tl.store(TIMES + place, time)
    tl.store(SECONDS + place, following)
    tl.store(WINNERS + place, column)


@triton.jit
def _settle(
    LOGITS,
    BEST,
    LIST,
    IDS,
    HOW,
    POSITIONS,
    SUMS,
    TIMES,
    SECONDS,
    WINNERS,
    TOKENS,
    CODES,
    N,
    blocks,
    chunks,
    AHEAD: tl.constexpr,
    LISTED: tl.constexpr,
    BB: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    release(OVERLAPS)
    row = tl.program_id(0)
    SCORES = LOGITS + row.to(tl.int64) * N
    LIST += row * blocks
    temperature, key = temperature_of(HOW, row), random_key(HOW, row, tl.load(POSITIONS + row) + AHEAD)
    top_p, min_p, top_k = kept_of(HOW, row)
    number = tl.arange(0, BB)
    best = tl.load(BEST + row * blocks + number, mask=number < blocks, other=float("-inf"))
    most = tl.max(best, 0)
    chunk = tl.arange(0, BC)
    is_chunk, of_chunk = chunk < chunks, row * chunks + chunk
    total = tl.sum(tl.load(SUMS + of_chunk, mask=is_chunk, other=0.0), 0)
    times = tl.load(TIMES + of_chunk, mask=is_chunk, other=float("inf"))
    time, winner, following = two_least(times, chunk)
    # A time that is no number is equal to none.
    winner = tl.minimum(winner, chunks - 1)
    place = tl.minimum(tl.load(WINNERS + row * chunks + winner), N - 1)
    seconds = tl.load(SECONDS + of_chunk, mask=is_chunk, other=float("inf"))
    following = tl.minimum(following, tl.min(seconds, 0))
    is_top_k, is_min_p = (top_k > 0) & (top_k < N), min_p > 0
    least, cut = tl.full([], float("-inf"), tl.float32), tl.full([], _NO_CUT, tl.float32)
    is_sure, close = time == time, tl.full([], 0.0, tl.float32)
    if is_top_k | is_min_p | (top_p < 1):
        # The blocks with all that may be drawn; without top-k and min-p, with all that may be before the winner.
        lowest = tl.load(SCORES + place) - 2 * _SLACK * temperature
        if is_min_p:
            cut = tl.log(tl.maximum(min_p, _LEAST_CHANCE))
            lowest = most + temperature * (cut - 2 * _SLACK) - 1e-6 * tl.abs(most)
        if is_top_k:
            # As many blocks have a maximum of at least this.
            low, high = tl.full([], _LEAST_KEY, tl.int64), _key_of(most)
            while low < high:
                middle = low + (high - low + 1) // 2
                count = tl.sum((best >= _float_of(middle)).to(tl.int32), 0)
                low, high = _narrowed(low, high, middle, count, top_k)
            lowest = _float_of(low)
        is_listed = (best >= lowest) & (number < blocks)
        listed = tl.sum(is_listed.to(tl.int32), 0)
        tl.store(LIST + tl.cumsum(is_listed.to(tl.int32), 0) - 1, number, mask=is_listed)
        tl.debug_barrier()
        if is_top_k:
            low, high = _key_of(lowest), _key_of(most)
            while low < high:
                middle = low + (high - low + 1) // 2
                count = _count(SCORES, LIST, listed, N, _float_of(middle), BN, STEP)
                low, high = _narrowed(low, high, middle, count, top_k)
            least = _float_of(low)
        if is_top_k | is_min_p:
            above = float("-inf")
            time, place, following, total, kept, close = _race_again(
                SCORES, LIST, IDS, listed, N, key, most, temperature, least, cut, above, LISTED, BN, STEP
            )
            # Which of equal logits is kept is the host's choice.
            is_sure = is_sure & ((kept == top_k) | (is_top_k == 0))
        left = (top_p < 1).to(tl.int32)
        while left > 0:
            surely, perhaps = _before(SCORES, LIST, listed, N, most, temperature, least, cut, place, BN, STEP)
            # There is one above it then, so that this ends whatever the logits are.
            left = ((surely > 0) & (surely >= top_p * (total + close) * (1 + _SLACK))).to(tl.int32)
            if left > 0:
                chosen = tl.load(SCORES + place)
                time, place, following, _, _, _ = _race_again(
                    SCORES, LIST, IDS, listed, N, key, most, temperature, least, cut, chosen, LISTED, BN, STEP
                )
            else:
                is_sure = is_sure & (perhaps < top_p * (total - close) * (1 - _SLACK))
    is_sure = is_sure & (following > time + _SLACK)
    token = place
    if LISTED:
        token = tl.load(IDS + place)
    tl.store(TOKENS + row, token)
    tl.store(CODES + row, tl.where(is_sure, token, -1 - token))


@triton.jit
def _expect(LIKELY, HOW, STATE, FOLLOWING, TOKEN, level, W: tl.constexpr, BW: tl.constexpr, OVERLAPS: tl.constexpr):
    wait(OVERLAPS)
    release(OVERLAPS)
    lanes = tl.arange(0, BW)
    tokens = tl.load(LIKELY + lanes, mask=lanes < W, other=-1.0).to(tl.int32)
    chances = tl.load(LIKELY + W + lanes, mask=lanes < W, other=0.0)
    temperature, key = temperature_of(HOW, 0), random_key(HOW, 0, tl.load(STATE) + tl.load(STATE + 1) + 1 + level)
    top_p, min_p, top_k = kept_of(HOW, 0)
    log_weights = (
        tl.log(tl.maximum(chances, _LEAST_CHANCE) / tl.maximum(tl.max(chances, 0), _LEAST_CHANCE)) / temperature
    )
    is_likely = (log_weights >= tl.log(tl.maximum(min_p, _LEAST_CHANCE))) & ((lanes < top_k) | (top_k == 0))
    is_kept = (tokens >= 0) & is_likely
    weights = tl.where(is_kept, tl.exp(log_weights), 0.0)
    is_kept = is_kept & (tl.cumsum(weights, 0) - weights < top_p * tl.sum(weights, 0))
    times = tl.where(is_kept, log_times(key, tokens, log_weights), float("inf"))
    place = tl.min(tl.where(is_kept & (times == tl.min(times, 0)), lanes, BW), 0)
    token = tl.max(tl.where(lanes == place, tokens, -1), 0)
    tl.store(FOLLOWING, token.to(tl.float32))
    tl.store(TOKEN, tl.maximum(token, 0))


def expect(likely: Tensor, how: Tensor, state: Tensor, level: int, following: Tensor, token: Tensor) -> None:
    """The token that `race` (decode/sampling.py) is likely to put first of a head's candidates.

    A draft that was made for another one is of no use, and that is all.

    Args:
        likely: the tokens of the candidates, and then their probabilities.
        how: `sampling_numbers`.
        state: where the head goes on (chains.py).
        level: of the draft step, from 0 on.
        following: the token, -1 if there is no candidate.
        token: of the next row.
    """
    width = len(likely) // 2
    block = triton.next_power_of_2(width)
    _expect[(1,)](likely, how, state, following, token, level, width, block, **overlap(how), num_warps=1)


def draw(
    states_RH: Tensor,
    weight: Matrix,
    ids_N: Tensor | None,
    memory: DrawMemory,
    how: Tensor,
    positions_M: Tensor,
    ahead: int,
    tokens_M: Tensor,
    codes_M: Tensor,
) -> None:
    """The token drawn after each row; in `codes_M` -1 - token where rounding could make it another one.

    Args:
        ids_N: the tokens that are scored; None is all of them.
        how: `sampling_numbers` of each row.
        ahead: how far after a row's position its draw is.
    """
    scores, drawn = memory.scores, len(tokens_M)
    count, blocks, chunks = scores.logits_RN.shape[1], scores.best.shape[1], memory.sums.shape[1]
    block_scores(states_RH, weight, ids_N, scores, drawn)
    ids, listed, block = how if ids_N is None else ids_N, ids_N is not None, triton.next_power_of_2(blocks)
    found = memory.sums, memory.times, memory.seconds, memory.winners
    _race[(drawn, chunks)](
        scores.logits_RN, scores.best, ids, how, positions_M, *found, count, blocks, chunks, ahead, listed, block,
        _CHUNK, **overlap(how),
    )  # fmt: skip
    _settle[(drawn,)](
        scores.logits_RN, scores.best, scores.places, ids, how, positions_M, *found, tokens_M, codes_M,
        count, blocks, chunks, ahead, listed, block, triton.next_power_of_2(chunks), BLOCK, _STEP,
        **overlap(how), num_warps=8,
    )  # fmt: skip
