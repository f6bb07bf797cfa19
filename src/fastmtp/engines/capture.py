"""Functions over fixed memory, which take nothing and return nothing, as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

Step = Callable[[], None]
_WARM_UPS = 3


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches kernels on the current device, wherever their memory is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def shared_memory(device: torch.device) -> Any:
    """A pool for graphs of which one runs after the other; None where there are no graphs."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None


def capture(step: Step, device: torch.device, memory: Any = None) -> torch.cuda.CUDAGraph:
    """A graph of a step that was run before: libraries choose and compile their kernels outside of a capture.

    Args:
        memory: the pool that graphs share; None is one of its own.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may copy and allocate meanwhile.
    with torch.cuda.device(device), torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        step()
    return graph


def captured(step: Step, device: torch.device, memory: Any = None) -> Step:
    """What runs the step: a CUDA graph's replay, elsewhere the step itself.

    To capture it the step is run some times first, in which it must change nothing that matters.

    Args:
        memory: see `capture`.
    """
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        beside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(beside)
    return capture(step, device, memory).replay
