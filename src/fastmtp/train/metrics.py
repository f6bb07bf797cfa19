"""Figures of a training run by step (JSON lines and TensorBoard), time by part of the work, peak memory."""

from __future__ import annotations

import importlib.util
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastmtp import jsonl


class Metrics:
    """Writes figures by step to `metrics.jsonl`, and to TensorBoard if it is installed."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "metrics.jsonl"
        # Otherwise the next line would continue one that was written by half.
        jsonl.mend(self._path)
        self._writer: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(directory / "tensorboard")

    def write(self, step: int, figures: dict[str, float | list[float]]) -> None:
        """Append a row; a list holds one figure for each draft step."""
        jsonl.append(self._path, {"time": time.time(), "step": step, **figures})
        if self._writer is None:
            return
        for name, value in figures.items():
            values = (
                {f"{name}/{k}": part for k, part in enumerate(value, 1)}
                if isinstance(value, list)
                else {name: value}
            )
            for tag, figure in values.items():
                self._writer.add_scalar(tag, figure, step)
        self._writer.flush()


class Stopwatch:
    """Seconds by part of the work: those of a GPU, which it notes itself, so that it need not be waited for."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._noted: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self._device.type != "cuda":
            started = time.perf_counter()
            yield
            self.seconds[part] += time.perf_counter() - started
            return
        before, after = self._event(), self._event()
        before.record()
        yield
        after.record()
        self._noted.append((part, before, after))

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def settle(self) -> None:
        """Add up what was noted; waits for the device."""
        for part, before, after in self._noted:
            after.synchronize()
            self.seconds[part] += before.elapsed_time(after) / 1e3
        self._noted.clear()


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
