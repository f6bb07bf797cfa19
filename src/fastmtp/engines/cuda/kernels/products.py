"""Products of a few rows with a matrix of weights.

Shapes: R rows in whole tiles, M of them wanted, N outputs, K inputs, P parts of K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait
from fastmtp.engines.cuda.kernels.shapes import TILE, block, blocks, division
from fastmtp.engines.cuda.kernels.steps import add_step, no_sums, scaled
from fastmtp.engines.cuda.matrices import Matrix

# Rows of several tiles, and two matrices, leave room for fewer.
_STAGES, _FEWER_STAGES = 4, 3


@triton.jit(do_not_specialize=["M"])
def _product(
    X,
    W,
    SCALES,
    OUT,
    R,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    DEPTH: tl.constexpr,
    TILES: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * TILES * 16 + tl.arange(0, 16)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    is_column = columns < N
    wait(OVERLAPS)
    x, places = X + rows[:, None] * K, columns.to(tl.int64)
    totals = no_sums(TILES, BN)
    for step in range(0, DEPTH, BK):
        totals = add_step(x, W, SCALES, rows, places, M, is_column, part * DEPTH + step, totals, K, KIND, BK)
    release(OVERLAPS)
    for tile in tl.static_range(TILES):
        total = scaled(SCALES, columns, is_column, totals[tile], KIND)
        out = OUT + (part * R + tile * 16 + rows[:, None]) * N + columns[None, :]
        tl.store(out, total, mask=is_column[None, :])


@triton.jit(do_not_specialize=["M"])
def _gated(
    X,
    GATE,
    UP,
    GATE_SCALES,
    UP_SCALES,
    GATE_BIAS,
    UP_BIAS,
    OUT,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    KIND: tl.constexpr,
    BIASED: tl.constexpr,
    GELU: tl.constexpr,
    TILES: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * TILES * 16 + tl.arange(0, 16)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    is_column = columns < N
    wait(OVERLAPS)
    x, places = X + rows[:, None] * K, columns.to(tl.int64)
    gates, ups = no_sums(TILES, BN), no_sums(TILES, BN)
    for step in range(0, K, BK):
        gates = add_step(x, GATE, GATE_SCALES, rows, places, M, is_column, step, gates, K, KIND, BK)
        ups = add_step(x, UP, UP_SCALES, rows, places, M, is_column, step, ups, K, KIND, BK)
    release(OVERLAPS)
    for tile in tl.static_range(TILES):
        gate = scaled(GATE_SCALES, columns, is_column, gates[tile], KIND)
        up = scaled(UP_SCALES, columns, is_column, ups[tile], KIND)
        if BIASED:
            gate += tl.load(GATE_BIAS + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
            up += tl.load(UP_BIAS + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        inner = gate
        if GELU:
            # tanh(z) = 2 sigmoid(2 z) - 1, so (1 + tanh(z)) / 2 = sigmoid(2 z).
            inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        found = gate * tl.sigmoid(inner) * up
        out = OUT + (tile * 16 + rows[:, None]) * N + columns[None, :]
        tl.store(out, found.to(OUT.dtype.element_ty), mask=is_column[None, :])


def product(x_RK: Tensor, weight: Matrix, out: Tensor, wanted: int) -> Tensor:
    """The parts [P, R, N] of x Wᵀ in float32, in the memory `out`; their sum in order is the product.

    Args:
        wanted: the first M rows; what the others have is not said.
    """
    (rows, inputs), outputs = x_RK.shape, weight.outputs
    how, own = division(outputs, inputs, weight.bits), block(rows, weight.bits)
    parts_PRN = out[: how.parts * rows * outputs].view(how.parts, rows, outputs)
    grid = (rows // TILE // own.tiles, blocks(outputs, own.columns), how.parts)
    _product[grid](
        x_RK,
        weight.values,
        weight.scales,
        parts_PRN,
        rows,
        wanted,
        outputs,
        inputs,
        weight.code,
        how.depth,
        own.tiles,
        own.columns,
        own.step,
        **overlap(x_RK),
        num_warps=4,
        num_stages=_STAGES if own.tiles == 1 else _FEWER_STAGES,
    )
    return parts_PRN


def gated(
    x_RK: Tensor,
    weights: tuple[Matrix, Matrix],
    biases: tuple[Tensor, Tensor] | None,
    out_RN: Tensor,
    wanted: int,
    *,
    gelu: bool,
) -> None:
    """activation(x Gᵀ + g) (x Uᵀ + u) for the gate's weights [N, K] and those of its partner.

    Args:
        wanted: as for `product`.
    """
    (rows, inputs), outputs = x_RK.shape, out_RN.shape[1]
    gate, up = weights
    own = block(rows, gate.bits, len(weights))
    gate_bias, up_bias = biases or (x_RK, x_RK)
    _gated[(rows // TILE // own.tiles, blocks(outputs, own.columns))](
        x_RK,
        gate.values,
        up.values,
        gate.scales,
        up.scales,
        gate_bias,
        up_bias,
        out_RN,
        wanted,
        outputs,
        inputs,
        gate.code,
        biases is not None,
        gelu,
        own.tiles,
        own.columns,
        own.step,
        **overlap(x_RK),
        num_warps=4,
        num_stages=_FEWER_STAGES,
    )
