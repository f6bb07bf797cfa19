"""Keys of a config.json that would change the arithmetic and are not applied.

A key that neither `ModelConfig` nor these lists name is harmless: transformers' own classes of the supported
architectures do not read it, or it concerns training, generation or files only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

# Of other architectures, with the value that changes nothing; null always does. A list holds one value a layer.
_NEUTRAL: dict[str, Any] = {
    "attention_chunk_size": 0,
    "attention_multiplier": None,
    "attn_logit_softcapping": 0,
    "attn_temperature_tuning": False,
    "clip_qkv": None,
    "embedding_multiplier": 1,
    "final_logit_softcapping": 0,
    "is_causal": True,
    "is_encoder_decoder": False,
    "kv_lora_rank": 0,
    "logit_scale": 1,
    "logits_scaling": 1,
    "mlp_only_layers": None,
    "n_routed_experts": 0,
    "no_rope_layers": 1,
    "num_experts": 0,
    "num_kv_shared_layers": 0,
    "num_local_experts": 0,
    "parallel_attn": False,
    "residual_multiplier": 1,
    "rope_interleaved": False,
    "rotary_pct": 1,
    "scale_depth": None,
    "scale_emb": 1,
    "use_alibi": False,
    "use_bidirectional_attention": False,
    "use_mrope": False,
    "use_parallel_residual": False,
    "use_qk_norm": False,
}
# Read by `rope.py` or harmless there.
_ROPE_KEYS = (
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "factor",
    "finetuned",
    "high_freq_factor",
    "long_factor",
    "low_freq_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "rope_theta",
    "rope_type",
    "short_factor",
    "truncate",
    "type",
)
# Of frequencies, factors and lengths; beyond it float32 overflows.
_MOST = 1e18


def check_keys(values: Mapping[str, Any], source: str) -> None:
    """Raises ValueError if a key of another architecture has an effect."""
    for name, neutral in _NEUTRAL.items():
        value = values.get(name)
        several = value if isinstance(value, list) else [value]
        if any(entry is not None and entry != neutral for entry in several):
            raise ValueError(f"{source}: {name} is {value}; a model with {name} is not supported")


def check_rope_keys(settings: Mapping[str, Any], source: str, known: Iterable[str] = _ROPE_KEYS) -> None:
    """Raises ValueError if a setting of the rotary embeddings is unknown, or a number that cannot be right."""
    for name, value in settings.items():
        if name not in known or not (value is None or _fits(name, value)):
            raise ValueError(f"{source}: the rotary embeddings' {name} is {value!r:.60}, which is not supported")


def _fits(name: str, value: Any) -> bool:
    """Whether a setting of the rotary embeddings is of the right type, and a number that can be right."""
    if name in ("rope_type", "type"):
        return isinstance(value, str)
    if name in ("truncate", "finetuned"):
        return isinstance(value, bool)
    if name in ("long_factor", "short_factor"):
        return isinstance(value, list) and all(_is_number(one, math.ulp(0)) for one in value)
    # 0 switches `mscale` off; the others are those of a kind of attention.
    if name == "rope_theta":
        # Powers of 1 are all alike.
        return _is_number(value, math.nextafter(1, 2))
    return _is_number(value, 0 if name.startswith("mscale") else math.ulp(0)) or isinstance(value, dict)


def _is_number(value: Any, least: float) -> bool:
    return type(value) in (int, float) and least <= value <= _MOST
