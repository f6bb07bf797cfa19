"""A head as a model directory of architecture MiMo, whose MTP layer vLLM and SGLang run on other targets too.

    e = embedding of token t + 1, zero at t = 0;  s = the target's state at t after its final norm
    s' = final_layernorm(block(input_proj([hidden_layernorm(s), token_layernorm(e)])))

and s' replaces s at the next step. The block is Qwen2's, whose q, k and v have biases: missing ones are written as
zeros. Follows mimo_mtp.py of vLLM 0.32 and of SGLang 0.5.23.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from fastmtp.errors import parsing
from fastmtp.export.job import Job
from fastmtp.export.manifest import Manifest
from fastmtp.heads.layouts import MIMO, State, all_keys, from_head, key_map, to_head
from fastmtp.method.head import shapes_of
from fastmtp.models.config import FULL
from fastmtp.models.info import head_size, raise_problems

FILE = "model.safetensors"
_KINDS = ("llama", "mistral", "qwen2")
_WITH_BIAS = ("layer.self_attn.q_proj", "layer.self_attn.k_proj", "layer.self_attn.v_proj")


def problems(job: Job) -> list[str]:
    """The reasons why the engines' MiMo block cannot run this head; empty if it can."""
    config = job.config
    if job.kind not in _KINDS:
        return [f"{job.kind}: a MiMo block is like {', '.join(_KINDS)}"]
    found = [
        f"{name}: a MiMo block has no such tensor"
        for name in job.tensors
        if name.endswith(".bias") and name.removesuffix(".bias") not in _WITH_BIAS
    ]
    if config.hidden_act != "silu":
        found.append(f"hidden_act {config.hidden_act}: a MiMo block has silu")
    if head_size(config) * int(config.num_attention_heads) != int(config.hidden_size):
        found.append(f"head_dim {head_size(config)}: a MiMo block has hidden_size / num_attention_heads")
    return found


def tensors(job: Job) -> State:
    """The head under MiMo's keys, with all biases of a MiMo block if it can be one."""
    ours = {name: tensor.contiguous() for name, tensor in job.tensors.items()}
    if not problems(job):
        for module in _WITH_BIAS:
            weight = ours[f"{module}.weight"]
            ours.setdefault(f"{module}.bias", torch.zeros(weight.shape[0], dtype=weight.dtype))
    return from_head(MIMO, key_map(MIMO, shapes_of(ours), ()), ours)


def config(job: Job) -> dict[str, Any]:
    """config.json: the target's configuration, and keys by which the engines recognise an MTP head."""
    values: dict[str, Any] = job.config.to_diff_dict()
    # The head attends to the full context, even if the target's layers have windows.
    if hasattr(job.config, "sliding_window"):
        values |= {"use_sliding_window": False, "sliding_window": None}
    if values.get("layer_types"):
        values["layer_types"] = [FULL] * int(job.config.num_hidden_layers)
    dtype = str(job.tensors["input_proj.weight"].dtype).removeprefix("torch.")
    return {**values, "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1, "dtype": dtype}


def read_head(directory: Path, manifest: Manifest) -> dict[str, Tensor]:
    """The head of an export, under our names.

    Raises:
        FileNotFoundError, ValueError: the file or a tensor is missing or damaged.
    """
    path = directory / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the export is not whole")
    with parsing(path):
        stored = load_file(path)
    keys = key_map(MIMO, dict.fromkeys(manifest.head.dtypes, (0,)), ())
    raise_problems(
        f"{path}: is not whole:", [f"missing tensor {key}" for key in all_keys(keys) if key not in stored]
    )
    return to_head(MIMO, keys, stored)


def declared_kind(job: Job) -> str:
    """The `model_type` in the target's own configuration; `Job.kind` is that of the model it runs as."""
    if job.source.gguf is not None:
        return job.kind
    return str(PreTrainedConfig.get_config_dict(job.source.location)[0].get("model_type"))
