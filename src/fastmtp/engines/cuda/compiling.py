"""Compiles kernels side by side, where a first start would compile some forty one after the other.

Triton compiles a kernel when it is launched. So a function is run once without the kernels that are not compiled
yet, which tells which ones it launches; its results mean nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
import triton.language as tl

from fastmtp.engines.capture import on_device

# A kernel, and what of its arguments it is compiled for.
Wanted = tuple[triton.JITFunction, str]

_HOOKED = threading.Lock()


def compile_for(device: torch.device, function: Callable[[], object]) -> None:
    """Compile what a function would launch."""
    wanted = launched_by(function)

    def compile_one(one: Wanted) -> None:
        kernel, specialization = one
        # The current device is the thread's own.
        with on_device(device):
            kernel.preload(specialization)

    with ThreadPoolExecutor() as pool:
        list(pool.map(compile_one, wanted))


def launched_by(function: Callable[[], object]) -> list[Wanted]:
    """The kernels that a function would launch and that are not compiled; it runs without them."""
    found: dict[tuple[int, Any], Wanted] = {}
    own = threading.get_ident()

    def note(*, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        if threading.get_ident() != own:
            return False
        # What names a dtype would be read back as that dtype: another kernel, by the same key.
        constants = compile["constants"].values()
        assert not any(isinstance(one, str) and tl.dtype.is_dtype(one) for one in constants), fn
        found[id(fn.jit_function), compile["key"]] = fn.jit_function, compile["specialization_data"]
        # Neither compiled nor launched.
        return True

    # The hook is the process's.
    with _HOOKED, triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = note
        function()
    return list(found.values())
