"""The MTP head: one decoder layer of the target's own class, applied recursively (FastMTP, section 3.2).

Shapes: B batch, T tokens, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fastmtp.models.config import FULL
from fastmtp.models.layers import Cache, Rotations, norm_offset, run_layers


class Frozen(Protocol):
    """The frozen target's interface for the recursion."""

    def embed(self, ids_BT: Tensor) -> Tensor: ...

    def rotations(self, positions_BT: Tensor) -> Rotations: ...


class Applied(Protocol):
    """A head as the recursion applies it: `MTPHead`, or what computes the same."""

    def __call__(
        self,
        state_BTH: Tensor,
        embedding_BTH: Tensor,
        rotation: Rotations,
        mask: Tensor | None,
        cache: Cache | None,
        /,
    ) -> Tensor: ...


class MTPHead(nn.Module):
    """s' = final_norm(layer(input_proj([hidden_norm(s), token_norm(e)]))).

    `s` is the target's state after its final norm at the first step, and the head's own output afterwards; `e`
    is the embedding of the token that follows. Embeddings and LM head are the target's and not part of the head.
    The layer always attends to the full context.
    """

    def __init__(self, model: Any) -> None:
        """A head for a transformers model, initialised from the model's last layer and final norm.

        `input_proj` starts as the sum of its two normalised inputs; training fits it first (train/initial.py).
        """
        super().__init__()
        base, like = model.model, model.lm_head.weight
        self.token_norm = _unit_norm(base.norm)
        self.hidden_norm = _unit_norm(base.norm)
        size = int(model.config.hidden_size)
        self.input_proj = nn.Linear(2 * size, size, bias=False, dtype=like.dtype, device=like.device)
        with torch.no_grad():
            self.input_proj.weight.copy_(torch.eye(size).repeat(1, 2))
        self.layer = _last_layer(model)
        self.final_norm = copy.deepcopy(base.norm)
        self.requires_grad_(True)

    def forward(
        self,
        state_BTH: Tensor,
        embedding_BTH: Tensor,
        rotation: Rotations,
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """The next states, [B, T, H]."""
        joined = torch.cat([self.hidden_norm(state_BTH), self.token_norm(embedding_BTH)], dim=-1)
        layers = cast(nn.ModuleList, [self.layer])
        hidden_BTH = run_layers(layers, [FULL], self.input_proj(joined), rotation, {FULL: mask}, cache)
        return cast(Tensor, self.final_norm(hidden_BTH))


def _unit_norm(norm: nn.Module) -> nn.Module:
    """A copy of a norm with all gains at one."""
    fresh = copy.deepcopy(norm)
    with torch.no_grad():
        cast(Tensor, fresh.weight).fill_(1.0 - norm_offset(norm))
    return fresh


def _last_layer(model: Any) -> nn.Module:
    """A copy of the model's last layer that attends to everything."""
    config = copy.deepcopy(model.config)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [FULL] * int(config.num_hidden_layers)
    last = model.model.layers[-1]
    # The layer's index matters: a model's first layers can be dense and its last ones have experts.
    with torch.device("meta"):
        layer = type(last)(config, int(config.num_hidden_layers) - 1)
    layer.load_state_dict({name: value.clone() for name, value in last.state_dict().items()}, assign=True)
    return cast(nn.Module, layer)


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of a head for a transformers model, which may be on the meta device."""
    return shapes_of(MTPHead(model).state_dict())


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
