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
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from fastmtp.models.info import head_size
from fastmtp.models.source import Source, gguf_reader

Floats = NDArray[np.float32]

# How llama.cpp's converter changes tensors of an architecture, by the file's own name for it.
_INTERLEAVED_ROPE = ("llama",)
_NORMS_PLUS_ONE = ("gemma3",)


class Weights(Protocol):
    """The tensors of a checkpoint."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows start..stop - 1 of a matrix, or elements of a vector."""
        ...


def whole(weights: Weights, name: str) -> Floats:
    return weights.rows(name, 0, weights.shapes()[name][0])


def open_weights(source: Source, config: Any) -> Weights:
    """The tensors of a located model; those of a hub id are fetched first."""
    if source.gguf is not None:
        return GgufWeights(source.gguf, config)
    directory = Path(source.place)
    if not directory.is_dir():
        directory = Path(
            snapshot_download(source.place, allow_patterns=["*.safetensors", "*.safetensors.index.json"])
        )
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    return SafetensorsWeights(directory / name for name in names)


class TensorWeights:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Floats:
        return _floats(self._tensors[name][start:stop])


class SafetensorsWeights:
    """Tensors of safetensors files, which stay on disk."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._slices: dict[str, Any] = {}
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            file: Any = safe_open(path, framework="pt")
            self._slices |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(part.get_shape()) for name, part in self._slices.items()}

    def rows(self, name: str, start: int, stop: int) -> Floats:
        return _floats(self._slices[name][start:stop])


class GgufWeights:
    """Tensors of a GGUF file, dequantised, with what its converter changed undone."""

    def __init__(self, path: Path, config: Any) -> None:
        reader = gguf_reader(path)
        self._architecture = reader.fields["general.architecture"].contents()
        self._head_size = head_size(config)
        architectures = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        names = gguf.get_tensor_name_map(architectures[self._architecture], config.num_hidden_layers)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        factors = self._tensors.pop("rope_freqs.weight", None)
        self.rope_factors: Floats | None = None if factors is None else np.asarray(factors.data, np.float32)
        self._names = {}
        for name in _hugging_face_names(config):
            stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if stored in self._tensors:
                self._names[name] = stored

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            name: tuple(int(size) for size in reversed(self._tensors[stored].shape))
            for name, stored in self._names.items()
        }

    def rows(self, name: str, start: int, stop: int) -> Floats:
        tensor = self._tensors[self._names[name]]
        wanted: Any = slice(start, stop)
        if self._architecture in _INTERLEAVED_ROPE and (".q_proj." in name or ".k_proj." in name):
            wanted = self._interleaved(np.arange(start, stop))
        values = np.array(gguf.dequantize(tensor.data[wanted], tensor.tensor_type), np.float32)
        if self._architecture in _NORMS_PLUS_ONE and name.endswith("norm.weight"):
            values = values - 1
        return values

    def _interleaved(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where rows of q or k are in a file whose rope turns neighbours, not halves."""
        head, place = np.divmod(rows, self._head_size)
        half, pair = np.divmod(place, self._head_size // 2)
        return np.asarray(head * self._head_size + 2 * pair + half)


def _hugging_face_names(config: Any) -> list[str]:
    attention = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    network = [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    norms = ["input", "post_attention", "pre_feedforward", "post_feedforward"]
    parts = [*attention, *network, *(f"{name}_layernorm" for name in norms)]
    inner = [f"model.layers.{layer}.{part}" for layer in range(config.num_hidden_layers) for part in parts]
    modules = ["model.embed_tokens", *inner, "model.norm", "lm_head"]
    return [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def _floats(tensor: Tensor) -> Floats:
    values: Floats = tensor.detach().float().contiguous().cpu().numpy()
    return values
