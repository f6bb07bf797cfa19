"""`ModelConfig`, a model's shape and arithmetic, as read from a Hugging Face config.json.

Attributes have transformers' names. `rope_parameters` has the form of transformers 5, as in heads on disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from fastmtp.models.config_keys import check_keys, check_rope_keys
from fastmtp.models.families import ALIASES, FAMILIES, ONLY_TORCH, Family
from fastmtp.models.quantization import quantization

FULL = "full_attention"
SLIDING = "sliding_attention"
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")

# Far above any model's; names of tensors are made for so many before a file is looked at.
MOST_LAYERS = 2_000
# Token ids and positions are 32-bit integers.
_MOST = 2**31 - 1
_LONG_CONTEXT = ("llama3", "yarn", "longrope")
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# For these keys null is a value of its own, not the default.
_NULLABLE = ("num_key_value_heads", "sliding_window", *_IDS)


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
    query_pre_attn_scalar: int | None = None
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
        family = FAMILIES[kind]
        given = {**family.defaults, **known}
        layers, heads = (_count(given, name, source) for name in ("num_hidden_layers", "num_attention_heads"))
        hidden = _count(given, "hidden_size", source)
        # transformers has no default of head_dim for most models.
        if "head_dim" not in given and hidden % heads:
            raise ValueError(f"{source}: hidden_size {hidden} is no multiple of num_attention_heads {heads}")
        given.setdefault("head_dim", hidden // heads)
        if given.get("num_key_value_heads") is None:
            given["num_key_value_heads"] = heads
        size, key_heads = (_count(given, name, source) for name in ("head_dim", "num_key_value_heads"))
        if size % 2:
            raise ValueError(f"{source}: head_dim is {size}; rotary embeddings need an even one")
        if heads % key_heads:
            raise ValueError(
                f"{source}: num_attention_heads {heads} is no multiple of num_key_value_heads {key_heads}"
            )
        window = _window(family, given, source)
        types = _layer_types(family, given, window, layers, source)
        activation = "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"
        if given.get(activation, ACTIVATIONS[0]) not in ACTIVATIONS:
            supported = ", ".join(ACTIVATIONS)
            raise ValueError(f"{source}: activation {given[activation]!r} is not supported; supported: {supported}")
        epsilon = given.get("rms_norm_eps", 1e-6)
        if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
            raise ValueError(f"{source}: rms_norm_eps is {epsilon!r:.60}; it must be a number above 0 and below 1")
        for name in _IDS:
            ids_of(given.get(name), f"{source}: {name}")
        has_scalar = "query_pre_attn_scalar" in family.defaults
        rope = _rope_by_kind(given, source) if family.rope_by_kind else _rope(family, given, types, source)
        return cls(
            model_type=kind,
            vocab_size=_count(given, "vocab_size", source),
            hidden_size=hidden,
            intermediate_size=_count(given, "intermediate_size", source),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=size,
            max_position_embeddings=_count(given, "max_position_embeddings", source),
            rms_norm_eps=float(epsilon),
            hidden_act=str(given.get(activation, ACTIVATIONS[0])),
            tie_word_embeddings=_switch(given, "tie_word_embeddings", source),
            rope_parameters=rope,
            layer_types=types,
            sliding_window=window,
            attention_bias="attention_bias" in family.biases and _switch(given, "attention_bias", source),
            mlp_bias="mlp_bias" in family.biases and _switch(given, "mlp_bias", source),
            query_pre_attn_scalar=_count(given, "query_pre_attn_scalar", source) if has_scalar else None,
            bos_token_id=given.get("bos_token_id"),
            eos_token_id=given.get("eos_token_id"),
            pad_token_id=given.get("pad_token_id"),
        )


def check_supported(values: Mapping[str, Any], source: str) -> None:
    """Raises ValueError if no engine runs models of this kind."""
    kind = values.get("model_type")
    if kind not in (*FAMILIES, *ALIASES, *ONLY_TORCH):
        supported = ", ".join((*FAMILIES, *ALIASES, *ONLY_TORCH))
        raise ValueError(f"{source}: architecture {kind!r} is not supported; supported: {supported}")
    settings = values.get("quantization_config")
    if kind in ONLY_TORCH and settings:
        raise ValueError(f"{source}: a quantised {kind} is not supported; give the model in bfloat16 or float32")
    quantization(settings, source)
    if kind not in ONLY_TORCH:
        check_keys(values, source)


def ids_of(value: Any, where: str) -> list[int]:
    """The token ids of a setting that holds one, several, or none.

    Raises:
        ValueError: it holds something else.
    """
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"{where}: {value!r} must be a token id or a list of them")
    return ids


def _count(given: Mapping[str, Any], name: str, source: str) -> int:
    value, most = given[name], MOST_LAYERS if name == "num_hidden_layers" else _MOST
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{source}: {name} is {value!r:.60}; it must be a whole number from 1 to {most}")
    return value


def _switch(given: Mapping[str, Any], name: str, source: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"{source}: {name} is {value!r:.60}; it must be true or false")
    return value


def _window(family: Family, given: Mapping[str, Any], source: str) -> int | None:
    switched_off = family.window_switch and not _switch(given, "use_sliding_window", source)
    if not family.windows or switched_off or given["sliding_window"] is None:
        return None
    return _count(given, "sliding_window", source)


def _layer_types(
    family: Family, given: Mapping[str, Any], window: int | None, layers: int, source: str
) -> tuple[str, ...]:
    listed = given.get("layer_types")
    if not (listed is None or (isinstance(listed, list) and all(isinstance(kind, str) for kind in listed))):
        raise ValueError(f"{source}: layer_types is {listed!r:.60}; it must be a list of names")
    types = None if listed is None else tuple(listed)
    # Other families' layers are all of one kind, whatever the list says.
    free = family.window_switch or "sliding_window_pattern" in family.defaults
    if types is None or not free:
        usual = _usual_types(family, given, window, layers, source)
        if types not in (None, usual):
            raise ValueError(f"{source}: layer_types must be {usual[0]} for all {layers} layers here, or missing")
        types = usual
    if len(types) != layers or not set(types) <= {FULL, SLIDING}:
        raise ValueError(f"{source}: layer_types must hold {FULL} or {SLIDING} for each of {layers} layers")
    if SLIDING in types and window is None:
        raise ValueError(f"{source}: layer_types has {SLIDING}, but sliding_window is missing or switched off")
    return types


def _usual_types(
    family: Family, given: Mapping[str, Any], window: int | None, layers: int, source: str
) -> tuple[str, ...]:
    if "sliding_window_pattern" in family.defaults:
        pattern = _count(given, "sliding_window_pattern", source)
        return tuple(SLIDING if (layer + 1) % pattern else FULL for layer in range(layers))
    first = given["max_window_layers"] if family.window_switch else 0
    if type(first) is not int or first < 0:
        raise ValueError(f"{source}: max_window_layers is {first!r:.60}; it must be a whole number of 0 or more")
    return tuple(SLIDING if window is not None and layer >= first else FULL for layer in range(layers))


def _rope(family: Family, given: Mapping[str, Any], types: tuple[str, ...], source: str) -> dict[str, Any]:
    """The settings in the form of transformers 5, from that form or the older one."""
    parameters = _settings(given, "rope_scaling" if given.get("rope_scaling") else "rope_parameters", source)
    nested = [parameters[key] for key in parameters if key in types and family.window_switch]
    for own in nested or [parameters]:
        own.setdefault("rope_theta", given.get("rope_theta", 10000.0))
        if "partial_rotary_factor" in given:
            own.setdefault("partial_rotary_factor", given["partial_rotary_factor"])
        _complete(own, given, source)
    return parameters


def _rope_by_kind(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    parameters = _settings(given, "rope_parameters", source)
    check_rope_keys(parameters, source, (FULL, SLIDING))
    for kind, theta, default in ((SLIDING, "rope_local_base_freq", 1e4), (FULL, "rope_theta", 1e6)):
        own = parameters[kind] = parameters.get(kind) or {"rope_type": "default"}
        if kind == FULL:
            own.update(_settings(given, "rope_scaling", source))
        own.setdefault("rope_theta", given.get(theta, default))
        _complete(own, given, source)
    return parameters


def _settings(given: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """A copy of an object in the configuration; empty where there is none."""
    found = given.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{source}: {name} is {found!r:.60}; it must be an object")
    return deepcopy(found)


def _complete(parameters: dict[str, Any], given: Mapping[str, Any], source: str) -> None:
    check_rope_keys(parameters, source)
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    if parameters["rope_type"] in _LONG_CONTEXT:
        key = "original_max_position_embeddings"
        parameters[key] = given.get(key) or parameters.get(key) or given["max_position_embeddings"]
