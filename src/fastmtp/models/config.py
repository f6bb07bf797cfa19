"""`ModelConfig`, a model's shape and arithmetic, as read from a Hugging Face config.json.

Attributes have transformers' names. `rope_parameters` has the form of transformers 5, as in heads on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

FULL = "full_attention"
SLIDING = "sliding_attention"

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
# With experts or latent attention, which the native engine does not have.
ONLY_TORCH = ("glm4_moe", "deepseek_v3")
# Architectures that run as another one: MiMo is a Qwen2 with additional MTP layers (vLLM's mimo.py, 055e47c).
ALIASES = {"mimo": "qwen2"}

_LONG_CONTEXT = ("llama3", "yarn", "longrope")
# transformers' defaults for keys that a config.json lacks.
_COMMON = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2}
_MISTRAL = {"intermediate_size": 14336, "max_position_embeddings": 131072, "num_key_value_heads": 8}
_QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "max_position_embeddings": 32768}
_QWEN_LAYERS = {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | _ENDS | {"intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": _COMMON | _ENDS | _MISTRAL | {"sliding_window": 4096},
    "qwen2": _COMMON | _QWEN | _QWEN_LAYERS,
    "qwen3": _COMMON | _QWEN | _QWEN_LAYERS | {"head_dim": 128},
    "gemma3_text": {
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
    },
}
# For these keys null is a value of its own, not the default.
_NULLABLE = ("num_key_value_heads", "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id")
_REFUSED = ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")


@dataclass(frozen=True)
class ModelConfig:
    """A dense decoder's shape and arithmetic.

    Attributes:
        rope_parameters: one set for all layers; in Gemma one set for each kind of attention.
        layer_types: FULL or SLIDING for each layer.
        sliding_window: number of last tokens that a SLIDING layer attends to.
        attention_bias: q, k, v and o have biases; Qwen2's q, k and v always have them.
        query_pre_attn_scalar: attention scores are divided by its root; None means `head_dim`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    rope_parameters: Mapping[str, Any]
    layer_types: tuple[str, ...]
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    query_pre_attn_scalar: float | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: str) -> ModelConfig:
        """Read the contents of a config.json.

        Raises:
            ValueError: no engine runs such a model, or a value is invalid.
        """
        check_supported(values, source)
        kind = ALIASES.get(values["model_type"], values["model_type"])
        known = {name: value for name, value in values.items() if value is not None or name in _NULLABLE}
        given = _DEFAULTS[kind] | known
        layers, heads = (_count(given, name, source) for name in ("num_hidden_layers", "num_attention_heads"))
        hidden = _count(given, "hidden_size", source)
        # transformers has no default of head_dim for most models.
        given.setdefault("head_dim", hidden // heads)
        if given.get("num_key_value_heads") is None:
            given["num_key_value_heads"] = heads
        window = _window(kind, given)
        types = _layer_types(kind, given, window, layers)
        if len(types) != layers or not set(types) <= {FULL, SLIDING}:
            raise ValueError(f"{source}: layer_types must hold {FULL} or {SLIDING} for each of {layers} layers")
        gemma = kind == "gemma3_text"
        return cls(
            model_type=kind,
            vocab_size=_count(given, "vocab_size", source),
            hidden_size=hidden,
            intermediate_size=_count(given, "intermediate_size", source),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=_count(given, "num_key_value_heads", source),
            head_dim=_count(given, "head_dim", source),
            max_position_embeddings=_count(given, "max_position_embeddings", source),
            rms_norm_eps=float(given.get("rms_norm_eps", 1e-6)),
            hidden_act=str(given["hidden_activation"] if gemma else given.get("hidden_act", "silu")),
            tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
            rope_parameters=_gemma_rope(given) if gemma else _rope(kind, given, types),
            layer_types=types,
            sliding_window=window,
            attention_bias=kind in ("llama", "qwen3", "gemma3_text") and bool(given.get("attention_bias", False)),
            mlp_bias=kind == "llama" and bool(given.get("mlp_bias", False)),
            query_pre_attn_scalar=float(given["query_pre_attn_scalar"]) if gemma else None,
            bos_token_id=given.get("bos_token_id"),
            eos_token_id=given.get("eos_token_id"),
            pad_token_id=given.get("pad_token_id"),
        )


def check_supported(values: Mapping[str, Any], source: str) -> None:
    """Raises ValueError if no engine runs models of this kind."""
    kind = values.get("model_type")
    if kind not in (*SUPPORTED, *ALIASES, *ONLY_TORCH):
        supported = ", ".join((*SUPPORTED, *ALIASES, *ONLY_TORCH))
        raise ValueError(f"{source}: architecture {kind!r} is not supported; supported: {supported}")
    for name in _REFUSED:
        if values.get(name):
            raise ValueError(f"{source}: a model with {name} is not supported")
    if quantized := values.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise ValueError(
            f"{source}: its weights are quantised ({method}), which is not supported; give the model in bfloat16, "
            "float16 or float32, or as a .gguf file"
        )


def _count(given: Mapping[str, Any], name: str, source: str) -> int:
    value = given[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{source}: {name} is {value!r}; it must be a whole number of 1 or more")
    return value


def _window(kind: str, given: Mapping[str, Any]) -> int | None:
    if kind in ("qwen2", "qwen3") and not given.get("use_sliding_window", False):
        return None
    return None if kind == "llama" else given["sliding_window"]


def _layer_types(kind: str, given: Mapping[str, Any], window: int | None, layers: int) -> tuple[str, ...]:
    if kind != "llama" and given.get("layer_types") is not None:
        return tuple(given["layer_types"])
    if kind == "gemma3_text":
        pattern = int(given["sliding_window_pattern"])
        return tuple(SLIDING if (layer + 1) % pattern else FULL for layer in range(layers))
    first = 0 if kind == "mistral" else int(given.get("max_window_layers", 0))
    return tuple(SLIDING if window is not None and layer >= first else FULL for layer in range(layers))


def _rope(kind: str, given: Mapping[str, Any], types: tuple[str, ...]) -> dict[str, Any]:
    """The settings in the form of transformers 5, from that form or the older one."""
    parameters: dict[str, Any] = deepcopy(given.get("rope_scaling") or given.get("rope_parameters") or {})
    nested = [parameters[key] for key in parameters if key in types and kind in ("qwen2", "qwen3")]
    for own in nested or [parameters]:
        own.setdefault("rope_theta", given.get("rope_theta", 10000.0))
        if "partial_rotary_factor" in given:
            own.setdefault("partial_rotary_factor", given["partial_rotary_factor"])
        _complete(own, given)
    return parameters


def _gemma_rope(given: Mapping[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = deepcopy(given.get("rope_parameters") or {})
    for kind, theta, default in ((SLIDING, "rope_local_base_freq", 1e4), (FULL, "rope_theta", 1e6)):
        own = parameters[kind] = parameters.get(kind) or {"rope_type": "default"}
        if kind == FULL:
            own.update(given.get("rope_scaling") or {})
        own.setdefault("rope_theta", given.get(theta, default))
        _complete(own, given)
    return parameters


def _complete(parameters: dict[str, Any], given: Mapping[str, Any]) -> None:
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if parameters["rope_type"] in _LONG_CONTEXT:
        parameters.setdefault("original_max_position_embeddings", given["max_position_embeddings"])
