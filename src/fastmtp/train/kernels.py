"""Triton kernels of the objective. `TRITON_INTERPRET=1`, set before the import, runs them on a CPU.

Shapes: N positions, R reference positions, D draft vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmtp.method.losses import FLOOR

_BLOCK, _WARPS = 8192, 16


@triton.jit  # type: ignore[untyped-decorator]
def _kl_kernel(  # type: ignore[no-untyped-def]
    LOGITS,
    REFERENCE,
    AT,
    LOSS,
    columns,
    LOWEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program is a row: the normalisers of both distributions first, then loss and gradient."""
    row = tl.program_id(0).to(tl.int64)
    q_row = LOGITS + row * columns
    p_row = REFERENCE + tl.load(AT + row) * columns
    q_top = -float("inf")
    p_top = -float("inf")
    q_sum = 0.0
    p_sum = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        q = tl.load(q_row + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        p = tl.load(p_row + column, mask=column < columns, other=-float("inf")).to(tl.float32)
        q_higher = tl.maximum(q_top, tl.max(q, 0))
        p_higher = tl.maximum(p_top, tl.max(p, 0))
        q_sum = q_sum * tl.exp(q_top - q_higher) + tl.sum(tl.exp(q - q_higher), 0)
        p_sum = p_sum * tl.exp(p_top - p_higher) + tl.sum(tl.exp(p - p_higher), 0)
        q_top = q_higher
        p_top = p_higher
    q_log_sum = q_top + tl.log(q_sum)
    p_log_sum = p_top + tl.log(p_sum)
    loss = 0.0
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < columns
        q = tl.load(q_row + column, mask=inside, other=0.0).to(tl.float32)
        p = tl.load(p_row + column, mask=inside, other=0.0).to(tl.float32)
        log_q = tl.maximum(q - q_log_sum, LOWEST)
        log_p = tl.maximum(p - p_log_sum, LOWEST)
        chance = tl.exp(log_p)
        loss += tl.sum(tl.where(inside, chance * (log_p - log_q), 0.0), 0)
        tl.store(q_row + column, (tl.exp(log_q) - chance).to(LOGITS.dtype.element_ty), mask=inside)
    tl.store(LOSS + row, loss)


def fused_kl_(logits_ND: Tensor, reference_RD: Tensor, at_N: Tensor) -> tuple[Tensor, Tensor]:
    """`kl_loss` in one kernel: the loss [N], and its gradient, which replaces the logits.

    Args:
        reference_RD: the target's logits.
        at_N: which of their rows each position is compared with.
    """
    assert logits_ND.is_contiguous() and reference_RD.is_contiguous()
    count, columns = logits_ND.shape
    loss_N = torch.empty(count, dtype=torch.float32, device=logits_ND.device)
    if count:
        block = min(_BLOCK, triton.next_power_of_2(columns))
        arguments = (logits_ND, reference_RD, at_N, loss_N, columns, FLOOR, block)
        _kl_kernel[(count,)](*arguments, num_warps=_WARPS)
    return loss_N, logits_ND
