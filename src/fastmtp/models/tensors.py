"""What a configuration implies: the tensors of a model and their shapes, norms, scales, windows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fastmtp.models.config import FULL, SLIDING, ModelConfig
from fastmtp.models.families import FAMILIES, Family
from fastmtp.models.info import raise_problems

Shape = tuple[int, ...]

# Tensors of Hugging Face checkpoints that a model does not need: leftovers, and MTP layers, which are heads.
_LEFT_OVER = ("rotary_emb.inv_freq", ".rotary_emb.inv_freq")
_MTP_LAYERS = ("model.mtp_layers.", "mtp.")


def family(config: ModelConfig) -> Family:
    return FAMILIES[config.model_type]


def layer_types(config: Any) -> list[str]:
    """Attention kind of each layer; without `layer_types` all layers have the same."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return list(types)
    kind = SLIDING if getattr(config, "sliding_window", None) else FULL
    return [kind] * int(config.num_hidden_layers)


def windows(config: Any) -> dict[str, int | None]:
    """The window of each kind of attention in the model; None attends to all tokens."""
    sizes = {FULL: None, SLIDING: getattr(config, "sliding_window", None)}
    return {kind: sizes[kind] for kind in sorted(set(layer_types(config)))}


def attention_scale(config: ModelConfig) -> float:
    """The factor of the attention scores."""
    return float((config.query_pre_attn_scalar or config.head_dim) ** -0.5)


def embedding_scale(config: ModelConfig) -> float:
    return float(config.hidden_size**0.5) if family(config).scaled_embedding else 1.0


@dataclass(frozen=True)
class Projection:
    """The size of a linear module, and whether it has a bias."""

    outputs: int
    inputs: int
    bias: bool


def projections(config: ModelConfig) -> dict[str, Projection]:
    """The linear modules of a layer, by name."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = (config.head_dim * count for count in (config.num_attention_heads, config.num_key_value_heads))
    bias = config.attention_bias or family(config).query_bias
    return {
        "self_attn.q_proj": Projection(queries, hidden, bias),
        "self_attn.k_proj": Projection(keys, hidden, bias),
        "self_attn.v_proj": Projection(keys, hidden, bias),
        "self_attn.o_proj": Projection(hidden, queries, config.attention_bias),
        "mlp.gate_proj": Projection(inner, hidden, config.mlp_bias),
        "mlp.up_proj": Projection(inner, hidden, config.mlp_bias),
        "mlp.down_proj": Projection(hidden, inner, config.mlp_bias),
    }


def norms(config: ModelConfig) -> dict[str, int]:
    """The sizes of a layer's norms, by name."""
    own = family(config)
    names = ["input_layernorm", "post_attention_layernorm"]
    if own.outer_norms:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    sizes = dict.fromkeys(names, config.hidden_size)
    if own.query_key_norms:
        sizes |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), config.head_dim)
    return sizes


def layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The tensors of one layer, by their names in it."""
    shapes: dict[str, Shape] = {}
    for name, own in projections(config).items():
        shapes[f"{name}.weight"] = own.outputs, own.inputs
        if own.bias:
            shapes[f"{name}.bias"] = (own.outputs,)
    return shapes | {f"{name}.weight": (size,) for name, size in norms(config).items()}


def head_shapes(config: ModelConfig) -> dict[str, Shape]:
    """The tensors of an MTP head for a model."""
    hidden = config.hidden_size
    norms = {f"{name}.weight": (hidden,) for name in ("token_norm", "hidden_norm", "final_norm")}
    layer = {f"layer.{name}": shape for name, shape in layer_shapes(config).items()}
    return {**norms, "input_proj.weight": (hidden, 2 * hidden), **layer}


def tensor_shapes(config: ModelConfig) -> dict[str, Shape]:
    """All tensors of a model, the LM head included if it is tied."""
    outer = (config.vocab_size, config.hidden_size)
    layer = layer_shapes(config)
    layers = {
        f"model.layers.{index}.{name}": shape
        for index in range(config.num_hidden_layers)
        for name, shape in layer.items()
    }
    return {
        "model.embed_tokens.weight": outer,
        **layers,
        "model.norm.weight": (config.hidden_size,),
        "lm_head.weight": outer,
    }


def check_tensors(config: ModelConfig, shapes: Mapping[str, Shape], source: str) -> None:
    """Raises ValueError if a tensor is missing, has another shape, or is not one of the model's.

    A tied LM head may be stored.
    """
    expected = tensor_shapes(config)
    if config.tie_word_embeddings and "lm_head.weight" not in shapes:
        del expected["lm_head.weight"]
    wrong = [f"{name}: has no place in a {config.model_type}" for name in _strange(shapes, expected)]
    wrong += [
        f"{name}: {list(shapes[name]) if name in shapes else 'missing'}, must be {list(shape)}"
        for name, shape in expected.items()
        if shapes.get(name) != shape
    ]
    raise_problems(f"{source}: tensors do not fit the configuration:", wrong)


def _strange(stored: Iterable[str], expected: Mapping[str, Shape]) -> list[str]:
    return [
        name
        for name in stored
        if name not in expected and not name.startswith(_MTP_LAYERS) and not name.endswith(_LEFT_OVER)
    ]
