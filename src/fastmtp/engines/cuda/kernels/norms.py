"""What goes into a product: embeddings, the residual stream with its new terms, and RMS norms.

Shapes: R rows in whole tiles, M of them wanted, H hidden, P parts of a product.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait

_WARPS = 16


@triton.jit
def _normed(x, gains, epsilon, H: tl.constexpr):
    return x * (1 / tl.sqrt(tl.sum(x * x, 0) / H + epsilon)) * gains


@triton.jit
def _embed(TOKENS, E, RESIDUAL, scale, H: tl.constexpr, BH: tl.constexpr, OVERLAPS: tl.constexpr):
    wait(OVERLAPS)
    release(OVERLAPS)
    row = tl.program_id(0)
    columns = tl.arange(0, BH)
    is_column = columns < H
    token = tl.load(TOKENS + row).to(tl.int64)
    x = tl.load(E + token * H + columns, mask=is_column, other=0.0).to(tl.float32) * scale
    tl.store(RESIDUAL + row * H + columns, x, mask=is_column)


@triton.jit
def _add_norm(
    PARTS,
    BIAS,
    OUTER,
    RESIDUAL,
    GAINS,
    OUT,
    R,
    epsilon,
    H: tl.constexpr,
    BH: tl.constexpr,
    P: tl.constexpr,
    BIASED: tl.constexpr,
    HAS_OUTER: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row = tl.program_id(0)
    columns = tl.arange(0, BH)
    is_column = columns < H
    # What no kernel writes is on its way while the kernel before ends; then all else at once.
    gains = tl.load(GAINS + columns, mask=is_column, other=0.0)
    if BIASED:
        bias = tl.load(BIAS + columns, mask=is_column, other=0.0).to(tl.float32)
    if HAS_OUTER:
        outer = tl.load(OUTER + columns, mask=is_column, other=0.0)
    wait(OVERLAPS)
    release(OVERLAPS)
    if ADDS:
        residual = tl.load(RESIDUAL + row * H + columns, mask=is_column, other=0.0)
    x = tl.full([BH], 0.0, tl.float32)
    for part in tl.static_range(P):
        x += tl.load(PARTS + (part * R + row) * H + columns, mask=is_column, other=0.0)
    if BIASED:
        x += bias
    if HAS_OUTER:
        x = _normed(x, outer, epsilon, H)
    if ADDS:
        x += residual
    if P > 0:
        tl.store(RESIDUAL + row * H + columns, x, mask=is_column)
    y = _normed(x, gains, epsilon, H)
    tl.store(OUT + row * H + columns, y.to(OUT.dtype.element_ty), mask=is_column)


@triton.jit
def _join(
    STATES,
    TOKENS,
    E,
    STATE_GAINS,
    TOKEN_GAINS,
    OUT,
    scale,
    epsilon,
    H: tl.constexpr,
    BH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait(OVERLAPS)
    release(OVERLAPS)
    row = tl.program_id(0)
    columns = tl.arange(0, BH)
    is_column = columns < H
    state = tl.load(STATES + row * H + columns, mask=is_column, other=0.0).to(tl.float32)
    token = tl.load(TOKENS + row).to(tl.int64)
    embedding = tl.load(E + token * H + columns, mask=is_column, other=0.0).to(tl.float32) * scale
    left = _normed(state, tl.load(STATE_GAINS + columns, mask=is_column, other=0.0), epsilon, H)
    right = _normed(embedding, tl.load(TOKEN_GAINS + columns, mask=is_column, other=0.0), epsilon, H)
    out = OUT + row * 2 * H + columns
    tl.store(out, left.to(OUT.dtype.element_ty), mask=is_column)
    tl.store(out + H, right.to(OUT.dtype.element_ty), mask=is_column)


def embed(tokens_M: Tensor, embedding_VH: Tensor, scale: float, residual_RH: Tensor) -> None:
    """The residual stream before the first layer, in float32."""
    hidden = residual_RH.shape[1]
    _embed[tokens_M.shape](
        tokens_M, embedding_VH, residual_RH, scale, hidden, triton.next_power_of_2(hidden), **overlap(residual_RH)
    )


def add_norm(
    parts_PRH: Tensor | None,
    residual_RH: Tensor,
    gains_H: Tensor,
    out_RH: Tensor,
    epsilon: float,
    count: int,
    *,
    bias_H: Tensor | None = None,
    outer_H: Tensor | None = None,
    adds: bool = True,
) -> None:
    """Add a product to the residual stream, and normalise the sum into `out_RH`.

    Args:
        count: M, how many rows are wanted.
        parts_PRH: of the product; None leaves the residual stream as it is.
        bias_H: of the product.
        outer_H: gains of a norm between the product and the residual stream.
        adds: False: the product alone becomes the residual stream.
    """
    rows, hidden = residual_RH.shape
    _add_norm[(count,)](
        residual_RH if parts_PRH is None else parts_PRH,
        residual_RH if bias_H is None else bias_H,
        residual_RH if outer_H is None else outer_H,
        residual_RH,
        gains_H,
        out_RH,
        rows,
        epsilon,
        hidden,
        triton.next_power_of_2(hidden),
        0 if parts_PRH is None else parts_PRH.shape[0],
        bias_H is not None,
        outer_H is not None,
        adds,
        **overlap(out_RH),
        num_warps=_WARPS,
    )


def join(
    states_RH: Tensor,
    tokens_M: Tensor,
    embedding_VH: Tensor,
    gains: tuple[Tensor, Tensor],
    out_R2H: Tensor,
    scale: float,
    epsilon: float,
) -> None:
    """The head's input [hidden_norm(s), token_norm(e)]; `gains` are those of the two norms."""
    hidden = states_RH.shape[1]
    size = triton.next_power_of_2(hidden)
    _join[tokens_M.shape](
        states_RH, tokens_M, embedding_VH, *gains, out_R2H, scale, epsilon, hidden, size, **overlap(out_R2H)
    )
