"""Kernels that begin while the one before them ends (programmatic dependent launch, compute capability 9.0 on).

A kernel calls `wait` before it reads what the one before it writes, and before it writes anything; then `release`,
when the next one may begin: late in a product, whose memory the next kernel's programs would take. No kernel
releases before it has waited: what all others before wrote is there when a kernel begins, and may be read at once.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LEAST_CAPABILITY = 9


@triton.jit
def wait(OVERLAPS: tl.constexpr):
    """For the end of the kernels before."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()


@triton.jit
def release(OVERLAPS: tl.constexpr):
    """Let the next kernel begin."""
    if OVERLAPS:
        tl.extra.cuda.gdc_launch_dependents()


def overlap(where: Tensor) -> dict[str, Any]:
    """The options of a launch on a tensor's device."""
    return _options(where.device)


@cache
def _options(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < _LEAST_CAPABILITY:
        return {"OVERLAPS": False}
    return {"OVERLAPS": True, "launch_pdl": True}
