"""A GGUF file's metadata as a `ModelConfig`: each of its keys is applied, harmless, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastmtp.models.config import FULL, SLIDING, ModelConfig
from fastmtp.models.gguf_file import GgufFile

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}

_KEYS = {
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
}
_GEMMA_KEYS = {
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "rope.freq_base_swa": "rope_local_base_freq",
    "final_logit_softcapping": "final_logit_softcapping",
    "attn_logit_softcapping": "attn_logit_softcapping",
}
# Read by the functions below.
_READ = (
    "attention.value_length",
    "attention.scale",
    "rope.dimension_count",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
# Without influence on the arithmetic of a text model.
_HARMLESS = ("rope.scaling.finetuned", "tensor_data_layout", "mm.tokens_per_image")
# Harmless with these values, which converters write for models without the feature.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "use_parallel_residual": False,
}
_GEMMA_27B_LAYERS = 62
_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def gguf_config(file: GgufFile, source: str) -> ModelConfig:
    """
    Raises:
        ValueError: the architecture, or the value of a key, is not supported, or a key is missing.
    """
    architecture = str(file.metadata["general.architecture"])
    if architecture not in MODEL_TYPES:
        supported = ", ".join(MODEL_TYPES)
        raise ValueError(f"{source}: architecture {architecture!r} is not supported; supported: {supported}")
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    keys = _KEYS | (_GEMMA_KEYS if architecture == "gemma3" else {})
    for key, value in own.items():
        known = key in keys or key in _READ or key in _HARMLESS or (key in _NEUTRAL and value == _NEUTRAL[key])
        if not known:
            raise ValueError(f"{source}: {prefix}{key} is {value!r}, which is not supported")
    values = {name: own[key] for key, name in keys.items() if key in own}
    values |= {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()
    }
    values |= {
        "model_type": MODEL_TYPES[architecture],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
    }
    values.setdefault("vocab_size", len(file.metadata["tokenizer.ggml.tokens"]))
    missing = [key for key in ("embedding_length", "block_count", "feed_forward_length") if key not in own]
    if missing:
        raise ValueError(f"{source}: {prefix}{missing[0]} is missing")
    values.setdefault("head_dim", own.get("rope.dimension_count", _head_size(values)))
    values["rope_scaling"] = _rope_scaling(own, f"{source}: {prefix}")
    if architecture == "gemma3":
        values.setdefault("sliding_window", 4096)
        _gemma(values)
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, values["head_dim"]) != values["head_dim"]:
            raise ValueError(f"{source}: {prefix}{key} is {own[key]}; only {values['head_dim']} is supported")
    scale = own.get("attention.scale", 0.0)
    usual = float(values.get("query_pre_attn_scalar", values["head_dim"])) ** -0.5
    if scale and not math.isclose(scale, usual, rel_tol=1e-5):
        raise ValueError(f"{source}: {prefix}attention.scale is {scale}; only {usual:.6g} is supported")
    return ModelConfig.from_json(values, source)


def end_ids(file: GgufFile) -> list[int]:
    """The tokens that end an answer: end of text, end of turn, end of message."""
    keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return [int(file.metadata[key]) for key in keys if key in file.metadata]


def _head_size(values: Mapping[str, Any]) -> int:
    return int(values["hidden_size"]) // int(values["num_attention_heads"])


def _gemma(values: dict[str, Any]) -> None:
    """Set what llama.cpp derives for Gemma 3 without a key."""
    large = values["num_hidden_layers"] == _GEMMA_27B_LAYERS
    values["query_pre_attn_scalar"] = _head_size(values) if large else values["head_dim"]
    pattern = values.get("sliding_window_pattern")
    if isinstance(pattern, list):
        values["layer_types"] = [SLIDING if sliding else FULL for sliding in pattern]


def _rope_scaling(own: Mapping[str, Any], where: str) -> dict[str, Any] | None:
    """llama.cpp's settings as transformers' `rope_scaling`."""
    kind = own.get("rope.scaling.type", "linear" if "rope.scale_linear" in own else "none")
    factor = float(own.get("rope.scaling.factor", own.get("rope.scale_linear", 1.0)))
    if kind == "none" or factor in (0.0, 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise ValueError(f"{where}rope.scaling.type is {kind!r}; supported: none, linear, yarn")
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    for name, key in {
        "original_max_position_embeddings": "original_context_length",
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
    }.items():
        if f"rope.scaling.{key}" in own:
            found[name] = own[f"rope.scaling.{key}"]
    if "rope.scaling.attn_factor" in own:
        found["attention_factor"] = float(own["rope.scaling.attn_factor"]) * (0.1 * math.log(factor) + 1.0)
    return found
