"""Small GGUF files: a random llama model around a tokenizer, with any metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from tokenizers.pre_tokenizers import ByteLevel

from fastmtp.engines.torch.target import Target

HIDDEN, INNER, HEADS = 32, 48, 4


def byte_level(size: int = 257) -> dict[str, Any]:
    """The keys of a tokenizer with a token for each byte, and one more of two bytes."""
    tokens = [*sorted(ByteLevel.alphabet()), "ab"]
    tokens += [f"t{index}" for index in range(len(tokens), size)]
    return {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": tokens, "ggml.merges": ["a b"]}


def write_random(
    path: Path,
    tokenizer: dict[str, Any],
    architecture: str = "llama",
    *,
    tensors: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({}),
    typed: Mapping[str, tuple[np.ndarray[Any, Any], GGMLQuantizationType]] = MappingProxyType({}),
    others: Mapping[str, Any] = MappingProxyType({}),
    hidden: int = HIDDEN,
    inner: int = INNER,
    **more: Any,
) -> None:
    """A model of one layer.

    Args:
        tensors: besides those of the layer.
        typed: instead of those of the layer, with their types.
        others: keys by their whole names.
        tokenizer: keys below `tokenizer.`, with `.` or `__` between their parts.
        more: keys below the architecture's name, as well.
    """
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(hidden)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    own = {f"tokenizer.{name}": value for name, value in tokenizer.items()}
    own |= {f"{architecture}.{name.replace('__', '.')}": value for name, value in more.items()}
    own |= others
    for name, value in own.items():
        if value is not None:
            _add(writer, name, value)
    size = len(tokenizer["ggml.tokens"])
    shapes = {"token_embd": (size, hidden), "output_norm": (hidden,)}
    block = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "ffn_down": (hidden, inner)}
    block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (hidden, hidden))
    block |= dict.fromkeys(("ffn_gate", "ffn_up"), (inner, hidden))
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        if f"{name}.weight" not in typed:
            writer.add_tensor(f"{name}.weight", random.standard_normal(shape, np.float32) / 4)
    for name, (values, kind) in typed.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(
    path: Path,
    target: Target,
    keys: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, np.ndarray[Any, Any] | None] = MappingProxyType({}),
    alignment: int = 32,
) -> None:
    """A model as llama.cpp's converter writes it, in float32.

    Args:
        keys: below the architecture's name, besides the shape; without None.
        tensors: besides the model's, or instead of them; without None.
    """
    config, values = target.config, dict(target.model.state_dict())
    name = config.model_type.removesuffix("_text")
    shape = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": target.model.model.layers[0].self_attn.head_dim,
        "attention.value_length": target.model.model.layers[0].self_attn.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if name == "gemma3":
        pattern = [kind == "sliding_attention" for kind in config.layer_types]
        shape |= {"attention.sliding_window": config.sliding_window, "attention.sliding_window_pattern": pattern}
        shape |= {"rope.freq_base": 1e6, "rope.freq_base_swa": 1e4}
        # The tiny model keeps the class's scale, which is that of heads of 256.
        for layer in range(config.num_hidden_layers):
            key = f"model.layers.{layer}.self_attn.q_norm.weight"
            values[key] = (1 + values[key]) * (8 / 256) ** 0.5 - 1
    writer = GGUFWriter(str(path), name)
    writer.add_custom_alignment(alignment)
    for key, value in byte_level(config.vocab_size).items():
        _add(writer, f"tokenizer.{key}", value)
    for key, value in {**shape, **keys}.items():
        if value is not None:
            _add(writer, f"{name}.{key}", value)
    architecture = {text: number for number, text in MODEL_ARCH_NAMES.items()}[name]
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    found: dict[str, np.ndarray[Any, Any] | None] = {}
    for own, value in values.items():
        if own != "lm_head.weight" or not config.tie_word_embeddings:
            gain = 1 if name == "gemma3" and own.endswith("norm.weight") else 0
            array = (value + gain).numpy()
            if name == "llama" and (".q_proj." in own or ".k_proj." in own):
                array = _neighbours(array, shape["attention.key_length"])
            found[names.get_name(own, (".weight", ".bias"))] = array
    for own, array in {**found, **tensors}.items():
        if array is not None:
            writer.add_tensor(own, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _neighbours(rows: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """The rows of q or k in the order of a rope that rotates neighbours."""
    halves = rows.reshape(rows.shape[0] // size, 2, size // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def _add(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
