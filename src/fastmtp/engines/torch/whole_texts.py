"""A forward over whole texts, padded on the right, through fused layers.

Shapes: B texts, T tokens with padding, N = B T rows, Q query heads, K key/value heads, D size of a head, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmtp.engines.torch.fused_layers import FusedLayers
from fastmtp.engines.torch.slot_parts import LayerParts
from fastmtp.models.layers import Masks, Rotations, steady_attention


def read_texts(
    layers: FusedLayers, embedded_BTH: Tensor, rotation: Rotations, masks: Masks, parts: LayerParts
) -> tuple[Tensor, Tensor]:
    """The states after the final norm, and what the last layer was given; both [B, T, H].

    Args:
        rotation: of positions 0 to T.
    """
    shape = embedded_BTH.shape[:2]

    def attend(layer: int, joint_NJD: Tensor) -> Tensor:
        own = layers.layers[layer]
        cosines_TD, sines_TD = (part[0] for part in rotation[own.kind])
        rows = parts.rotate(joint_NJD, own.head_norms, layers.key_heads, cosines_TD, sines_TD)
        queries, keys, values = (part.view(*shape, *part.shape[1:]).transpose(1, 2) for part in rows)
        found_BQTD = attend_texts(queries, keys, values, masks[own.kind], own.scale)
        return found_BQTD.transpose(1, 2).flatten(0, 1)

    with steady_attention():
        streams = layers(embedded_BTH.flatten(0, 1), attend, parts)
    return streams.normed.view(*shape, -1), streams.before_last.view(*shape, -1)


def attend_texts(
    queries_BQTD: Tensor, keys_BKTD: Tensor, values_BKTD: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attention [B, Q, T, D]; without a mask it is causal."""
    # With a mask or in float32, the fast kernels take as many key heads as query heads.
    is_grouped = mask is None and queries_BQTD.dtype != torch.float32
    group = queries_BQTD.shape[1] // keys_BKTD.shape[1]
    if group > 1 and not is_grouped:
        keys_BKTD, values_BKTD = (part.repeat_interleave(group, 1) for part in (keys_BKTD, values_BKTD))
    return nn.functional.scaled_dot_product_attention(
        queries_BQTD,
        keys_BKTD,
        values_BKTD,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=is_grouped and group > 1,
    )
