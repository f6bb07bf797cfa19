"""Checks before memory is taken, and what a GPU has of it."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from fastmtp.models import tensors
from fastmtp.models.config import ModelConfig

if TYPE_CHECKING:
    import torch


def weight_bytes(config: ModelConfig, bytes_of: Callable[[str], float]) -> int:
    """Of all weights of a target.

    Args:
        bytes_of: of one weight of the tensor of this name.
    """
    shapes = tensors.tensor_shapes(config)
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return int(sum(math.prod(shape) * bytes_of(name) for name, shape in shapes.items()))


def check_memory(needed: int, free: int, what: str, instead: str, where: str = "of memory") -> None:
    """Raises MemoryError if so many bytes are not free; what takes them would fail later, or be killed."""
    if needed > free:
        raise MemoryError(
            f"{what} needs {needed / 1e9:.1f} GB {where} and {free / 1e9:.1f} GB are free; use {instead}"
        )


def free_bytes(device: torch.device) -> int:
    """What a GPU has free, with what PyTorch holds of it and does not use."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def release_memory() -> None:
    """Give back what dropped engines leave behind, so that the next one can have it."""
    # An engine may be a part of a reference cycle.
    gc.collect()
    if "torch" in sys.modules:
        import torch

        # What PyTorch keeps for later tensors, others cannot have. Without a GPU this does nothing.
        torch.cuda.empty_cache()


def card(device: str) -> str | None:
    """The name and memory of a device, as PyTorch calls it, if it is a GPU."""
    if not device.startswith("cuda"):
        return None
    import torch

    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.total_memory / (1 << 30):.0f} GiB"
