"""Functions over fixed memory, captured as CUDA graphs at their first call; on a CPU that one is called."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmtp.engines.capture import Step, capture, on_device, shared_memory
from fastmtp.engines.copies import Sent
from fastmtp.engines.cuda.kernels.shapes import TILE

# Rows of the graphs: those of a round, those of many sequences, and those of a prompt.
SMALL, LARGE, PROMPT = (1, 2, 4, 8, 16), (64, 256), (64, 256, 1024)


@dataclass(frozen=True)
class Sizes:
    """What graphs are made for.

    Attributes:
        rows: numbers of rows that fewer are filled up to, a tile's among them; more are taken as they are.
        spans: the least number of spans of attention, of which the next is fourfold; None: those that are needed.
        prompt: numbers of rows that prompts are read in, in whole tiles; a text of more than the first is one.
    """

    rows: tuple[int, ...] = (*SMALL, *LARGE)
    spans: int | None = 16
    prompt: tuple[int, ...] = PROMPT

    @property
    def small(self) -> tuple[int, ...]:
        """Those of a round."""
        return tuple(count for count in self.rows if count <= TILE)

    def part_of_prompt(self, left: int) -> tuple[int, int]:
        """How many of the rows that are left are read next, and those of the graph: at most twice as many."""
        most = next((size for size in self.prompt if size >= left), self.prompt[-1])
        if most > 2 * left and most > self.prompt[0]:
            most = max(size for size in self.prompt if size <= left)
        return min(left, most), most


# An interpreter takes its time for every row and span.
EXACT = Sizes(SMALL, None, tuple(range(TILE, PROMPT[-1] + 1, TILE)))


class Graphs:
    """Runs functions that take nothing and return nothing.

    Attributes:
        sizes: of its graphs.
        launched: how many graphs were launched.
        copied: how many copies to the host were waited for.
    """

    def __init__(self, device: torch.device, sizes: Sizes | None = None) -> None:
        """
        Args:
            sizes: by default what suits the device.
        """
        self._device, self._lock = device, RLock()
        self.sizes = sizes or (Sizes() if device.type == "cuda" else EXACT)
        # The replay of each graph, and its function, which keeps the memory that the graph knows.
        self._captured: dict[Hashable, tuple[Step, Step]] = {}
        self._memory = shared_memory(self._device)
        self.launched = self.copied = 0
        self._captures = True

    @contextmanager
    def uncaptured(self) -> Iterator[None]:
        """Functions are called, and no graph is made. A round has a tile's rows: kernels are the same for fewer."""
        sizes = self.sizes
        self.sizes = replace(sizes, rows=tuple(count for count in sizes.rows if count >= TILE))
        self._captures = False
        try:
            yield
        finally:
            self.sizes, self._captures = sizes, True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around every use of what calls share; kernels are launched on the target's device."""
        with self._lock, on_device(self._device):
            yield

    def rows_for(self, count: int) -> int:
        """The rows of the graph that so many rows are filled up to."""
        return next((size for size in self.sizes.rows if size >= count), count)

    @property
    def captured(self) -> int:
        """How many graphs there are."""
        return len(self._captured)

    def run(self, key: Hashable, function: Step) -> None:
        """Call a function, the one that came with this key first; without graphs, too: tests see the same."""
        self.launched += 1
        if not self._captures:
            function()
            return
        if key in self._captured:
            replay, _ = self._captured[key]
            replay()
            return
        # The first call compiles the kernels, too, which cannot be done while a graph is captured.
        function()
        replay = capture(function, self._device, self._memory).replay if self._device.type == "cuda" else function
        self._captured[key] = replay, function

    def forget(self) -> None:
        """Drop all graphs; their functions hold what holds this. A function that is run again is captured again."""
        with self._lock:
            self._captured.clear()
            # PyTorch does not take a pool again that no graph uses.
            self._memory = shared_memory(self._device)

    def arrived(self, sent: Sent) -> NDArray[Any]:
        """Waits for a copy."""
        self.copied += 1
        return sent.wait()

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
