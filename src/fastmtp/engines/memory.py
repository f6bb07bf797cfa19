"""Checks before memory is taken."""

from __future__ import annotations

import math
from collections.abc import Callable

from fastmtp.models import tensors
from fastmtp.models.config import ModelConfig


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
