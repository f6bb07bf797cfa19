"""The tensors of a model under their Hugging Face names, read as float32 some rows at a time.

Only the requested rows are in memory, so an engine can convert a model as large as the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fastmtp.models.config import ModelConfig
from fastmtp.models.gguf_file import GgufFile
from fastmtp.models.gguf_rope import FACTORS, FACTORS_ARCHITECTURE, LONG_FACTORS
from fastmtp.models.grids import GRIDDED, Grid, grid
from fastmtp.models.quantization import Quantization
from fastmtp.models.quantized import dequantized
from fastmtp.models.safetensors_file import FLOATS, SINGLE, StoredTensor, read_directory, read_index
from fastmtp.models.tensors import family, tensor_shapes

Floats = NDArray[np.float32]
# What is converted at a time fits a processor's caches.
_CHUNK_BYTES = 1 << 21

# llama.cpp's names for the modules of a layer.
GGUF_NAMES = {
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
# A family with norms after its networks, too, names its norms differently.
_GGUF_OUTER_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GGUF_AROUND = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Weights(Protocol):
    """The tensors of a model.

    Attributes:
        rope_factors: divisors of the rotary frequencies, which some GGUF files hold.
    """

    @property
    def rope_factors(self) -> Floats | None: ...

    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Rows start..stop - 1 of a matrix, or elements of a vector."""
        ...

    def grid(self, name: str, start: int, stop: int) -> Grid | None:
        """Rows of a matrix whose weights are stored on a grid of 16 steps; None for others."""
        ...


def whole(weights: Weights, name: str) -> Floats:
    return weights.rows(name, 0, weights.shapes()[name][0])


def chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Ranges of rows that are worth reading at once."""
    step = max(1, _CHUNK_BYTES // (4 * math.prod(shape[1:])))
    return ((start, min(shape[0], start + step)) for start in range(0, shape[0], step))


def has_tied_head(weights: Weights) -> bool:
    """Whether the LM head is the embedding: none is stored, or an equal one."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    shapes = weights.shapes()
    return head not in shapes or all(
        np.array_equal(weights.rows(head, start, stop), weights.rows(embedding, start, stop))
        for start, stop in chunks(shapes[head])
    )


def finite(values: Floats, name: str) -> Floats:
    """The values as they are; raises ValueError if one is infinite or not a number."""
    # The sum of squares takes less time than a look at each value.
    if not np.isfinite(np.vdot(values, values)) and not np.isfinite(values).all():
        raise ValueError(f"{name}: holds values that are infinite or not a number")
    return values


class SafetensorsWeights:
    """The tensors of safetensors files, read through memory maps."""

    rope_factors: Floats | None = None

    def __init__(
        self, tensors: Mapping[str, StoredTensor], where: Path, quantization: Quantization | None = None
    ) -> None:
        """
        Args:
            where: the file or directory, for error messages.
            quantization: how matrices are quantised, which are dequantised here.
        Raises:
            ValueError: a tensor has a type that is not supported.
        """
        self._where = where
        self._tensors = dequantized(tensors, quantization, where)
        for name, tensor in self._tensors.items():
            if isinstance(tensor, StoredTensor) and tensor.kind not in FLOATS:
                scales = "" if quantization is None else ", or quantised with scales"
                supported = ", ".join(FLOATS)
                raise ValueError(f"{where}: {name} is stored as {tensor.kind}; supported: {supported}{scales}")
        self._shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def rows(self, name: str, start: int, stop: int) -> Floats:
        return finite(self._tensors[name].rows(start, stop), f"{self._where}: {name}")

    def grid(self, name: str, start: int, stop: int) -> Grid | None:
        return None


def weight_paths(directory: Path) -> list[Path]:
    """The files that hold the tensors of a Hugging Face directory.

    Raises:
        ValueError: the index is damaged, or names a file outside the directory.
    """
    index = read_index(directory)
    names = [SINGLE] if index is None else sorted(set(index.values()))
    return [directory / name for name in names]


def directory_weights(directory: Path, quantization: Quantization | None = None) -> SafetensorsWeights:
    """The tensors of a Hugging Face directory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, the index contradicts the files, or a tensor's type is not supported.
    """
    return SafetensorsWeights(read_directory(directory), directory, quantization)


class GgufWeights:
    """The tensors of a GGUF file, dequantised; the changes that llama.cpp's converter made are undone."""

    def __init__(self, file: GgufFile, config: ModelConfig) -> None:
        stored = dict(file.tensors)
        architecture = file.metadata["general.architecture"]
        self.rope_factors: Floats | None = None
        if config.rope_parameters.get("rope_type") == "longrope":
            # They are the configuration's.
            stored = {name: tensor for name, tensor in stored.items() if name not in LONG_FACTORS}
        elif architecture == FACTORS_ARCHITECTURE and FACTORS in stored:
            self.rope_factors = stored.pop(FACTORS).rows(slice(None))
        self._path, self._config = file.path, config
        # The converter reorders the rows of q and k for a rope that rotates neighbouring elements.
        self._reordered = architecture == "llama"
        self._offset = np.float32(family(config).norm_offset)
        names = _gguf_names(config)
        self._tensors = {name: stored.pop(own) for name, own in names.items() if own in stored}
        # Where only some modules, or some layers, have biases, those of the others are zeros.
        expected = tensor_shapes(config)
        self._zeros = {
            name: shape for name, shape in expected.items() if name.endswith(".bias") and name not in self._tensors
        }
        # Tensors that the model does not have keep the file's names, for the error message.
        self._tensors |= stored

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._zeros | {name: tensor.shape for name, tensor in self._tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> Floats:
        if name in self._zeros:
            return np.zeros(stop - start, np.float32)
        values = self._tensors[name].rows(self._stored_rows(name, start, stop))
        if self._offset and name.endswith("norm.weight"):
            values = values - self._offset
        return finite(values, f"{self._path}: {name}")

    def grid(self, name: str, start: int, stop: int) -> Grid | None:
        tensor = self._tensors[name]
        if tensor.kind not in GRIDDED:
            return None
        found = grid(tensor.kind, tensor.data[self._stored_rows(name, start, stop)])
        for part in (found.steps, found.least):
            finite(part, f"{self._path}: {name}")
        return found

    def _stored_rows(self, name: str, start: int, stop: int) -> slice | NDArray[np.int64]:
        if self._reordered and (".q_proj." in name or ".k_proj." in name):
            return self._neighbours(np.arange(start, stop))
        return slice(start, stop)

    def _neighbours(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The file's rows of q or k, whose rope rotates neighbours, for rows of a rope that rotates halves."""
        size = self._config.head_dim
        head, element = np.divmod(rows, size)
        half, pair = np.divmod(element, size // 2)
        return np.asarray(head * size + 2 * pair + half)


def _gguf_names(config: ModelConfig) -> dict[str, str]:
    """The name of each tensor in the file, by its Hugging Face name."""
    inner = GGUF_NAMES | (_GGUF_OUTER_NORMS if family(config).outer_norms else {})
    names = {}
    for name in tensor_shapes(config):
        module, _, kind = name.rpartition(".")
        if module in _GGUF_AROUND:
            names[name] = f"{_GGUF_AROUND[module]}.{kind}"
        else:
            _, _, layer, part = module.split(".", 3)
            names[name] = f"blk.{layer}.{inner[part]}.{kind}"
    return names
