"""How well stated probabilities fit what came true, and the line that makes them fit: pure functions.

Shapes: N statements. Platt scaling: the logit of what was said, times a scale, plus a shift (Platt 1999); expected
calibration error in bins of equal width (Guo et al., arXiv 1706.04599).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from fastmtp.models.calibration import AS_SAID, EDGE, Line

BINS = 10


@dataclass(frozen=True)
class Statements:
    """What was said of each draft [N], what came of it [N], from 0 to 1, and what it counts for [N]; float64."""

    said_N: Tensor
    came_N: Tensor
    weight_N: Tensor

    @classmethod
    def joined(cls, parts: Iterable[Statements]) -> Statements:
        none_N = torch.empty(0, dtype=torch.float64)
        columns = [(none_N, none_N, none_N), *((part.said_N, part.came_N, part.weight_N) for part in parts)]
        return cls(*map(torch.cat, zip(*columns, strict=True)))

    @property
    def weight(self) -> float:
        return float(self.weight_N.sum())


@dataclass(frozen=True)
class Bin:
    """Of the statements in a range: how much they count, their mean, and the share that came true."""

    weight: float
    said: float
    came: float


def fit_line(statements: Statements) -> Line:
    """The likeliest line.

    A normal law of unit width around AS_SAID goes before the data, worth about one statement: without it statements
    that are told apart perfectly would have no likeliest line.
    """
    logits_N = _logits(statements.said_N)
    start_2 = torch.tensor(AS_SAID, dtype=torch.float64)
    line_2 = start_2.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([line_2], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        negative = binary_cross_entropy_with_logits(
            line_2[0] * logits_N + line_2[1], statements.came_N, statements.weight_N, reduction="sum"
        )
        total: Tensor = (negative + (line_2 - start_2).square().sum() / 2) / (1 + statements.weight)
        total.backward()  # type: ignore[no-untyped-call]
        return total

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    scale, shift = line_2.tolist()
    return scale, shift


def log_loss(line: Line, statements: Statements) -> float:
    """Mean cross-entropy of what came true under what was said, in nats."""
    logits_N = line[0] * _logits(statements.said_N) + line[1]
    total = binary_cross_entropy_with_logits(logits_N, statements.came_N, statements.weight_N, reduction="sum")
    return float(total) / statements.weight


def curve(line: Line, statements: Statements) -> list[Bin]:
    """The reliability curve in BINS ranges of equal width; one that is empty has zeros."""
    said_N = (line[0] * _logits(statements.said_N) + line[1]).sigmoid()
    place_N = (said_N * BINS).long().clamp(max=BINS - 1)

    def sums(value_N: Tensor) -> Tensor:
        return torch.zeros(BINS, dtype=torch.float64).index_add(0, place_N, statements.weight_N * value_N)

    weight_B = sums(torch.ones_like(said_N))
    columns = (weight_B, *(sums(value_N) / weight_B.clamp(min=1e-12) for value_N in (said_N, statements.came_N)))
    return [Bin(*values) for values in cast("list[list[float]]", torch.stack(columns, 1).tolist())]


def calibration_error(bins: Iterable[Bin]) -> float:
    """The mean distance between what a bin said and what came true in it."""
    listed = list(bins)
    return sum(one.weight * abs(one.said - one.came) for one in listed) / sum(one.weight for one in listed)


def _logits(said_N: Tensor) -> Tensor:
    return said_N.clamp(EDGE, 1 - EDGE).logit()
