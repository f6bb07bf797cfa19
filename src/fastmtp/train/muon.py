"""Muon (https://kellerjordan.github.io/posts/muon/), with the learning rate of AdamW (arXiv 2502.16982)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import cast

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
            together: numbers, at most, of a stack of matrices that are orthogonalised at once.
        """
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self._dtype, self._together = dtype, together

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rate, decay = group["lr"], group["weight_decay"]
            for matrices in groups_of([one for one in group["params"] if one.grad is not None], self._together):
                updates = orthogonalized(self._directions(matrices), self._dtype)
                if decay:
                    torch._foreach_mul_([*matrices], 1 - rate * decay)
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.add_(update, alpha=-0.2 * max(matrix.shape) ** 0.5 * rate)

    def _directions(self, matrices: list[nn.Parameter]) -> tuple[Tensor, ...]:
        for state, matrix in ((self.state[matrix], matrix) for matrix in matrices):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(matrix)
        momenta = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        gradients = [cast(Tensor, matrix.grad) for matrix in matrices]
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        return torch._foreach_lerp(gradients, momenta, MOMENTUM)


def groups_of(matrices: Sequence[nn.Parameter], most: int) -> list[list[nn.Parameter]]:
    """Groups of similar shapes, whose stacks have at most so many numbers; larger matrices are alone."""
    groups: list[list[nn.Parameter]] = []
    for matrix in sorted(matrices, key=lambda one: sorted(one.shape)):
        joined = [*(groups[-1] if groups else []), matrix]
        if len(joined) > 1 and prod(_stack_shape(joined)) <= most:
            groups[-1] = joined
        else:
            groups.append([matrix])
    return groups


def orthogonalized(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """About U V^T for each matrix U S V^T, by Newton-Schulz iteration; its singular values are from 0.5 to 1.5.

    Args:
        dtype: of the arithmetic, and of what is returned.
    """
    wides = [_wide(matrix) for matrix in matrices]
    is_one = len(wides) == 1
    multiply_add = torch.addmm if is_one else torch.baddbmm
    wide = wides[0].to(dtype) if is_one else _stacked(wides, dtype)
    a, b, c = COEFFICIENTS
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = multiply_add(wide, multiply_add(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    found = [wide] if is_one else _parts(wide, wides)
    return [own.T if len(own) < len(matrix) else own for own, matrix in zip(found, matrices, strict=True)]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _stack_shape(matrices: Sequence[Tensor]) -> tuple[int, int, int]:
    shapes = [_wide(matrix).shape for matrix in matrices]
    return len(shapes), max(rows for rows, _ in shapes), max(columns for _, columns in shapes)


def _stacked(wides: list[Tensor], dtype: torch.dtype) -> Tensor:
    """As one, with zeros around the smaller ones, which the iteration leaves as they are."""
    stack = torch.zeros(_stack_shape(wides), dtype=dtype, device=wides[0].device)
    torch._foreach_copy_(_parts(stack, wides), wides)
    return stack


def _parts(stack: Tensor, wides: Sequence[Tensor]) -> list[Tensor]:
    return [part[: wide.shape[0], : wide.shape[1]] for part, wide in zip(stack, wides, strict=True)]
