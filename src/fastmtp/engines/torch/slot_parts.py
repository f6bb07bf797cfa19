"""What layers do between their matrix products, in plain PyTorch, or on a GPU in kernels.

Shapes: S slots, L room for tokens, B texts, T tokens of each, N rows, Q query heads, K key/value heads, D size of a
head, H hidden; J = Q + 2 K heads that are computed together, G = 2 I columns of the gate and its partner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from fastmtp.engines.torch.slot_attention import (
    ChunkAttention,
    StepAttention,
    attend_chunks_by_mask,
    attend_slots_by_mask,
)
from fastmtp.models.layers import norm_epsilon, norm_offset


class Norm:
    """An RMSNorm of transformers, in fewer kernels where its gains are its weights.

    Attributes:
        gains: in float32.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module, offset = module, norm_offset(module)
        self._is_plain = offset == 0
        self._weight = cast(Tensor, module.weight)
        self.gains = self._weight.detach().float() + offset
        self.epsilon = norm_epsilon(module)

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._is_plain:
            return nn.functional.rms_norm(hidden, self._weight.shape, self._weight, self.epsilon)
        return cast(Tensor, self._module(hidden))


# Of queries and keys.
HeadNorms = tuple[Norm, Norm]


class StepPlacement(Protocol):
    """Norms and rotates each slot's queries and keys, and writes keys and values at its position.

    Returns the queries [S, Q, D].
    """

    def __call__(
        self,
        joint_SJD: Tensor,
        norms: HeadNorms | None,
        cosines_LD: Tensor,
        sines_LD: Tensor,
        positions_S: Tensor,
        keys_SKLD: Tensor,
        values_SKLD: Tensor,
    ) -> Tensor: ...


class TextRotation(Protocol):
    """Norms and rotates the queries and keys of whole texts, whose rows lie one text after the other, N = B T.

    Returns queries [N, Q, D], keys [N, K, D] and values [N, K, D].
    """

    def __call__(
        self,
        joint_NJD: Tensor,
        norms: HeadNorms | None,
        key_heads: int,
        cosines_TD: Tensor,
        sines_TD: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True)
class LayerParts:
    """
    Attributes:
        add_norm: hidden + added, `added` normed before if there is a norm for it; and that normed by the last one.
        gate: activation(gate) * up, of SiLU or of GELU by tanh.
    """

    rotate: TextRotation
    place: StepPlacement
    attend: StepAttention
    attend_chunks: ChunkAttention
    add_norm: Callable[[Tensor, Tensor, Norm | None, Norm], tuple[Tensor, Tensor]]
    gate: Callable[[Tensor, bool], Tensor]


def layer_parts(device: torch.device) -> LayerParts:
    """Those for a device."""
    if device.type != "cpu":
        from fastmtp.engines.torch.chunk_kernels import attend_chunks
        from fastmtp.engines.torch.slot_kernels import add_norm_slots, attend_slots, gate_slots, place_slots
        from fastmtp.engines.torch.text_kernels import rotate_texts

        return LayerParts(rotate_texts, place_slots, attend_slots, attend_chunks, add_norm_slots, gate_slots)
    return PLAIN


def rotate_by_repeating(
    joint_NJD: Tensor, norms: HeadNorms | None, key_heads: int, cosines_TD: Tensor, sines_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`TextRotation`."""
    texts = len(joint_NJD) // len(cosines_TD)
    return rotated(joint_NJD, norms, key_heads, cosines_TD.repeat(texts, 1), sines_TD.repeat(texts, 1))


def place_by_index(
    joint_SJD: Tensor,
    norms: HeadNorms | None,
    cosines_LD: Tensor,
    sines_LD: Tensor,
    positions_S: Tensor,
    keys_SKLD: Tensor,
    values_SKLD: Tensor,
) -> Tensor:
    """`StepPlacement`."""
    every, key_heads = torch.arange(len(joint_SJD), device=joint_SJD.device), keys_SKLD.shape[1]
    queries, keys, values = rotated(joint_SJD, norms, key_heads, cosines_LD[positions_S], sines_LD[positions_S])
    keys_SKLD[every, :, positions_S] = keys
    values_SKLD[every, :, positions_S] = values
    return queries


def rotated(
    joint_NJD: Tensor, norms: HeadNorms | None, key_heads: int, cosines_ND: Tensor, sines_ND: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, Q, D] and keys [N, K, D], normed and with their rotary embedding, and values [N, K, D]."""
    turned, values = joint_NJD[:, :-key_heads], joint_NJD[:, -key_heads:]
    if norms is not None:
        both = turned[:, :-key_heads], turned[:, -key_heads:]
        turned = torch.cat([norm(part) for norm, part in zip(norms, both, strict=True)], 1)
    first, second = turned.chunk(2, -1)
    turned = turned * cosines_ND[:, None] + torch.cat([-second, first], -1) * sines_ND[:, None]
    return turned[:, :-key_heads], turned[:, -key_heads:], values


def add_norm(hidden_NH: Tensor, added_NH: Tensor, outer: Norm | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """As `LayerParts` says."""
    hidden_NH = hidden_NH + (outer(added_NH) if outer else added_NH)
    return hidden_NH, norm(hidden_NH)


def gate(joint_NG: Tensor, gelu: bool) -> Tensor:
    """As `LayerParts` says; the gate's columns come first."""
    own, up = joint_NG.chunk(2, -1)
    return (nn.functional.gelu(own, approximate="tanh") if gelu else nn.functional.silu(own)) * up


PLAIN = LayerParts(rotate_by_repeating, place_by_index, attend_slots_by_mask, attend_chunks_by_mask, add_norm, gate)
