"""Muon (https://kellerjordan.github.io/posts/muon/), with the learning rate of AdamW (arXiv 2502.16982)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
        together: int = 0,
    ) -> None:
        """
        Args:
            together: numbers, at most, of matrices that are orthogonalised at once.
        """
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self._dtype, self._together = dtype, together

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate = group["lr"]
            for matrices in alike([one for one in group["params"] if one.grad is not None], self._together):
                updates = orthogonalized([self._direction(matrix) for matrix in matrices])
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.mul_(1 - rate * group["weight_decay"])
                    matrix.add_(update, alpha=-0.2 * max(matrix.shape) ** 0.5 * rate)

    def _direction(self, matrix: nn.Parameter) -> Tensor:
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - MOMENTUM)
        return matrix.grad.lerp(momentum, MOMENTUM).to(self._dtype)


def alike(matrices: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Groups of one shape, or its transpose, with at most so many numbers each; larger matrices are alone."""
    groups: list[list[nn.Parameter]] = []
    for matrix in sorted(matrices, key=lambda one: sorted(one.shape)):
        last = groups[-1] if groups else []
        fits = (len(last) + 1) * matrix.numel() <= most
        if last and fits and sorted(last[0].shape) == sorted(matrix.shape):
            last.append(matrix)
        else:
            groups.append([matrix])
    return groups


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """About U V^T for each matrix U S V^T, by Newton-Schulz iteration; its singular values are from 0.5 to 1.5."""
    wides = [matrix.T if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
    is_one = len(wides) == 1
    wide, multiply_add = (wides[0], torch.addmm) if is_one else (torch.stack(wides), torch.baddbmm)
    a, b, c = COEFFICIENTS
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = multiply_add(wide, multiply_add(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    found = [wide] if is_one else wide.unbind()
    return [
        own.T if matrix.shape[0] > matrix.shape[1] else own for own, matrix in zip(found, matrices, strict=True)
    ]
