"""Key maps between our head and the MTP layers of checkpoints.

- `MIMO`: MiMo; vLLM's mimo_mtp.py (0bb55d6).
- `QWEN`: Qwen3-Next, Qwen3.5 dense and MoE; vLLM's qwen3_next_mtp.py (055e47c) and qwen3_5_mtp.py (01d9980).
- `appended`: DeepSeek-V3, GLM-4.5 to 4.7 (MoE); vLLM's deepseek_mtp.py (03356f8), glm4_moe_mtp.py (028aedf) and
  transformers 5.23's `MtpLayer`. The state after the final norm is fed back, as in SGLang's *_nextn.py and
  later versions of vLLM.

All compute final_norm(layer(projection([one norm, other norm]))), and differ in names and in the order of the
halves. The layer's tensors are named as in transformers' decoder layer, except those of experts: a checkpoint has
matrices for each expert, transformers 5 has one tensor for all experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
# One key, or for each expert the keys of the matrices that are joined along their rows.
Keys = str | list[tuple[str, ...]]
KeyMap = dict[str, Keys]


@dataclass(frozen=True)
class Layout:
    """The names of a checkpoint's head.

    Attributes:
        modules: the checkpoint's name of a module, by ours.
        embedding_first: whether the projection takes [embedding, hidden]; ours takes [hidden, embedding].
        namespace: prefixes of the keys of MTP layers, those of a second layer included.
        copies: keys that repeat a tensor of the target, with the key of that tensor.
    """

    modules: Mapping[str, str]
    embedding_first: bool
    namespace: tuple[str, ...]
    copies: Mapping[str, str] = field(default_factory=dict)


MIMO = Layout(
    modules={
        "token_norm": "model.mtp_layers.0.token_layernorm",
        "hidden_norm": "model.mtp_layers.0.hidden_layernorm",
        "input_proj": "model.mtp_layers.0.input_proj",
        "layer": "model.mtp_layers.0",
        "final_norm": "model.mtp_layers.0.final_layernorm",
    },
    embedding_first=False,
    namespace=("model.mtp_layers.",),
)
QWEN = Layout(
    modules={
        "token_norm": "mtp.pre_fc_norm_embedding",
        "hidden_norm": "mtp.pre_fc_norm_hidden",
        "input_proj": "mtp.fc",
        "layer": "mtp.layers.0",
        "final_norm": "mtp.norm",
    },
    embedding_first=True,
    namespace=("mtp.",),
)


def appended(layers: int) -> Layout:
    """The layout of an MTP layer that is numbered after the target's own `layers`."""
    extra = f"model.layers.{layers}"
    return Layout(
        modules={
            "token_norm": f"{extra}.enorm",
            "hidden_norm": f"{extra}.hnorm",
            "input_proj": f"{extra}.eh_proj",
            "layer": extra,
            "final_norm": f"{extra}.shared_head.norm",
        },
        embedding_first=True,
        namespace=(f"{extra}.", f"model.layers.{layers + 1}."),
        copies={
            f"{extra}.embed_tokens.weight": "model.embed_tokens.weight",
            f"{extra}.shared_head.head.weight": "lm_head.weight",
        },
    )


def layout_of(config: Any, source: str) -> Layout:
    """The layout of an architecture's checkpoints.

    Raises:
        ValueError: the architecture has none that is known.
    """
    match config.model_type:
        case "qwen2":
            return MIMO
        case "qwen3_next" | "qwen3_5_text" | "qwen3_5_moe_text":
            return QWEN
        case "deepseek_v3" | "glm4_moe":
            return appended(int(config.num_hidden_layers))
    raise ValueError(
        f"{source}: no MTP layers are known for architecture {config.model_type!r}; known: mimo, qwen3_next, "
        "qwen3_5, qwen3_5_moe, deepseek_v3, glm4_moe"
    )


def key_map(layout: Layout, shapes: Mapping[str, tuple[int, ...]], stored: Collection[str]) -> KeyMap:
    """The checkpoint's keys for each tensor of a head of these shapes; `stored` are all keys of the checkpoint."""
    found: KeyMap = {}
    for name, shape in shapes.items():
        module = next(module for module in layout.modules if name.startswith(f"{module}."))
        key = layout.modules[module] + name.removeprefix(module)
        found[name] = key if key in stored else _of_experts(key, shape[0])
    return found


def _of_experts(key: str, experts: int) -> Keys:
    prefix, _, matrix = key.rpartition("experts.")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(matrix)
    if not prefix or parts is None:
        return key
    return [tuple(f"{prefix}experts.{expert}.{part}.weight" for part in parts) for expert in range(experts)]


def all_keys(keys: KeyMap) -> list[str]:
    return [key for own in keys.values() for key in ([own] if isinstance(own, str) else sum(own, ()))]


def to_head(layout: Layout, keys: KeyMap, tensors: Mapping[str, Tensor]) -> State:
    """A head's tensors from a checkpoint's, bits unchanged."""
    return _ordered(layout, {name: _joined(own, tensors) for name, own in keys.items()})


def from_head(layout: Layout, keys: KeyMap, head: Mapping[str, Tensor]) -> State:
    """A checkpoint's tensors from a head's, bits unchanged; the inverse of `to_head`."""
    tensors: State = {}
    for name, tensor in _ordered(layout, head).items():
        tensors |= _split(keys[name], tensor)
    return tensors


def swapped(head: Mapping[str, Tensor]) -> State:
    """With the halves of the projection's columns swapped."""
    first, second = head["input_proj.weight"].chunk(2, dim=1)
    return {**head, "input_proj.weight": torch.cat([second, first], dim=1)}


def _ordered(layout: Layout, head: Mapping[str, Tensor]) -> State:
    return swapped(head) if layout.embedding_first else dict(head)


def _joined(keys: Keys, tensors: Mapping[str, Tensor]) -> Tensor:
    if isinstance(keys, str):
        return tensors[keys]
    return torch.stack([torch.cat([tensors[key] for key in expert]) for expert in keys])


def _split(keys: Keys, tensor: Tensor) -> State:
    if isinstance(keys, str):
        return {keys: tensor}
    return {
        key: part.contiguous()
        for own, expert in zip(keys, tensor, strict=True)
        for key, part in zip(own, expert.chunk(len(own)), strict=True)
    }
