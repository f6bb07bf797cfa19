"""A step over static tensors as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

Step = Callable[[], None]
_WARM_UPS = 3


def captured(step: Step, device: torch.device) -> Step:
    """What runs the step: a CUDA graph's replay, elsewhere the step itself.

    To capture it the step is run some times first, in which it must change nothing that matters.
    """
    if device.type != "cuda":
        return step
    with torch.cuda.device(device):
        # Libraries choose and compile their kernels outside of a capture.
        beside: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay
