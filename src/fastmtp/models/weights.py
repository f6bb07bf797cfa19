"""Reading the tensors of a model one piece at a time, under their Hugging Face names, as float32.

Nothing here holds more than the rows that are asked for, so an engine can convert a model that fills memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
from numpy.typing import NDArray

from fastmtp.models.config import ModelConfig
from fastmtp.models.family import family, tensor_shapes
from fastmtp.models.gguf_file import GgufFile, GgufTensor
from fastmtp.models.safetensors_file import StoredTensor, read_header

Floats = NDArray[np.float32]

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
# Gemma has a norm after attention, too.
_GGUF_OUTER_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GGUF_AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ROPE_FACTORS = "rope_freqs.weight"


class Weights(Protocol):
    """The tensors of a checkpoint."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows start..stop - 1 of a matrix, or elements of a vector."""
        ...


def whole(weights: Weights, name: str) -> Floats:
    return weights.rows(name, 0, weights.shapes()[name][0])


class TensorWeights:
    """PyTorch's tensors in memory."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Floats:
        values: Floats = self._tensors[name][start:stop].detach().float().contiguous().cpu().numpy()
        return values


class SafetensorsWeights:
    """Tensors of safetensors files, which stay on disk."""

    def __init__(self, paths: Iterable[Path]) -> None:
        """
        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or holds a tensor of a type that is not supported.
        """
        self._tensors: dict[str, StoredTensor] = {}
        for path in paths:
            self._tensors |= read_header(path)

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Floats:
        return self._tensors[name].rows(start, stop)


def directory_weights(directory: Path) -> SafetensorsWeights:
    """The tensors of a Hugging Face directory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the index names one outside the directory.
    """
    names = [SINGLE]
    if (directory / INDEX).is_file():
        names = sorted(set(json.loads((directory / INDEX).read_text())["weight_map"].values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{directory / INDEX}: names {name!r}, which is not a file of the directory")
    return SafetensorsWeights(directory / name for name in names)


class GgufWeights:
    """Tensors of a GGUF file, dequantised, with what its converter changed undone.

    Attributes:
        rope_factors: by which the frequencies of rotary embeddings are divided; None if the file has none.
    """

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        stored = dict(file.tensors)
        factors = stored.pop(_ROPE_FACTORS, None)
        self.rope_factors: Floats | None = None if factors is None else _floats(factors, slice(None))
        self._config = config
        # llama.cpp's converter reorders rows of q and k for a rope that turns neighbours.
        self._reordered = file.metadata["general.architecture"] == "llama"
        self._offset = np.float32(family(config).norm_offset)
        names = _gguf_names(config)
        self._tensors = {name: stored.pop(own) for name, own in names.items() if own in stored}
        # Files of models whose q, k and v alone have biases.
        outputs = [name for name in names if name.endswith("o_proj.bias") and name not in self._tensors]
        self._zeros = {name: (config.hidden_size,) for name in outputs if config.attention_bias}
        # What has no place is named as the file names it.
        self._tensors |= stored

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._zeros | {name: tensor.shape for name, tensor in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Floats:
        if name in self._zeros:
            return np.zeros(stop - start, np.float32)
        wanted: Any = slice(start, stop)
        if self._reordered and (".q_proj." in name or ".k_proj." in name):
            wanted = self._neighbours(np.arange(start, stop))
        values = _floats(self._tensors[name], wanted)
        return values - self._offset if self._offset and name.endswith("norm.weight") else values

    def _neighbours(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows of q or k are in a file whose rope turns neighbours, not halves."""
        size = self._config.head_dim
        head, place = np.divmod(rows, size)
        half, pair = np.divmod(place, size // 2)
        return np.asarray(head * size + 2 * pair + half)


def _gguf_names(config: ModelConfig) -> dict[str, str]:
    """By a tensor's Hugging Face name, the file's."""
    inner = _GGUF_NAMES | (_GGUF_OUTER_NORMS if family(config).outer_norms else {})
    names = {}
    for name in tensor_shapes(config):
        module, _, kind = name.rpartition(".")
        if module in _GGUF_AROUND:
            names[name] = f"{_GGUF_AROUND[module]}.{kind}"
        else:
            _, _, layer, part = module.split(".", 3)
            names[name] = f"blk.{layer}.{inner[part]}.{kind}"
    return names


def _floats(tensor: GgufTensor, rows: Any) -> Floats:
    values = np.array(gguf.dequantize(tensor.data[rows], tensor.kind), np.float32)
    return values.reshape(len(values), *tensor.shape[1:])
