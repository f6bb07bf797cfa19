"""Our Muon is PyTorch's, in an arithmetic that can be chosen."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from fastmtp.train.muon import Muon, groups_of, orthogonalized

SHAPES = [(8, 24), (24, 8), (16, 16)]


def trained(optimizer: Optimizer, matrices: list[nn.Parameter]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return matrices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_are_those_of_pytorch(dtype: torch.dtype) -> None:
    """In bfloat16 bit for bit, in float32 but for bfloat16's rounding."""
    torch.manual_seed(0)
    start = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    ours, theirs = deepcopy(start), deepcopy(start)
    trained(Muon(ours, lr=0.02, weight_decay=0.1, dtype=dtype), ours)
    trained(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs)
    for before, mine, other in zip(start, ours, theirs, strict=True):
        moved = (other - before).norm()
        assert (mine - other).norm() <= (0 if dtype == torch.bfloat16 else 0.02 * moved)
        assert moved > 0.01 * before.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalized_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    """All singular values come near one, and U and V stay: U^T X V is diagonal."""
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    given = matrix.clone()
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ orthogonalized([matrix], torch.float32)[0] @ vh.T
    assert torch.equal(matrix, given)
    assert values.diagonal().min() > 0.3 and values.diagonal().max() < 1.5
    assert (values - values.diagonal().diag()).abs().max() < 1e-4


@pytest.mark.parametrize("most", [3 * 8 * 24, 4 * 16 * 24, 1 << 20])
def test_together_is_one_by_one(most: int) -> None:
    """Matrices of one shape, of its transpose, and of others, with zeros around the smaller ones."""
    torch.manual_seed(0)
    start = [nn.Parameter(torch.randn(shape)) for shape in [*SHAPES, (24, 8), (8, 24), (16, 16)]]
    alone, together = deepcopy(start), deepcopy(start)
    trained(Muon(alone, lr=0.02, weight_decay=0.1, dtype=torch.float32), alone)
    trained(Muon(together, lr=0.02, weight_decay=0.1, dtype=torch.float32, together=most), together)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_groups_are_as_large_as_their_stack_may_be() -> None:
    matrices = [nn.Parameter(torch.zeros(shape)) for shape in [*SHAPES, (24, 8), (8, 24), (16, 16)]]

    def grouped(most: int) -> list[list[tuple[int, ...]]]:
        return [[tuple(one.shape) for one in group] for group in groups_of(matrices, most)]

    narrow, square = [(8, 24), (24, 8), (24, 8), (8, 24)], [(16, 16), (16, 16)]
    assert grouped(0) == [[shape] for shape in narrow + square]
    assert grouped(3 * 8 * 24) == [narrow[:3], narrow[3:], square]
    assert grouped(6 * 16 * 24 - 1) == [narrow + square[:1], square[1:]]
    assert grouped(6 * 16 * 24) == [narrow + square]
