"""The memory bandwidth of a device, measured with a copy."""

from __future__ import annotations

import time
from statistics import median

import torch

_BYTES, _RUNS = 1 << 28, 6


def copy_gb_s(device: torch.device) -> float:
    """Bytes read and written in a second, in GB."""
    source = torch.ones(_BYTES // 4, device=device)
    to = torch.empty_like(source)
    times = []
    for _ in range(_RUNS):
        _wait(device)
        started = time.perf_counter()
        to.copy_(source)
        _wait(device)
        times.append(time.perf_counter() - started)
    # The first one also makes the memory its own.
    return 2 * _BYTES / median(times[1:]) / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
