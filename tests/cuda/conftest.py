"""Triton's interpreter, made fast enough for tests, and targets that are small enough for it."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fastmtp.engines.torch.target import Target
from tests.conftest import COMMON, tiny_target

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _hasten() -> None:
    """Patch Triton's language once, not for each call of each function, and warn of no overflow."""
    from triton.runtime import interpreter

    class Lasting:
        def restore(self) -> None: ...

    real, patched = interpreter._patch_lang, set()

    def patch_once(function: Any) -> Lasting:
        modules = [
            value for value in function.__globals__.values() if value in (interpreter.tl, interpreter.tl.core)
        ]
        if (seen := frozenset(map(id, modules))) not in patched:
            patched.add(seen)
            real(function)
        return Lasting()

    call = interpreter.GridExecutor.__call__

    def call_as_on_a_device(*arguments: Any, **named: Any) -> None:
        with np.errstate(over="ignore"):
            call(*arguments, **named)

    interpreter.GridExecutor.__call__ = call_as_on_a_device
    interpreter._patch_lang = patch_once
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)


if DEVICE.type == "cpu" and importlib.util.find_spec("triton") is not None:
    _hasten()


@cache
def shallow(family: str, layers: int = 2) -> Target:
    """The first layers of a tiny target with one key head; the interpreter takes milliseconds for each."""
    with patch.dict(COMMON, num_key_value_heads=1):
        whole = tiny_target.__wrapped__(family)
    model = whole.model
    model.model.layers = model.model.layers[:layers]
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:layers]
    if getattr(model.config, "sliding_window", None):
        model.config.sliding_window = 6
    return Target(model, whole.tokenizer, f"shallow-{family}")
