"""What a head does between its matrix products: in plain PyTorch, or on a GPU in kernels of Triton.

Shapes: N rows, H hidden, B texts, T tokens of each, Q query heads, K key/value heads, G = Q / K, D size of a head,
J = Q + 2 K heads that are computed together, I inner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fastmtp.extras import has_triton
from fastmtp.train.pace import Pace


class Gains(NamedTuple):
    """Of an RMSNorm; in float32, as it computes."""

    gains_H: Tensor
    epsilon: float


# Of queries and keys.
HeadNorms = tuple[Gains, Gains]


class Rotation(Protocol):
    """Norms and rotates queries and keys: [B, K, G, T, D] and [B, K, T, D], and values [B, K, T, D]."""

    def __call__(
        self,
        joint_NJD: Tensor,
        norms: HeadNorms | None,
        key_heads: int,
        cosines_TD: Tensor,
        sines_TD: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class HeadParts:
    """All are differentiable; norms give a dtype of the caller's choice.

    Attributes:
        join: the norms of two inputs side by side, [N, 2 H].
        add_norm: the sum of two inputs, and its norm.
        gate: activation(gate) * up of [N, 2 I], of SiLU or of GELU by tanh.
    """

    join: Callable[[Tensor, Tensor, tuple[Gains, Gains], torch.dtype], Tensor]
    norm: Callable[[Tensor, Gains, torch.dtype], Tensor]
    add_norm: Callable[[Tensor, Tensor, Gains, torch.dtype], tuple[Tensor, Tensor]]
    rotate: Rotation
    gate: Callable[[Tensor, bool], Tensor]


def head_parts(pace: Pace) -> HeadParts:
    """Those for a device."""
    if pace.fused and has_triton():
        from fastmtp.train.gate_kernels import gate
        from fastmtp.train.norm_kernels import add_norm, join, norm
        from fastmtp.train.rotation_kernels import rotate

        return HeadParts(join, norm, add_norm, rotate, gate)
    return PLAIN


def _join(left_NH: Tensor, right_NH: Tensor, norms: tuple[Gains, Gains], dtype: torch.dtype) -> Tensor:
    return torch.cat([_norm(left_NH, norms[0], dtype), _norm(right_NH, norms[1], dtype)], 1)


def _norm(given: Tensor, by: Gains, dtype: torch.dtype) -> Tensor:
    return nn.functional.rms_norm(given.float(), by.gains_H.shape, by.gains_H, by.epsilon).to(dtype)


def _add_norm(hidden_NH: Tensor, added_NH: Tensor, by: Gains, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    total_NH = hidden_NH + added_NH
    return total_NH, _norm(total_NH, by, dtype)


def _rotate(
    joint_NJD: Tensor, norms: HeadNorms | None, key_heads: int, cosines_TD: Tensor, sines_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    joint = joint_NJD.view(-1, len(cosines_TD), *joint_NJD.shape[1:]).transpose(1, 2)
    turned, values = joint[:, :-key_heads], joint[:, -key_heads:]
    if norms is not None:
        both = turned[:, :-key_heads], turned[:, -key_heads:]
        turned = torch.cat([_norm(part, by, part.dtype) for part, by in zip(both, norms, strict=True)], 1)
    first, second = turned.chunk(2, -1)
    turned = turned * cosines_TD + torch.cat([-second, first], -1) * sines_TD
    queries = turned[:, :-key_heads]
    grouped = queries.view(len(queries), key_heads, -1, *queries.shape[2:])
    return grouped, turned[:, -key_heads:], values


def _gate(joint: Tensor, gelu: bool) -> Tensor:
    own, up = joint.chunk(2, -1)
    return (nn.functional.gelu(own, approximate="tanh") if gelu else nn.functional.silu(own)) * up


PLAIN = HeadParts(_join, _norm, _add_norm, _rotate, _gate)
