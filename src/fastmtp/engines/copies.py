"""Copies between the host and a device that leave both free to go on."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


class Sent:
    """A copy on its way to the host, of what is in a tensor now, whatever is launched before it is waited for."""

    def __init__(self, tensor: Tensor) -> None:
        # PyTorch gives pinned memory to nobody else before the copies to it are done, even if it was dropped.
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        self._copy.copy_(tensor, non_blocking=True)
        self._done: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(tensor.device))

    def wait(self) -> NDArray[Any]:
        """For this copy, not for what was launched after it."""
        if self._done is not None:
            self._done.synchronize()
        found: NDArray[Any] = self._copy.numpy()
        return found


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host; later work on the device waits for the copy, the host does not."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values
