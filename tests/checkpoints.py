"""Tiny random checkpoints that carry an MTP layer, in every known layout, with the keys that are published."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
)

from tests.conftest import COMMON, byte_tokenizer

LAYERS = 4
SHAPE = {**COMMON, "num_hidden_layers": LAYERS}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 2,
}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MROPE = {**ROPE, "mrope_section": [1, 1, 0], "mrope_interleaved": True}


def _without(*names: str) -> dict[str, Any]:
    return {key: value for key, value in SHAPE.items() if key not in names}


@dataclass(frozen=True)
class Kind:
    """An architecture, and the published names of its MTP layer."""

    config: Callable[[], Any]
    token_norm: str
    hidden_norm: str
    projection: str
    layer: str
    final_norm: str
    embedding_first: bool = True
    fused_experts: bool = False
    wrapper: type[Any] | None = None

    @property
    def appended(self) -> bool:
        return self.layer.startswith("model.layers.")


def _mtp(config: Callable[[], Any], **rest: Any) -> Kind:
    names = ("mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.layers.0", "mtp.norm")
    return Kind(config, *names, **rest)


def _appended(config: Callable[[], Any]) -> Kind:
    layer = f"model.layers.{LAYERS}"
    return Kind(config, f"{layer}.enorm", f"{layer}.hnorm", f"{layer}.eh_proj", layer, f"{layer}.shared_head.norm")


_MIMO = "model.mtp_layers.0"
KINDS = {
    "mimo": Kind(
        lambda: Qwen2Config(
            **_without("head_dim"), rope_parameters={"rope_type": "default", "rope_theta": 640000.0}
        ),
        f"{_MIMO}.token_layernorm",
        f"{_MIMO}.hidden_layernorm",
        f"{_MIMO}.input_proj",
        _MIMO,
        f"{_MIMO}.final_layernorm",
        embedding_first=False,
    ),
    "qwen3_next": _mtp(lambda: Qwen3NextConfig(**SHAPE, **LINEAR, **QWEN_EXPERTS)),
    "qwen3_5": _mtp(lambda: Qwen3_5TextConfig(**SHAPE, **LINEAR, rope_parameters=MROPE), wrapper=Qwen3_5Config),
    "qwen3_5_moe": _mtp(
        lambda: Qwen3_5MoeTextConfig(
            **_without("intermediate_size"), **LINEAR, **QWEN_EXPERTS, rope_parameters=MROPE
        ),
        fused_experts=True,
        wrapper=Qwen3_5MoeConfig,
    ),
    "deepseek_v3": _appended(
        lambda: DeepseekV3Config(**_without("head_dim", "num_key_value_heads"), **EXPERTS, **LATENT)
    ),
    "glm4_moe": _appended(
        lambda: Glm4MoeConfig(**SHAPE, **EXPERTS, use_qk_norm=True, attention_bias=True, rope_parameters=ROPE)
    ),
}


@dataclass(frozen=True)
class Made:
    """A checkpoint on disk, its model, and its MTP layer: transformers' layer, and the tensors around it by key."""

    kind: Kind
    directory: Path
    model: Any
    layer: nn.Module
    tensors: dict[str, Tensor]


def make_checkpoint(name: str, directory: Path) -> Made:
    """Write a random checkpoint in bfloat16, but for the correction biases of routers, as published ones are."""
    torch.manual_seed(0)
    kind = KINDS[name]
    config = kind.config()
    model = AutoModelForCausalLM.from_config(config).eval()
    attending = kind.config()
    if getattr(config, "layer_types", None) is not None:
        attending.layer_types = ["full_attention"] * LAYERS
    attending._attn_implementation = "sdpa"
    layer = type(model.model.layers[-1])(attending, LAYERS - 1).eval().requires_grad_(False)
    for module in (model, layer):
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_(0, 0.3)
        for parameter in module.parameters():
            parameter.requires_grad_(False).copy_(parameter.bfloat16())
    hidden = config.hidden_size
    tensors = {
        f"{norm}.weight": torch.randn(hidden) for norm in (kind.token_norm, kind.hidden_norm, kind.final_norm)
    }
    tensors[f"{kind.projection}.weight"] = torch.randn(hidden, 2 * hidden) / 4
    tensors = {key: tensor.bfloat16() for key, tensor in tensors.items()}
    model.save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    if kind.wrapper is not None:
        kind.wrapper(text_config=config.to_dict()).save_pretrained(directory)
    if name == "mimo":
        _as_mimo(directory / "config.json")
    path = directory / "model.safetensors"
    own = {key: _stored(key, tensor) for key, tensor in load_file(path).items()}
    copies = {}
    if kind.appended:
        copies[f"{kind.layer}.embed_tokens.weight"] = own["model.embed_tokens.weight"].clone()
        copies[f"{kind.layer}.shared_head.head.weight"] = own["lm_head.weight"].clone()
    save_file({**own, **tensors, **_layer_tensors(kind, layer), **copies}, path, metadata={"format": "pt"})
    return Made(kind, directory, model, layer, tensors)


def _stored(key: str, tensor: Tensor) -> Tensor:
    return tensor if "correction_bias" in key else tensor.bfloat16()


def _layer_tensors(kind: Kind, layer: nn.Module) -> dict[str, Tensor]:
    """The layer by published keys: each matrix of each expert by itself, unless they are published fused."""
    tensors = {}
    for name, value in layer.state_dict().items():
        key = f"{kind.layer}.{name}"
        prefix, _, matrix = key.rpartition(".")
        stored = _stored(key, value)
        if ".experts." not in name or kind.fused_experts:
            tensors[key] = stored
            continue
        for expert, both in enumerate(stored):
            parts = {"gate_proj": both[:16], "up_proj": both[16:]} if matrix == "gate_up_proj" else {matrix: both}
            tensors |= {f"{prefix}.{expert}.{part}.weight": rows.clone() for part, rows in parts.items()}
    return tensors


def _as_mimo(path: Path) -> None:
    """As MiMo's configuration is: an architecture of its own with remote code, and settings of transformers 4."""
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["layer_types"]
    code = {"AutoConfig": "configuration_mimo.MiMoConfig", "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM"}
    names = {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "auto_map": code}
    changes = {"rope_theta": 640000, "use_sliding_window": False, "sliding_window": 32768, "attention_bias": True}
    path.write_text(json.dumps(config | names | changes | {"head_dim": 8, "num_nextn_predict_layers": 1}))
