"""fastmtp: faster decoding of an open-weight LLM with its own multi-token-prediction head; same output."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmtp.config import SamplingConfig
    from fastmtp.decode.generation import Generation
    from fastmtp.decode.native_backend import NativeBackend
    from fastmtp.decode.torch_backend import TorchBackend
    from fastmtp.models.head_format import load_head, load_native_head
    from fastmtp.models.native import load_native_target
    from fastmtp.models.shipped import shipped_head
    from fastmtp.models.target import load_target

__all__ = [
    "Generation",
    "NativeBackend",
    "SamplingConfig",
    "TorchBackend",
    "load_head",
    "load_native_head",
    "load_native_target",
    "load_target",
    "shipped_head",
]

_HOMES = {
    "Generation": "decode.generation",
    "NativeBackend": "decode.native_backend",
    "SamplingConfig": "config",
    "TorchBackend": "decode.torch_backend",
    "load_head": "models.head_format",
    "load_native_head": "models.head_format",
    "load_native_target": "models.native",
    "load_target": "models.target",
    "shipped_head": "models.shipped",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `fastmtp --help` need not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmtp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastmtp.{_HOMES[name]}"), name)
