"""Which engine runs a model: what was asked for, or the fastest one here. Nobody else asks."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastmtp.extras import has_native, has_triton, require
from fastmtp.models.families import ONLY_TORCH
from fastmtp.models.packaged import file_of
from fastmtp.progress import QUIET, Progress

if TYPE_CHECKING:
    from fastmtp.engines.cuda.engine import CudaEngine
    from fastmtp.engines.protocol import Engine
    from fastmtp.engines.torch.engine import TorchEngine

EngineName = Literal["native", "torch", "cuda"]
TORCH_DTYPES = ("float32", "bfloat16", "float16")
NATIVE_DTYPES = ("int8", "int4", "bfloat16")
CUDA_DTYPES = ("bfloat16", "float16", "int8", "int4", "fp8")
# With an engine of its own for each: PyTorch has none of them.
_QUANTISED = ("int8", "int4", "fp8")
log = logging.getLogger("fastmtp")


@dataclass(frozen=True)
class EngineOptions:
    """How a user wants a target run; None leaves it to the machine."""

    engine: EngineName | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None


def open_engine(
    name: str,
    options: EngineOptions = EngineOptions(),
    *,
    for_throughput: bool = False,
    progress: Progress = QUIET,
) -> Engine:
    """Load a target into the engine that `choose_engine` chooses.

    Args:
        name: a packaged model (packaged_models.py), a Hugging Face directory, a `.gguf` file, or a hub id.
        for_throughput: many tokens at once are to be computed: PyTorch does so on a GPU, but for quantised weights,
            which it does not have, and where the user names no dtype it takes the fastest one.
    Raises:
        FileNotFoundError: no such file or directory, or a hub id that cannot be had.
        ValueError: options that contradict each other, an unsupported architecture, or a damaged file.
        MemoryError: the weights would not fit.
    """
    chosen = choose_engine(options)
    is_asked = options.engine == "cuda" or options.dtype in _QUANTISED
    if chosen == "cuda" and (is_asked or (not for_throughput and _has_kernels(name, progress))):
        return open_cuda(name, options.dtype, options.device, progress)
    if chosen != "native":
        if not for_throughput:
            _say_why_not_cuda(options)
        return open_torch(name, options.dtype, options.device, for_throughput=for_throughput, progress=progress)
    from fastmtp.engines.native.engine import NativeEngine
    from fastmtp.engines.native.load import load_native_target

    weight_type: Any = options.dtype or "int8"
    file_of(name, progress)
    target = load_native_target(name, weight_type=weight_type, threads=options.threads, progress=progress)
    return NativeEngine(target)


def is_for_throughput() -> bool:
    """Whether the engine that decodes here by default is the one for many tokens at once, too."""
    return choose_engine(EngineOptions()) == "native"


def open_torch(
    name: str,
    dtype: str | None = None,
    device: str | None = None,
    *,
    for_throughput: bool = False,
    progress: Progress = QUIET,
) -> TorchEngine:
    """For what needs PyTorch's own modules; arguments as for `open_engine`."""
    require("torch")
    import torch

    from fastmtp.engines.torch.engine import TorchEngine
    from fastmtp.engines.torch.target import load_target, throughput_dtype

    _check_device(device)
    chosen = getattr(torch, dtype) if dtype else throughput_dtype(device) if for_throughput else None
    file_of(name, progress)
    with progress.status(f"loading {name}"):
        return TorchEngine(load_target(name, dtype=chosen, device=device))


def open_cuda(
    name: str, dtype: str | None = None, device: str | None = None, progress: Progress = QUIET
) -> CudaEngine:
    """The engine of Triton kernels; arguments as for `open_engine`."""
    import torch

    from fastmtp.engines.cuda.load import load_cuda_engine

    _check_device(device)
    file_of(name, progress)
    chosen = torch.device(device or "cuda")
    engine = load_cuda_engine(name, dtype=dtype or "bfloat16", device=chosen, progress=progress)
    progress.say(f"decoding with {engine.name}")
    return engine


def _say_why_not_cuda(options: EngineOptions) -> None:
    """One line if PyTorch decodes on a GPU that lacks something for the CUDA engine."""
    if _suits_cuda(options) and _has_gpu() and (lacking := _lacking_for_cuda(options.device)):
        log.warning("the CUDA engine is not used: %s; decoding with PyTorch", lacking)


def _has_kernels(name: str, progress: Progress) -> bool:
    """Whether the CUDA engine runs a model; one line if PyTorch must."""
    from fastmtp.models.config import ModelConfig
    from fastmtp.models.source import locate, reading

    file_of(name, progress)
    source = locate(name)
    with reading(source):
        config = source.read_config()
    if isinstance(config, ModelConfig):
        return True
    log.warning("%s: the CUDA engine does not run %s models; decoding with PyTorch", name, config.model_type)
    return False


def _check_device(name: str | None) -> None:
    """Raises ValueError if PyTorch has no such device."""
    import torch

    if name is None:
        return
    try:
        device = torch.device(name)
        if device.type != "cuda":
            # PyTorch knows kinds of devices that hold nothing, or that this build is not for.
            torch.zeros(1, device=device).item()
    except (RuntimeError, ImportError, AssertionError) as error:
        raise ValueError(f"--device is {name!r}; it must be cpu, cuda, cuda:1, ...") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        there = "has no usable GPU" if count == 0 else f"has {count}"
        raise ValueError(f"--device {name}: this machine, or this build of torch, {there}")


