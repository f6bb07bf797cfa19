"""A dense model with an MTP head as llama.cpp's architecture `glm4moe`, whose graph has an MTP block.

- All blocks of the target are leading dense ones (`leading_dense_block_count`). The head is the block after them.
  That one must have experts, so its network is the shared expert, and a routed one, as narrow as may be, is zero.
- The rope turns halves (NEOX), so rows of q and k stay as Hugging Face has them.
- `eh_proj` takes [embedding, hidden]; ours takes [hidden, embedding]: the halves of its columns change places.
- The state that it takes from the target is the one after the final norm, and so is the one it feeds back.

Read from llama.cpp's src/models/glm4-moe.cpp. Shapes: H hidden, I intermediate, E width of the routed expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from fastmtp.export.job import Job
from fastmtp.models.info import head_size, raise_problems
from fastmtp.models.weights import Floats, whole

ARCHITECTURE = "glm4moe"
KINDS = ("llama", "mistral", "qwen2", "qwen3")
# Experts are quantised in blocks of so many.
_BLOCK = 32

_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
_NETWORK = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_AROUND = {
    "token_norm": "nextn.enorm",
    "hidden_norm": "nextn.hnorm",
    "input_proj": "nextn.eh_proj",
    "final_norm": "nextn.shared_head_norm",
}
_WITH_BIAS = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its shape in the order of numpy, and how to get its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Floats]


def check(job: Job) -> None:
    """Raises ValueError if this layout cannot carry the target."""
    if job.kind not in KINDS:
        raise ValueError(
            f"{job.target.source}: --to llama.cpp writes {', '.join(KINDS)} and mimo, not {job.kind}. If its own "
            "graph in llama.cpp has an MTP block (glm4_moe, deepseek_v3, qwen3_next, qwen3_5), write the head into "
            "the model with --to checkpoint, and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    problems = []
    rope = str(job.config.rope_parameters.get("rope_type", "default"))
    if rope not in ("default", "linear") or getattr(job.weights, "rope_factors", None) is not None:
        problems.append(f"rope_type {rope}: {ARCHITECTURE} has default and linear")
    if job.config.hidden_act != "silu":
        problems.append(f"hidden_act {job.config.hidden_act}: {ARCHITECTURE} has silu")
    if _rotated(job) < head_size(job.config):
        problems.append(f"partial_rotary_factor: {ARCHITECTURE} here turns whole heads")
    names = target_names(job)
    problems += [f"{name}: {ARCHITECTURE} has no such tensor" for name, place in names.items() if place is None]
    raise_problems(f"{job.target.source}: llama.cpp's MTP graph cannot run this model:", problems)


def keys(job: Job) -> dict[str, tuple[Any, gguf.GGUFValueType]]:
    """What llama.cpp must know of the model besides its tokenizer."""
    config, integer, real = job.config, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
    layers, size, rope = int(config.num_hidden_layers), head_size(config), config.rope_parameters
    expert = _expert(job)
    values: dict[str, tuple[Any, gguf.GGUFValueType]] = {
        "block_count": (layers + 1, integer),
        "nextn_predict_layers": (1, integer),
        "context_length": (context_length(job), integer),
        "vocab_size": (job.target.vocabulary_size, integer),
        "embedding_length": (int(config.hidden_size), integer),
        "feed_forward_length": (int(config.intermediate_size), integer),
        "attention.head_count": (int(config.num_attention_heads), integer),
        "attention.head_count_kv": (int(config.num_key_value_heads), integer),
        "attention.key_length": (size, integer),
        "attention.value_length": (size, integer),
        "attention.layer_norm_rms_epsilon": (float(config.rms_norm_eps), real),
        "rope.dimension_count": (size, integer),
        "rope.freq_base": (float(rope["rope_theta"]), real),
        "leading_dense_block_count": (layers, integer),
        "expert_count": (1, integer),
        "expert_used_count": (1, integer),
        "expert_feed_forward_length": (expert, integer),
        "expert_shared_count": (int(config.intermediate_size) // expert, integer),
    }
    if rope.get("rope_type") == "linear":
        values["rope.scaling.type"] = ("linear", gguf.GGUFValueType.STRING)
        values["rope.scaling.factor"] = (float(rope["factor"]), real)
    return {f"{ARCHITECTURE}.{name}": value for name, value in values.items()}


def context_length(job: Job) -> int:
    """The context that the file promises: this graph always attends to everything, so a window ends it."""
    window = job.config.sliding_window if "sliding_attention" in job.target.kinds else None
    return min(job.target.context_limit, window or job.target.context_limit)


def shared(job: Job) -> Iterator[Stored]:
    """What the target's file and a file of the head alone both need."""
    shapes = job.weights.shapes()
    for name, place in target_names(job).items():
        if place is not None and not place.startswith("blk."):
            yield Stored(place, shapes[name], lambda name=name: whole(job.weights, name))  # type: ignore[misc]


