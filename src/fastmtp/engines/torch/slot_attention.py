"""Attention of many texts of different lengths over static caches.

Shapes: S slots, R slots of a prefill, C tokens of a chunk, N = R C rows, L room for tokens, Q query heads,
K key/value heads, D size of a head.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from fastmtp.models.layers import keys_seen, steady_attention


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


class ChunkAttention(Protocol):
    """The queries of a chunk of some slots, R C = N of them, attend as those of steps from `start` on would.

    The chunk's own keys and values are in the caches already.
    """

    def __call__(
        self,
        queries_NQD: Tensor,
        keys_SKLD: Tensor,
        values_SKLD: Tensor,
        slots_R: Tensor,
        start: Tensor,
        scale: float,
        window: int | None,
    ) -> Tensor: ...


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
    group = queries_SQD.shape[1] // keys_SKLD.shape[1]
    keys, values = (part.repeat_interleave(group, 1) for part in (keys_SKLD, values_SKLD))
    return _attend(queries_SQD[:, :, None], keys, values, mask_SL[:, None, None], scale)[:, :, 0]


def attend_chunks_by_mask(
    queries_NQD: Tensor,
    keys_SKLD: Tensor,
    values_SKLD: Tensor,
    slots_R: Tensor,
    start: Tensor,
    scale: float,
    window: int | None,
) -> Tensor:
    """`ChunkAttention` in plain PyTorch: copies the keys of the slots."""
    (rows, heads, size), begin = queries_NQD.shape, int(start)
    tokens = rows // len(slots_R)
    seen_CL = keys_seen(begin, tokens, window, start.device)
    keys, values = (
        part[slots_R, :, : begin + tokens].repeat_interleave(heads // part.shape[1], 1)
        for part in (keys_SKLD, values_SKLD)
    )
    queries_RQCD = queries_NQD.reshape(len(slots_R), tokens, heads, size).transpose(1, 2)
    return _attend(queries_RQCD, keys, values, seen_CL, scale).transpose(1, 2).flatten(0, 1)


def _attend(queries_RQCD: Tensor, keys_RQLD: Tensor, values_RQLD: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention [R, Q, C, D]; which keys are seen broadcasts to [R, Q, C, L].

    With a mask the fast kernels take as many key heads as query heads.
    """
    with steady_attention():
        return nn.functional.scaled_dot_product_attention(
            queries_RQCD, keys_RQLD, values_RQLD, attn_mask=seen, scale=scale
        )
