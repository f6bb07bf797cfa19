"""Functions over fixed memory, captured as CUDA graphs at their first call; on a CPU they are simply called."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmtp.engines.capture import Step, capture

# Rows of the graphs: those of a round, and those of prompts.
SMALL, LARGE = (1, 2, 4, 8, 16), (64, 256)


class Graphs:
    """Runs functions that take nothing and return nothing.

    Attributes:
        launched: how many graphs were launched.
        copied: how many copies to the host were waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, RLock()
        # With each graph its function, which keeps the memory that the graph knows.
        self._captured: dict[Hashable, tuple[torch.cuda.CUDAGraph, Step]] = {}
        self._memory: Any = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.launched = self.copied = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around every use of what calls share; kernels are launched on the target's device."""
        device = self._device
        with self._lock, torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield

    def rows_for(self, count: int) -> int:
        """The rows of the graph that so many rows are filled up to."""
        if count > SMALL[-1] and self._device.type != "cuda":
            # There are no graphs, and an interpreter takes its time for every row.
            return count
        return next(size for size in (*SMALL, *LARGE) if size >= count)

    def run(self, key: Hashable, function: Step) -> None:
        """Call a function, the one that came with this key first."""
        self.launched += 1
        if key in self._captured:
            self._captured[key][0].replay()
            return
        # The first call compiles the kernels, too, which cannot be done while a graph is captured.
        function()
        if self._device.type == "cuda":
            self._captured[key] = capture(function, self._device, self._memory), function

    def forget(self) -> None:
        """Drop all graphs; their functions hold what holds this. A function that is run again is captured again."""
        with self._lock:
            self._captured.clear()

    def to_host(self, tensor: Tensor) -> NDArray[Any]:
        """A copy, which later calls leave alone."""
        self.copied += 1
        found: NDArray[Any] = tensor.to("cpu", copy=True).numpy()
        return found


def upload(values: NDArray[np.int32], to: Tensor) -> None:
    """Copy numbers from the host into a tensor; later work on the device waits for them, the host does not."""
    source = torch.from_numpy(np.ascontiguousarray(values))
    if to.is_cuda:
        source = source.pin_memory()
    to.copy_(source.view(to.shape), non_blocking=True)
