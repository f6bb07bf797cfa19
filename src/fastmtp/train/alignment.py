"""Which of the head's states predict which positions; found on the host, where the batch is made.

Positions are aligned by the last token read, t + k for step k of the chain at t: so all steps are compared with one
reference. The states of all steps lie one after the other.

Shapes: B batch, T tokens, S starts of a step's chains, N = B T positions, M states of some positions, K steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Positions that are compared at once.

    Attributes:
        positions_N: which they are.
        pieces: of the states that predict them, those that are scored at once: their rows [M], and which of
            `positions_N` each predicts [M].
    """

    positions_N: Tensor
    pieces: list[tuple[Tensor, Tensor]]


def rows_of(valid_BT: Tensor, starts: Sequence[Tensor]) -> Tensor:
    """The row of the state that predicts each position in each step [K, N]; -1 where it does not count.

    Args:
        starts: of each step's chains [S].
    """
    texts, tokens = valid_BT.shape
    rows_KBT, before = torch.full((len(starts), texts, tokens), -1), 0
    firsts_B1 = torch.arange(texts)[:, None]
    for step, (starts_S, rows_BT) in enumerate(zip(starts, rows_KBT, strict=True), 1):
        inside_S = starts_S[starts_S + step < tokens]
        rows_BT[:, inside_S + step] = before + firsts_B1 * len(starts_S) + torch.arange(len(inside_S))
        before += texts * len(starts_S)
    return rows_KBT.where(valid_BT, -1).flatten(1)


def chunks_of(rows_KN: Tensor, most: int, *, together: bool) -> list[Chunk]:
    """Chunks of so many positions.

    Args:
        together: all steps' states are scored at once, but at most twice as many as positions; otherwise step by
            step.
    """
    found = []
    for positions_N in torch.split(_grouped(rows_KN), most):
        own_KN = rows_KN[:, positions_N]
        steps_M, at_M = (own_KN >= 0).nonzero(as_tuple=True)
        sizes = 2 * most if together else torch.bincount(steps_M).tolist()
        pieces = zip(torch.split(own_KN[steps_M, at_M], sizes), torch.split(at_M, sizes), strict=True)
        found.append(Chunk(positions_N, [(rows_M, where_M) for rows_M, where_M in pieces if len(rows_M)]))
    return found


def _grouped(rows_KN: Tensor) -> Tensor:
    """The positions that count in a step, sorted by these steps, so that most chunks need no masking."""
    powers_K1 = 2 ** torch.arange(len(rows_KN))[:, None]
    kind_N = ((rows_KN >= 0) * powers_K1).sum(0)
    order = kind_N.argsort(stable=True)
    return order[kind_N[order] > 0]
