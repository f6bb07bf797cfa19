"""Triton: a head's norms, with the sums that they are of, forward and backward.

Shapes: N rows, H hidden, P programs of a backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastmtp.train.head_parts import Gains

# Numbers of the sums of a backward pass, of which each program has some of its own rows.
_SUMS = 1 << 21
# Arguments of which a kernel need not be compiled again.
SIZES = ["rows", "tokens"]


@triton.jit  # type: ignore[untyped-decorator]
def _norm(  # type: ignore[no-untyped-def]
    given, added, gains, total, output, stride, epsilon, H: tl.constexpr, ADDS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program for a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    is_own = columns < H
    x = tl.load(given + row * H + columns, mask=is_own, other=0.0).to(tl.float32)
    if ADDS:
        x += tl.load(added + row * H + columns, mask=is_own, other=0.0).to(tl.float32)
        kept = x.to(total.dtype.element_ty)
        tl.store(total + row * H + columns, kept, mask=is_own)
        # As the next layers read it.
        x = kept.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(x * x, 0) / H + epsilon)
    found = x * scale * tl.load(gains + columns, mask=is_own, other=0.0)
    tl.store(output + row * stride + columns, found.to(output.dtype.element_ty), mask=is_own)


@triton.jit(do_not_specialize=SIZES)  # type: ignore[untyped-decorator]
def _norm_backward(  # type: ignore[no-untyped-def]
    given,
    gains,
    upstream,
    beside,
    found,
    sums,
    rows,
    stride,
    epsilon,
    H: tl.constexpr,
    WANTED: tl.constexpr,
    BESIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program for every P-th row; `beside` is the gradient of the sum that was normed."""
    columns = tl.arange(0, COLUMNS)
    is_own = columns < H
    gain = tl.load(gains + columns, mask=is_own, other=0.0)
    own_sums = tl.zeros([COLUMNS], tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        x = tl.load(given + row * H + columns, mask=is_own, other=0.0).to(tl.float32)
        slope = tl.load(upstream + row * stride + columns, mask=is_own, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(x * x, 0) / H + epsilon)
        x = x * scale
        own_sums += slope * x
        if WANTED:
            slope = slope * gain
            change = scale * (slope - x * (tl.sum(slope * x, 0) / H))
            if BESIDE:
                change += tl.load(beside + row * H + columns, mask=is_own, other=0.0).to(tl.float32)
            tl.store(found + row * H + columns, change.to(found.dtype.element_ty), mask=is_own)
    tl.store(sums + tl.program_id(0) * H + columns, own_sums, mask=is_own)


def _normed(given_NH: Tensor, added_NH: Tensor | None, by: Gains, output: Tensor) -> Tensor:
    """Writes the norm of the given rows into the output's columns; gives back what was normed [N, H]."""
    rows, size = given_NH.shape
    assert given_NH.is_contiguous() and (added_NH is None or added_NH.is_contiguous())
    total_NH = given_NH if added_NH is None else torch.empty_like(added_NH)
    _norm[(rows,)](
        given_NH,
        given_NH if added_NH is None else added_NH,
        by.gains_H,
        total_NH,
        output,
        output.stride(0),
        by.epsilon,
        size,
        added_NH is not None,
        triton.next_power_of_2(size),
        num_warps=_warps(size),
    )
    return total_NH


def _norm_gradients(
    given_NH: Tensor, by: Gains, upstream_NH: Tensor, beside_NH: Tensor | None, wanted: bool
) -> tuple[Tensor | None, Tensor]:
    """By what was normed, if that is wanted, and by the gains."""
    rows, size = given_NH.shape
    assert upstream_NH.stride(1) == 1 and (beside_NH is None or beside_NH.is_contiguous())
    found_NH = torch.empty_like(given_NH) if wanted else None
    programs = min(rows, max(1, _SUMS // triton.next_power_of_2(size)))
    sums_PH = torch.empty(programs, size, dtype=torch.float32, device=given_NH.device)
    _norm_backward[(programs,)](
        given_NH,
        by.gains_H,
        upstream_NH,
        given_NH if beside_NH is None else beside_NH,
        given_NH if found_NH is None else found_NH,
        sums_PH,
        rows,
        upstream_NH.stride(0),
        by.epsilon,
        size,
        wanted,
        beside_NH is not None,
        triton.next_power_of_2(size),
        num_warps=_warps(size),
    )
    return found_NH, sums_PH.sum(0)


def _warps(size: int) -> int:
    return 4 if size <= 2048 else 16


class _Norm(Function):
    """The sum, if there is one, and its norm."""

    @staticmethod
    def forward(
        ctx: Any, given_NH: Tensor, added_NH: Tensor | None, gains_H: Tensor, epsilon: float, dtype: torch.dtype
    ) -> tuple[Tensor | None, Tensor]:
        output_NH = torch.empty_like(given_NH, dtype=dtype)
        total_NH = _normed(given_NH, added_NH, Gains(gains_H, epsilon), output_NH)
        ctx.save_for_backward(total_NH, gains_H)
        ctx.epsilon, ctx.adds = epsilon, added_NH is not None
        ctx.set_materialize_grads(False)
        return (total_NH if ctx.adds else None), output_NH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, beside_NH: Tensor | None, upstream_NH: Tensor) -> tuple[Tensor | None, ...]:
        total_NH, gains_H = ctx.saved_tensors
        by = Gains(gains_H, ctx.epsilon)
        found_NH, sum_H = _norm_gradients(total_NH, by, upstream_NH, beside_NH, ctx.needs_input_grad[0])
        return found_NH, found_NH if ctx.adds else None, sum_H, None, None


class _Join(Function):
    """The norms of two inputs side by side [N, 2 H]."""

    @staticmethod
    def forward(
        ctx: Any,
        left_NH: Tensor,
        right_NH: Tensor,
        left_gains_H: Tensor,
        right_gains_H: Tensor,
        epsilons: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        rows, size = left_NH.shape
        output = torch.empty(rows, 2 * size, dtype=dtype, device=left_NH.device)
        _normed(left_NH, None, Gains(left_gains_H, epsilons[0]), output[:, :size])
        _normed(right_NH, None, Gains(right_gains_H, epsilons[1]), output[:, size:])
        ctx.save_for_backward(left_NH, right_NH, left_gains_H, right_gains_H)
        ctx.epsilons = epsilons
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        left_NH, right_NH, left_gains_H, right_gains_H = ctx.saved_tensors
        size = left_NH.shape[1]
        left, right = Gains(left_gains_H, ctx.epsilons[0]), Gains(right_gains_H, ctx.epsilons[1])
        wants_left, wants_right, *_ = ctx.needs_input_grad
        found_left, sum_left = _norm_gradients(left_NH, left, upstream[:, :size], None, wants_left)
        found_right, sum_right = _norm_gradients(right_NH, right, upstream[:, size:], None, wants_right)
        return found_left, found_right, sum_left, sum_right, None, None


def join(left_NH: Tensor, right_NH: Tensor, norms: tuple[Gains, Gains], dtype: torch.dtype) -> Tensor:
    """As `HeadParts` says."""
    gains, epsilons = zip(*norms, strict=True)
    found: Tensor = _Join.apply(left_NH, right_NH, *gains, epsilons, dtype)  # type: ignore[no-untyped-call]
    return found


def norm(given_NH: Tensor, by: Gains, dtype: torch.dtype) -> Tensor:
    """As `HeadParts` says."""
    found: Tensor = _Norm.apply(given_NH, None, *by, dtype)[1]  # type: ignore[no-untyped-call]
    return found


def add_norm(hidden_NH: Tensor, added_NH: Tensor, by: Gains, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `HeadParts` says."""
    total_NH, normed_NH = _Norm.apply(hidden_NH, added_NH, *by, dtype)  # type: ignore[no-untyped-call]
    return total_NH, normed_NH