def trunk(job: Job) -> Iterator[Stored]:
    """The target's blocks."""
    shapes = job.weights.shapes()
    for name, place in target_names(job).items():
        if place is not None and place.startswith("blk."):
            yield Stored(place, shapes[name], lambda name=name: whole(job.weights, name))  # type: ignore[misc]


def head(job: Job) -> Iterator[Stored]:
    """The block of the head."""
    block = f"blk.{int(job.config.num_hidden_layers)}"
    tensors = {**job.tensors, "input_proj.weight": swapped(job.tensors["input_proj.weight"])}
    for name, place in head_names(job).items():
        values = tensors[name]
        yield Stored(place, tuple(values.shape), lambda values=values: values.float().numpy())  # type: ignore[misc]
    hidden, expert = int(job.config.hidden_size), _expert(job)
    for place, shape in {
        "ffn_gate_inp.weight": (1, hidden),
        "exp_probs_b.bias": (1,),
        "ffn_gate_exps.weight": (1, expert, hidden),
        "ffn_up_exps.weight": (1, expert, hidden),
        "ffn_down_exps.weight": (1, hidden, expert),
    }.items():
        yield Stored(f"{block}.{place}", shape, lambda shape=shape: np.zeros(shape, np.float32))  # type: ignore[misc]


def target_names(job: Job) -> dict[str, str | None]:
    """By the target's own name of a tensor, the file's; None where the file has none."""
    names: dict[str, str | None] = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    stored = job.weights.shapes()
    for name in job.target.model.state_dict():
        if name == "lm_head.weight":
            if name in stored and not job.config.tie_word_embeddings:
                names[name] = "output.weight"
        elif name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            place = _place(rest, "")
            names[name] = None if place is None else f"blk.{layer}.{place}"
        elif name not in names:
            names[name] = None
    return names


def head_names(job: Job) -> dict[str, str]:
    """By the name of a head's tensor, the file's."""
    block = f"blk.{int(job.config.num_hidden_layers)}"
    return {name: f"{block}.{place}" for name in job.tensors if (place := _head_place(name)) is not None}


def head_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head's tensors under our names, from those of its block under the file's."""
    ours = {theirs: name for name, theirs in _AROUND.items()}
    ours |= {theirs: f"layer.{name}" for name, theirs in _LAYER.items()}
    ours |= {f"{theirs}_shexp": f"layer.{name}" for name, theirs in _NETWORK.items()}
    found = {}
    for place, tensor in tensors.items():
        stem, _, kind = place.rpartition(".")
        if stem in ours:
            found[f"{ours[stem]}.{kind}"] = tensor
    return found | {"input_proj.weight": swapped(found["input_proj.weight"])}


def swapped(projection: Tensor) -> Tensor:
    """With the halves of its columns in each other's place."""
    return torch.cat(list(reversed(projection.chunk(2, dim=1))), dim=1)


def _head_place(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    return f"{_AROUND[stem]}.{kind}" if stem in _AROUND else _place(name.removeprefix("layer."), "_shexp")


def _place(name: str, network: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    place = _LAYER.get(stem) or (f"{_NETWORK[stem]}{network}" if stem in _NETWORK else None)
    if place is None or (kind == "bias" and place not in _WITH_BIAS):
        return None
    return f"{place}.{kind}"


def _expert(job: Job) -> int:
    """E: the shared expert is a multiple of it."""
    return math.gcd(int(job.config.intermediate_size), _BLOCK)


def _rotated(job: Job) -> int:
    return int(head_size(job.config) * float(job.config.rope_parameters.get("partial_rotary_factor", 1.0)))
