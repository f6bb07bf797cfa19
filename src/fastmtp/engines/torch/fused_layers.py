"""A target's layers on rows: weights that are applied to the same input lie in one matrix, so operations are few.

A GPU is faster than the host launches operations, and the modules of transformers need about 45 for each layer.

Shapes: N rows, Q query heads, K key/value heads, D size of a head, H hidden, I intermediate;
J = Q + 2 K heads that are computed together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmtp.engines.torch.slot_parts import HeadNorms, LayerParts, Norm
from fastmtp.extras import has_triton
from fastmtp.models.families import FAMILIES
from fastmtp.models.info import head_size

# Of a layer's number, and its queries, keys and values [N, J, D], as they were computed; gives [N, Q, D].
Attention = Callable[[int, Tensor], Tensor]


def is_fusible(config: Any, device: torch.device) -> bool:
    """Whether `FusedLayers` computes the layers of a configuration's family, with kernels for the device."""
    has_kernels = device.type == "cpu" or has_triton()
    return has_kernels and config.model_type in FAMILIES


def has_gelu(config: Any) -> bool:
    """Whether the gate's activation is GELU by tanh; it is SiLU in the other families that are supported."""
    named = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    return named == "gelu_pytorch_tanh"


@dataclass(frozen=True)
class FusedLayer:
    """A layer's weights, those that are applied to the same input in one matrix."""

    kind: str
    scale: float
    norm: Norm
    query_key_value: tuple[Tensor, Tensor | None]
    head_norms: HeadNorms | None
    output: tuple[Tensor, Tensor | None]
    output_norm: Norm | None
    second_norm: Norm
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]
    down_norm: Norm | None
    gelu: bool


class Streams(NamedTuple):
    """The residual stream [N, H] before the last layer and after it, and that after the final norm."""

    before_last: Tensor
    last: Tensor
    normed: Tensor


class FusedLayers:
    """The layers of a supported model, and its final norm."""

    # Weights made in inference mode would stay what autograd refuses.
    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Any, kinds: Sequence[str]) -> None:
        """The model's modules share the memory of the fused weights from now on.

        Args:
            kinds: of attention, by layer.
        """
        config = model.config
        gelu = has_gelu(config)
        self.key_heads, self.size = int(config.num_key_value_heads), head_size(config)
        self.layers = [_fused(layer, kind, gelu) for layer, kind in zip(model.model.layers, kinds, strict=True)]
        self._norm = Norm(model.model.norm)

    def __call__(self, hidden_NH: Tensor, attend: Attention, parts: LayerParts) -> Streams:
        after = [layer.norm for layer in self.layers[1:]] + [self._norm]
        before_NH, normed_NH = hidden_NH, self.layers[0].norm(hidden_NH)
        for index, (layer, next_norm) in enumerate(zip(self.layers, after, strict=True)):
            before_NH = hidden_NH
            found_NH = self._attended(index, normed_NH, attend)
            hidden_NH, normed_NH = parts.add_norm(hidden_NH, found_NH, layer.output_norm, layer.second_norm)
            found_NH = _network(layer, normed_NH, parts)
            hidden_NH, normed_NH = parts.add_norm(hidden_NH, found_NH, layer.down_norm, next_norm)
        return Streams(before_NH, hidden_NH, normed_NH)

    # Apart, so that what they compute with is freed before the next part.
    def _attended(self, index: int, normed_NH: Tensor, attend: Attention) -> Tensor:
        layer = self.layers[index]
        joint_NJ = nn.functional.linear(normed_NH, *layer.query_key_value)
        found_NQD = attend(index, joint_NJ.view(len(joint_NJ), -1, self.size))
        return nn.functional.linear(found_NQD.flatten(1), *layer.output)


def _network(layer: FusedLayer, normed_NH: Tensor, parts: LayerParts) -> Tensor:
    inner_NI = parts.gate(nn.functional.linear(normed_NH, *layer.gate_up), layer.gelu)
    return nn.functional.linear(inner_NI, *layer.down)


def _fused(layer: Any, kind: str, gelu: bool) -> FusedLayer:
    attention, network = layer.self_attn, layer.mlp

    def norm(module: Any, name: str) -> Norm | None:
        own = getattr(module, name, None)
        return None if own is None else Norm(own)

    # With norms after attention and network, the second norm has another name.
    outer = hasattr(layer, "pre_feedforward_layernorm")
    query_norm, key_norm = norm(attention, "q_norm"), norm(attention, "k_norm")
    return FusedLayer(
        kind=kind,
        scale=float(attention.scaling),
        norm=Norm(layer.input_layernorm),
        query_key_value=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norms=(query_norm, key_norm) if query_norm and key_norm else None,
        output=(attention.o_proj.weight, attention.o_proj.bias),
        output_norm=norm(layer, "post_attention_layernorm") if outer else None,
        second_norm=Norm(layer.pre_feedforward_layernorm if outer else layer.post_attention_layernorm),
        gate_up=_joined(network.gate_proj, network.up_proj),
        down=(network.down_proj.weight, network.down_proj.bias),
        down_norm=norm(layer, "post_feedforward_layernorm"),
        gelu=gelu,
    )


def _joined(*modules: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weights and biases of linear modules as one; theirs become views of it, and take no more memory."""
    sizes = [module.out_features for module in modules]
    weight = torch.cat([module.weight.data for module in modules])
    for module, own in zip(modules, torch.split(weight, sizes), strict=True):
        module.weight.data = own
    biases = [module.bias.data for module in modules if module.bias is not None]
    # Otherwise the next fused matrix takes a part of what was freed, and the rest stays in pieces.
    torch.cuda.empty_cache()
    return weight, torch.cat(biases) if biases else None
