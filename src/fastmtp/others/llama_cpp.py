"""llama.cpp on the same weights, through PyPI's `xllamacpp` (extra `llama-cpp`), for comparison."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

import gguf
import numpy as np

from fastmtp.files import cache_directory, replacing
from fastmtp.models.gguf_file import gguf_reader
from fastmtp.others.process import EngineProcess

TYPES = ("Q8_0", "BF16", "Q4_0")


def version() -> str | None:
    """The version of xllamacpp; None if it is not installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        return None
    return importlib.metadata.version("xllamacpp")


def requantized(source: Path, kind: str) -> Path:
    """A GGUF file with the weights of `source` in another type, made once and kept in the cache directory."""
    stat = source.stat()
    key = hashlib.sha256(f"{source.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    path = cache_directory() / "llama.cpp" / f"{key}-{kind}.gguf"
    if path.is_file():
        return path
    reader = gguf_reader(source)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            # The writer sets the first ones itself; the type and version of quantisation would be wrong.
            if not name.startswith(("GGUF.", "general.architecture", "general.file_type", "general.quantization")):
                items = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type=items)
        for tensor in reader.tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            # As llama.cpp's own tool does: vectors, and matrices that blocks do not divide, stay as they are.
            block, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
            fits = values.ndim > 1 and values.shape[-1] % block == 0
            wanted = gguf.GGMLQuantizationType[kind if fits else "F32"]
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def process(path: Path, context: int, threads: int, speculation: str | None = None) -> EngineProcess:
    """llama.cpp with a model, in a process of its own; the caller closes it.

    Raises:
        ValueError: llama.cpp failed; the message holds its last words.
    """
    settings = {"path": str(path), "context": context, "threads": threads, "speculation": speculation}
    return EngineProcess("fastmtp.others.llama_cpp_process", settings, f"{path}: llama.cpp")


def decode_speed(path: Path, prompt: list[int], new_tokens: int, threads: int) -> tuple[float, float]:
    """Tokens a second of plain decoding and of prefill, by llama.cpp's own clock."""
    with process(path, len(prompt) + new_tokens + 16, threads) as engine:
        request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "ignore_eos": True}
        found = engine.ask(request)
    return float(found["decode_per_second"]), float(found["prefill_per_second"])
