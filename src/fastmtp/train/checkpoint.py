"""Checkpoints of a training run: tensors and plain values only, so that reading one runs no code."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from fastmtp.errors import PARSING, reason, writing
from fastmtp.files import recover, replacing


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    with replacing(path) as temporary, writing(path, RuntimeError):
        torch.save(state, temporary)


def load_checkpoint(path: Path, device: torch.device, keys: Sequence[str]) -> dict[str, Any]:
    """
    Args:
        keys: what it must hold.
    Raises:
        ValueError: the file is damaged, or of something else.
    """
    recover(path)
    with checkpointed(path):
        state = cast("dict[str, Any]", torch.load(path, map_location=device, weights_only=True))
        if missing := [key for key in keys if key not in state]:
            raise KeyError(f"no {', '.join(missing)} in it")
        return state


@contextmanager
def checkpointed(path: Path) -> Iterator[None]:
    """Around code that reads a checkpoint or takes what it holds; raises ValueError if it is damaged."""
    try:
        yield
    except (RuntimeError, pickle.UnpicklingError, OSError, *PARSING) as error:
        raise ValueError(
            f"{path}: damaged checkpoint ({reason(error)}); remove {path.parent} to start again"
        ) from error
