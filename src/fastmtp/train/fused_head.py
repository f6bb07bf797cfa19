"""A head in few operations: weights that are applied to the same input in one product, what is between in kernels.

A GPU is faster than the host launches the operations of transformers' modules, which also pass more memory.

Shapes: B texts, T tokens of each, N = B T rows, H hidden, Q query heads, K key/value heads, G = Q / K, D size of a
head, L keys; J = Q + 2 K heads that are computed together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastmtp.engines.torch.fused_layers import has_gelu
from fastmtp.engines.torch.target import Target
from fastmtp.engines.torch.whole_texts import attend_texts
from fastmtp.method.head import Applied, MTPHead
from fastmtp.models.config import FULL
from fastmtp.models.families import FAMILIES
from fastmtp.models.layers import Cache, Rotations, norm_epsilon
from fastmtp.train.head_parts import Gains, head_parts
from fastmtp.train.pace import pace_of


def prepared(head: MTPHead, target: Target) -> Applied:
    """The head as it is applied in one step: itself, or on a GPU its weights as they are now, in few operations."""
    if not pace_of(target.device).fused_parts or target.config.model_type not in FAMILIES:
        return head
    return FusedHead(head, target)


class FusedHead:
    """`MTPHead.forward` of a supported family, with the gradients of its weights."""

    def __init__(self, head: MTPHead, target: Target) -> None:
        layer = cast(Any, head.layer)
        attention, network = layer.self_attn, layer.mlp
        self._parts = head_parts(pace_of(target.device))
        # As autocast would choose it.
        self._dtype = torch.float32 if target.dtype == torch.float32 else torch.bfloat16
        self._key_heads, self._scale = int(target.config.num_key_value_heads), float(attention.scaling)
        self._size = int(attention.head_dim)
        self._offset = FAMILIES[target.config.model_type].norm_offset
        self._gelu = has_gelu(target.config)
        # With norms after attention and network, the norm before the network has another name.
        outer = hasattr(layer, "pre_feedforward_layernorm")
        self._inputs = self._gains(head.hidden_norm), self._gains(head.token_norm)
        self._first = self._gains(layer.input_layernorm)
        self._heads = (
            (self._gains(attention.q_norm), self._gains(attention.k_norm)) if hasattr(attention, "q_norm") else None
        )
        self._attended = self._gains(layer.post_attention_layernorm) if outer else None
        self._second = self._gains(layer.pre_feedforward_layernorm if outer else layer.post_attention_layernorm)
        self._computed = self._gains(layer.post_feedforward_layernorm) if outer else None
        self._final = self._gains(head.final_norm)
        self._project = self._joined(head.input_proj)
        self._query_key_value = self._joined(attention.q_proj, attention.k_proj, attention.v_proj)
        self._output = self._joined(attention.o_proj)
        self._gate_up = self._joined(network.gate_proj, network.up_proj)
        self._down = self._joined(network.down_proj)

    def __call__(
        self,
        state_BTH: Tensor,
        embedding_BTH: Tensor,
        rotation: Rotations,
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        parts, linear, dtype = self._parts, nn.functional.linear, self._dtype
        inputs = state_BTH.flatten(0, 1), embedding_BTH.flatten(0, 1)
        hidden_NH = linear(parts.join(*inputs, self._inputs, dtype), *self._project)
        joint_NJ = linear(parts.norm(hidden_NH, self._first, dtype), *self._query_key_value)
        cosines_TD, sines_TD = (part[0] for part in rotation[FULL])
        joint_NJD = joint_NJ.view(len(joint_NJ), -1, self._size)
        queries, keys, values = parts.rotate(joint_NJD, self._heads, self._key_heads, cosines_TD, sines_TD)
        if cache is not None:
            keys, values = cache.update(keys, values, 0)
        found_NH = linear(self._attend(queries, keys, values, mask), *self._output)
        hidden_NH, normed_NH = self._added(hidden_NH, found_NH, self._attended, self._second, dtype)
        found_NH = linear(parts.gate(linear(normed_NH, *self._gate_up), self._gelu), *self._down)
        _, normed_NH = self._added(hidden_NH, found_NH, self._computed, self._final, torch.float32)
        return normed_NH.view(state_BTH.shape)

    def _added(
        self, hidden_NH: Tensor, found_NH: Tensor, outer: Gains | None, by: Gains, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        if outer is not None:
            found_NH = self._parts.norm(found_NH, outer, self._dtype)
        return self._parts.add_norm(hidden_NH, found_NH, by, dtype)

    def _attend(self, queries: Tensor, keys_BKLD: Tensor, values_BKLD: Tensor, mask: Tensor | None) -> Tensor:
        """Attention [N, Q D] of queries [B, K, G, T, D]; without a mask it is causal.

        With one the kernels want as many key heads as query heads: those that share a key head are taken as more
        queries of it.
        """
        group, width = queries.shape[2], queries.shape[1:3].numel() * self._size
        if mask is None:
            found = attend_texts(queries.flatten(1, 2), keys_BKLD, values_BKLD, None, self._scale)
            return found.transpose(1, 2).reshape(-1, width)
        # [1, 1, G T, L], as the kernels add it.
        unseen = torch.where(mask[:, :, None].expand(-1, -1, group, -1, -1), 0.0, -torch.inf).flatten(2, 3)
        unseen = unseen.to(queries.dtype)
        found = attend_texts(queries.flatten(2, 3), keys_BKLD, values_BKLD, unseen, self._scale)
        return found.view(queries.shape).permute(0, 3, 1, 2, 4).reshape(-1, width)

    def _gains(self, norm: nn.Module) -> Gains:
        weight_H = cast(Tensor, norm.weight)
        return Gains((weight_H + self._offset if self._offset else weight_H).float(), norm_epsilon(norm))

    def _joined(self, *modules: nn.Linear) -> tuple[Tensor, Tensor | None]:
        """The weights and biases of linear modules as one."""
        biases = [module.bias for module in modules if module.bias is not None]
        return self._cast([module.weight for module in modules]), self._cast(biases) if biases else None

    def _cast(self, tensors: Sequence[Tensor]) -> Tensor:
        return (torch.cat([*tensors]) if len(tensors) > 1 else tensors[0]).to(self._dtype)
