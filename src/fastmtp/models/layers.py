"""Decoder layers of transformers' own classes, run on our caches and masks.

Shapes: B batch, T new tokens, L keys (held + new), H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from inspect import signature
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from fastmtp.models.config import ModelConfig
from fastmtp.models.rope import Floats, ropes
from fastmtp.models.tensors import windows

# transformers 5.24 gave the argument another name.
_CACHE_ARGUMENT = "cache" if "cache" in signature(LlamaDecoderLayer.forward).parameters else "past_key_values"

Masks = Mapping[str, Tensor | None]
Rotations = Mapping[str, tuple[Tensor, Tensor]]


class Cache(Protocol):
    """The interface that an attention layer uses."""

    def update(self, key: Tensor, value: Tensor, layer: int, /, *_: Any, **__: Any) -> tuple[Tensor, Tensor]: ...


def skeleton(config: Any) -> Any:
    """A configuration's model on the meta device: classes, names and shapes without memory for weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def norm_offset(norm: nn.Module) -> float:
    """What a norm's class adds to its stored weights to get gains: 0 for w, 1 for 1 + w."""
    # The gains of a new norm are 1.
    return 1.0 - float(cast("Any", type(norm))(1).weight.detach())


def norm_epsilon(norm: nn.Module) -> float:
    """What a norm adds to the mean square, which its class has under one of two names."""
    return float(cast("Any", getattr(norm, "variance_epsilon", getattr(norm, "eps", None))))


def causal_mask(start: int, tokens: int, window: int | None, device: torch.device) -> Tensor | None:
    """`keys_seen` as [1, 1, T, L].

    None where attention's default is the same: one token that attends to everything, or a causal prefill.
    """
    length = start + tokens
    inside_window = window is None or length <= window
    if inside_window and (tokens == 1 or start == 0):
        return None
    return keys_seen(start, tokens, window, device)[None, None]


def keys_seen(start: int, tokens: int, window: int | None, device: torch.device) -> Tensor:
    """Which of the L = start + tokens keys each new token attends to, [T, L] of bool."""
    queries = torch.arange(start, start + tokens, device=device)[:, None]
    keys = torch.arange(start + tokens, device=device)[None, :]
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return seen


def causal_masks(config: Any, start: int, tokens: int, device: torch.device) -> Masks:
    """`causal_mask` for each kind of attention in the model."""
    return {kind: causal_mask(start, tokens, size, device) for kind, size in windows(config).items()}


def set_ropes(rotary: Any, config: ModelConfig, factors: Floats | None, source: str) -> None:
    """Give transformers' rotary module the native engine's frequencies, whatever the length of a text.

    Raises:
        ValueError: the settings are not supported.
    """
    kinds = sorted(set(config.layer_types))
    for kind, (frequencies, scale) in zip(kinds, ropes(config, kinds, factors, source), strict=True):
        prefix = ""
        # With a type of its own the module would compute the frequencies again from each text's length.
        if hasattr(rotary, "layer_types"):
            prefix, rotary.rope_type[kind] = f"{kind}_", "default"
        else:
            rotary.rope_type = "default"
        getattr(rotary, f"{prefix}inv_freq").copy_(torch.from_numpy(frequencies))
        setattr(rotary, f"{prefix}attention_scaling", scale)


def rotations(rotary: nn.Module, like: Tensor, positions_BT: Tensor, kinds: set[str]) -> Rotations:
    """Rotary cosines and sines for each kind of attention; in most models all kinds share them."""
    if hasattr(rotary, "layer_types"):
        return {kind: rotary(like, positions_BT, kind) for kind in kinds}
    shared = rotary(like, positions_BT)
    return dict.fromkeys(kinds, shared)


def run_layers(
    layers: nn.ModuleList,
    kinds: list[str],
    hidden_BTH: Tensor,
    rotation: Rotations,
    masks: Masks,
    cache: Cache | None,
) -> Tensor:
    """The residual stream after all layers, [B, T, H]."""
    for layer, kind in zip(layers, kinds, strict=True):
        hidden_BTH = layer(
            hidden_BTH,
            position_embeddings=rotation[kind],
            attention_mask=masks[kind],
            **{_CACHE_ARGUMENT: cache},
        )
    return hidden_BTH


def steady_attention() -> AbstractContextManager[None]:
    """Attention without cuDNN, which makes a plan for every new shape: batches are of many.

    Flash and memory-efficient kernels where they can, otherwise (float32 with grouped heads) the plain formula.
    """
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    context: AbstractContextManager[None] = sdpa_kernel(kernels)
    return context