def open_states_engine(
    trained: TorchEngine, engine: EngineName | None = None, device: str | None = None, progress: Progress = QUIET
) -> Engine:
    """The fastest engine for the states of a target that is loaded in PyTorch already (`trained`).

    On a GPU that is the target itself: nothing reads whole texts faster.
    """
    if engine is None and (trained.target.config.model_type in ONLY_TORCH or trained.target.device.type != "cpu"):
        engine = "torch"
    options = EngineOptions(engine, device=device)
    if engine is None and choose_engine(options) == "cuda":
        # It is made for few rows.
        return trained
    if choose_engine(options) == "torch":
        return trained
    return open_engine(trained.target.source, options, progress=progress)


def open_beside(engine: Engine, dtype: str, progress: Progress = QUIET) -> Engine:
    """The target of an open engine once more, in the same kind of engine on the same device, with other weights."""
    kinds: dict[str, EngineName] = {"torch.": "torch", "cuda ": "cuda"}
    found = [kind for start, kind in kinds.items() if engine.arithmetic.startswith(start)]
    kind: EngineName = found[0] if found else "native"
    return open_engine(
        engine.target.source, EngineOptions(kind, dtype, engine.device, engine.threads), progress=progress
    )


def choose_engine(options: EngineOptions) -> EngineName:
    """The engine that fits what was asked for, or the fastest one for this machine.

    Raises:
        ValueError: the options contradict each other, the native engine is asked for and was not built, or the
            CUDA engine is and cannot run.
        MissingExtraError: PyTorch is needed and not installed.
    """
    on_gpu = options.device not in (None, "cpu")
    if options.engine == "cuda":
        _check_cuda(options)
        return "cuda"
    if _suits_cuda(options) and _has_gpu() and _lacking_for_cuda(options.device) is None:
        return "cuda"
    if options.engine == "torch" or (
        options.engine is None and (on_gpu or options.dtype in ("float32", "float16"))
    ):
        _check_not_quantised(options)
        require("torch")
        return "torch"
    if options.engine == "native":
        if on_gpu:
            raise ValueError(f"--engine native runs on a CPU, not on --device {options.device}")
        if options.dtype not in (None, *NATIVE_DTYPES):
            raise ValueError(f"--engine native has --dtype {', '.join(NATIVE_DTYPES)}, not {options.dtype}")
    built = has_native()
    if options.dtype not in NATIVE_DTYPES:
        _check_not_quantised(options)
    asked = options.engine == "native" or options.dtype in _QUANTISED
    if built and (asked or options.device == "cpu" or not _has_gpu()):
        return "native"
    if asked:
        raise ValueError("the native engine was not built; install fastmtp again where a C++ compiler is")
    require("torch")
    if not built and not _has_gpu():
        log.warning("the native engine was not built (no C++ compiler?); decoding with PyTorch")
    return "torch"


def _check_cuda(options: EngineOptions) -> None:
    """Raises ValueError if the CUDA engine cannot run with these options on this machine."""
    if options.dtype not in (None, *CUDA_DTYPES):
        raise ValueError(f"--engine cuda has --dtype {', '.join(CUDA_DTYPES)}, not {options.dtype}")
    if options.device is not None and not options.device.startswith("cuda"):
        raise ValueError(f"--engine cuda runs on an NVIDIA GPU, not on --device {options.device}")
    require("torch")
    if lacking := _lacking_here(options.device):
        raise ValueError(f"--engine cuda: {lacking}")


def _check_not_quantised(options: EngineOptions) -> None:
    """Raises ValueError if weights are asked for that PyTorch does not have, and the native engine here neither."""
    if options.dtype in _QUANTISED:
        owners = "the CUDA engine's, on an NVIDIA GPU"
        if options.dtype in NATIVE_DTYPES:
            owners = f"the native engine's, on a CPU, and {owners}"
        is_cuda = options.engine is None and (options.device or "cuda").startswith("cuda")
        lacking = _lacking_here(options.device) if is_cuda else None
        raise ValueError(f"--dtype {options.dtype} is {owners}" + (f"; {lacking}" if lacking else ""))


def _suits_cuda(options: EngineOptions) -> bool:
    is_cuda = options.device is None or options.device.startswith("cuda")
    return options.engine is None and is_cuda and options.dtype in (None, *CUDA_DTYPES)


def _lacking_here(device: str | None) -> str | None:
    """What the CUDA engine lacks; None if nothing."""
    return _lacking_for_cuda(device) if _has_gpu() else "this machine has no usable GPU"


def _lacking_for_cuda(device: str | None) -> str | None:
    """What the CUDA engine lacks on a machine with a GPU; None if nothing."""
    if not has_triton():
        return "Triton is not installed; pip install triton"
    import torch

    if torch.version.cuda is None:
        return "this build of torch is not for NVIDIA's GPUs"
    _check_device(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is too old; its compute capability must be 8.0 or more"
    return None


def _has_gpu() -> bool:
    # Importing torch takes seconds: only where it is installed and there is a driver that it could use.
    if importlib.util.find_spec("torch") is None or not _has_driver():
        return False
    import torch

    return torch.cuda.is_available()


def _has_driver() -> bool:
    for library in ("libcuda.so.1", "nvcuda.dll"):
        with suppress(OSError):
            ctypes.CDLL(library)
            return True
    # That of AMD's GPUs; PyTorch brings its own library for them.
    return Path("/dev/kfd").exists()
