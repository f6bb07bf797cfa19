"""The least time that a forward of the target can take: the bytes that it must read, at the memory's bandwidth."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from fastmtp.engines.torch.target import Target
from fastmtp.models.info import TargetInfo

_READ_BYTES = 1 << 28


def floor(target: TargetInfo) -> dict[str, float]:
    """Bytes of weights that one forward reads, the bandwidth measured now, and their quotient in milliseconds."""
    if isinstance(target, Target):
        weights = [*target.model.model.layers.parameters(), target.lm_head.weight]
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        bandwidth = _torch_bandwidth(target.device)
    else:
        from fastmtp import _native

        native: Any = target
        size = native.forward_bytes
        bandwidth = _READ_BYTES / _native.read_seconds(native.runtime, _READ_BYTES, 5) / 1e9
    return {"bytes": size, "bandwidth_gb_s": bandwidth, "ms": size / bandwidth / 1e6}


def _torch_bandwidth(device: torch.device) -> float:
    data = torch.ones(_READ_BYTES // 4, device=device)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        # Waits for the device.
        float(data.sum())
        times.append(time.perf_counter() - started)
    return _READ_BYTES / median(times[1:]) / 1e9
