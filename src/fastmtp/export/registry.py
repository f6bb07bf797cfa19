"""The modules of the engines that a head can be exported to, by the value of --to; their interface: engines.py."""

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
# Types of the weights in a GGUF file, the default first; here because the command line needs them without torch.
GGUF_TYPES = ("BF16", "F16", "F32", "Q8_0", "Q4_0")


def engine_named(name: str) -> Engine:
    """Raises ValueError if there is no such engine."""
    if name not in MODULES:
        raise ValueError(f"engine must be one of {', '.join(MODULES)}, not {name!r}")
    return cast("Engine", importlib.import_module(MODULES[name]))
