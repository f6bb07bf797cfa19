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

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
# One key, or for each expert the keys of the matrices that are joined along their rows.
Place = str | list[tuple[str, ...]]
Places = dict[str, Place]


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


def places(layout: Layout, shapes: Mapping[str, tuple[int, ...]], keys: Collection[str]) -> Places:
    """The keys of each tensor of a head of these shapes, in a checkpoint with these keys."""
    found: Places = {}
    for name, shape in shapes.items():
        module = next(module for module in layout.modules if name.startswith(f"{module}."))
        key = layout.modules[module] + name.removeprefix(module)
        found[name] = key if key in keys else _of_experts(key, shape[0])
    return found


def _of_experts(key: str, experts: int) -> Place:
    prefix, _, matrix = key.rpartition("experts.")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(matrix)
    if not prefix or parts is None:
        return key
    return [tuple(f"{prefix}experts.{expert}.{part}.weight" for part in parts) for expert in range(experts)]


def keys_of(found: Iterable[Place]) -> list[str]:
    """All keys of these places."""
    return [key for place in found for key in ([place] if isinstance(place, str) else sum(place, ()))]


def to_head(layout: Layout, found: Places, tensors: Mapping[str, Tensor]) -> State:
    """A head's tensors from a checkpoint's, bits unchanged."""
    head = {name: _joined(place, tensors) for name, place in found.items()}
    return _ordered(layout, head)


def from_head(layout: Layout, found: Places, head: Mapping[str, Tensor]) -> State:
    """A checkpoint's tensors from a head's, bits unchanged; the inverse of `to_head`."""
    tensors: State = {}
    for name, tensor in _ordered(layout, head).items():
        tensors |= _split(found[name], tensor)
    return tensors


def _ordered(layout: Layout, head: Mapping[str, Tensor]) -> State:
    """With the halves of the projection swapped where the layouts differ; its own inverse."""
    return swapped(head) if layout.embedding_first else dict(head)


def swapped(head: Mapping[str, Tensor]) -> State:
    """With the projection for [embedding, hidden] in place of [hidden, embedding], or the other way round."""
    first, second = head["input_proj.weight"].chunk(2, dim=1)
    return {**head, "input_proj.weight": torch.cat([second, first], dim=1)}


def _joined(place: Place, tensors: Mapping[str, Tensor]) -> Tensor:
    if isinstance(place, str):
        return tensors[place]
    return torch.stack([torch.cat([tensors[key] for key in keys]) for keys in place])


def _split(place: Place, tensor: Tensor) -> State:
    if isinstance(place, str):
        return {place: tensor}
    return {
        key: part.contiguous()
        for keys, expert in zip(place, tensor, strict=True)
        for key, part in zip(keys, expert.chunk(len(keys)), strict=True)
    }
