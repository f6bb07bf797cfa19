"""Muon (https://kellerjordan.github.io/posts/muon/), with the learning rate of AdamW (arXiv 2502.16982)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTUM = 0.95
# Coefficients of the odd polynomial that each iteration applies to the singular values; steep at zero.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7


class Muon(Optimizer):
    """`torch.optim.Muon` with "match_rms_adamw", orthogonalising in a dtype of the caller's choice.

    PyTorch's always takes bfloat16, which a CPU without bfloat16 instructions multiplies fifty times slower than
    float32.
    """

    def __init__(
        self, matrices: Iterable[nn.Parameter], *, lr: float, weight_decay: float, dtype: torch.dtype
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate = group["lr"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonalized(matrix.grad.lerp(momentum, MOMENTUM).to(self._dtype))
                matrix.mul_(1 - rate * group["weight_decay"])
                matrix.add_(update, alpha=-0.2 * max(matrix.shape) ** 0.5 * rate)


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U V^T for a matrix U S V^T, by Newton-Schulz iteration; its singular values are from 0.5 to 1.5."""
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    a, b, c = COEFFICIENTS
    wide = wide / wide.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide
