"""A dense model with an MTP head as llama.cpp's architecture `glm4moe`, whose graph has an MTP block.

- All blocks of the target are leading dense ones (`leading_dense_block_count`). The head is the block after them.
  That block must have experts: the head's network is the shared expert, and the routed one is small and zero.
- The rope rotates halves (NEOX), so the rows of q and k have the order of Hugging Face.
- `eh_proj` takes [embedding, hidden] and our `input_proj` [hidden, embedding], so its halves are swapped.
- The head takes the target's state after the final norm, and feeds back its own state after its final norm.

Follows llama.cpp's src/models/glm4-moe.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import gguf
import numpy as np
from torch import Tensor

from fastmtp.export.job import Job
from fastmtp.heads.layouts import swapped
from fastmtp.models.config import SLIDING
from fastmtp.models.info import head_size, raise_problems
from fastmtp.models.weights import GGUF_NAMES, Floats, has_tied_head, whole

ARCHITECTURE = "glm4moe"
KINDS = ("llama", "mistral", "qwen2", "qwen3")
# Quantised rows of experts are multiples of this.
_BLOCK = 32

# The names of a layer's modules, and of a head's.
_LAYER = GGUF_NAMES | {"post_attention_layernorm": "post_attention_norm"}
_HEAD = {
    "token_norm": "nextn.enorm",
    "hidden_norm": "nextn.hnorm",
    "input_proj": "nextn.eh_proj",
    "final_norm": "nextn.shared_head_norm",
    **{f"layer.{name}": own + "_shexp" * name.startswith("mlp.") for name, own in _LAYER.items()},
}
_WITH_BIAS = ("attn_q", "attn_k", "attn_v")


@dataclass(frozen=True)
class Value:
    """A value of the file's metadata, its type, and the type of an array's items."""

    value: object
    kind: gguf.GGUFValueType
    items: gguf.GGUFValueType | None = None


@dataclass(frozen=True)
class Stored:
    """A tensor of the file: its shape in numpy's order, and a function that reads its values."""

    name: str
    shape: tuple[int, ...]
    values: Callable[[], Floats]


def check(job: Job) -> None:
    """Raises ValueError if the architecture cannot run the target."""
    if job.kind not in KINDS:
        raise ValueError(
            f"{job.target.source}: --to llama.cpp writes {', '.join(KINDS)} and mimo, not {job.kind}. If its own "
            "graph in llama.cpp has an MTP block (glm4_moe, deepseek_v3, qwen3_next, qwen3_5), write the head into "
            "the model with --to checkpoint, and convert that with llama.cpp's convert_hf_to_gguf.py"
        )
    problems = []
    rope = str(job.config.rope_parameters.get("rope_type", "default"))
    if rope not in ("default", "linear") or job.weights.rope_factors is not None:
        problems.append(f"rope_type {rope}: {ARCHITECTURE} has default and linear")
    if job.config.hidden_act != "silu":
        problems.append(f"hidden_act {job.config.hidden_act}: {ARCHITECTURE} has silu")
    if float(job.config.rope_parameters.get("partial_rotary_factor", 1.0)) < 1:
        problems.append(f"partial_rotary_factor: {ARCHITECTURE} here turns whole heads")
    names = target_names(job)
    problems += [f"{name}: {ARCHITECTURE} has no such tensor" for name, own in names.items() if own is None]
    raise_problems(f"{job.target.source}: llama.cpp's MTP graph cannot run this model:", problems)


def metadata(job: Job) -> dict[str, Value]:
    """The metadata of the model, without its tokenizer."""
    config, integer, real = job.config, gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32
    layers, size, rope = int(config.num_hidden_layers), head_size(config), config.rope_parameters
    expert = _expert(job)
    values = {
        "block_count": Value(layers + 1, integer),
        "nextn_predict_layers": Value(1, integer),
        "context_length": Value(context_length(job), integer),
        "vocab_size": Value(job.target.vocabulary_size, integer),
        "embedding_length": Value(int(config.hidden_size), integer),
        "feed_forward_length": Value(int(config.intermediate_size), integer),
        "attention.head_count": Value(int(config.num_attention_heads), integer),
        "attention.head_count_kv": Value(int(config.num_key_value_heads), integer),
        "attention.key_length": Value(size, integer),
        "attention.value_length": Value(size, integer),
        "attention.layer_norm_rms_epsilon": Value(float(config.rms_norm_eps), real),
        "rope.dimension_count": Value(size, integer),
        "rope.freq_base": Value(float(rope["rope_theta"]), real),
        "leading_dense_block_count": Value(layers, integer),
        "expert_count": Value(1, integer),
        "expert_used_count": Value(1, integer),
        "expert_feed_forward_length": Value(expert, integer),
        "expert_shared_count": Value(int(config.intermediate_size) // expert, integer),
    }
    if rope.get("rope_type") == "linear":
        values["rope.scaling.type"] = Value("linear", gguf.GGUFValueType.STRING)
        values["rope.scaling.factor"] = Value(float(rope["factor"]), real)
    return {f"{ARCHITECTURE}.{name}": value for name, value in values.items()}


def context_length(job: Job) -> int:
    """The file's context length: at most the target's window, since this graph has no sliding window."""
    window = job.config.sliding_window if SLIDING in job.target.kinds else None
    return min(job.target.context_limit, window or job.target.context_limit)


def target(job: Job) -> Iterator[Stored]:
    """The target's tensors; those outside of blocks, which a file of the head alone needs too, come first."""
    shapes = job.weights.shapes()
    for name, own in target_names(job).items():
        if own is not None:
            yield Stored(own, shapes[name], partial(whole, job.weights, name))


def head(job: Job) -> Iterator[Stored]:
    """The tensors of the head's block."""
    hidden, expert = int(job.config.hidden_size), _expert(job)
    block = f"blk.{int(job.config.num_hidden_layers)}"
    for name, tensor in swapped(job.tensors).items():
        if (own := _name(_HEAD, name)) is not None:
            yield Stored(f"{block}.{own}", tuple(tensor.shape), partial(_floats, tensor))
    for own, shape in {
        "ffn_gate_inp.weight": (1, hidden),
        "exp_probs_b.bias": (1,),
        "ffn_gate_exps.weight": (1, expert, hidden),
        "ffn_up_exps.weight": (1, expert, hidden),
        "ffn_down_exps.weight": (1, hidden, expert),
    }.items():
        yield Stored(f"{block}.{own}", shape, partial(_zeros, shape))


def target_names(job: Job) -> dict[str, str | None]:
    """The file's name of each of the target's tensors; None for one that this architecture lacks."""
    names: dict[str, str | None] = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    if not has_tied_head(job.weights):
        names["lm_head.weight"] = "output.weight"
    for name in job.target.model.state_dict():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            own = _name(_LAYER, rest)
            names[name] = None if own is None else f"blk.{layer}.{own}"
        elif name != "lm_head.weight":
            names.setdefault(name, None)
    return names


def head_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A head's tensors under our names, from those of its block."""
    ours = {own: module for module, own in _HEAD.items()}
    found = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module in ours:
            found[f"{ours[module]}.{kind}"] = tensor
    return swapped(found)


def _name(modules: Mapping[str, str], name: str) -> str | None:
    """The file's name of a tensor in its block; None if this architecture has no such tensor."""
    module, _, kind = name.rpartition(".")
    own = modules.get(module)
    return None if own is None or (kind == "bias" and own not in _WITH_BIAS) else f"{own}.{kind}"


def _zeros(shape: tuple[int, ...]) -> Floats:
    return np.zeros(shape, np.float32)


def _floats(tensor: Tensor) -> Floats:
    values: Floats = tensor.float().numpy()
    return values


def _expert(job: Job) -> int:
    """The size of the routed expert, which must divide that of the shared one."""
    return math.gcd(int(job.config.intermediate_size), _BLOCK)
