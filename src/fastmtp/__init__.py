"""fastmtp: faster decoding of an open-weight LLM with its own multi-token-prediction head; same output."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmtp.api import Model, load
    from fastmtp.config import SamplingConfig
    from fastmtp.decode.generation import Generation, Result

__all__ = ["Generation", "Model", "Result", "SamplingConfig", "load"]

_HOMES = {
    "Generation": "decode.generation",
    "Model": "api",
    "Result": "decode.generation",
    "SamplingConfig": "config",
    "load": "api",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; `fastmtp --help` need not wait for it.
    if name not in _HOMES:
        raise AttributeError(f"module 'fastmtp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastmtp.{_HOMES[name]}"), name)
