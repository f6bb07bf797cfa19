"""Attention of many texts of different lengths over static caches, and what comes before it in a step.

Shapes: S slots, R slots of a prefill, C tokens of a chunk, N rows, L room for tokens, Q query heads, K key/value
heads, D size of a head; J = Q + 2 K heads that are computed together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from fastmtp.models.layers import steady_attention

# Of a layer's number, and its queries, keys and values [N, J, D], which are not rotated yet.
Attention = Callable[[int, Tensor], Tensor]


class StepAttention(Protocol):
    """One query of each slot attends to the slot's keys up to its position, or to the last ones of a window."""

    def __call__(
        self,
        queries_SQD: Tensor,
        keys_SKLD: Tensor,
        values_SKLD: Tensor,
        positions_S: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor: ...


class StepPlacement(Protocol):
    """Rotates each slot's queries and keys by its position; writes keys and values there; the queries [S, Q, D]."""

    def __call__(
        self,
        joint_SJD: Tensor,
        cosines_LD: Tensor,
        sines_LD: Tensor,
        positions_S: Tensor,
        keys_SKLD: Tensor,
        values_SKLD: Tensor,
    ) -> Tensor: ...


@dataclass(frozen=True)
class StepParts:
    """What a step does around its matrix products; without `gate` the layer's own activation."""

    place: StepPlacement
    attend: StepAttention
    gate: Callable[..., Tensor] | None


def step_parts(device: torch.device) -> StepParts:
    """On a GPU kernels, which read each slot up to its own length only."""
    if device.type != "cpu":
        from fastmtp.engines.torch.slot_kernels import attend_slots, gate_slots, place_slots

        return StepParts(place_slots, attend_slots, gate_slots)
    return StepParts(place_by_index, attend_slots_by_mask, None)


def place_by_index(
    joint_SJD: Tensor,
    cosines_LD: Tensor,
    sines_LD: Tensor,
    positions_S: Tensor,
    keys_SKLD: Tensor,
    values_SKLD: Tensor,
) -> Tensor:
    """`StepPlacement` in plain PyTorch."""
    every, key_heads = torch.arange(len(joint_SJD), device=joint_SJD.device), keys_SKLD.shape[1]
    queries, keys, values = rotated(joint_SJD, key_heads, cosines_LD[positions_S], sines_LD[positions_S])
    keys_SKLD[every, :, positions_S] = keys
    values_SKLD[every, :, positions_S] = values
    return queries


def rotated(
    joint_NJD: Tensor, key_heads: int, cosines_ND: Tensor, sines_ND: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [N, Q, D] and keys [N, K, D] with their rotary embedding, and values [N, K, D]."""
    turned, values = joint_NJD[:, :-key_heads], joint_NJD[:, -key_heads:]
    first, second = turned.chunk(2, -1)
    turned = turned * cosines_ND[:, None] + torch.cat([-second, first], -1) * sines_ND[:, None]
    return turned[:, :-key_heads], turned[:, -key_heads:], values


def attend_slots_by_mask(
    queries_SQD: Tensor,
    keys_SKLD: Tensor,
    values_SKLD: Tensor,
    positions_S: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """`StepAttention` in plain PyTorch: reads the whole room of every slot."""
    keys_L, newest_S1 = torch.arange(keys_SKLD.shape[2], device=positions_S.device), positions_S[:, None]
    mask_SL = keys_L <= newest_S1
    if window is not None:
        mask_SL &= keys_L > newest_S1 - window
    mask_S11L = mask_SL[:, None, None]
    return attend_many(queries_SQD[:, :, None], keys_SKLD, values_SKLD, mask_S11L, scale)[:, :, 0]


def attend_many(queries_RQCD: Tensor, keys_RKLD: Tensor, values_RKLD: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention with a mask of bool that broadcasts to [R, Q, C, L]; [R, Q, C, D]."""
    group = queries_RQCD.shape[1] // keys_RKLD.shape[1]
    # With masks, the fast kernels take as many key heads as query heads.
    keys, values = (part.repeat_interleave(group, 1) for part in (keys_RKLD, values_RKLD))
    with steady_attention():
        return nn.functional.scaled_dot_product_attention(queries_RQCD, keys, values, attn_mask=mask, scale=scale)
