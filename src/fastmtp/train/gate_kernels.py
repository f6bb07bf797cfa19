"""Triton: the gate of a head's feed-forward network, forward and backward.

Shapes: N rows, I inner.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fastmtp.engines.torch.slot_kernels import gate_slots

# Columns of one program.
_COLUMNS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _gate_backward(  # type: ignore[no-untyped-def]
    joint, upstream, found, INNER: tl.constexpr, GELU: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program for a row and some columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = columns < INNER
    own = row * 2 * INNER + columns
    gate = tl.load(joint + own, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(joint + own + INNER, mask=is_column, other=0.0).to(tl.float32)
    slope = tl.load(upstream + row * INNER + columns, mask=is_column, other=0.0).to(tl.float32)
    inner = gate
    inner_slope = 1.0
    if GELU:
        # As `_gate` of slot_kernels.py.
        inner = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        inner_slope = 1.5957691216057308 * (1 + 3 * 0.044715 * gate * gate)
    chance = tl.sigmoid(inner)
    gate_slope = slope * up * chance * (1 + gate * (1 - chance) * inner_slope)
    tl.store(found + own, gate_slope.to(found.dtype.element_ty), mask=is_column)
    tl.store(found + own + INNER, (slope * gate * chance).to(found.dtype.element_ty), mask=is_column)


class _Gate(Function):
    """activation(gate) * up of [N, 2 I]."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(joint)
        ctx.gelu = gelu
        return gate_slots(joint, gelu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_NI: Tensor) -> tuple[Tensor, None]:
        (joint,) = ctx.saved_tensors
        assert upstream_NI.is_contiguous()
        rows, inner = upstream_NI.shape
        found = torch.empty_like(joint)
        _gate_backward[(rows, triton.cdiv(inner, _COLUMNS))](joint, upstream_NI, found, inner, ctx.gelu, _COLUMNS)
        return found, None


def gate(joint: Tensor, gelu: bool) -> Tensor:
    """As `HeadParts` says."""
    found: Tensor = _Gate.apply(joint, gelu)  # type: ignore[no-untyped-call]
    return found
