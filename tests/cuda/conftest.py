"""Triton's interpreter, made fast enough for tests, and targets that are small enough for it."""

from __future__ import annotations

import importlib.util
import math
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
    """Patch Triton's language once, not for each call of each function; make shapes once; warn of no overflow."""
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

    core = interpreter.tl.core
    checked = core.block_type.__init__

    @cache
    def numbers(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(size) for size in shape])

    @cache
    def block(shape: tuple[int, ...]) -> Any:
        checked(found := object.__new__(core.block_type), core.int32, list(shape))
        return found

    def tensor(self: Any, handle: Any, kind: Any) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.numel, self.shape = numbers(tuple(kind.shape) if kind.is_block() else ())

    def block_type(self: Any, element: Any, shape: Any) -> None:
        like = block(tuple(map(core._unwrap_if_constexpr, shape)))
        self.element_ty, self.shape, self.numel = element, like.shape, like.numel
        self.name = f"<{list(like.shape)}, {element}>"

    core.tensor.__init__, core.block_type.__init__ = tensor, block_type
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
