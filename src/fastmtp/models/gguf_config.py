"""A GGUF file's metadata as a `ModelConfig`: each of its keys is applied, harmless, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastmtp.models.config import FULL, SLIDING, ModelConfig
from fastmtp.models.gguf_file import GgufFile
from fastmtp.models.gguf_rope import ROPE_KEYS, rope_scaling

MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}

_KEYS = {
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
}
# Read by the functions below.
_READ = ("attention.value_length", "attention.scale", "rope.dimension_count", *ROPE_KEYS)
# Without influence on the arithmetic of a text model; the size of the vocabulary is that of the tokenizer.
_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "mm.tokens_per_image")
# Harmless with these values, which converters write for models without the feature.
_NEUTRAL: dict[str, Any] = {
    "attention.causal": True,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "use_parallel_residual": False,
}
# llama.cpp has no default for these.
_REQUIRED = (
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "context_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_BIASES = {"attention_bias": ".attn_", "mlp_bias": ".ffn_"}
_GEMMA_27B_LAYERS = 62
_IDS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def gguf_config(file: GgufFile, source: str) -> ModelConfig:
    """
    Raises:
        ValueError: the architecture, or the value of a key, is not supported, or a key is missing.
    """
    _check_general(file, source)
    architecture = str(file.metadata["general.architecture"])
    if architecture not in MODEL_TYPES:
        supported = ", ".join(MODEL_TYPES)
        raise ValueError(f"{source}: architecture {architecture!r} is not supported; supported: {supported}")
    prefix = f"{architecture}."
    where = f"{source}: {prefix}"
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    own = {key: _value(key, value, where) for key, value in own.items()}
    keys = _KEYS | (_GEMMA_KEYS if architecture == "gemma3" else {})
    _check_keys(own, keys, where)
    size = len(file.metadata["tokenizer.ggml.tokens"])
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _IDS.items()}
    biases = [name for name in file.tensors if name.startswith("blk.") and name.endswith(".bias")]
    values = {
        "model_type": MODEL_TYPES[architecture],
        "vocab_size": size,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": 10000.0,
        **{f"{name}_token_id": None if token is None or token >= size else token for name, token in ids.items()},
        **{name: any(module in bias for bias in biases) for name, module in _BIASES.items()},
        **{name: own[key] for key, name in keys.items() if key in own},
    }
    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    values.setdefault("head_dim", _head_size(values))
    values["rope_scaling"] = rope_scaling(file, own, values["head_dim"], where)
    if architecture == "gemma3":
        _gemma(values, where)
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, values["head_dim"]) != values["head_dim"]:
            raise ValueError(f"{where}{key} is {own[key]}; only {values['head_dim']} is supported")
    scale = own.get("attention.scale", 0.0)
    usual = float(values.get("query_pre_attn_scalar", values["head_dim"])) ** -0.5
    if scale and not math.isclose(scale, usual, rel_tol=1e-5):
        raise ValueError(f"{where}attention.scale is {scale}; only {usual:.6g} is supported")
    return ModelConfig.from_json(values, source)


def _check_general(file: GgufFile, source: str) -> None:
    """Raises ValueError if the file holds something else than a language model; other notes in it are harmless."""
    kind = file.metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"{source}: general.type is {kind!r}; only a whole language model ('model') can be read")
    for key in file.metadata:
        if key.startswith(("adapter.", "clip.")):
            raise ValueError(f"{source}: holds {key}: adapters and image encoders are not supported")
    version = file.metadata.get("general.quantization_version", 2)
    if version != 2:
        raise ValueError(f"{source}: general.quantization_version is {version}; supported: 2")
    for key in ("general.architecture", "tokenizer.ggml.tokens"):
        if key not in file.metadata:
            raise ValueError(f"{source}: {key} is missing")


def _value(key: str, value: Any, where: str) -> Any:
    """A key's value; lists of layers' values are supported where all are the same."""
    if isinstance(value, list) and key != "attention.sliding_window_pattern":
        if len(set(value)) != 1:
            raise ValueError(f"{where}{key} is {value!r:.60}; it must be the same in all layers")
        value = value[0]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}{key} is {value}")
    return value


def _check_keys(own: Mapping[str, Any], keys: Mapping[str, str], where: str) -> None:
    """Raises ValueError unless each key is applied or harmless, and none is missing."""
    # Of yarn; another type with it would scale as yarn does.
    neutral = _NEUTRAL | {"rope.scaling.yarn_ext_factor": float(own.get("rope.scaling.type") == "yarn")}
    for key, value in own.items():
        if key not in (*keys, *_READ, *_HARMLESS) and not (key in neutral and value == neutral[key]):
            raise ValueError(f"{where}{key} is {value!r}, which is not supported")
    for key in _REQUIRED:
        if key not in own:
            raise ValueError(f"{where}{key} is missing")


def _head_size(values: Mapping[str, Any]) -> int:
    return int(values["hidden_size"]) // int(values["num_attention_heads"])


def _gemma(values: dict[str, Any], where: str) -> None:
    """Set what llama.cpp derives for Gemma 3 without a key."""
    if not values.get("sliding_window"):
        raise ValueError(f"{where}attention.sliding_window is missing")
    if "attention_factor" in (values["rope_scaling"] or {}):
        raise ValueError(f"{where}rope.scaling.attn_factor must be 1")
    large = values["num_hidden_layers"] == _GEMMA_27B_LAYERS
    values["query_pre_attn_scalar"] = _head_size(values) if large else values["head_dim"]
    pattern = values.get("sliding_window_pattern")
    if isinstance(pattern, list):
        values["layer_types"] = [SLIDING if sliding else FULL for sliding in pattern]
