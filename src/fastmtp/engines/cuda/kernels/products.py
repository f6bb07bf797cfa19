"""Products of a few rows with a matrix of weights.

Shapes: R rows in whole tiles, N outputs, K inputs, P parts of K.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastmtp.engines.cuda.kernels.overlap import overlap, release, wait
from fastmtp.engines.cuda.kernels.shapes import TILE, Division, division

_WARPS, _STAGES, _GATED_STAGES = 4, 4, 3
# The gate's columns of a program, and inputs of a step.
_GATED = 32, 128
# Triton's interpreter has no products of bfloat16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply_add(left, right, total):
    """total + left right, in float32."""
    if _INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


@triton.jit
def _product(
    X,
    W,
    OUT,
    R,
    N: tl.constexpr,
    K: tl.constexpr,
    DEPTH: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    part = tl.program_id(2)
    is_column = columns < N
    wait(OVERLAPS)
    total = tl.full([16, BN], 0.0, tl.float32)
    weights = W + columns.to(tl.int64)[:, None] * K
    for step in range(0, DEPTH, BK):
        inputs = part * DEPTH + step + tl.arange(0, BK)
        is_input = inputs < K
        x = tl.load(X + rows[:, None] * K + inputs[None, :], mask=is_input[None, :], other=0.0)
        w = tl.load(weights + inputs[None, :], mask=is_column[:, None] & is_input[None, :], other=0.0)
        total = multiply_add(x, tl.trans(w), total)
    release(OVERLAPS)
    tl.store(OUT + (part * R + rows[:, None]) * N + columns[None, :], total, mask=is_column[None, :])


@triton.jit
def _gated(
    X,
    GATE,
    UP,
    GATE_BIAS,
    UP_BIAS,
    OUT,
    N: tl.constexpr,
    K: tl.constexpr,
    BIASED: tl.constexpr,
    GELU: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * 16 + tl.arange(0, 16)
    columns = tl.program_id(1) * BN + tl.arange(0, BN)
    is_column = columns < N
    wait(OVERLAPS)
    gate = tl.full([16, BN], 0.0, tl.float32)
    up = tl.full([16, BN], 0.0, tl.float32)
    place = columns.to(tl.int64)[:, None] * K
    for step in range(0, K, BK):
        inputs = step + tl.arange(0, BK)
        is_input = inputs < K
        x = tl.load(X + rows[:, None] * K + inputs[None, :], mask=is_input[None, :], other=0.0)
        mask = is_column[:, None] & is_input[None, :]
        gate = multiply_add(x, tl.trans(tl.load(GATE + place + inputs[None, :], mask=mask, other=0.0)), gate)
        up = multiply_add(x, tl.trans(tl.load(UP + place + inputs[None, :], mask=mask, other=0.0)), up)
    release(OVERLAPS)
    if BIASED:
        gate += tl.load(GATE_BIAS + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
        up += tl.load(UP_BIAS + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    inner = gate
    if GELU:
        # tanh(z) = 2 sigmoid(2 z) - 1, so (1 + tanh(z)) / 2 = sigmoid(2 z).
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    found = gate * tl.sigmoid(inner) * up
    out = OUT + rows[:, None] * N + columns[None, :]
    tl.store(out, found.to(OUT.dtype.element_ty), mask=is_column[None, :])


def product(x_RK: Tensor, weight_NK: Tensor, out: Tensor) -> Tensor:
    """The parts [P, R, N] of x Wᵀ in float32, in the memory `out`; their sum in order is the product."""
    (rows, inputs), outputs = x_RK.shape, weight_NK.shape[0]
    how = division(outputs, inputs)
    parts_PRN = out[: how.parts * rows * outputs].view(how.parts, rows, outputs)
    grid = (rows // TILE, how.programs(outputs), how.parts)
    _product[grid](
        x_RK,
        weight_NK,
        parts_PRN,
        rows,
        outputs,
        inputs,
        how.depth,
        how.columns,
        how.step,
        **overlap(x_RK),
        num_warps=_WARPS,
        num_stages=_STAGES,
    )
    return parts_PRN


def gated(
    x_RK: Tensor,
    weights: tuple[Tensor, Tensor],
    biases: tuple[Tensor, Tensor] | None,
    out_RN: Tensor,
    *,
    gelu: bool,
) -> None:
    """activation(x Gᵀ + g) (x Uᵀ + u) for the gate's weights [N, K] and those of its partner."""
    (rows, inputs), outputs = x_RK.shape, out_RN.shape[1]
    how = Division(*_GATED, inputs, 1)
    gate_bias, up_bias = biases or (x_RK, x_RK)
    _gated[(rows // TILE, how.programs(outputs))](
        x_RK,
        *weights,
        gate_bias,
        up_bias,
        out_RN,
        outputs,
        inputs,
        biases is not None,
        gelu,
        how.columns,
        how.step,
        **overlap(x_RK),
        num_warps=_WARPS,
        num_stages=_GATED_STAGES,
    )
