"""fastmtp: faster decoding of an open-weight LLM with its own multi-token-prediction head; same output."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmtp.config import SamplingConfig
    from fastmtp.decode.generation import Generation, Result
    from fastmtp.decode.torch_backend import TorchBackend
    from fastmtp.models.head import MTPHead
    from fastmtp.models.head_format import load_head
    from fastmtp.models.shipped import shipped_head
    from fastmtp.models.target import Target, load_target

__all__ = [
    "Generation",
    "MTPHead",
    "Result",
    "SamplingConfig",
    "Target",
    "TorchBackend",
    "load_head",
    "load_target",
    "shipped_head",
]

_HOMES = {
    "Generation": "decode.generation",
    "MTPHead": "models.head",
    "Result": "decode.generation",
    "SamplingConfig": "config",
    "Target": "models.target",
    "TorchBackend": "decode.torch_backend",
    "load_head": "models.head_format",
    "load_target": "models.target",
    "shipped_head": "models.shipped",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `fastmtp --help` need not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmtp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastmtp.{_HOMES[name]}"), name)
