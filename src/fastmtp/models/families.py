"""The families of models that run here: what their configurations leave out, and how their layers differ."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# With experts or latent attention, which the native engine does not have.
ONLY_TORCH = ("glm4_moe", "deepseek_v3")
# Architectures that run as another one: MiMo is a Qwen2 with additional MTP layers (vLLM's mimo.py, 055e47c).
ALIASES = {"mimo": "qwen2"}


@dataclass(frozen=True)
class Family:
    """
    Attributes:
        model_class: transformers' name of the causal language model; heads on disk hold it.
        defaults: transformers' values of keys that a config.json lacks.
        windows: layers may attend to the last tokens only.
        window_switch: they do so only with `use_sliding_window`, from layer `max_window_layers` on.
        biases: keys of the configuration that give linear modules a bias.
        query_bias: q, k and v have biases whatever the configuration says.
        norm_offset: added to a norm's stored weights to get its gains.
        query_key_norms: q and k of each head are normalised.
        outer_norms: there are norms after attention and the feed-forward network, too.
        scaled_embedding: embeddings are multiplied by the root of the hidden size.
        rope_by_kind: layers with a window have a rope of their own.
    """

    model_class: str
    defaults: Mapping[str, Any]
    windows: bool = True
    window_switch: bool = False
    biases: tuple[str, ...] = ()
    query_bias: bool = False
    norm_offset: float = 0.0
    query_key_norms: bool = False
    outer_norms: bool = False
    scaled_embedding: bool = False
    rope_by_kind: bool = False


_COMMON = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_LLAMA = {"intermediate_size": 11008, "max_position_embeddings": 2048}
_MISTRAL = {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8}
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_QWEN_LAYERS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM", _COMMON | _ENDS | _LLAMA, windows=False, biases=("attention_bias", "mlp_bias")
    ),
    "mistral": Family("MistralForCausalLM", _COMMON | _ENDS | _MISTRAL | {"sliding_window": 4096}),
    "qwen2": Family("Qwen2ForCausalLM", _COMMON | _QWEN | _QWEN_LAYERS, window_switch=True, query_bias=True),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _COMMON | _QWEN | _QWEN_LAYERS | {"head_dim": 128},
        window_switch=True,
        biases=("attention_bias",),
        query_key_norms=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA,
        biases=("attention_bias",),
        norm_offset=1.0,
        query_key_norms=True,
        outer_norms=True,
        scaled_embedding=True,
        rope_by_kind=True,
    ),
}
SUPPORTED = tuple(FAMILIES)
