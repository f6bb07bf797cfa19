"""Writing a GGUF file one tensor at a time, quantised to a type."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np

from fastmtp.export.gguf.layout import ARCHITECTURE, Stored, Value

# llama.cpp's own tools do not quantise the router of experts.
_IN_FULL = (".ffn_gate_inp.",)


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Iterable[Stored], kind: str) -> None:
    """Write a file.

    Args:
        kind: type of the matrices, one of registry.GGUF_TYPES. Vectors, and matrices whose rows its blocks do not
            divide, are F32.
    Raises:
        ValueError: the disk has too little room, or a value is beyond the type's range.
    """
    listed = [(tensor, _type(tensor, kind)) for tensor in tensors]
    sizes = [_bytes(tensor.shape, wanted) for tensor, wanted in listed]
    free = shutil.disk_usage(path.parent).free
    if sum(sizes) > free:
        raise ValueError(f"{path.parent}: {sum(sizes) / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free")
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"])
    for name, entry in metadata.items():
        writer.add_key_value(name, entry.value, entry.kind, sub_type=entry.items)
    for (tensor, wanted), size in zip(listed, sizes, strict=True):
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=wanted)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, wanted in listed:
            values = tensor.values()
            assert values.shape == tensor.shape, tensor.name
            if wanted == gguf.GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
                raise ValueError(f"{tensor.name}: holds values beyond the range of F16; give another --type")
            writer.write_tensor_data(gguf.quants.quantize(values, wanted))


def _type(tensor: Stored, kind: str) -> gguf.GGMLQuantizationType:
    block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    is_matrix = len(tensor.shape) > 1 and not any(part in tensor.name for part in _IN_FULL)
    return gguf.GGMLQuantizationType[kind if is_matrix and tensor.shape[-1] % block == 0 else "F32"]


def _bytes(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count: int = math.prod(shape) // block * size
    return count
