"""Small GGUF files: a random llama model around a tokenizer, with any metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import GGUFWriter

HIDDEN, INNER, HEADS = 32, 48, 4


def write_random(
    path: Path,
    tokenizer: dict[str, Any],
    architecture: str = "llama",
    *,
    tensors: Mapping[str, np.ndarray[Any, Any]] = MappingProxyType({}),
    **more: Any,
) -> None:
    """A model of one layer.

    Args:
        tensors: besides those of the layer.
        tokenizer: keys below `tokenizer.`, with `.` or `__` between their parts.
        more: keys below the architecture's name, as well.
    """
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    own = {f"tokenizer.{name}": value for name, value in tokenizer.items()}
    own |= {f"{architecture}.{name.replace('__', '.')}": value for name, value in more.items()}
    for name, value in own.items():
        _add(writer, name, value)
    size = len(tokenizer["ggml.tokens"])
    shapes = {"token_embd": (size, HIDDEN), "output_norm": (HIDDEN,)}
    block = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "ffn_down": (HIDDEN, INNER)}
    block |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (HIDDEN, HIDDEN))
    block |= dict.fromkeys(("ffn_gate", "ffn_up"), (INNER, HIDDEN))
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape, np.float32) / 4)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


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
