"""Opening a target in the engine that the user or the machine chooses."""

from __future__ import annotations

import importlib.util
import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastmtp.progress import QUIET, Progress

if TYPE_CHECKING:
    from fastmtp.engines.protocol import Batch
    from fastmtp.engines.torch.forward import Forward
    from fastmtp.engines.torch.target import Target
    from fastmtp.models.info import TargetInfo

EngineName = Literal["native", "torch"]
TORCH_DTYPES = ("float32", "bfloat16", "float16")
NATIVE_DTYPES = ("int8", "int4", "bfloat16")
_ONLY_NATIVE = ("int8", "int4")


@dataclass(frozen=True)
class EngineOptions:
    """How a user wants a target run; None leaves it to the machine."""

    engine: EngineName | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None


def choose_engine(options: EngineOptions) -> EngineName:
    """The engine that fits what was asked for, or the fastest one for this machine.

    Raises:
        ValueError: the options contradict each other, or the native engine is asked for and was not built.
    """
    on_gpu = options.device not in (None, "cpu")
    if options.engine == "torch" or (
        options.engine is None and (on_gpu or options.dtype in ("float32", "float16"))
    ):
        if options.dtype in _ONLY_NATIVE:
            raise ValueError(f"--dtype {options.dtype} is the native engine's, which runs on a CPU only")
        return "torch"
    if options.engine == "native":
        if on_gpu:
            raise ValueError(f"--engine native runs on a CPU, not on --device {options.device}")
        if options.dtype not in (None, *NATIVE_DTYPES):
            raise ValueError(f"--engine native has --dtype {', '.join(NATIVE_DTYPES)}, not {options.dtype}")
    built = importlib.util.find_spec("fastmtp._native") is not None
    asked = options.engine == "native" or options.dtype in _ONLY_NATIVE
    if built and (asked or options.device == "cpu" or not _has_gpu()):
        return "native"
    if asked:
        raise ValueError("the native engine was not built; install fastmtp again where a C++ compiler is")
    if not built and not _has_gpu():
        remark = "the native engine was not built (no C++ compiler?); decoding with PyTorch"
        logging.getLogger("fastmtp").warning(remark)
    return "torch"


def open_target(name: str, options: EngineOptions, progress: Progress = QUIET) -> TargetInfo:
    """Load a target into the engine that `choose_engine` chooses."""
    if choose_engine(options) == "torch":
        return open_torch_target(name, options.dtype, options.device, progress=progress)
    from fastmtp.engines.native.target import load_native_target

    with _loading(name, progress):
        weight_type: Any = options.dtype or "int8"
        return load_native_target(name, weight_type=weight_type, threads=options.threads)


def describe_target(name: str, progress: Progress = QUIET) -> TargetInfo:
    """A target without its weights: its tokenizer, chat template and ends."""
    from fastmtp.models.source import describe

    with _loading(name, progress):
        return describe(name)


def open_torch_target(
    name: str,
    dtype: str | None,
    device: str | None,
    *,
    for_throughput: bool = False,
    progress: Progress = QUIET,
) -> Target:
    """Load a target into PyTorch; without a dtype, in the one that suits the device."""
    import torch

    from fastmtp.engines.torch.target import load_target, throughput_dtype

    chosen = getattr(torch, dtype) if dtype else throughput_dtype(device) if for_throughput else None
    with _loading(name, progress):
        return load_target(name, dtype=chosen, device=device)


def open_forward(
    target: Target, name: str, engine: EngineName | None, device: str | None, progress: Progress = QUIET
) -> Forward:
    """What computes the states of a target that is loaded in PyTorch."""
    from fastmtp.engines.torch.forward import TorchForward
    from fastmtp.models.info import ONLY_TORCH

    options = EngineOptions(engine, device=device)
    if choose_engine(options) == "torch" or (engine is None and target.config.model_type in ONLY_TORCH):
        return TorchForward(target)
    return forward_of(open_target(name, options, progress))


def forward_of(target: TargetInfo) -> Forward:
    """What computes the states of a target in the engine that it is loaded in."""
    from fastmtp.engines.torch.forward import TorchForward
    from fastmtp.engines.torch.target import Target

    if isinstance(target, Target):
        return TorchForward(target)
    from fastmtp.engines.native.forward import NativeForward

    native: Any = target
    return NativeForward(native)


def open_batch(name: str, options: EngineOptions, progress: Progress = QUIET) -> Batch:
    """An engine that decodes many sequences together."""
    if choose_engine(options) == "torch":
        from fastmtp.engines.torch.batch import TorchBatch

        target = open_torch_target(name, options.dtype, options.device, for_throughput=True, progress=progress)
        return TorchBatch(target)
    from fastmtp.engines.native.batch import NativeBatch

    native: Any = open_target(name, options, progress)
    return NativeBatch(native)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _loading(name: str, progress: Progress) -> AbstractContextManager[object]:
    """A status while a target loads, and none of transformers' own messages."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    return progress.status(f"loading {name}")
