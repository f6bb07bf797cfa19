"""The engines that a head can be exported to, by the name that --to takes; engines.py says what each provides."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from fastmtp.export.engines import Engine

MODULES = {
    "llama.cpp": "fastmtp.export.llama_cpp",
    "vllm": "fastmtp.export.vllm",
    "sglang": "fastmtp.export.sglang",
    "transformers": "fastmtp.export.custom_generate",
    "checkpoint": "fastmtp.export.checkpoint",
}
# Of the weights in a GGUF file, the default first; here, where the command can name them without heavy imports.
GGUF_TYPES = ("BF16", "F16", "F32", "Q8_0", "Q4_0")


def engine_named(name: str) -> Engine:
    return cast("Engine", importlib.import_module(MODULES[name]))
