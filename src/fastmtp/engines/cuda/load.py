"""Opens a target in the CUDA engine."""

from __future__ import annotations

from typing import cast

import torch

from fastmtp.engines.cuda.engine import CudaEngine
from fastmtp.engines.cuda.matrices import QUANTISED, Quantised
from fastmtp.engines.cuda.target import CudaTarget
from fastmtp.models.source import locate, open_model, reading
from fastmtp.progress import QUIET, Progress


def load_cuda_engine(
    name: str, *, dtype: str = "bfloat16", device: torch.device, progress: Progress = QUIET
) -> CudaEngine:
    """Load a target onto a device, compile the kernels, and capture the graphs of its rounds.

    Args:
        name: as for `open_engine`.
        dtype: of the weights, one of `CUDA_DTYPES`.
    Raises:
        FileNotFoundError: no such file or directory, or a hub id that cannot be downloaded.
        ValueError: an unsupported architecture, a damaged file, or a tokenizer that does not fit.
        MemoryError: the weights would not fit.
    """
    source = locate(name)
    with reading(source):
        with progress.status(f"loading {name}"):
            config, weights = open_model(source)
            end_ids, tokenizer = source.end_ids(), source.read_tokenizer()
        # Quantised values are exact in bfloat16.
        quantised = cast(Quantised, dtype) if dtype in QUANTISED else None
        target = CudaTarget(
            config,
            end_ids,
            tokenizer,
            name,
            weights,
            dtype=torch.bfloat16 if quantised else getattr(torch, dtype),
            quantised=quantised,
            device=device,
            progress=progress,
        )
    engine = CudaEngine(target)
    if device.type == "cuda":
        # An interpreter compiles nothing.
        engine.capture(progress)
    return engine
